"""A hundred hospitals, and then only seventy of them: does the round end with the exact sum, and how long it takes."""

from __future__ import annotations

from figures import Figure, at_most, progress, told
from secure_hospitals import Terms, one_round, sums_seen, wrong_in

PARAMETERS, HOSPITALS, DROPPED = 100_000, 100, 30


def figures() -> list[Figure]:
    made: list[Figure] = []
    for name, dropped in (("whole", 0), ("drop-outs", DROPPED)):
        terms = Terms(HOSPITALS, PARAMETERS, dropped=tuple(range(dropped)))
        progress(f"n100: {HOSPITALS} hospitals, {dropped} of them drop out")
        with sums_seen() as seen:
            cost = one_round(terms)
        made += [
            at_most(f"n100.{name}", wrong_in(terms, seen[0]), 0, f"{{:.0f}} of {PARAMETERS:,} integers differ"),
            told(f"n100.{name}.wall", cost.wall, "{:.1f} s, one hospital after another"),
            told(f"n100.{name}.hospital", cost.worst, "{:.2f} CPU-s at most"),
            told(f"n100.{name}.coordinator", cost.coordinator, "{:.2f} CPU-s"),
        ]
    return made
