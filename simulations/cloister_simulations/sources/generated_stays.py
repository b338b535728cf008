"""Invented intensive care stays: vitals that drift before the worst happens, measured more often as it does.

For whoever has no records at hand. Nobody's records, and so no licence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_client.site_file import SeriesFile
from cloister_simulations.site_folder import Hospital, apportion, invented_names

HOURS = 24
VITALS = {"heart_rate": (85.0, 14.0), "systolic_bp": (122.0, 18.0), "temperature": (37.0, 0.5), "lactate": (1.8, 0.6)}
"""Mean and sd of those who do well; lactate is a laboratory value, and rarer."""
_DRIFT = {"heart_rate": 1.0, "systolic_bp": -1.0, "temperature": 0.3, "lactate": 1.5}
"""Where each goes, in sd, by the end of the stay of somebody whose log-odds of dying are one higher."""
_EVERY = {"heart_rate": 1.5, "systolic_bp": 1.5, "temperature": 4.0, "lactate": 9.0}
"""Hours between two measurements, on average."""


class GeneratedStays(BaseModel):
    """Invented stays of 24 hours; sites differ in size, in what is ordinary there, and every other one in its units."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["generated-stays"]
    sites: Annotated[int, Field(ge=2, le=500)] = 4
    stays: Annotated[int, Field(ge=100)] = 1600
    seed: Annotated[int, Field(ge=0)] = 0


def generated_stays(source: GeneratedStays) -> Iterator[Hospital]:
    """Each site's stays and measurements."""
    rng = np.random.default_rng(source.seed)
    least = source.stays // (2 * source.sites)
    sizes = apportion(source.stays - least * source.sites, rng.dirichlet(np.full(source.sites, 3.0)))
    first = 1
    for at, (site, more) in enumerate(zip(invented_names(source.sites), sizes, strict=True)):
        table, series = _stays_of(rng, least + more, first)
        first += least + more
        terms = SeriesFile(path="series.csv", row="stay", minutes="minutes", name="vital", value="value")
        if at % 2 == 0:
            yield Hospital(site, table, series=series, measured=terms)
            continue
        # As a vendor's system writes it: other names, and temperature in Fahrenheit.
        warm = series["vital"] == "temperature"
        series["value"] = series["value"].where(~warm, series["value"] * 1.8 + 32).round(2)
        series["vital"] = series["vital"].replace({"heart_rate": "PULSE", "temperature": "TEMP_F"})
        columns = {"heart_rate": "PULSE", "temperature": "TEMP_F"}
        yield Hospital(site, table, columns, {"temperature": "degF"}, series=series, measured=terms)


def _stays_of(rng: np.random.Generator, stays: int, first: int) -> tuple[Any, Any]:
    """Stays numbered from ``first``, and what was measured of them."""
    age = np.clip(rng.normal(64, 15, stays), 18, 100).round()
    worse = rng.normal(0, 1, stays)  # where the stay is heading, which no column says
    risk = 1 / (1 + np.exp(-(-2.2 + 0.5 * (age - 64) / 15 + 1.6 * worse)))
    names = np.array([f"S{number:06d}" for number in range(first, first + stays)])
    table = pd.DataFrame({"stay": names, "age": age.astype(int), "died": (rng.random(stays) < risk).astype(int)})
    parts = [_measured(rng, names, worse, vital) for vital in VITALS]
    series = pd.concat(parts, ignore_index=True).sort_values(["stay", "minutes", "vital"], ignore_index=True)
    return table, series


def _measured(rng: np.random.Generator, names: NDArray[np.str_], worse: NDArray[np.float64], vital: str) -> Any:
    """One vital's measurements: the worse it goes, the more often somebody looks."""
    mean, sd = VITALS[vital]
    counts = 1 + rng.poisson(HOURS / _EVERY[vital] * np.exp(0.25 * worse))
    stay = np.repeat(np.arange(len(names)), counts)
    minutes = np.floor(rng.uniform(0, HOURS * 60, len(stay)))
    own = rng.normal(0, 0.6, len(names))
    drift = _DRIFT[vital] * worse[stay] * minutes / (HOURS * 60)
    value = mean + sd * (own[stay] + drift + rng.normal(0, 0.5, len(stay)))
    least = 0.3 if vital == "lactate" else 30.0
    return pd.DataFrame(
        {
            "stay": names[stay],
            "minutes": minutes.astype(int),
            "vital": vital,
            "value": np.maximum(value, least).round(2),
        }
    )
