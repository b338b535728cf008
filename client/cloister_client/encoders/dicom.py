"""A picture, a volume or a mask from DICOM files.

A file is used, or refused in one sentence that says what it is and never what stands in it. First it is held against
what the hospital allows (who the patient is, private tags, writing in the pixels), then against the plan's feature.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.encoders.dicom_pixels import frames, place, places
from cloister_client.site_file import PictureTerms
from cloister_shared.errors import DataRefused
from cloister_shared.schema import ImageFeature

Pixels = NDArray[np.float32]

MOST = 2**29
"""Pixels of one file: more is no picture, or is one that was made to fill the memory."""

READER = "Install it: pip install 'cloister[imaging]'."

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"

IDENTIFYING = (
    "PatientID",
    "PatientBirthDate",
    "PatientBirthTime",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientTelecomInformation",
    "PatientInsurancePlanCodeSequence",
    "MilitaryRank",
    "CountryOfResidence",
    "RegionOfResidence",
    "MedicalRecordLocator",
    "PatientComments",
    "ResponsibleOrganization",
    "InstitutionAddress",
)
"""Tags that tell who a patient is (PS3.15 annex E, what the basic profile empties), beside every person's name."""


@dataclass(frozen=True)
class Slice:
    """A file that may be used: its data set, and where it lies along the patient."""

    data: Any
    place: float | None
    """Millimetres along the normal of its plane."""
    number: int | None


@dataclass(frozen=True)
class Head:
    """What of a file tells whether it is looked for; none of it is said to anybody."""

    path: str
    key: str
    """The tag that joins."""
    kind: str
    modality: str
    part: str
    is_picture: bool

    @property
    def is_mask(self) -> bool:
        """Whether it is a segmentation."""
        return self.kind.startswith(SEGMENTATION)

    def meets(self, feature: ImageFeature) -> bool:
        """Whether it is of the plan's modality, and of the part of the body if it says which."""
        parts = [name.upper() for name in feature.body_part]
        return (not feature.modality or self.modality in [name.upper() for name in feature.modality]) and (
            not parts or not self.part or self.part in parts
        )


# --- reading -------------------------------------------------------------------------------------------------
def picture(paths: Sequence[Path], feature: ImageFeature, allowed: PictureTerms) -> Pixels:
    """[channels, *its own size] of one file, or of the slices of one volume; grey values in the modality's own unit.

    Colours are 0 to 255, and bright is always more. What is seen of it is for the plan's window to say.

    Raises:
        DataRefused: a file cannot be read, may not be used, or is not what the plan asks for.
    """
    files = [opened(path, allowed) for path in paths]
    volume = len(feature.size) == 3
    with _quiet("a file whose tags cannot be read", "Export it again."):
        for file in files:
            _fits(file, feature)
    with _quiet("a picture whose pixels cannot be unpacked", "Export it without compression."):
        if len(files) == 1:
            read = frames(files[0], feature.channels)
        elif not volume:
            raise DataRefused("several files where the plan wants one picture", mend="Name one file.")
        else:
            read = np.concatenate([frames(one.data, feature.channels) for one in in_order(files)], axis=1)
    if volume and read.shape[1] == 1:
        raise DataRefused("one slice where the plan wants a volume", mend="Name the folder that holds the series.")
    if not volume and read.shape[1] > 1:
        raise DataRefused("several frames where the plan wants one picture", mend="Export the frame that is meant.")
    return read if volume else read[:, 0]


