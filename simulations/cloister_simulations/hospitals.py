"""One table into several hospitals on disk: for each a table and the ``site.yaml`` that describes it.

A hospital's folder is what a real hospital would give its agent, so a simulated hospital is read by the same
connector. Every source is deterministic: the same terms give the same bytes.

    breast-cancer   comes with scikit-learn, split here      heart-disease   four real hospitals
    generated-ehr   drawn here from a known risk             readmission     real encounters, proxy hospitals
    tables          your own
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_shared.errors import DataRefused

Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Units = dict[str, str | dict[str, str | float]]
Vector = NDArray[np.float64]
Frame = Any  # pandas ships no stubs, and what pyright infers of its results is a union of everything


# --- the sources -------------------------------------------------------------------------------------------
class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class BreastCancer(_Terms):
    """Wisconsin diagnostic breast cytology: 569 patients of one hospital, dealt out to ``sites``."""

    source: Literal["breast-cancer"]
    sites: Annotated[int, Field(ge=2, le=8)] = 5
    seed: Seed = 0


class HeartDisease(_Terms):
    """UCI heart disease at its four real hospitals, with FLamby's rows and FLamby's split."""

    source: Literal["heart-disease"]


class Readmission(_Terms):
    """Diabetes 130-US hospitals (Strack et al. 2014), with PROXY hospitals.

    The 101,766 encounters name no hospital. The admission source stands in for one, so the differences
    between these sites are those between ways into a hospital; no figure here speaks for a real one.
    """

    source: Literal["readmission"]
    max_rows: Annotated[int, Field(ge=100)] | None = None
    """For quick runs: all encounters of as many patients, drawn in the order of ``seed``, as fit."""
    seed: Seed = 0


class GeneratedEhr(_Terms):
    """Invented patients whose true risk is known (`log_odds`), at hospitals that differ."""

    source: Literal["generated-ehr"]
    sites: Annotated[int, Field(ge=2, le=500)] = 6
    patients: Annotated[int, Field(ge=100)] = 3000
    seed: Seed = 0
    label_shift: Share = 0.4
    """Sd, between hospitals, of a constant added to the log-odds."""
    feature_shift: Share = 0.4
    """Sd, between hospitals, of each quantity's mean, in units of that quantity's own sd."""
    missing: Share = 0.08
    """Share of laboratory values that are absent; each hospital's own share lies between 0 and twice this."""


class Tables(_Terms):
    """Your own tables: the ``site.yaml`` of each hospital, paths as seen from the scenario file."""

    source: Literal["tables"]
    sites: tuple[str, ...] = Field(min_length=2)


Source = Annotated[
    BreastCancer | HeartDisease | Readmission | GeneratedEhr | Tables, Field(discriminator="source")
]


# --- on disk -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Hospital:
    site: str
    table: pd.DataFrame
    columns: dict[str, str] = field(default_factory=dict)
    """A feature's name in the plan: its column in ``table``, where they differ."""
    units: Units = field(default_factory=dict)
    """A feature's name in the plan: the unit of its column, where it is not the plan's."""


def build(source: Source, folder: Path) -> list[Path]:
    """Write ``folder/SITE/{table.csv or table.parquet, site.yaml}``; other folders there are left alone.

    Returns:
        The paths of the ``site.yaml`` files, by site name.

    Raises:
        DataRefused: the source needs records that are not on this machine.
    """
    match source:
        case Tables(sites=sites):
            return [Path(site) for site in sites]
        case BreastCancer():
            hospitals, suffix = _breast_cancer(source), "csv"
        case HeartDisease():
            hospitals, suffix = _heart_disease(), "csv"
        case Readmission():
            hospitals, suffix = _readmission(source), "parquet"
        case GeneratedEhr():
            hospitals, suffix = _generated_ehr(source), "csv"
    return sorted(_write(hospital, folder / hospital.site, f"table.{suffix}") for hospital in hospitals)


def data_folder(name: str) -> Path:
    """The folder of real records ``name``, inside the one that CLOISTER_DATA names.

    Raises:
        DataRefused: it is not there.
    """
    folder = Path(os.environ.get("CLOISTER_DATA", "../shared/data")) / name
    if not folder.is_dir():
        raise DataRefused(
            f"There is no folder of records {folder}.",
            mend=f"Set CLOISTER_DATA to the folder that holds {name}, or use generated-ehr or breast-cancer,"
            " which need no data.",
        )
    return folder


