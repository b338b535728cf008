"""Scores of new rows at a hospital, in a file that stays there."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloister_client.dataset import NewRows
from cloister_client.released import Released
from cloister_shared import durable
from cloister_shared.outcomes.answers import answers, names

AT_ONCE = 1024
"""Rows that the network sees together."""


@dataclass(frozen=True)
class Scored:
    """What became of the rows, in counts."""

    rows: int
    scored: int
    unusual: int | None
    """Unlike the hospital's training rows; None where nobody can say."""
    out: Path


def predict(released: Released, rows: NewRows, out: Path) -> Scored:
    """Write a line for each row: its number, its patient if known, what the model says, and whether it is unusual."""
    schema, scaled = released.plan.table, released.scaled(rows)
    x, parts = scaled.numpy(), [released.network.output(part).numpy() for part in scaled.split(AT_ONCE)]
    said = answers(schema, released.calibration(np.concatenate(parts)), x)
    far = released.usual.far(x) if released.usual else None
    problems = {number: what for what, number in _problems(rows)}
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", *(["patient"] if rows.patients else []), *names(schema), "unusual", "note"])
    for at in range(len(x)):
        head = [at + 1, *([rows.patients[at]] if rows.patients else [])]
        if not rows.read[at]:
            lines.writerow([*head, *([""] * len(names(schema))), "", problems.get(at + 1, "a missing value")])
            continue
        flag = "unknown" if far is None else "yes" if far[at] else "no"
        note = "not harmonised" if released.unharmonised else ""
        lines.writerow([*head, *(f"{value:.6g}" for value in said[at]), flag, note])
    durable.save_secret(out, text.getvalue())
    unusual = None if far is None else int((far & rows.read).sum())
    return Scored(len(x), int(rows.read.sum()), unusual, out)


def told(released: Released, scored: Scored) -> list[str]:
    """What was done, in sentences for the hospital's own people."""
    model, calibration = released.model, released.calibration
    lines = [
        f"{model.manifest.study}, plan {model.manifest.digest[:12]}, signed by {model.signer}: {scored.scored} of"
        f" {scored.rows} rows are scored."
    ]
    if released.unharmonised:
        lines.append(
            "Not harmonised: this hospital has no sums of the study, so what it adds and multiplies is unknown. Numbers"
            " are centred and scaled only, and the model knows no hospital that measures as this one may."
        )
    if calibration.how == "none":
        lines.append(f"Not calibrated here: {calibration.why}.".replace("..", "."))
    else:
        lines.append(f"Calibrated on {calibration.rows} held-out rows of this hospital ({calibration.how}).")
    if scored.unusual is None:
        lines.append("Nobody can say which rows are unusual: this hospital has too few training rows for that.")
    else:
        lines.append(
            f"{scored.unusual} rows are unlike 99 in 100 of this hospital's training rows: look at them again."
        )
    return [*lines, f"Written to {scored.out}, which its owner alone can read."]


def _problems(rows: NewRows) -> list[tuple[str, int]]:
    found = [
        (f"{column.name}: {problem}", number)
        for column in rows.quality.columns
        for problem, numbers in column.problems.items()
        for number in numbers
    ]
    return sorted(found, key=lambda each: each[1], reverse=True)
