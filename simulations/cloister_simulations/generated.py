"""Invented patients whose true risk is known, at hospitals that differ: for whoever has no records at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, Units, apportion, invented_names

Share = Annotated[float, Field(ge=0, le=1)]
Vector = NDArray[np.float64]
Frame = Any  # what pandas' stubs say of these results is a union of everything


class GeneratedEhr(BaseModel):
    """Invented patients whose true risk is known (`log_odds`), at hospitals that differ."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["generated-ehr"]
    sites: Annotated[int, Field(ge=2, le=500)] = 6
    patients: Annotated[int, Field(ge=100)] = 3000
    seed: Annotated[int, Field(ge=0)] = 0
    label_shift: Share = 0.4
    """Sd, between hospitals, of a constant added to the log-odds."""
    feature_shift: Share = 0.4
    """Sd, between hospitals, of each quantity's mean, in units of that quantity's own sd."""
    missing: Share = 0.08
    """Share of laboratory values that are absent; each hospital's own share lies between 0 and twice this."""
    site_effects: Annotated[float, Field(ge=0, le=3)] = 0.0
    """Sd, between hospitals, of what each one's instruments add to a vital sign or laboratory value, in units of that
    quantity's own sd; half of it is that of the logarithm of what they multiply its spread by. No risk hangs on it."""


@dataclass(frozen=True)
class _Quantity:
    """A quantity in the plan's unit. With ``log``, its logarithm is normal, and ``mean`` is its median."""

    mean: float
    sd: float
    low: float
    high: float
    decimals: int
    log: bool = False

    def value(self, z: Vector) -> Vector:
        raw = self.mean * np.exp(self.sd * z) if self.log else self.mean + self.sd * z
        return np.clip(raw, self.low, self.high).round(self.decimals)

    def score(self, value: Vector) -> Vector:
        return np.log(value / self.mean) / self.sd if self.log else (value - self.mean) / self.sd


_PATIENT = {"age": _Quantity(62, 15, 18, 100, 0), "bmi": _Quantity(27.5, 0.18, 14, 60, 1, log=True)}
_VITALS = {"systolic_bp": _Quantity(132, 20, 70, 240, 0), "heart_rate": _Quantity(82, 15, 35, 180, 0)}
_LABS = {
    "creatinine": _Quantity(1.0, 0.4, 0.3, 12, 2, log=True),
    "haemoglobin": _Quantity(13.2, 1.8, 5, 20, 1),
    "glucose": _Quantity(115, 0.3, 40, 600, 0, log=True),
    "sodium": _Quantity(139, 4, 115, 165, 0),
}
_QUANTITIES = _PATIENT | _VITALS | _LABS

CREATININE = 0.011312  # mg/dL for one umol/L: 113.12 g/mol
GLUCOSE = 18.016  # mg/dL for one mmol/L: 180.16 g/mol


def log_odds(table: pd.DataFrame) -> Vector:
    """The true log-odds of ``deteriorated``, in the plan's units, before a hospital's own constant.

    A linear score with two bends that no linear model follows: low pressure counts for more as creatinine
    rises, and both a slow and a fast heart are bad signs.
    """
    z = {name: quantity.score(table[name].to_numpy()) for name, quantity in _QUANTITIES.items()}
    score = 0.45 * z["age"] + 0.1 * z["bmi"] - 0.2 * z["systolic_bp"] + 0.25 * z["heart_rate"]
    score += 0.45 * z["creatinine"] - 0.4 * z["haemoglobin"] + 0.25 * z["glucose"] - 0.2 * z["sodium"]
    for name, weight in (("charlson", 0.2), ("prior_admissions", 0.25), ("smoker", 0.35)):
        score += weight * table[name].to_numpy()
    score += 0.7 * (table["admission_type"].to_numpy() == "emergency")
    score += -0.9 * z["creatinine"] * z["systolic_bp"] + 0.4 * (z["heart_rate"] ** 2 - 1)
    return score - 2.8