def _write(hospital: _Hospital, folder: Path, table: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if table.endswith(".parquet"):
        hospital.table.to_parquet(folder / table, index=False)
    else:
        hospital.table.to_csv(folder / table, index=False, lineterminator="\n")
    differs = {"columns": hospital.columns, "units": hospital.units}
    described = {"path": table} | {key: value for key, value in differs.items() if value}
    site_yaml = folder / "site.yaml"
    terms = {"site": hospital.site, "table": described}
    site_yaml.write_text(yaml.safe_dump(terms, sort_keys=False), encoding="utf-8", newline="\n")
    return site_yaml


def _invented_names(count: int) -> list[str]:
    """Names that stand for no real hospital: trees, then numbered trees."""
    trees = ("alder", "birch", "cedar", "elder", "hazel", "juniper", "linden", "maple", "rowan", "willow")
    rounds = ["" if i < len(trees) else f"-{i // len(trees) + 1}" for i in range(count)]
    return [f"{trees[i % len(trees)]}{numbered}" for i, numbered in enumerate(rounds)]


def _apportion(total: int, weights: NDArray[np.floating]) -> list[int]:
    """Whole numbers that sum to ``total`` and follow the weights, by largest remainders."""
    exact = total * np.asarray(weights, dtype=float) / np.sum(weights)
    whole = np.floor(exact).astype(int)
    most_owed = np.argsort(whole - exact, kind="stable")
    whole[most_owed[: total - whole.sum()]] += 1
    return whole.tolist()


# --- breast cancer -----------------------------------------------------------------------------------------
def _breast_cancer(source: BreastCancer) -> Iterator[_Hospital]:
    """What each hospital has beyond the least size halves from one to the next; smaller ones see more cancer.

    As in life, where a small specialist clinic is sent the likelier cases. ``seed`` deals the patients out.
    """
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer(as_frame=True)
    table = bunch.data.rename(columns=lambda name: name.replace(" ", "_"))
    table.insert(0, "patient_id", [f"P{number:04d}" for number in range(1, len(table) + 1)])
    table["malignant"] = 1 - bunch.target  # scikit-learn writes malignant as 0
    least = 60  # so that every hospital has enough of both outcomes to hold some out and still report on them
    sizes = [
        least + more for more in _apportion(len(table) - least * source.sites, 0.5 ** np.arange(source.sites))
    ]
    ill = _apportion(int(table["malignant"].sum()), np.linspace(0.85, 1.25, source.sites) * sizes)
    order = table.iloc[np.random.default_rng(source.seed).permutation(len(table))]
    malignant, benign = order[order["malignant"] == 1], order[order["malignant"] == 0]
    for site, size, cases in zip(_invented_names(source.sites), sizes, ill, strict=True):
        own = pd.concat([malignant[:cases], benign[: size - cases]])
        malignant, benign = malignant[cases:], benign[size - cases :]
        yield _Hospital(site, own.sort_values("patient_id"))


# --- heart disease -----------------------------------------------------------------------------------------
_HEART = {
    "0": "age",
    "1": "sex",
    "3": "resting_bp",
    "4": "cholesterol",
    "5": "fasting_sugar",
    "7": "max_heart_rate",
    "8": "exercise_angina",
    "9": "st_depression",
    "2_2.0": "chest_pain_atypical",
    "2_3.0": "chest_pain_non_anginal",
    "2_4.0": "chest_pain_asymptomatic",
    "6_1.0": "ecg_st_t_abnormality",
    "6_2.0": "ecg_hypertrophy",
    "set": "split",
    "label": "disease",
}
"""FLamby's columns in its order. Chest pain 1 (typical angina) and ECG 0 (normal) are the dropped levels."""


def _heart_disease() -> Iterator[_Hospital]:
    """The 740 rows that FLamby (du Terrail et al. 2022) keeps of UCI heart disease, centre by centre."""
    raw: Frame = pd.read_csv(
        data_folder("fed_heart_disease") / "flamby_preprocessed.csv", dtype={"center": str, "set": str}
    )
    table = raw[["center", "row_in_file", *_HEART]].rename(columns=_HEART)
    row = table.pop("row_in_file").astype(str).str.zfill(3)
    table.insert(
        1, "patient_id", table["center"] + "-" + row
    )  # one row of the hospital's file is one patient
    whole = {name: int for name in _HEART.values() if name not in ("st_depression", "split")}
    for center, own in table.astype(whole).groupby("center"):
        yield _Hospital(str(center), own.drop(columns="center"))


# --- readmission -------------------------------------------------------------------------------------------
_PROXIES = {
    "emergency-room": ("Emergency Room",),
    "physician-referral": ("Physician Referral",),
    "clinic-referral": ("Clinic Referral", "HMO Referral"),
    "hospital-transfer": (
        "Transfer from a hospital",
        "Transfer from critial access hospital",  # so spelt in the file
        "Transfer from hospital inpt/same fac reslt in a sep claim",
        "Transfer from Ambulatory Surgery Center",
    ),
    "care-facility": (
        "Transfer from a Skilled Nursing Facility (SNF)",
        "Transfer from another health care facility",
        "Transfer From Another Home Health Agency",
        "Readmission to Same Home Health Agency",
        "Transfer from Hospice",
    ),
}
"""Proxy hospital: admission sources, as IDs_mapping.csv names them. All others are ``source-unknown``."""

_ICD9 = (
    ("circulatory", 390, 459),
    ("circulatory", 785, 785),
    ("respiratory", 460, 519),
    ("respiratory", 786, 786),
    ("digestive", 520, 579),
    ("digestive", 787, 787),
    ("genitourinary", 580, 629),
    ("genitourinary", 788, 788),
    ("musculoskeletal", 710, 739),
    ("neoplasms", 140, 239),
    ("injury", 800, 999),
    ("diabetes", 250, 250),
)
"""Primary diagnosis by ICD-9 chapter and its symptoms, after Strack et al. 2014; the rest is ``other``."""

_GONE = (11, 13, 14, 19, 20, 21)
"""Dispositions after which nobody is readmitted: died, or discharged to a hospice."""


def _readmission(source: Readmission) -> Iterator[_Hospital]:
    folder = data_folder("diabetes130")
    # "None" means that the test was not made, which is a finding and not a gap.
    raw: Frame = pd.read_csv(
        folder / "diabetic_data.csv.gz",
        keep_default_na=False,
        na_values=["?"],
        dtype={"diag_1": str},
        low_memory=False,
    )
    raw = raw[~raw["discharge_disposition_id"].isin(_GONE)].sort_values("encounter_id")
    if source.max_rows is not None:
        raw = _whole_patients(raw, source.max_rows, source.seed)
    # Encounter ids rise with time, so a patient's first row is the first encounter. A patient stays at one
    # site: splits and privacy are by patient, and neither holds for someone who is at two hospitals.
    first = raw.groupby("patient_nbr")["admission_source_id"].transform("first")
    site = first.map(_admission_sources(folder)).fillna("source-unknown")
    for name, own in _encounters(raw).groupby(site):
        yield _Hospital(str(name), own)


def _whole_patients(raw: Frame, most: int, seed: int) -> Frame:
    """All encounters of the first patients, in a drawn order, that together have at most ``most`` rows."""
    counts = raw["patient_nbr"].value_counts().sort_index()
    drawn = counts.iloc[np.random.default_rng(seed).permutation(len(counts))]
    return raw[raw["patient_nbr"].isin(drawn.index[drawn.cumsum() <= most])]


def _admission_sources(folder: Path) -> dict[int, str]:
    """Admission source id -> proxy hospital. IDs_mapping.csv holds three tables, the sources last."""
    lines = (folder / "IDs_mapping.csv").read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("admission_source_id"))
    named = {name: proxy for proxy, names in _PROXIES.items() for name in names}
    pairs = [line.split(",", 1) for line in lines[start + 1 :]]
    return {int(key): named[name.strip()] for key, name in pairs if name.strip() in named}


