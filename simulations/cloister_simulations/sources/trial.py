"""An invented trial of a blood-pressure drug, of which the effect on every patient is known (``true_effect``).

Most hospitals toss a coin. Those called ``observed`` treat whom their doctors would: the more ill the likelier, so
that a plain difference between arms is wrong there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, apportion, invented_names

Vector = NDArray[np.float64]
Frame = Any


class Trial(BaseModel):
    """Invented patients of whom it is known what the treatment changes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["trial"]
    sites: Annotated[int, Field(ge=2, le=100)] = 5
    patients: Annotated[int, Field(ge=100)] = 6000
    seed: Annotated[int, Field(ge=0)] = 0
    observed: Annotated[int, Field(ge=0)] = 1
    """So many of the hospitals do not toss a coin."""
    confounding: Annotated[float, Field(ge=0, le=5)] = 0.8
    """There, how much one standard deviation of illness adds to the log-odds of treatment."""


def true_effect(table: pd.DataFrame) -> Vector:
    """What the treatment changes of ``systolic_fall`` (mmHg), patient by patient: it harms about one in four."""
    severe = (table["baseline_systolic"].to_numpy() - 150) / 12
    kidney = (table["egfr"].to_numpy() - 75) / 20
    return 4.0 + 3.5 * severe + 2.0 * kidney - 4.0 * table["orthostatic"].to_numpy()


def untreated(table: pd.DataFrame) -> Vector:
    """The mean fall without treatment."""
    severe = (table["baseline_systolic"].to_numpy() - 150) / 12
    return 5.0 + 2.5 * severe - 0.08 * (table["age"].to_numpy() - 60) - 1.5 * table["diabetes"].to_numpy()


def trial(source: Trial) -> Iterator[Hospital]:
    """Each hospital's patients, treated by its own rule."""
    rng = np.random.default_rng(source.seed)
    least = source.patients // (2 * source.sites)
    sizes = apportion(source.patients - least * source.sites, rng.dirichlet(np.full(source.sites, 3.0)))
    first = 1
    for at, site in enumerate(invented_names(source.sites)):
        count = least + sizes[at]
        table = _patients(rng, count, first)
        severe = (table["baseline_systolic"].to_numpy() - 150) / 12
        tilt = source.confounding if at >= source.sites - source.observed else 0.0
        treated = rng.random(count) < 1 / (1 + np.exp(-tilt * severe))
        fall = untreated(table) + treated * true_effect(table) + rng.normal(0, 4, count)
        table["treated"] = treated.astype(int)
        table["systolic_fall"] = np.clip(fall, -40, 60).round(1)
        first += count
        yield Hospital(site, table)


def _patients(rng: np.random.Generator, count: int, first: int) -> Frame:
    return pd.DataFrame(
        {
            "patient_id": [f"T{number:06d}" for number in range(first, first + count)],
            "age": np.clip(rng.normal(60, 11, count), 25, 90).round().astype(int),
            "sex": np.where(rng.random(count) < 0.5, "female", "male"),
            "baseline_systolic": np.clip(rng.normal(150, 12, count), 120, 200).round().astype(int),
            "egfr": np.clip(rng.normal(75, 20, count), 15, 130).round().astype(int),
            "diabetes": (rng.random(count) < 0.25).astype(int),
            "orthostatic": (rng.random(count) < 0.2).astype(int),
        }
    )
