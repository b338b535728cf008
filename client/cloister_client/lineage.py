"""Whose rows a study uses, written down before anything that came of them leaves: pseudonyms, never ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_client.dataset import Dataset, Rows
from cloister_client.lineage_book import Facts, LineageBook, Patients
from cloister_shared.model_file import weights_digest
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_text import privacy
from cloister_shared.pseudonyms import Names, pseudonyms


class Lineage:
    """One study's part of the hospital's record, for the patients of one load of its rows."""

    def __init__(self, book: LineageBook, plan: StudyPlan, dataset: Dataset) -> None:
        self._book, self._plan, self._facts = book, plan, facts_of(plan, dataset)
        names = None if dataset.ids is None else pseudonyms(book.key, dataset.ids)
        self._train, self._held_out = (_whose(rows, names) for rows in (dataset.train, dataset.test))

    def uses(self, number: int) -> None:
        """Round ``number`` begins to work on the rows: on disk when this returns."""
        self._book.used(self._facts, number, self._train, self._held_out)

    def receives(self, vector: NDArray[np.float32], site: Path) -> None:
        """The final model came; ``site`` is the folder of the study, for public weights."""
        self._book.received(self._plan.digest, weights_digest(self._plan, vector, site))

    def close(self) -> None:
        """Let go of the file."""
        self._book.close()


def facts_of(plan: StudyPlan, dataset: Dataset) -> Facts:
    """What the record keeps of a plan, as it is at this hospital."""
    terms = plan.privacy
    return Facts(
        plan=plan.digest,
        study=plan.study,
        version=plan.version,
        rounds=plan.rounds,
        promise=privacy(plan),
        unit=(terms.unit or "record") if plan.private else "",
        epsilon=terms.epsilon if plan.private else None,
        delta=terms.delta if plan.private else None,
        shared=plan.shared_noise,
        exact=plan.evaluation.epsilon_share is None,
        readiness=plan.readiness is not None,
    )


def _whose(rows: Rows, names: Names | None) -> Patients:
    return Patients(None if names is None else np.sort(names[np.unique(rows.patients)]))
