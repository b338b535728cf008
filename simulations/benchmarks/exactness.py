"""Is the sum the sum? Integers bit for bit under drop-outs, and the decoded weighted mean in real numbers.

The mean is held against the same mean in double precision: three hospitals of 20 patients, 20 beside 500 and
50,000, and three of 50,000, with updates of three sizes. The plan's bound is 8 standard deviations of the
update, and its most rows are those of the largest hospital. Told is also what looser terms cost: the default
bound with an update far below it, and hospitals of 20 patients in a plan that allows 50,000. Flower's SecAgg+ runs
the same cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import flower_round
import numpy as np
from figures import Figure, at_most, progress, told
from numpy.typing import NDArray
from secure_hospitals import Terms, error, one_round, sums_seen, wrong_in

from cloister_shared.masking import threshold

PARAMETERS, HOSPITALS = 100_000, 7
COHORTS = {"small": (20, 20, 20), "mixed": (20, 500, 50_000), "large": (50_000, 50_000, 50_000)}
SIZES = (1e-3, 0.05, 1.0)
BAR = 1e-6


def figures() -> list[Figure]:
    return [*integers(), *means()]


def integers() -> list[Figure]:
    """Every pattern of drop-outs that the threshold allows, at each width on the wire."""
    most = HOSPITALS - threshold(HOSPITALS)
    patterns = [dropped for count in range(most + 1) for dropped in combinations(range(HOSPITALS), count)]
    progress(f"exact: {len(patterns)} patterns of drop-outs among {HOSPITALS} hospitals, in three widths")
    wrong = 0
    for bits in (32, 24, 16):
        for dropped in patterns:
            terms = Terms(HOSPITALS, PARAMETERS // 10, dropped=dropped, bits=bits)
            with sums_seen() as seen:
                one_round(terms)
            wrong += wrong_in(terms, seen[0])
    return [at_most("exact.integer-sum", wrong, 0, f"{{:.0f}} differ, {3 * len(patterns)} patterns")]


def means() -> list[Figure]:
    made: list[Figure] = []
    for name, rows in COHORTS.items():
        progress(f"exact: hospitals of {', '.join(map(str, rows))} patients")
        cases = [Terms(len(rows), PARAMETERS, rows=rows, sd=sd, bound=8 * sd) for sd in SIZES]
        ours = [error(one_round(terms).model, terms) for terms in cases]
        theirs = [error(flower(terms), terms) for terms in cases]
        made += [
            at_most(f"exact.{name}", max(ours), BAR, "{:.1e} at most"),
            told(f"exact.{name}.flower", max(theirs), f"{{:.2g}} at most ({said(theirs)})"),
        ]
    rows, largest = COHORTS["small"], 50_000
    coarse = {
        "default-bound": Terms(len(rows), PARAMETERS, rows=rows, sd=SIZES[0]),
        "max-rows-50000": Terms(len(rows), PARAMETERS, rows=rows, sd=SIZES[0], bound=8 * SIZES[0], max_rows=largest),
    }
    for name, terms in coarse.items():
        made.append(told(f"exact.small.{name}", error(one_round(terms).model, terms), "{:.1e}"))
    return made


def flower(terms: Terms) -> NDArray[np.float32]:
    return flower_round.secure_round([terms.update(k) for k in range(terms.hospitals)], terms.rows)[0]


def said(errors: Sequence[float]) -> str:
    return ", ".join(f"{value:.2g}" for value in errors)
