"""Invented organs with lesions in them, as pictures or volumes, at hospitals whose scanners differ."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, invented_names

Picture = NDArray[np.float32]


class Phantoms(BaseModel):
    """An ellipse of tissue with none to three bright blobs in it, and where these are.

    Noise, brightness, contrast and how even the light is are each hospital's own, as those of scanners are.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["phantoms"]
    sites: Annotated[int, Field(ge=2, le=50)] = 4
    patients: Annotated[int, Field(ge=10)] = 60
    """At each hospital."""
    size: tuple[Annotated[int, Field(ge=8, le=256)], ...] = Field(default=(32, 32), min_length=2, max_length=3)
    files: Literal["npy", "nifti"] = "npy"
    seed: Annotated[int, Field(ge=0)] = 0
    noise: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Sd of a pixel, where tissue is 0.5 and a lesion 0.15 to 0.35 more; from half to one and a half times as much."""
    reach: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.12, 0.26)
    """The least and greatest half-width of a lesion, of half the picture's."""


def phantoms(source: Phantoms) -> Iterator[Hospital]:
    """One picture a patient in column ``scan``, its lesions in column ``lesions``; all as files of 0 to 255 and 0/1."""
    for number, site in enumerate(invented_names(source.sites)):
        generator = np.random.default_rng([source.seed, number])
        scanner = {
            "noise": source.noise * generator.uniform(0.5, 1.5),
            "contrast": generator.uniform(0.8, 1.2),
            "brightness": generator.uniform(-0.08, 0.08),
            "slant": generator.uniform(-0.15, 0.15),
        }
        rows: list[dict[str, Any]] = []
        files: dict[str, bytes] = {}
        for patient in range(1, source.patients + 1):
            scan, lesions = phantom(source.size, generator, reach=source.reach, **scanner)
            names = [f"{kind}/{patient:04d}.{_ENDINGS[source.files]}" for kind in ("scans", "lesions")]
            for name, pixels in zip(names, (scan, lesions), strict=True):
                files[name] = _written(pixels, source.files)
            rows.append({"patient_id": f"{site}-{patient:04d}", "scan": names[0], "lesions": names[1]})
        yield Hospital(site, pd.DataFrame(rows), files=files)


def phantom(
    size: tuple[int, ...],
    generator: np.random.Generator,
    *,
    noise: float,
    reach: tuple[float, float] = (0.12, 0.26),
    contrast: float = 1.0,
    brightness: float = 0.0,
    slant: float = 0.0,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture of 0 to 255 and its lesions, 0 or 1."""
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, length) for length in size], indexing="ij"))
    middle = generator.uniform(-0.12, 0.12, len(size)).reshape(-1, *[1] * len(size))
    radii = generator.uniform(0.65, 0.9, len(size)).reshape(middle.shape)
    organ = (((place - middle) / radii) ** 2).sum(0) < 1
    picture = np.where(organ, 0.5, 0.1)
    lesions = np.zeros(size, bool)
    for _ in range(generator.integers(0, 4)):
        way = generator.normal(size=len(size))
        at = way / np.linalg.norm(way) * generator.uniform(0.0, 0.65)
        at = middle + radii * at.reshape(middle.shape)
        extent = generator.uniform(*reach, len(size)).reshape(middle.shape)
        blob = ((((place - at) / extent) ** 2).sum(0) < 1) & organ
        picture = np.where(blob, 0.5 + generator.uniform(0.15, 0.35), picture)
        lesions |= blob
    picture = contrast * picture + brightness + slant * place[-1] + noise * generator.normal(size=size)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8), lesions.astype(np.uint8)


_ENDINGS = {"npy": "npy", "nifti": "nii.gz"}


def _written(pixels: NDArray[np.uint8], kind: str) -> bytes:
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, pixels)
        return file.getvalue()
    import nibabel as nib

    image: Any = nib.Nifti1Image(pixels, np.eye(4))  # type: ignore[attr-defined]
    return gzip.compress(image.to_bytes(), mtime=0)  # the same bytes each time
