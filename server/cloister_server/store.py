"""What the coordinator must not lose: the checkpoint after every round, and one line for each round.

The checkpoint is the state of a study. Every round begins by reading it, so a run that was killed goes on
exactly as one that was not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_server.total import Glimpse, Mean
from cloister_shared import durable
from cloister_shared.combat import Constants
from cloister_shared.errors import CheckpointBroken
from cloister_shared.tally import Numbers


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round. ``metrics`` are of the model that the round began with."""

    round: int
    answered: tuple[str, ...]
    rejected: dict[str, str]
    """Hospital to reason: an odd reply, a refusal, a fault, or no answer before the deadline."""
    numbers: Numbers
    """Means of metrics over the hospitals, and what was counted."""
    update_norm: float
    metrics: dict[str, Numbers]
    """Each hospital's own; empty under the secure sum."""
    seconds: float
    glimpse: Glimpse | None = None

    @classmethod
    def of(cls, number: int, mean: Mean, seconds: float) -> RoundRecord:
        """The round in one line."""
        norm, seconds = round(mean.norm, 6), round(seconds, 6)
        return cls(number, mean.answered, mean.rejected, mean.numbers, norm, mean.metrics, seconds, mean.glimpse)


@dataclass(frozen=True)
class Checkpoint:
    """A study after ``round`` rounds: the model, the strategy's state, and the run's constants."""

    run: str
    plan: str
    round: int
    model: NDArray[np.float32]
    state: dict[str, NDArray[np.float32]] = field(default_factory=dict[str, NDArray[np.float32]])
    statistics: Numbers | None = None
    """What the hospitals summed up before round 1, where the plan asks for it."""
    normalisation: Constants | None = None
    cohort: dict[str, str] = field(default_factory=dict[str, str])
    """Of a secure sum: each hospital of the run with its signed key, sorted by name."""


class Store:
    """One run's folder: ``checkpoint.safetensors``, ``collected.safetensors`` and ``rounds.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint, self._rounds = folder / "checkpoint.safetensors", folder / "rounds.jsonl"
        self._collected = folder / "collected.safetensors"

    def load(self, plan: str) -> Checkpoint | None:
        """The last checkpoint of the plan with this digest, or None before the first.

        Raises:
            CheckpointBroken: it is damaged, or of another plan.
        """
        if not self._checkpoint.exists():
            return None
        header, arrays = durable.load(self._checkpoint)
        if header["plan"] != plan:
            raise CheckpointBroken(
                f"The run in {self.folder} is of plan {header['plan'][:12]}, not of this one ({plan[:12]}).",
                mend="Resume with the plan it was begun with, or choose another folder.",
            )
        pairs = header["normalisation"]
        normalisation = tuple(tuple(map(float, each)) for each in pairs) if pairs else None
        model = arrays.pop("model")
        cohort = header["cohort"]
        said = header["statistics"]
        return Checkpoint(header["run"], header["plan"], header["round"], model, arrays, said, normalisation, cohort)

    def save(self, checkpoint: Checkpoint, record: RoundRecord | None = None) -> None:
        """Append the round's line, then replace the checkpoint, which is what counts."""
        if record:
            with self._rounds.open("a", encoding="utf-8") as lines:
                # The line break comes first, so that a line torn by a kill spoils only itself.
                lines.write("\n" + json.dumps(vars(record), default=vars))
        header = {
            "run": checkpoint.run,
            "plan": checkpoint.plan,
            "round": checkpoint.round,
            "statistics": checkpoint.statistics,
            "normalisation": checkpoint.normalisation,
            "cohort": checkpoint.cohort,
        }
        durable.save(self._checkpoint, header, {"model": checkpoint.model, **checkpoint.state})

    def save_collected(self, header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Keep a round's masked sum before anybody is asked to open it: hospitals open a round once."""
        durable.save(self._collected, header, arrays)

    def load_collected(self, transcript: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """The last masked sum, if it is of the round with these terms."""
        if not self._collected.exists() or durable.load_header(self._collected)["transcript"] != transcript:
            return None
        return durable.load(self._collected)

    def rounds(self, upto: int | None = None) -> list[dict[str, Any]]:
        """The lines of the rounds that the checkpoint holds; a round that was done over counts once, as last done."""
        if not self._rounds.exists():
            return []
        found: dict[int, dict[str, Any]] = {}
        for line in self._rounds.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that a kill tore; its round was not checkpointed and is done over
            if upto is None or record["round"] <= upto:
                found[record["round"]] = record
        return [found[number] for number in sorted(found)]
