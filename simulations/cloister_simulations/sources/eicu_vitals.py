"""eICU demo (Pollard et al. 2018): blood pressure of intensive care stays, twelve hours at a time.

The 116 real hospitals have a dozen stays each here, too few to train a model that protects patients. Those of one
region and of like size stand together as one site.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from cloister_client.site_file import SeriesFile
from cloister_simulations.site_folder import Hospital

HOURS = 12
"""Of one window."""
DAYS = 7
"""Of a stay that are used."""
LEAST = 6
"""Measurements that a window must have."""

_SIZES = {"<100": "small", "100 - 249": "small", "250 - 499": "large", ">= 500": "large"}
_VITALS = {"noninvasivesystolic": "systolic", "noninvasivediastolic": "diastolic", "noninvasivemean": "mean"}

Frame = Any  # what pandas' stubs say of these results is a union of everything


class EicuVitals(BaseModel):
    """Windows of twelve hours of non-invasive blood pressure; a site is the hospitals of a region and size.

    ``deteriorated``: the patient died in hospital within ``ahead`` hours after the window's end.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["eicu-vitals"]
    ahead: Annotated[float, Field(gt=0)] = 24.0


def eicu_vitals(source: EicuVitals, folder: Path) -> Iterator[Hospital]:
    """A table of windows and a file of measurements for each site. ``folder`` holds the records."""
    stays: Frame = pd.read_csv(folder / "patient.csv.gz").set_index("patientunitstayid")
    hospitals: Frame = pd.read_csv(folder / "hospital.csv.gz", keep_default_na=False).set_index("hospitalid")
    size = hospitals["numbedscategory"].map(_SIZES).fillna("unknown")
    site = (hospitals["region"].str.lower() + "-" + size).to_dict()

    wide: Frame = pd.read_csv(folder / "vitalaperiodic.csv.gz")
    wide = wide[wide["observationoffset"].between(0, DAYS * 24 * 60 - 1)].sort_values("vitalaperiodicid")
    wide["part"] = wide["observationoffset"] // (HOURS * 60)
    wide["window"] = wide["patientunitstayid"].astype(str) + "-" + wide["part"].astype(str)
    wide["minutes"] = wide["observationoffset"] - wide["part"] * HOURS * 60
    series: Frame = wide.rename(columns=_VITALS).melt(
        ["window", "minutes"], list(_VITALS.values()), "parameter", "value"
    )
    series = series.dropna(subset="value")
    many = series.groupby("window").size() >= LEAST
    windows = wide[wide["window"].isin(many.index[many])].drop_duplicates("window")
    stay = stays.loc[windows["patientunitstayid"]]
    end = (windows["part"].to_numpy() + 1) * HOURS * 60
    left = (stay["hospitaldischargeoffset"].to_numpy() - end) / 60
    table: Frame = pd.DataFrame(
        {
            "window": windows["window"].to_numpy(),
            "patient": stay["uniquepid"].to_numpy(),
            "deteriorated": ((stay["hospitaldischargestatus"] == "Expired") & (left <= source.ahead)).astype(int),
        }
    ).reset_index(drop=True)
    # A patient stays at the site of the first stay: privacy is by patient, and does not hold for one who is at two.
    at = stay["hospitalid"].map(site).groupby(stay["uniquepid"].to_numpy()).first()
    terms = SeriesFile(path="series.parquet", row="window", minutes="minutes", name="parameter", value="value")
    for name, own in table.groupby(table["patient"].map(at)):
        measured = series[series["window"].isin(own["window"])].sort_values(["window", "minutes", "parameter"])
        yield Hospital(str(name), own, series=measured, measured=terms)