def _encounters(raw: Frame) -> pd.DataFrame:
    """What is known at discharge, in few and sensible columns."""
    tests = {"None": "not measured", "Norm": "normal"}
    admission = {1: "emergency", 7: "emergency", 2: "urgent", 3: "elective"}  # 7 is a trauma centre
    discharge = {1: "home", 6: "home health", 8: "home health", 2: "hospital", 5: "hospital", 9: "hospital"}
    discharge |= dict.fromkeys((3, 4, 15, 22, 23, 24), "care facility")
    counted = ("outpatient", "emergency", "inpatient")
    return pd.DataFrame(
        {
            "encounter_id": raw["encounter_id"],
            "patient_id": raw["patient_nbr"],
            "age": raw["age"].str.extract(r"\[(\d+)-", expand=False).astype(int) + 5,  # the decade's midpoint
            "sex": raw["gender"].str.lower().where(raw["gender"].isin(["Female", "Male"])),
            "time_in_hospital": raw["time_in_hospital"],
            "num_lab_procedures": raw["num_lab_procedures"],
            "num_procedures": raw["num_procedures"],
            "num_medications": raw["num_medications"],
            **{f"number_{kind}": raw[f"number_{kind}"] for kind in counted},
            "number_diagnoses": raw["number_diagnoses"],
            "a1c": raw["A1Cresult"].replace(tests),
            "max_glucose": raw["max_glu_serum"].replace(tests),
            "insulin": raw["insulin"].str.lower(),
            "medication_changed": (raw["change"] == "Ch").astype(int),
            "diabetes_medication": (raw["diabetesMed"] == "Yes").astype(int),
            "diagnosis": _chapters(raw["diag_1"]),
            "admission_type": raw["admission_type_id"].map(admission).fillna("other"),
            "discharge": raw["discharge_disposition_id"].map(discharge).fillna("other"),
            "readmitted_30d": (raw["readmitted"] == "<30").astype(int),
        }
    )


