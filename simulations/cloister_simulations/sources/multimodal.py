"""Invented patients with a small chest picture, a note and a few values, each of which tells a part of the outcome.

One hospital takes no pictures. The true risk is known (column-free: ``multimodal_ehr`` alone draws it).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, apportion, invented_names

Vector = NDArray[np.float64]
Frame = Any

SIZE = 16
"""Pixels of a picture's side."""


class MultimodalEhr(BaseModel):
    """Invented patients with a picture, a note and a table, at hospitals of which the last has no pictures."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["multimodal-ehr"]
    sites: Annotated[int, Field(ge=2, le=50)] = 4
    patients: Annotated[int, Field(ge=100)] = 3000
    seed: Annotated[int, Field(ge=0)] = 0


def multimodal_ehr(source: MultimodalEhr, folder: Path) -> Iterator[Hospital]:
    """Each hospital's table; its pictures are written to ``folder/SITE/pictures``.

    Three independent findings make the outcome: an opacity in the picture, breathlessness in the note, oxygen
    saturation in the table. None of them shows in the other two.
    """
    rng = np.random.default_rng(source.seed)
    sizes = apportion(source.patients, rng.dirichlet(np.full(source.sites, 6.0)) + 0.2)
    first = 1
    for at, site in enumerate(invented_names(source.sites)):
        count = sizes[at]
        opacity, breathless = rng.random(count) < 0.4, rng.random(count) < 0.45
        saturation, age = np.clip(rng.normal(95, 2.5, count), 80, 100).round(1), rng.normal(62, 14, count)
        risk = 2.2 * opacity + 1.6 * breathless - 0.45 * (saturation - 95) + 0.03 * (age - 62) - 1.9
        table: Frame = pd.DataFrame(
            {
                "patient_id": [f"M{number:06d}" for number in range(first, first + count)],
                "age": np.clip(age, 18, 100).round().astype(int),
                "saturation": saturation,
                "note": [_note(rng, ill) for ill in breathless],
                "picture": [""] * count,
            }
        )
        if at < source.sites - 1:
            (folder / site / "pictures").mkdir(parents=True, exist_ok=True)
            table["picture"] = [f"pictures/{number}.npy" for number in table["patient_id"]]
            for name, ill in zip(table["picture"], opacity, strict=True):
                np.save(folder / site / name, _picture(rng, ill))
        table["icu"] = (rng.random(count) < 1 / (1 + np.exp(-risk))).astype(int)
        first += count
        yield Hospital(site, table)


_COMMON = [
    "patient",
    "admitted",
    "overnight",
    "stable",
    "family",
    "present",
    "medication",
    "given",
    "slept",
    "well",
    "appetite",
    "fair",
]
_BREATHLESS = ["dyspnoea at rest", "short of breath on stairs", "tachypnoeic and uses accessory muscles", "orthopnoea"]
_CALM = ["breathing comfortably", "no respiratory distress", "lungs clear on both sides", "walks without difficulty"]


def _note(rng: np.random.Generator, ill: bool) -> str:
    words = list(rng.choice(_COMMON, 8))
    words.insert(int(rng.integers(0, 8)), str(rng.choice(_BREATHLESS if ill else _CALM)))
    return " ".join(words)


def _picture(rng: np.random.Generator, ill: bool) -> NDArray[np.uint8]:
    """Two dark lungs on a brighter ground; an opacity is a bright blot in one of them."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    picture = np.full((SIZE, SIZE), 150.0)
    for centre in (0.28, 0.72):
        picture -= 90 * np.exp(-(((x - centre) / 0.16) ** 2) - ((y - 0.5) / 0.3) ** 2)
    if ill:
        at = rng.choice([0.28, 0.72]), rng.uniform(0.3, 0.7)
        picture += 80 * np.exp(-(((x - at[0]) / 0.12) ** 2) - ((y - at[1]) / 0.12) ** 2)
    return np.clip(picture + rng.normal(0, 12, picture.shape), 1, 255).astype(np.uint8)