def generated_ehr(source: GeneratedEhr) -> Iterator[Hospital]:
    """Each hospital's encounters, with its own shift, share of gaps and way to record."""
    rng = np.random.default_rng(source.seed)
    least = source.patients // (4 * source.sites)
    sizes = apportion(source.patients - least * source.sites, rng.dirichlet(np.full(source.sites, 2.0)))
    shifts = {name: rng.normal(0, source.feature_shift, source.sites) for name in _QUANTITIES}
    constants = rng.normal(0, source.label_shift, source.sites)
    rates = source.missing * rng.uniform(0, 2, source.sites)
    instruments = np.random.default_rng([source.seed, 1])  # its own, so that who the patients are does not change
    first = 1
    for at, site in enumerate(invented_names(source.sites)):
        patients = least + sizes[at]
        table = _patients_of(rng, patients, first, {name: shift[at] for name, shift in shifts.items()})
        risk = 1 / (1 + np.exp(-log_odds(table) - constants[at]))
        table["deteriorated"] = (rng.random(len(table)) < risk).astype(int)
        _measured(instruments, table, source.site_effects)
        gaps = rng.random((len(table), len(_LABS))) < rates[at]
        table[list(_LABS)] = table[list(_LABS)].mask(gaps)
        yield _recorded(site, table, at)
        first += patients


def _measured(rng: np.random.Generator, table: Frame, effects: float) -> None:
    """What this hospital's instruments make of its patients' true values."""
    for name, quantity in (_VITALS | _LABS).items():
        added, times = rng.normal(0, effects), np.exp(rng.normal(0, effects / 2))
        if effects:
            table[name] = quantity.value(quantity.score(table[name].to_numpy()) * times + added)


def _patients_of(rng: np.random.Generator, patients: int, first: int, shift: dict[str, float]) -> Frame:
    """Patients of one hospital, numbered from ``first``; about one in four has more than one encounter."""
    drawn = {name: quantity.value(rng.normal(shift[name], 1, patients)) for name, quantity in _PATIENT.items()}
    female = rng.random(patients) < 0.5
    height = np.where(female, rng.normal(1.62, 0.07, patients), rng.normal(1.76, 0.07, patients))
    person: Frame = pd.DataFrame(
        {
            "patient_id": [f"G{number:06d}" for number in range(first, first + patients)],
            "age": drawn["age"].astype(int),
            "sex": np.where(female, "female", "male"),
            "bmi": drawn["bmi"],
            "weight": np.clip(drawn["bmi"] * height**2, 30, 250).round(1),
            "smoker": (rng.random(patients) < 0.2).astype(int),
            "charlson": np.minimum(rng.poisson(0.4 + 0.04 * np.clip(drawn["age"] - 40, 0, None)), 20),
            "prior_admissions": np.minimum(rng.geometric(0.6, patients) - 1, 15),
        }
    )
    table = person.loc[person.index.repeat(1 + rng.binomial(3, 0.09, patients))].reset_index(drop=True)
    table["prior_admissions"] += table.groupby("patient_id").cumcount()
    # Kidneys age, and the chronically ill are anaemic: without such ties every column would be independent.
    ties = {"creatinine": 0.02 * (table["age"] - 62), "haemoglobin": 0.1 * (1.5 - table["charlson"])}
    for name, quantity in (_VITALS | _LABS).items():
        table[name] = quantity.value(rng.normal(shift[name], 1, len(table)) + ties.get(name, 0.0))
    table["admission_type"] = rng.choice(["emergency", "urgent", "elective"], len(table), p=[0.5, 0.2, 0.3])
    return table


def _recorded(site: str, table: Frame, at: int) -> Hospital:
    """As this hospital writes it: the plan's way, in SI laboratory units, or with a vendor's names and lb."""
    units: Units
    match at % 3:
        case 0:
            return Hospital(site, table)
        case 1:
            units = {
                "creatinine": {"unit": "umol/L", "factor": CREATININE},
                "glucose": {"unit": "mmol/L", "factor": GLUCOSE},
                "haemoglobin": "g/L",
            }
            si = table.assign(
                creatinine=(table["creatinine"] / CREATININE).round(1),
                glucose=(table["glucose"] / GLUCOSE).round(2),
                haemoglobin=(table["haemoglobin"] * 10).round(),
            )
            return Hospital(site, si, units=units)
        case _:
            names = {"age": "AGE_YEARS", "weight": "WT_LB", "systolic_bp": "SBP", "heart_rate": "PULSE"}
            pounds = table.assign(weight=(table["weight"] / 0.45359237).round(1))
            return Hospital(site, pounds.rename(columns=names), columns=names, units={"weight": "lb"})
