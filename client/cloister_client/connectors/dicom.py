"""Connector ``dicom``: a folder of DICOM files, and a table of what was found in them, joined by a tag.

Only heads of files are read here, to find each row's files; ``encoders/dicom`` says whether they may be used.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_client.connectors.table import TableConnector
from cloister_client.encoders.dicom import Head, head
from cloister_client.site_file import DicomArchive, SiteFile, TableFile
from cloister_shared.errors import DataRefused
from cloister_shared.schema import ImageFeature, Mask, Schema

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("cloister.site")

Cell = str | tuple[str, ...] | None


@dataclass(frozen=True)
class DicomConnector:
    """Reads the archive that ``site.yaml`` names. Runs only inside the hospital."""

    site: SiteFile
    folder: Path

    @property
    def archive(self) -> DicomArchive:
        """The section of ``site.yaml``."""
        assert self.site.dicom is not None
        return self.site.dicom

    @property
    def source(self) -> str:
        """The archive's folder and the table beside it."""
        return f"{self.archive.folder} and {self.labels.source}"

    @property
    def labels(self) -> TableConnector:
        """The table of what was found."""
        return TableConnector(self.site.model_copy(update={"table": self._table}), self.folder)

    @property
    def _table(self) -> TableFile:
        assert self.archive.labels is not None, "an archive beside records is read through LinkedConnector"
        return self.archive.labels

    def describe(self) -> tuple[str, ...]:
        """The labels' columns; the pictures' name is the plan's to give.

        Raises:
            DataRefused: the table cannot be read.
        """
        return self.labels.describe()

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """The labels' rows, with the files of each row's pictures in the cells of image features.

        Of a two-dimensional picture that is one path, of a volume the paths of its slices; None where the archive has
        none. More than there should be are named together, and refused where they are opened. Where the outcome is a
        mask and the labels have no column of it, its cells are the segmentations of the same row.

        Raises:
            DataRefused: there is no folder, or the labels fail as a table does.
        """
        key, target = self.archive.join, schema.target
        pictures = [feature for feature in schema.features if isinstance(feature, ImageFeature)]
        others = tuple(feature for feature in schema.features if not isinstance(feature, ImageFeature))
        drawn = isinstance(target, Mask) and self._column(target.name) not in self.describe()
        wanted = schema.model_copy(update={"features": others})
        if drawn:  # the join stands in for a column that there is none of
            wanted = wanted.model_copy(update={"target": target.model_copy(update={"name": key})})
        frame = self.labels.rows(wanted, tuple(dict.fromkeys((key, *also))))
        frame = frame.loc[:, ~frame.columns.duplicated()].copy()
        keys = ["" if gap else str(cell).strip() for cell, gap in zip(frame[key], frame[key].isna(), strict=True)]
        for feature in pictures:
            frame[feature.name] = self.cells(frame, keys, partial(wanted_picture, feature))
        if drawn:
            frame[target.name] = self.cells(frame, keys, lambda one: one.is_mask)
        return frame.drop(columns=[key] if key not in (schema.patient_id, target.name, *also) else [])

    def count(self) -> int:
        """How many rows the labels have.

        Raises:
            DataRefused: they cannot be read as a table.
        """
        return self.labels.count()

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """The labels' units.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        return self.labels.factors(schema)

    def keys(self) -> list[str]:
        """What the labels join by, each once: for whoever fetches the pictures.

        Raises:
            DataRefused: the table or the column is missing.
        """
        name = self._column(self.archive.join)
        frame = self.labels.frame()
        if name not in frame.columns:
            raise DataRefused(
                f"{self.labels.source} of {self.site.site} has no column {name}.",
                mend=f"Map it in site.yaml under dicom.labels.columns: {{{self.archive.join}: COLUMN}}.",
            )
        return sorted({str(cell).strip() for cell in frame[name].dropna()})

    def cells(self, frame: pd.DataFrame, keys: Sequence[str], meant: Callable[[Head], bool]) -> pd.Series[Any]:
        """For each row the file that is meant, or all of them."""
        import pandas as pd

        found: list[Cell] = []
        for key in keys:
            paths = tuple(one.path for one in self.heads.get(key, []) if key and meant(one))
            found.append(None if not paths else paths[0] if len(paths) == 1 else paths)
        return pd.Series(found, index=frame.index, dtype=object)

    def _column(self, name: str) -> str:
        return self._table.columns.get(name, name)

    @cached_property
    def heads(self) -> dict[str, list[Head]]:
        """What the archive holds, by the tag that joins."""
        archive = self.folder / self.archive.folder
        if not archive.is_dir():
            raise DataRefused(
                f"{self.site.site}: there is no folder {self.archive.folder}.",
                mend="Correct dicom.folder in site.yaml; it is read beside that file.",
            )
        found: dict[str, list[Head]] = defaultdict(list)
        unread = 0
        for path in sorted(archive.rglob("*")):
            if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
                continue
            try:
                one = head(path, self.archive.join, str(path.relative_to(self.folder)))
                found[one.key].append(one)
            except DataRefused:
                unread += 1
        if unread:
            log.warning("%d files of %s are not DICOM, and are left out.", unread, self.archive.folder)
        return dict(found)


def wanted_picture(feature: ImageFeature, one: Head) -> bool:
    """Whether a file is such a picture, by its head."""
    return one.is_picture and one.meets(feature)
