"""Intensive care stays of 116 real hospitals (eICU demo, Pollard et al. 2018), by what APACHE asks on the first day.

A hospital has a dozen stays in these records, too few to train or to be judged alone. Hospitals of one region and size
therefore stand together as one network, as small hospitals do in life.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from cloister_simulations.site_folder import Hospital

Frame = Any

_SIZES = {"<100": "small", "100 - 249": "medium", "250 - 499": "large", ">= 500": "large"}
"""Beds: the size of a network's hospitals; ``unsized`` where the number is not known."""

_MEASURED = {
    "heartrate": "heart_rate",
    "meanbp": "mean_bp",
    "temperature": "temperature",
    "respiratoryrate": "respiratory_rate",
    "sodium": "sodium",
    "creatinine": "creatinine",
    "bun": "urea_nitrogen",
    "glucose": "glucose",
    "wbc": "leucocytes",
    "hematocrit": "haematocrit",
    "albumin": "albumin",
    "bilirubin": "bilirubin",
    "urine": "urine",
}


class EicuDemo(BaseModel):
    """Hospital death of ICU patients, at networks of the real hospitals of one region and size."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["eicu"]


def eicu(source: EicuDemo) -> Iterator[Hospital]:
    """Each network's stays with APACHE variables and a known end; a patient stays with the network of the first."""
    from cloister_simulations.hospitals import data_folder

    table = _stays(data_folder("eicu_demo"))
    for site, own in table.groupby("network"):
        yield Hospital(str(site), own.drop(columns="network"))


def _stays(folder: Path) -> Frame:
    patients: Frame = pd.read_csv(folder / "patient.csv.gz", dtype={"age": str})
    apache: Frame = pd.read_csv(folder / "apacheapsvar.csv.gz")
    chronic: Frame = pd.read_csv(folder / "apachepredvar.csv.gz")
    hospitals: Frame = pd.read_csv(folder / "hospital.csv.gz", dtype={"numbedscategory": str})
    kept = chronic[["patientunitstayid", "metastaticcancer", "cirrhosis", "immunosuppression", "electivesurgery"]]
    raw: Frame = patients.merge(apache, on="patientunitstayid").merge(hospitals, on="hospitalid", how="left")
    raw = raw.merge(kept.drop_duplicates("patientunitstayid"), on="patientunitstayid", how="left")
    raw = raw[raw["hospitaldischargestatus"].isin(["Alive", "Expired"])].sort_values("patientunitstayid")
    size = raw["numbedscategory"].map(_SIZES).fillna("unsized")
    network = raw["region"].str.lower() + "-" + size
    table: Frame = pd.DataFrame(
        {
            "network": network.groupby(raw["uniquepid"]).transform("first"),
            "stay_id": raw["patientunitstayid"],
            "patient_id": raw["uniquepid"],
            "age": pd.to_numeric(raw["age"].replace("> 89", "90"), errors="coerce"),
            "sex": raw["gender"].str.lower().where(raw["gender"].isin(["Female", "Male"])),
            "ventilated": (raw["vent"] == 1).astype(int),
            "dialysis": (raw["dialysis"] == 1).astype(int),
            "coma_scale": raw[["eyes", "motor", "verbal"]].where(raw["meds"] != 1).replace(-1, None).sum(
                axis=1, min_count=3
            ),
            "elective_surgery": (raw["electivesurgery"] == 1).astype(int),
            "metastatic_cancer": (raw["metastaticcancer"] == 1).astype(int),
            "cirrhosis": (raw["cirrhosis"] == 1).astype(int),
            "immunosuppressed": (raw["immunosuppression"] == 1).astype(int),
            **{name: raw[column].where(raw[column] != -1) for column, name in _MEASURED.items()},
            "died": (raw["hospitaldischargestatus"] == "Expired").astype(int),
        }
    )  # fmt: skip
    return table
