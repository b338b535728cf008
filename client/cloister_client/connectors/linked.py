"""Sources joined inside the hospital: files and an archive of pictures beside the records, by patient or encounter.

Which of the plan's names a file gives is said in ``link.columns``; all others are the records' own. Keys are compared
as they are written, but for blanks around them and a spreadsheet's ``.0``: 007 and 7 are two patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.connectors.coded import ENCOUNTER, CodedConnector
from cloister_client.connectors.connector import Connector
from cloister_client.connectors.dicom import DicomConnector, wanted_picture
from cloister_client.connectors.table import TableConnector
from cloister_client.encoders.scalars import words
from cloister_client.opt_outs import read_opt_outs
from cloister_client.site_file import LinkedFile, SiteFile, TableFile
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Feature, ImageFeature, Itself, Schema, target_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LinkedConnector:
    """The records that ``site.yaml`` names, and what is joined to them. Runs only inside the hospital."""

    main: Connector

    @property
    def site(self) -> SiteFile:
        """The hospital's own file."""
        return self.main.site

    @property
    def folder(self) -> Path:
        """Where that file is."""
        return self.main.folder

    @property
    def source(self) -> str:
        """The records and all that is beside them."""
        beside = [Path(link.path).name for link in self.site.link]
        beside += [self.site.dicom.folder] if self.site.dicom else []
        return " and ".join((self.main.source, *beside))

    def describe(self) -> tuple[str, ...]:
        """The records' columns or codes, and the columns that are joined to them.

        Raises:
            DataRefused: a source cannot be read, or a file has not the columns that it is to give.
        """
        found = list(self.main.describe())
        for link in self.site.link:
            there = self.file(link, ()).describe()
            if absent := [column for column in (link.key, *link.columns.values()) if column not in there]:
                raise DataRefused(
                    f"{link.path} of {self.site.site} has no column {', '.join(absent)}.",
                    mend="Correct link in site.yaml, or the file's header.",
                )
            found += link.columns.values()
        return tuple(found)

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """See ``Connector``: the records' rows, each with what the other sources have under its key.

        Raises:
            DataRefused: a source cannot be read, has several rows for a key, or has keys that fit none of the records.
        """
        given = {name for link in self.site.link for name in link.columns}
        by = tuple(dict.fromkeys(self._column(each, schema) for each in self._keys(schema, also)))
        own = tuple(dict.fromkeys((*(name for name in also if name not in given), *by)))
        frame = self.main.rows(self.own_part(schema), tuple(name for name in own if name != schema.patient_id))
        notes = list(frame.attrs.get("notes", []))
        wanted = self._not_opted_out(frame, schema)
        parts: dict[str, pd.Series[Any]] = {}
        for link in self.site.link:
            if names := self._names(link, schema, also):
                keys = words(frame[self._column(link.by, schema)])
                parts |= self._joined(link, names, schema, also, frame, np.where(wanted, keys, ""), notes)
        if (pictures := self._pictures(schema)) and self.site.dicom:
            keys = words(frame[self._column(self.site.dicom.by, schema)])
            parts |= self._seen(pictures, frame, np.where(wanted, keys, ""), notes)
        frame = frame.drop(columns=[name for name in by if name not in (schema.patient_id, *also)]).assign(**parts)
        frame.attrs["notes"] = notes
        return frame

    def count(self) -> int:
        """How many records there are.

        Raises:
            DataRefused: they cannot be read.
        """
        return self.main.count()

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """Of the records' columns and of those of the files.

        Raises:
            DataRefused: a unit is not known, or does not measure the same thing.
        """
        found = self.main.factors(self.own_part(schema))
        for link in self.site.link:
            found |= self.file(link, self._names(link, schema)).factors(self.part(link, schema))
        return found

    # --- who gives what ---------------------------------------------------------------------------------------
    def own_part(self, schema: Schema) -> Schema:
        """What of a plan's schema the records themselves have to give."""
        others = {name for link in self.site.link for name in link.columns}
        others |= {feature.name for feature in self._pictures(schema)}
        return _narrowed(schema, [feature for feature in schema.features if feature.name not in others], others)

    def part(self, link: LinkedFile, schema: Schema) -> Schema:
        """What of a plan's schema a file gives."""
        features = [feature for feature in schema.features if feature.name in link.columns]
        narrowed = _narrowed(schema, features, set(target_columns(schema.target)) - set(link.columns))
        return narrowed.model_copy(update={"patient_id": None})

    def file(self, link: LinkedFile, names: Sequence[str]) -> TableConnector:
        """A linked file as a table of these names, and of its key under a name that no feature can have."""
        columns = {name: link.columns[name] for name in names} | {_KEY: link.key}
        units = {name: unit for name, unit in link.units.items() if name in names or name not in link.columns}
        table = TableFile(path=link.path, columns=columns, units=units)
        return TableConnector(self.site.model_copy(update={"table": table}), self.folder)

    def _pictures(self, schema: Schema) -> list[ImageFeature]:
        """The pictures that an archive gives: all that no file does."""
        given = {name for link in self.site.link for name in link.columns}
        if self.site.dicom is None:
            return []
        return [f for f in schema.features if isinstance(f, ImageFeature) and f.name not in given]

    def _names(self, link: LinkedFile, schema: Schema, also: Sequence[str] = ()) -> list[str]:
        """The plan's names that a file gives."""
        known = [*(feature.name for feature in schema.features), *target_columns(schema.target), *also]
        return [name for name in dict.fromkeys(known) if name in link.columns]

    def _keys(self, schema: Schema, also: Sequence[str]) -> list[str]:
        """What is joined by."""
        found = [link.by for link in self.site.link if self._names(link, schema, also)]
        return [*found, self.site.dicom.by] if self.site.dicom and self._pictures(schema) else found

    def _column(self, by: str, schema: Schema) -> str:
        """The column of the records that holds such a key."""
        if by == "patient":
            if schema.patient_id is None:
                raise DataRefused(
                    f"{self.site.site} joins other sources by patient, and the plan does not say whose each row is.",
                    mend="Have the plan name table.patient_id, or write by: COLUMN in site.yaml.",
                )
            return schema.patient_id
        if isinstance(self.main, CodedConnector):
            if by != "encounter":
                raise DataRefused(
                    f"site.yaml of {self.site.site} joins by {by}, and clinical records have no such column.",
                    mend="Write by: patient or by: encounter.",
                )
            return ENCOUNTER
        return by

    def _not_opted_out(self, frame: pd.DataFrame, schema: Schema) -> NDArray[np.bool_]:
        """Records for which anything is looked up: of those who opted out nothing is."""
        if schema.patient_id is None or self.site.opt_outs is None:
            return np.ones(len(frame), bool)
        return ~np.isin(words(frame[schema.patient_id]), sorted(read_opt_outs(self.site, self.folder)))

    # --- joining ----------------------------------------------------------------------------------------------
    def _joined(
        self,
        link: LinkedFile,
        names: Sequence[str],
        schema: Schema,
        also: Sequence[str],
        frame: pd.DataFrame,
        keys: NDArray[Any],
        notes: list[str],
    ) -> dict[str, pd.Series[Any]]:
        """Each name's cells, in the order of the records; None where the file has no row."""
        import pandas as pd

        outcome = target_columns(schema.target)
        if 0 < len(missing := [name for name in outcome if name not in names]) < len(outcome):
            raise DataRefused(
                f"site.yaml of {self.site.site} joins a part of the outcome from {link.path}, and not"
                f" {', '.join(missing)}.",
                mend="Give all columns of the outcome in one source.",
            )
        beside = (_KEY, *(name for name in also if name in link.columns))
        there = self.file(link, names).rows(self.part(link, schema), beside)
        at = self._places(link, words(there[_KEY]), there[list(names)], keys)
        self._told(Path(link.path).name, keys, at >= 0, words(there[_KEY]), notes)
        found: dict[str, pd.Series[Any]] = {}
        for name in names:
            cells = there[name].tolist()
            found[name] = pd.Series([cells[row] if row >= 0 else None for row in at], index=frame.index, dtype=object)
        return found

    def _places(
        self, link: LinkedFile, theirs: NDArray[Any], cells: pd.DataFrame, keys: NDArray[Any]
    ) -> NDArray[np.int64]:
        """The row of a file for each record, or -1."""
        needed, first, last = set(keys[keys != ""]), dict[str, int](), dict[str, int]()
        differing: dict[str, list[int]] = {}
        again = cells.assign(**{_KEY: theirs}).duplicated(keep="first").to_numpy()
        for row, key in enumerate(theirs):
            if key not in needed:
                continue
            if key in first and not again[row]:
                differing.setdefault(key, [first[key] + 1]).append(row + 1)
            first.setdefault(key, row)
            last[key] = row
        if differing and link.several == "refuse":
            example = " and ".join(map(str, next(iter(differing.values()))[:2]))
            raise DataRefused(
                f"{self.site.site}: {Path(link.path).name} has several rows for {len(differing)} of"
                f" {len(needed)} keys, such as rows {example}.",
                mend="Leave one row a key, or write several: first or several: last in site.yaml, in the file's order.",
            )
        chosen = first if link.several == "first" else last
        return np.array([chosen.get(key, -1) if key else -1 for key in keys], np.int64)

    def _seen(
        self, pictures: Sequence[ImageFeature], frame: pd.DataFrame, keys: NDArray[Any], notes: list[str]
    ) -> dict[str, pd.Series[Any]]:
        """The files of each record's pictures."""
        archive = DicomConnector(self.site, self.folder)
        known = np.array(sorted(archive.heads), dtype=str)
        self._told(archive.archive.folder, keys, np.isin(keys, known) & (keys != ""), known, notes)
        return {
            feature.name: archive.cells(frame, list(map(str, keys)), partial(wanted_picture, feature))
            for feature in pictures
        }

    def _told(
        self, what: str, keys: NDArray[Any], found: NDArray[np.bool_], theirs: NDArray[Any], notes: list[str]
    ) -> None:
        """How many records have nothing there; refused where none has, or where the keys are written in two ways.

        Raises:
            DataRefused: of many records no key is there, or some are but for leading zeros.
        """
        lacking = ~found & (keys != "")
        if not lacking.any():
            return
        matched = set(keys[found])
        free = {key.lstrip("0") for key in theirs if key and key not in matched}
        bare = sum(key.lstrip("0") in free for key in keys[lacking])
        if bare:
            raise DataRefused(
                f"{self.site.site}: the keys of {bare} records are in {what} but for leading zeros.",
                mend="Write them the same in both; a spreadsheet takes leading zeros away. Nothing is guessed.",
            )
        if not found.any() and len(found) > _FEW:
            raise DataRefused(
                f"{self.site.site}: {what} has nothing under the key of any record.",
                mend="Correct key and by (of an archive: join and by) in site.yaml: both have to hold the same ids.",
            )
        notes.append(f"records that {what} has nothing for: {int(lacking.sum())}")


_KEY = "key of the link"
_FEW = 10
"""Records that may all be without what is joined: new ones that are scored."""


def _narrowed(schema: Schema, features: Sequence[Feature], others: set[str]) -> Schema:
    """These features alone, and no outcome where another source gives it."""
    update: dict[str, Any] = {"features": tuple(features)}
    if others & set(target_columns(schema.target)):
        update["target"] = Itself(kind="itself")
    return schema.model_copy(update=update)
