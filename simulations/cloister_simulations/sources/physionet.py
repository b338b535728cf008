"""PhysioNet/CinC Challenge 2012, set A (Silva et al. 2012): the first 48 hours of 4,000 intensive care stays.

All stays come from one hospital. The kind of unit stands in for a hospital, so these are PROXY sites: they differ as
a coronary care unit does from a surgical one, and no figure here speaks for four hospitals.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from cloister_client.site_file import SeriesFile
from cloister_simulations.site_folder import Hospital

UNITS = {1: "coronary-care", 2: "cardiac-surgery", 3: "medical", 4: "surgical"}
_STATIC = ("RecordID", "Age", "Gender", "Height", "ICUType")
_PLAUSIBLE = {"Age": (15, 120), "Height": (120, 220), "Weight": (25, 300)}
"""Of those who are described: others are typing errors (a height of 1.8 or 431 cm), and count as not measured."""

Frame = Any  # what pandas' stubs say of these results is a union of everything


class PhysioNet(BaseModel):
    """Intensive care stays of one hospital with PROXY sites: its four kinds of unit."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["physionet2012"]
    max_stays: Annotated[int, Field(ge=100)] | None = None
    """For quick runs: so many stays, drawn by ``seed``."""
    seed: Annotated[int, Field(ge=0)] = 0


def physionet(source: PhysioNet, folder: Path) -> Iterator[Hospital]:
    """A table of stays and a file of measurements for each kind of unit. ``folder`` holds the records."""
    died = pd.read_csv(folder / "Outcomes-a.txt").set_index("RecordID")["In-hospital_death"].sort_index()
    if source.max_stays is not None:
        some = np.random.default_rng(source.seed).permutation(len(died))[: source.max_stays]
        died = died.iloc[np.sort(some)]
    events: Frame = pd.read_csv(folder / "set-a.csv.gz")
    events = events[events["RecordID"].isin(died.index)]
    at_start = events[(events["Time"] == "00:00") & (events["Value"] >= 0)]
    first = at_start.drop_duplicates(["RecordID", "Parameter"]).pivot(
        index="RecordID", columns="Parameter", values="Value"
    )
    described = first.reindex(index=died.index, columns=["Age", "Gender", "Height", "Weight", "ICUType"])
    for name, (low, high) in _PLAUSIBLE.items():
        described[name] = described[name].where(described[name].between(low, high))
    table = pd.DataFrame(
        {
            "stay": died.index,
            "age": described["Age"].to_numpy(),
            "sex": described["Gender"].map({0.0: "female", 1.0: "male"}).to_numpy(),
            "height": described["Height"].to_numpy(),
            "admission_weight": described["Weight"].to_numpy(),
            "unit": described["ICUType"].map(UNITS).to_numpy(),
            "died": died.to_numpy(),
        }
    )
    clock = events["Time"].str.split(":", expand=True).astype(int)
    series = pd.DataFrame(
        {
            "stay": events["RecordID"],
            "hours": clock[0] + clock[1] / 60,
            "parameter": events["Parameter"],
            "value": events["Value"],
        }
    )
    # -1 is how the challenge writes what was not measured.
    series = series[~series["parameter"].isin(_STATIC) & (series["value"] >= 0)]
    terms = SeriesFile(path="series.parquet", row="stay", hours="hours", name="parameter", value="value")
    for unit, own in table.groupby("unit"):
        yield Hospital(str(unit), own, series=series[series["stay"].isin(own["stay"])], measured=terms)
