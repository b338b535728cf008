"""Every kind of outcome on one page: how many numbers a model says of it, what they mean, how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_shared.inputs import blocks, plan_constants
from cloister_shared.outcomes import binary, effect, itself, mask, quantity, several, survival
from cloister_shared.outcomes.judging import Array, Metric
from cloister_shared.outcomes.words import meaning, title
from cloister_shared.schema import Binary, Classes, Effect, Itself, Labels, Mask, Quantity, Schema, Survival, Target

__all__ = ["Dense", "Outcome", "cells", "meaning", "outcome_of", "outputs", "title"]

Raw = NDArray[np.float32]


@dataclass(frozen=True)
class Dense:
    """What the loss is without torch, for networks of linear layers alone."""

    cost: Callable[[Raw, Raw], float]
    """The value of the loss."""
    slope: Callable[[Raw, Raw], Raw]
    """Its derivative by each output, shaped like the output."""


@dataclass(frozen=True)
class Outcome:
    """How a model's outputs are read and judged."""

    headline: str
    """The metric that curves, tables and every round show."""
    metrics: Mapping[str, Metric]
    seen: Callable[[Raw, Raw], tuple[Array, Array]]
    """Of outputs [n, ...] and outcomes [n, ...], as the network has them: truth and prediction as metrics take them."""
    enough: Callable[[Array, int], bool]
    """Of truths: whether metrics tell of no single patient."""
    rises: bool = True
    """Whether more of the headline is better."""
    dense: Dense | None = None
    quick: Callable[[Array, Array], float] | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """Up to three other metrics, that tables show next to the headline."""
        return tuple(name for name in self.metrics if name != self.headline)[:3]

    def glance(self, truth: Array, prediction: Array) -> float:
        """The headline's value; NaN where the data cannot say."""
        if self.quick:
            return self.quick(truth, prediction)
        return float(self.metrics[self.headline](truth, prediction, np.ones((1, len(truth))))[0])


def outputs(target: Target) -> int:
    """How many numbers a network says of one record; of a mask as many as its picture has, of itself its inputs."""
    match target:
        case Binary() | Quantity():
            return 1
        case Classes(classes=names):
            return len(names)
        case Labels(labels=names):
            return len(names)
        case Survival(cuts=cuts):
            return len(cuts)
        case Effect():
            return 3
        case Mask() | Itself():
            raise ValueError("only the schema tells how many")


def outcome_of(schema: Schema, threshold: float = 0.5) -> Outcome:
    """How this study's outcome is judged; ``threshold`` is the risk from which a patient is called positive."""
    target = schema.target
    match target:
        case Binary():
            dense = Dense(binary.cost, binary.slope)
            return Outcome(
                "auroc", binary.at_threshold(threshold), binary.seen, binary.enough, dense=dense, quick=binary.auroc
            )
        case Classes():
            return Outcome("accuracy", several.CLASSES, several.chances, several.enough_classes)
        case Labels():
            return Outcome("macro_auroc", several.LABELS, several.risks, several.enough_labels)
        case Quantity():
            centre, scale = plan_constants(target)

            def in_units(output: Raw, y: Raw) -> tuple[Array, Array]:
                said = np.nan_to_num(output[:, 0].astype(np.float64), posinf=0.0, neginf=0.0)
                return y.astype(np.float64) * scale + centre, said * scale + centre

            return Outcome("rmse", quantity.METRICS, in_units, quantity.enough, rises=False)
        case Survival(cuts=cuts):
            return Outcome("c_index", survival.metrics(cuts), survival.seen(len(cuts)), survival.enough)
        case Mask(of=picture):
            block = next(block for block in blocks(schema) if block.feature.name == picture)
            return Outcome("dice", mask.METRICS, mask.seen(block.shape[1:]), mask.enough)
        case Itself(alarm=alarm):
            metrics = itself.METRICS if alarm else itself.WITHOUT_ALARMS
            return Outcome("auroc" if alarm else "error", metrics, itself.seen, itself.enough, rises=bool(alarm))
        case Effect(larger_is_better=rises, range=(low, high)):
            reading = effect.seen((low + high) / 2, (high - low) / 4)
            return Outcome("policy_value", effect.metrics(rises), reading, effect.enough, rises=rises)


def cells(target: Target) -> tuple[str, ...]:
    """The cells of a histogram of the outcome; none for one that is not counted."""
    match target:
        case Binary():
            return "no", "yes"
        case Classes(classes=names):
            return tuple(map(str, names))
        case _:
            return ()