def mask(path: Path, size: int, allowed: PictureTerms, of: Sequence[Path] = ()) -> Pixels:
    """[1, *its own size] of a segmentation, 0 or 1, ``size`` dimensions; every segment of it counts.

    A segmentation leaves slices out that hold nothing: ``of`` are the files of the volume it was drawn on, whose
    slices it is put upon.

    Raises:
        DataRefused: it cannot be read, may not be used, or was drawn on something else.
    """
    data = opened(path, allowed)
    if not _class(data).startswith(SEGMENTATION):
        return picture([path], ImageFeature(name="mask", kind="image", size=(1,) * size), allowed)
    with _quiet("a segmentation that cannot be unpacked", "Export it again."):
        from pydicom.pixels.utils import pixel_array

        segments = np.asarray(pixel_array(data)).reshape(-1, data.Rows, data.Columns).astype(bool)
        known = places(data)[: len(segments)]
        if size == 2:
            if len({round(one, 2) for one in known}) > 1:
                raise DataRefused("a mask of several slices where the plan wants one", mend="Export the one meant.")
            return segments.max(axis=0, keepdims=True).astype(np.float32)
        source = [opened(one, allowed) for one in of]
        if len(source) > 1:
            lying = [one.place for one in in_order(source) if one.place is not None]
        else:
            lying = sorted(places(source[0])) if source else []
        if len(known) < len(segments) or not lying:
            raise DataRefused(
                "a segmentation whose slices cannot be put upon the volume's",
                mend="Name the DICOM series that it was drawn on, and export both with their positions.",
            )
        gap = float(np.min(np.diff(lying))) if len(lying) > 1 else 1.0
        drawn = np.zeros((len(lying), *segments.shape[1:]), bool)
        for segment, where in zip(segments, known, strict=True):
            at = int(np.argmin(np.abs(np.asarray(lying) - where)))
            if abs(lying[at] - where) > gap / 2:
                raise DataRefused("a segmentation of another series", mend="Name the one drawn on this volume.")
            drawn[at] |= segment
        return drawn[None].astype(np.float32)


def opened(path: Path, allowed: PictureTerms) -> Any:
    """The data set of a file that the hospital allows to be used.

    Raises:
        DataRefused: it cannot be read, or may not be used.
    """
    if not path.is_file():
        raise DataRefused("a file that is not there", mend="Correct the path.")
    with _quiet("a file that is not DICOM, or whose beginning is gone", "Export it again as a DICOM part 10 file."):
        from pydicom import dcmread

        data = dcmread(path)
        data.get("PixelData")
        kind = _class(data)
        if "PixelData" not in data:
            raise DataRefused("a DICOM object without a picture", mend="Leave out reports, plans and waveforms.")
        _may_be_used(data, kind, allowed)
        return data


def head(path: Path, key: str, name: str) -> Head:
    """A file's head, joined by the tag ``key``; ``name`` is what it will be known by.

    Raises:
        DataRefused: it is not DICOM.
    """
    with _quiet("a file that is not DICOM", "Leave it out."):
        from pydicom import dcmread

        tags = ["SOPClassUID", "Modality", "BodyPartExamined", "Rows", key]
        data = dcmread(path, stop_before_pixels=True, specific_tags=tags)
        kind = _class(data)
        picture = "Rows" in data and not kind.startswith((SEGMENTATION, DOSE))
        modality, part = (str(data.get(tag, "")).upper() for tag in ("Modality", "BodyPartExamined"))
        return Head(name, str(data.get(key, "")).strip(), kind, modality, part, picture)


def in_order(files: Sequence[Any]) -> list[Slice]:
    """The slices of one volume, by where they lie; of old scanners that do not say, by their number.

    Raises:
        DataRefused: they are not one whole volume.
    """
    slices = [Slice(data, place(data, data), _whole(data.get("InstanceNumber"))) for data in files]
    if len({str(data.get("SeriesInstanceUID")) for data in files}) > 1:
        raise DataRefused("slices of several series", mend="Give each series a folder of its own.")
    shapes = {(data.get("Rows"), data.get("Columns"), int(data.get("NumberOfFrames") or 1)) for data in files}
    if len(shapes) > 1 or shapes.pop()[2] > 1:
        raise DataRefused("slices of different sizes", mend="Leave out scouts and reformats.")
    if all(one.place is not None for one in slices):
        slices.sort(key=lambda one: one.place or 0.0)
        gaps = np.diff([one.place or 0.0 for one in slices])
        if (gaps < 1e-3).any():
            raise DataRefused("two slices in one place", mend="Leave out the copy, or the other phase.")
        if (gaps > 1.5 * np.median(gaps)).any():
            raise DataRefused("a volume that lacks a slice", mend="Export the series as a whole.")
    elif all(one.number is not None for one in slices) and len({one.number for one in slices}) == len(slices):
        slices.sort(key=lambda one: one.number or 0)
    else:
        raise DataRefused("slices that do not say where they lie", mend="Export the series again.")
    return slices


