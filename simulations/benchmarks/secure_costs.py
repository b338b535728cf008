"""The table of what a secure round costs, by hospitals and parameters, in Markdown.

    make figures TOPIC=secure_costs

CPU seconds above the plain round of the same run, for the worst hospital and for the coordinator, in a round
from which one hospital's masked update is missing; and what a hospital sends. One run each: a few minutes in all.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable
from dataclasses import replace

from figures import progress
from secure_hospitals import Terms, one_round

HOSPITALS, PARAMETERS = (10, 20, 50, 100), (100_000, 1_000_000, 10_000_000)
MOST = 500_000_000
"""Parameters of all hospitals together; 100 with 10 million would take as long as the rest of the table."""

HEAD = """\
| Hospitals | Parameters | Hospital, CPU s | Coordinator, CPU s | Hospital sends, MB | of which shares, MB |
|---:|---:|---:|---:|---:|---:|"""


def rows(hospitals: Iterable[int], parameters: Iterable[int]) -> Iterable[str]:
    sizes = list(parameters)
    for n in hospitals:
        for size in sizes:
            if n * size <= MOST:
                yield row(Terms(n, size, dropped=(0,)))


def row(terms: Terms) -> str:
    progress(f"costs: {terms.hospitals} hospitals, {terms.parameters:,} parameters")
    plain, secure = one_round(replace(terms, secure=False)), one_round(terms)
    # One reply may fall on a disk's flush or a neighbour's burst; the middle hospital is every hospital.
    each = statistics.median(secure.hospitals.values()) - statistics.median(plain.hospitals.values())
    shares = secure.sent - plain.sent
    return (
        f"| {terms.hospitals} | {terms.parameters:,} | {each:.3f} | {secure.coordinator - plain.coordinator:.2f}"
        f" | {secure.sent / 1e6:.2f} | {shares / 1e6:.2f} |"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(HEAD)
    for line in rows(HOSPITALS, PARAMETERS):
        print(line, flush=True)
