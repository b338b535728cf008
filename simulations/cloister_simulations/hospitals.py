"""One table into several hospitals on disk: for each a table and the ``site.yaml`` that describes it.

A hospital's folder is what a real hospital would give its agent, so a simulated hospital is read by the same
connector. Every source is deterministic: the same terms give the same bytes.

    breast-cancer   comes with scikit-learn, split here      heart-disease   four real hospitals
    generated-ehr   drawn here from a known risk             readmission     real encounters, proxy hospitals
    censored-ehr    drawn from a known hazard                eicu            real stays, networks of real hospitals
    trial           drawn with a known effect                physionet2012   real stays, proxy hospitals
    multimodal-ehr  drawn: pictures, notes and a table       eicu-vitals     groups of real hospitals
    generated-stays drawn here, with vitals over time        ecg             one real recording, proxy hospitals
    phantoms        drawn here, with their lesions           pneumonia       real X-rays, proxy hospitals
    dicom-folder    archives, drawn here                     notes           real notes, proxy hospitals
    clinical-forms  FHIR, OMOP and a table, drawn here       molecules       of MoleculeNet, by scaffold
    genotypes       drawn here, with known effects           expression      real blood cells, proxy hospitals
    tables          your own
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_shared.errors import DataRefused
from cloister_simulations.generated import GeneratedEhr, generated_ehr
from cloister_simulations.site_folder import Hospital, apportion, invented_names, write
from cloister_simulations.sources.censored import CensoredEhr, censored_ehr
from cloister_simulations.sources.clinical_forms import ClinicalForms, write_forms
from cloister_simulations.sources.dicom_folder import DicomFolder, dicom_folder
from cloister_simulations.sources.ecg import Ecg, ecg
from cloister_simulations.sources.eicu import EicuDemo, eicu
from cloister_simulations.sources.eicu_vitals import EicuVitals, eicu_vitals
from cloister_simulations.sources.generated_stays import GeneratedStays, generated_stays
from cloister_simulations.sources.genomics import Expression, Genotypes, expression, genotypes
from cloister_simulations.sources.molecules import Molecules, molecules
from cloister_simulations.sources.multimodal import MultimodalEhr, multimodal_ehr
from cloister_simulations.sources.notes import ClinicalNotes, clinical_notes
from cloister_simulations.sources.phantoms import Phantoms, phantoms
from cloister_simulations.sources.physionet import PhysioNet, physionet
from cloister_simulations.sources.pneumonia import Pneumonia, pneumonia
from cloister_simulations.sources.trial import Trial, trial

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


class Tables(_Terms):
    """Your own tables: the ``site.yaml`` of each hospital, paths as seen from the scenario file."""

    source: Literal["tables"]
    sites: tuple[str, ...] = Field(min_length=2)


Source = Annotated[
    BreastCancer
    | HeartDisease
    | Readmission
    | GeneratedEhr
    | CensoredEhr
    | EicuDemo
    | MultimodalEhr
    | Trial
    | GeneratedStays
    | PhysioNet
    | EicuVitals
    | Ecg
    | Pneumonia
    | Phantoms
    | DicomFolder
    | ClinicalNotes
    | Molecules
    | Expression
    | Genotypes
    | ClinicalForms
    | Tables,
    Field(discriminator="source"),
]


# --- on disk -----------------------------------------------------------------------------------------------
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
        case ClinicalForms():
            return write_forms(source, folder)
        case BreastCancer():
            hospitals, suffix = _breast_cancer(source), "csv"
        case HeartDisease():
            hospitals, suffix = _heart_disease(), "csv"
        case Readmission():
            hospitals, suffix = _readmission(source), "parquet"
        case GeneratedEhr():
            hospitals, suffix = generated_ehr(source), "csv"
        case CensoredEhr():
            hospitals, suffix = censored_ehr(source), "csv"
        case EicuDemo():
            hospitals, suffix = eicu(source), "csv"
        case MultimodalEhr():
            hospitals, suffix = multimodal_ehr(source, folder), "csv"
        case Trial():
            hospitals, suffix = trial(source), "csv"
        case GeneratedStays():
            hospitals, suffix = generated_stays(source), "csv"
        case PhysioNet():
            hospitals, suffix = physionet(source, data_folder("physionet2012")), "parquet"
        case EicuVitals():
            hospitals, suffix = eicu_vitals(source, data_folder("eicu_demo")), "parquet"
        case Ecg():
            hospitals, suffix = ecg(source, data_folder("wfdb_samples")), "csv"
        case Pneumonia():
            hospitals, suffix = pneumonia(source, data_folder("pneumoniamnist_subset")), "csv"
        case Phantoms():
            hospitals, suffix = phantoms(source), "csv"
        case DicomFolder():
            hospitals, suffix = dicom_folder(source), "csv"
        case ClinicalNotes():
            hospitals, suffix = clinical_notes(source), "parquet"
        case Molecules():
            hospitals, suffix = molecules(source), "csv"
        case Expression():
            hospitals, suffix = expression(source), "parquet"
        case Genotypes():
            hospitals, suffix = genotypes(source), "parquet"
    return sorted(write(hospital, folder / hospital.site, f"table.{suffix}") for hospital in hospitals)


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


# --- breast cancer -----------------------------------------------------------------------------------------
def _breast_cancer(source: BreastCancer) -> Iterator[Hospital]:
    """What each hospital has beyond the least size halves from one to the next; smaller ones see more cancer.

    As in life, where a small specialist clinic is sent the likelier cases. ``seed`` deals the patients out.
    """
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer(as_frame=True)
    table = bunch.data.rename(columns=lambda name: name.replace(" ", "_"))
    table.insert(0, "patient_id", [f"P{number:04d}" for number in range(1, len(table) + 1)])
    table["malignant"] = 1 - bunch.target  # scikit-learn writes malignant as 0
    least = 60  # so that every hospital has enough of both outcomes to hold some out and still report on them
    sizes = [least + more for more in apportion(len(table) - least * source.sites, 0.5 ** np.arange(source.sites))]
    ill = apportion(int(table["malignant"].sum()), np.linspace(0.85, 1.25, source.sites) * sizes)
    order = table.iloc[np.random.default_rng(source.seed).permutation(len(table))]
    malignant, benign = order[order["malignant"] == 1], order[order["malignant"] == 0]
    for site, size, cases in zip(invented_names(source.sites), sizes, ill, strict=True):
        own = pd.concat([malignant[:cases], benign[: size - cases]])
        malignant, benign = malignant[cases:], benign[size - cases :]
        yield Hospital(site, own.sort_values("patient_id"))


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


def _heart_disease() -> Iterator[Hospital]:
    """The 740 rows that FLamby (du Terrail et al. 2022) keeps of UCI heart disease, centre by centre."""
    raw: Frame = pd.read_csv(
        data_folder("fed_heart_disease") / "flamby_preprocessed.csv", dtype={"center": str, "set": str}
    )
    table = raw[["center", "row_in_file", *_HEART]].rename(columns=_HEART)
    row = table.pop("row_in_file").astype(str).str.zfill(3)
    table.insert(1, "patient_id", table["center"] + "-" + row)  # one row of the hospital's file is one patient
    whole = {name: int for name in _HEART.values() if name not in ("st_depression", "split")}
    for center, own in table.astype(whole).groupby("center"):
        yield Hospital(str(center), own.drop(columns="center"))


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


def _readmission(source: Readmission) -> Iterator[Hospital]:
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
        yield Hospital(str(name), own)


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