def identified(data: Any) -> bool:
    """Whether it tells who the patient is, and does not say that this was taken out."""
    if str(data.get("PatientIdentityRemoved", "")).upper() == "YES":
        return False
    return any(
        element.value not in (None, "", b"", [])
        for element in data.iterall()
        if element.VR == "PN" or element.keyword in IDENTIFYING
    )


# --- what the hospital allows --------------------------------------------------------------------------------
def _may_be_used(data: Any, kind: str, allowed: PictureTerms) -> None:
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise DataRefused("a picture with writing in its pixels", mend="Have it cleaned; no switch allows it.")
    if str(data.get("RecognizableVisualFeatures", "")).upper() == "YES":
        raise DataRefused("a picture that shows who it is", mend="Have it defaced; no switch allows it.")
    if not allowed.identified and identified(data):
        raise DataRefused(
            "a file that tells who the patient is",
            mend="Have it de-identified, or write pictures: {identified: true} in site.yaml: nothing of it leaves.",
        )
    captured = kind.startswith(SECONDARY_CAPTURE) or str(data.get("ConversionType", "")) in ("WSD", "DV", "SI", "SD")
    if captured and not allowed.captures and str(data.get("BurnedInAnnotation", "")).upper() != "NO":
        raise DataRefused(
            "a capture of a screen or a scan that does not say whether there is writing in it",
            mend="Look at these pictures, then write pictures: {captures: true} in site.yaml, or leave them out.",
        )
    if not allowed.private_tags and any(element.tag.is_private for element in data.iterall()):
        raise DataRefused(
            "a file with private tags, in which anything may stand",
            mend="Have them taken out, or write pictures: {private_tags: true} in site.yaml: none of them is read.",
        )


# --- what the plan asks for ----------------------------------------------------------------------------------
def _fits(data: Any, feature: ImageFeature) -> None:
    kind = _class(data)
    if kind.startswith(SEGMENTATION):
        raise DataRefused("a segmentation where the plan wants a picture", mend="Name the series it was drawn on.")
    if kind.startswith(DOSE):
        raise DataRefused("a dose where the plan wants a picture", mend="Name the series that was planned on.")
    if feature.modality and str(data.get("Modality", "")).upper() not in [name.upper() for name in feature.modality]:
        raise DataRefused("a picture of another modality than the plan's", mend="Select the right series.")
    part = str(data.get("BodyPartExamined", "")).upper()
    if feature.body_part and part not in [name.upper() for name in feature.body_part]:
        said = "of another part of the body than the plan's" if part else "that does not say which part of the body"
        raise DataRefused(f"a picture {said}", mend="Select the right series, or have the tag filled in.")
    frames = int(data.get("NumberOfFrames") or 1)
    if not 0 < int(data.get("Rows") or 0) * int(data.get("Columns") or 0) * frames <= MOST:
        raise DataRefused("a picture of an impossible size", mend="Export it again.")


# --- small things --------------------------------------------------------------------------------------------
def _class(data: Any) -> str:
    return str(data.get("SOPClassUID", ""))


def _whole(value: Any) -> int | None:
    return None if value in (None, "") else int(value)


@contextlib.contextmanager
def _quiet(said: str, mend: str) -> Iterator[None]:
    """Refuse whatever goes wrong in this way: what pydicom raises, warns of and logs may quote a tag."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataRefused:
        raise
    except MemoryError:
        raise
    except ModuleNotFoundError:
        raise DataRefused("a DICOM file, and no reader of it here", mend=READER) from None
    except Exception:
        raise DataRefused(said, mend=mend) from None
    finally:
        logger.setLevel(level)
