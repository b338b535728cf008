"""Patients who do not want their records used: a list at the hospital, honoured before anything else is done.

``opt_outs`` in ``site.yaml`` names a file with one patient's id a line. What is written down of it is how many there
are and a digest of their pseudonyms: of ids alone, whoever has the digest of a short list could find them by trying.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloister_client.encoders.scalars import word, words
from cloister_client.lineage_book import key_in
from cloister_client.site_file import SiteFile, read_site
from cloister_shared import audit
from cloister_shared.errors import DataRefused
from cloister_shared.pseudonyms import pseudonyms
from cloister_shared.schema import Schema

if TYPE_CHECKING:
    import pandas as pd

_EVENT = "opt-outs"


def read_opt_outs(site: SiteFile, folder: Path) -> frozenset[str]:
    """The ids on the hospital's list; none where ``site.yaml`` names no list.

    Raises:
        DataRefused: the list that it names cannot be read.
    """
    if site.opt_outs is None:
        return frozenset()
    try:
        return frozenset(listed(folder / site.opt_outs).values())
    except (OSError, UnicodeDecodeError) as error:
        raise DataRefused(
            f"The list of opt-outs of {site.site} cannot be read ({type(error).__name__}), so nobody's records are"
            " used.",
            mend="Correct opt_outs in site.yaml: a text file beside it with one patient's id a line.",
        ) from None


def listed(path: Path) -> dict[int, str]:
    """The patients' ids in a list, by the number of their line; lines that are empty or begin with # hold none."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return {n: word(line) for n, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")}


def stamp(folder: Path) -> object:
    """Another one whenever the hospital's list is another file, or was written anew."""
    name = read_site(folder / "site.yaml").opt_outs
    try:
        seen = (folder / name).stat() if name else None
    except OSError:
        return name, None  # whoever reads it will say so
    return name, seen and (seen.st_ino, seen.st_size, seen.st_mtime_ns)


def without_opt_outs(frame: pd.DataFrame, schema: Schema, site: SiteFile, folder: Path) -> pd.DataFrame:
    """The rows of all other patients. The audit log, if there is one, learns of each new list.

    Raises:
        DataRefused: the list cannot be read, or the plan does not say who a row's patient is.
    """
    if site.opt_outs is None:
        return frame
    names = read_opt_outs(site, folder)
    if schema.patient_id is None:
        raise DataRefused(
            f"{site.site} has patients who opted out, and the plan does not say whose each row is.",
            mend="Have the plan name table.patient_id; without it, nobody can be left out.",
        )
    noted(folder / "audit.jsonl", names)
    kept: Any = ~np.isin(words(frame[schema.patient_id]), sorted(names))
    return frame if kept.all() else frame[kept]


def noted(log: Path, names: frozenset[str]) -> None:
    """Count and digest of the list into the audit log, unless they are the newest there.

    Raises:
        LineageBroken: the key of the hospital's pseudonyms is lost.
    """
    if not log.exists():
        return
    made = pseudonyms(key_in(log.parent), names)
    digest = hashlib.sha256(np.sort(made).tobytes()).hexdigest()
    said: dict[str, Any] = {"count": len(names), "sha256": digest}

    def missing(entries: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
        newest = next((entry.said for entry in reversed(entries) if entry.what == _EVENT), None)
        return [] if newest == said else [(_EVENT, said)]

    audit.append_where(log, missing)
