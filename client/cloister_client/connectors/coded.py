"""Connectors of clinical records: dated facts under codes, whatever keeps them, made into a plan's rows in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloister_client.connectors.clinical import Records, all_codes, asked
from cloister_client.connectors.selection import select
from cloister_client.site_file import Coded, SiteFile
from cloister_shared.errors import DataRefused
from cloister_shared.schema import Schema

if TYPE_CHECKING:
    import pandas as pd


ENCOUNTER = "LOCAL:encounter"
"""The column of the encounters' own ids."""


@dataclass(frozen=True)
class CodedConnector:
    """Reads what ``site.yaml`` names. Runs only inside the hospital."""

    site: SiteFile
    folder: Path
    terms: Coded
    """The source's section of ``site.yaml``."""
    named: Callable[[], str]
    """What is read, in a word."""
    records: Callable[[frozenset[str] | None], Records]
    """The records of these codes, or of all; raises DataRefused where they cannot be read."""

    @property
    def source(self) -> str:
        """The folder's or the database's name, never an account."""
        return self.named()

    def describe(self) -> tuple[str, ...]:
        """The codes that facts are written under, the most frequent first.

        Raises:
            DataRefused: the records cannot be read.
        """
        facts = self.records(None).facts
        counts = np.bincount(facts.code, minlength=len(facts.codes))
        return tuple(facts.codes[at] for at in np.argsort(-counts, kind="stable"))

    def rows(self, schema: Schema, also: tuple[str, ...] = ()) -> pd.DataFrame:
        """See ``Connector``; a row is an encounter, as the plan's anchor says. ``also`` may name ``ENCOUNTER``.

        Raises:
            DataRefused: the records cannot be read, or do not agree with the plan and site.yaml.
        """
        if columns := [name for name in also if name != ENCOUNTER]:
            raise DataRefused(
                f"The plan reads the column {columns[0]}, and clinical records have no columns.",
                mend="Have the plan hold patients out by number: evaluation: {holdout: 0.25}.",
            )
        wanted = all_codes(schema, asked(schema, self.terms, self.site.site))
        return select(self.records(wanted), schema, self.terms, self.site.site, ENCOUNTER if also else None)

    def count(self) -> int:
        """How many encounters there are.

        Raises:
            DataRefused: they cannot be read.
        """
        return len(self.records(frozenset()).encounters.id)

    def factors(self, schema: Schema) -> dict[str, tuple[float, float]]:
        """None: each value names its own unit, and is converted with it."""
        return {}
