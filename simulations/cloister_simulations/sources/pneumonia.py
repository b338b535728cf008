"""Children's chest X-rays of one hospital, dealt out to PROXY hospitals."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, apportion, invented_names


class Pneumonia(BaseModel):
    """PneumoniaMNIST (Kermany et al. 2018; Yang et al. 2023), 28 x 28 pixels, at PROXY hospitals.

    All of it comes from one hospital, which did not say whose a picture is: each counts as a patient. So the
    differences between these sites are those that are drawn here, in size and in how many of the sick are sent where;
    no figure speaks for a real one. The column ``split`` keeps the official test pictures apart; the official
    validation pictures train.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["pneumonia"]
    sites: Annotated[int, Field(ge=2, le=12)] = 5
    seed: Annotated[int, Field(ge=0)] = 0
    pictures: Annotated[int, Field(ge=100)] | None = None
    """For quick runs: so many pictures at most, as many of each kind in each part as there are in proportion."""


def pneumonia(source: Pneumonia, folder: Path) -> Iterator[Hospital]:
    """From ``folder``, which has pneumoniamnist.npz; each hospital a table and a PNG a picture.

    The second hospital is twice as large as the first, and so on to 1.5 times; the last sees the most pneumonia.
    """
    with np.load(folder / "pneumoniamnist.npz") as file:
        parts = {name: file[name] for name in file.files}
    images = np.concatenate([parts[f"{part}_images"] for part in ("train", "val", "test")])
    ill = np.concatenate([parts[f"{part}_labels"] for part in ("train", "val", "test")]).ravel().astype(int)
    testing = np.arange(len(ill)) >= len(ill) - len(parts["test_labels"])
    share = min(1.0, (source.pictures or len(ill)) / len(ill))
    dealt: list[list[int]] = [[] for _ in range(source.sites)]
    generator = np.random.default_rng(source.seed)
    sizes = np.linspace(1.0, 1.5, source.sites)
    for sick in (0, 1):
        weights = sizes * (np.linspace(0.8, 1.2, source.sites) if sick else np.linspace(1.2, 0.8, source.sites))
        for part in (False, True):
            at = generator.permutation(np.flatnonzero((ill == sick) & (testing == part)))
            at = at[: max(source.sites, round(share * len(at)))]
            ends = np.cumsum(apportion(len(at), weights))
            for site, own in zip(dealt, np.split(at, ends[:-1]), strict=True):
                site.extend(own.tolist())
    for site, own in zip(invented_names(source.sites), dealt, strict=True):
        own.sort()
        table: dict[str, Any] = {
            "patient_id": [f"X{at:05d}" for at in own],
            "xray": [f"images/{at:05d}.png" for at in own],
            "split": ["test" if testing[at] else "train" for at in own],
            "pneumonia": ill[own],
        }
        yield Hospital(site, pd.DataFrame(table), files={f"images/{at:05d}.png": _png(images[at]) for at in own})


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()
