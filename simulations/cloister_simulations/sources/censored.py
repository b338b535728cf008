"""Invented patients after a first heart failure, who are awaited until death, loss or the end of the study.

The true hazard of each is known (``log_hazard``, ``outlives``), so that a learned curve can be held against it.
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

SHAPE, SCALE = 1.3, 46.0
"""Weibull: the hazard of an average patient rises with time; two thirds are alive after SCALE / 2 months."""

AWAITED = 60.0
"""Months at which the study ends for everybody."""


class CensoredEhr(BaseModel):
    """Invented patients whose true hazard is known, at hospitals that lose different shares of them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["censored-ehr"]
    sites: Annotated[int, Field(ge=2, le=100)] = 6
    patients: Annotated[int, Field(ge=100)] = 4000
    seed: Annotated[int, Field(ge=0)] = 0
    hazard_shift: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Sd, between hospitals, of a constant added to the log-hazard."""
    lost: Annotated[float, Field(ge=0, lt=0.1)] = 0.01
    """Chance a month to be lost from sight; each hospital's own lies between 0 and twice this."""


def log_hazard(table: pd.DataFrame) -> Vector:
    """True logarithm of the ratio of each patient's hazard to the average's, before a hospital's own constant.

    One product that no linear model follows: the biomarker counts for more in the old.
    """
    age, marker = (table["age"].to_numpy() - 68) / 11, np.log(table["nt_probnp"].to_numpy() / 1200) / 0.9
    score = 0.5 * age + 0.55 * marker + 0.25 * age * marker - 0.35 * (table["ejection_fraction"].to_numpy() - 38) / 11
    score += 0.4 * table["diabetes"].to_numpy() - 0.5 * table["beta_blocker"].to_numpy()
    return score + table["nyha"].map({"I": -0.6, "II": -0.2, "III": 0.3, "IV": 0.8}).to_numpy()


def outlives(log_hazards: Vector, months: Vector) -> NDArray[np.float64]:
    """The true chance of each patient to outlive each time, [n, times]."""
    return np.exp(-np.exp(log_hazards)[:, None] * (months[None] / SCALE) ** SHAPE)


def censored_ehr(source: CensoredEhr) -> Iterator[Hospital]:
    """Each hospital's patients, with its own constant and its own way to lose them."""
    rng = np.random.default_rng(source.seed)
    least = source.patients // (3 * source.sites)
    sizes = apportion(source.patients - least * source.sites, rng.dirichlet(np.full(source.sites, 2.0)))
    constants = rng.normal(0, source.hazard_shift, source.sites)
    losses = source.lost * rng.uniform(0, 2, source.sites)
    first = 1
    for at, site in enumerate(invented_names(source.sites)):
        patients = least + sizes[at]
        table = _patients(rng, patients, first)
        hazard = np.exp(log_hazard(table) + constants[at])
        death = SCALE * (rng.exponential(size=patients) / hazard) ** (1 / SHAPE)
        loss = rng.exponential(1 / max(losses[at], 1e-9), patients)
        end = np.minimum(loss, rng.uniform(0.6, 1.0, patients) * AWAITED)  # who came late is awaited for less long
        table["months"] = np.minimum(death, end).round(2)
        table["died"] = (death <= end).astype(int)
        first += patients
        yield Hospital(site, table)


def _patients(rng: np.random.Generator, count: int, first: int) -> Frame:
    age = np.clip(rng.normal(68, 11, count), 30, 95).round()
    marker = np.clip(1200 * np.exp(0.9 * rng.normal(0.15 * (age - 68) / 11, 1)), 30, 30000).round()
    return pd.DataFrame(
        {
            "patient_id": [f"C{number:06d}" for number in range(first, first + count)],
            "age": age.astype(int),
            "sex": np.where(rng.random(count) < 0.45, "female", "male"),
            "nt_probnp": marker.astype(int),
            "ejection_fraction": np.clip(rng.normal(38, 11, count), 10, 75).round().astype(int),
            "nyha": rng.choice(["I", "II", "III", "IV"], count, p=[0.15, 0.4, 0.33, 0.12]),
            "diabetes": (rng.random(count) < 0.32).astype(int),
            "beta_blocker": (rng.random(count) < 0.7).astype(int),
        }
    )
