"""Archives of DICOM files at hospitals that keep them each in its own way; what is on them is invented."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, invented_names
from cloister_simulations.sources.phantoms import phantom

SYNTAXES = {
    "plain": "1.2.840.10008.1.2.1",
    "rle": "1.2.840.10008.1.2.5",
    "jpeg2000": "1.2.840.10008.1.2.4.90",
}
"""Explicit VR little endian, RLE lossless, JPEG 2000 lossless (PS3.5, annex A)."""

AIR, TISSUE = -160.0, 240.0
"""Hounsfield units of a phantom's 0 and 255: what a window of centre 40 and width 400 shows."""

_CT = "1.2.840.10008.5.1.4.1.1.2"
_ROOT = "1.2.826.0.1.3680043.10.1421"
"""Of the UIDs that are invented here; below pydicom's own."""


class DicomFolder(BaseModel):
    """Invented CT slices with or without a lesion, and a table of findings, joined by accession number.

    The same Hounsfield units are stored as unsigned or signed, bright or inverted, plain or compressed; the last
    hospital's files name invented patients, and its site.yaml allows that.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["dicom-folder"]
    sites: Annotated[int, Field(ge=2, le=50)] = 4
    patients: Annotated[int, Field(ge=10)] = 100
    """At each hospital."""
    size: Annotated[int, Field(ge=16, le=512)] = 32
    seed: Annotated[int, Field(ge=0)] = 0


def dicom_folder(source: DicomFolder) -> Iterator[Hospital]:
    """Each hospital an archive ``archive/ACCESSION.dcm`` and ``findings.csv``."""
    for number, site in enumerate(invented_names(source.sites)):
        generator = np.random.default_rng([source.seed, number, 1])
        named = number == source.sites - 1
        noise = 0.08 * generator.uniform(0.5, 1.5)
        files: dict[str, bytes] = {}
        rows: list[dict[str, Any]] = []
        for patient in range(1, source.patients + 1):
            picture, lesions = phantom((source.size, source.size), generator, noise=noise)
            units = np.round(AIR + (TISSUE - AIR) * picture / 255).astype(np.int16)
            accession = f"{site}-{patient:05d}"
            tags = {"AccessionNumber": accession, "PatientID": f"P{number}{patient:05d}", "BodyPartExamined": "ABDOMEN"}
            tags |= {"PatientName": "Invented^Patient"} if named else {"PatientIdentityRemoved": "YES"}
            files[f"archive/{accession}.dcm"] = dicom_file(
                units,
                uid=f"{_ROOT}.{source.seed}.{number}.{patient}",
                syntax=list(SYNTAXES)[number % 3],
                inverted=number % 4 == 1,
                signed=number % 2 == 0,
                **tags,
            )
            rows.append({"patient_id": tags["PatientID"], "ACCESSION": accession, "lesion": int(lesions.any())})
        findings = pd.DataFrame(rows)
        labels = {"path": "findings.csv", "columns": {"AccessionNumber": "ACCESSION"}}
        sections: dict[str, object] = {"dicom": {"folder": "archive", "labels": labels, "join": "AccessionNumber"}}
        if named:
            sections["pictures"] = {"identified": True}
        files["findings.csv"] = findings.to_csv(index=False, lineterminator="\n").encode()
        yield Hospital(site, findings, files=files, sections=sections)


def dicom_file(
    units: NDArray[np.int16],
    *,
    uid: str,
    syntax: str = "plain",
    inverted: bool = False,
    signed: bool = False,
    **tags: Any,
) -> bytes:
    """A CT slice of these Hounsfield units, as a DICOM part 10 file; ``tags`` go over the usual ones."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    intercept = 0 if signed else -1024
    stored = units.astype(np.int32) - intercept
    if inverted:
        stored = -1 - stored if signed else 4095 - stored
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(SYNTAXES["plain"])
    data = Dataset()
    data.file_meta = meta
    usual: dict[str, Any] = {
        "SOPClassUID": _CT,
        "SOPInstanceUID": uid,
        "StudyInstanceUID": f"{uid}.1",
        "SeriesInstanceUID": f"{uid}.2",
        "Modality": "CT",
        "PatientName": "",
        "PatientBirthDate": "",
        "Rows": units.shape[0],
        "Columns": units.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": int(signed),
        "RescaleSlope": 1,
        "RescaleIntercept": intercept,
    }
    for name, value in {**usual, **tags}.items():
        setattr(data, name, value)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    data.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    data["PixelData"].VR = "OW"
    if syntax != "plain":
        data.compress(SYNTAXES[syntax], generate_instance_uid=False)
    written = io.BytesIO()
    data.save_as(written, enforce_file_format=True)
    return written.getvalue()