def _chapters(codes: Frame) -> Frame:
    number: Frame = pd.to_numeric(codes, errors="coerce")  # V and E codes are no numbers, and stay "other"
    chapters = pd.Series("other", index=codes.index)
    for name, low, high in _ICD9:
        chapters[number.between(low, high + 1, inclusive="left")] = name
    return chapters


# --- generated EHR -----------------------------------------------------------------------------------------
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


def _generated_ehr(source: GeneratedEhr) -> Iterator[_Hospital]:
    rng = np.random.default_rng(source.seed)
    least = source.patients // (4 * source.sites)
    sizes = _apportion(source.patients - least * source.sites, rng.dirichlet(np.full(source.sites, 2.0)))
    shifts = {name: rng.normal(0, source.feature_shift, source.sites) for name in _QUANTITIES}
    constants = rng.normal(0, source.label_shift, source.sites)
    rates = source.missing * rng.uniform(0, 2, source.sites)
    first = 1
    for at, site in enumerate(_invented_names(source.sites)):
        patients = least + sizes[at]
        table = _patients_of(rng, patients, first, {name: shift[at] for name, shift in shifts.items()})
        risk = 1 / (1 + np.exp(-log_odds(table) - constants[at]))
        table["deteriorated"] = (rng.random(len(table)) < risk).astype(int)
        gaps = rng.random((len(table), len(_LABS))) < rates[at]
        table[list(_LABS)] = table[list(_LABS)].mask(gaps)
        yield _recorded(site, table, at)
        first += patients


def _patients_of(rng: np.random.Generator, patients: int, first: int, shift: dict[str, float]) -> Frame:
    """Patients of one hospital, numbered from ``first``; about one in four has more than one encounter."""
    drawn = {
        name: quantity.value(rng.normal(shift[name], 1, patients)) for name, quantity in _PATIENT.items()
    }
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


def _recorded(site: str, table: Frame, at: int) -> _Hospital:
    """As this hospital writes it: the plan's way, in SI laboratory units, or with a vendor's names and lb."""
    units: Units
    match at % 3:
        case 0:
            return _Hospital(site, table)
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
            return _Hospital(site, si, units=units)
        case _:
            names = {"age": "AGE_YEARS", "weight": "WT_LB", "systolic_bp": "SBP", "heart_rate": "PULSE"}
            pounds = table.assign(weight=(table["weight"] / 0.45359237).round(1))
            return _Hospital(site, pounds.rename(columns=names), columns=names, units={"weight": "lb"})
