"""Hospitals on disk: a table, the ``site.yaml`` that says how it differs from the plan, and what enrolment leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from cloister_client.ceilings import officers_of, pin_officer
from cloister_client.ledger import Ledger
from cloister_client.site_file import SeriesFile, WaveformFiles
from cloister_shared.envelope import new_identity, read_identity, save_roster
from cloister_shared.plan import Mechanism, StudyPlan

Units = dict[str, str | dict[str, str | float]]


@dataclass(frozen=True)
class Hospital:
    """A name, a table, and how its columns differ from the plan's."""

    site: str
    table: pd.DataFrame
    columns: dict[str, str] = field(default_factory=dict)
    """A feature's name in the plan: its column in ``table``, where they differ."""
    units: Units = field(default_factory=dict)
    """A feature's name in the plan: the unit of its column, where it is not the plan's."""
    series: pd.DataFrame | None = None
    """One measurement a row, which ``measured`` names the columns of."""
    measured: SeriesFile | WaveformFiles | None = None
    """What stands beside the table: ``series``, or recordings among the ``files``."""
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """What else is in the hospital's folder, by path: pictures that its cells name, recordings."""
    sections: Mapping[str, object] = field(default_factory=dict[str, object])
    """Sections of ``site.yaml`` that take the place of ``table``: another connector's."""


def write(hospital: Hospital, folder: Path, table: str) -> Path:
    """Write the table (CSV or Parquet, by its name) and the ``site.yaml`` beside it; the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    if not hospital.sections:
        _save(hospital.table, folder / table)
    if hospital.series is not None and isinstance(hospital.measured, SeriesFile):
        _save(hospital.series, folder / hospital.measured.path)
    differs = {"columns": hospital.columns, "units": hospital.units}
    described: dict[str, object] = {"path": table, **{key: value for key, value in differs.items() if value}}
    if hospital.measured:
        key = "series" if isinstance(hospital.measured, SeriesFile) else "waveforms"
        described[key] = hospital.measured.model_dump(exclude_none=True)
    for path, content in hospital.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    site_yaml = folder / "site.yaml"
    # The arms without privacy, against which the others are held, need a hospital that accepts them.
    policy = {"mechanisms": [mechanism.value for mechanism in Mechanism]}
    terms = {"site": hospital.site, "policy": policy, **(hospital.sections or {"table": described})}
    site_yaml.write_text(yaml.safe_dump(terms, sort_keys=False), encoding="utf-8", newline="\n")
    return site_yaml


def _save(table: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False, lineterminator="\n")


def invented_names(count: int) -> list[str]:
    """Names that stand for no real hospital: trees, then numbered trees."""
    trees = ("alder", "birch", "cedar", "elder", "hazel", "juniper", "linden", "maple", "rowan", "willow")
    rounds = ["" if i < len(trees) else f"-{i // len(trees) + 1}" for i in range(count)]
    return [f"{trees[i % len(trees)]}{numbered}" for i, numbered in enumerate(rounds)]


def apportion(total: int, weights: NDArray[np.floating]) -> list[int]:
    """Whole numbers that sum to ``total`` and follow the weights, by largest remainders."""
    exact = total * np.asarray(weights, dtype=float) / np.sum(weights)
    whole = np.floor(exact).astype(int)
    most_owed = np.argsort(whole - exact, kind="stable")
    whole[most_owed[: total - whole.sum()]] += 1
    return whole.tolist()


def enrol_all(folder: Path, names: Sequence[str], plan: StudyPlan | None = None) -> None:
    """What enrolment leaves behind: each hospital's own key, and everybody's public keys pinned by everybody.

    For a private ``plan`` also a budget: an officer at each hospital, and a ceiling that is the plan's epsilon.
    """
    roster: dict[str, str] = {}
    for name in names:
        own = folder / "sites" / name
        own.mkdir(parents=True, exist_ok=True)
        path = own / "identity.key"
        roster[name] = (read_identity(path) if path.exists() else new_identity(path)).public
        if plan and plan.private:
            grant(own, plan)
    for place in (folder, *(folder / "sites" / name for name in names)):
        if not (place / "roster.json").exists():
            save_roster(place / "roster.json", roster)


def grant(own: Path, plan: StudyPlan) -> None:
    """A hospital that lets its patients' privacy be spent on one plan, and on no more."""
    key, terms = own / "officer.key", plan.privacy
    assert terms.epsilon is not None
    assert terms.delta is not None
    ledger = Ledger(own / "ledger.sqlite")
    if "officer" not in officers_of(own):
        pin_officer(ledger.book, "officer", key)
    ceiling = ledger.ceiling()
    if ceiling is None or (ceiling.epsilon, ceiling.delta) != (terms.epsilon, terms.delta):
        identity = read_identity(key)
        ledger.set_ceiling(terms.epsilon, terms.delta, officer="officer", identity=identity, reason="a simulation")
    ledger.close()
