"""Whole secure rounds on the in-process grid: what they cost above the plain round, training stubbed.

Large: 20 hospitals with 25 million parameters. One drops out after it masked, in two ways: its masked update
arrived and it is silent when it is asked to unmask, or its masked update never arrives. CPU seconds of each
party, less those of the same party in the same round without the secure sum, in one run.

Small: 10 hospitals with a million parameters, nobody drops out. Wall seconds of a whole second round (keys are
checked in the first, once a run), in which the
hospitals work one after another, above the plain round's; Flower's SecAgg+ beside it, above its FedAvg.
"""

from __future__ import annotations

from dataclasses import replace

import flower_round
from figures import Figure, at_most, progress, told
from secure_hospitals import Cost, Terms, error, one_round

LARGE, SMALL = Terms(20, 25_000_000), Terms(10, 1_000_000)
REPEATS_LARGE, REPEATS_SMALL = 2, 5
PARTY_BAR, WALL_BAR = 2.0, 0.35
RATIO_BAR = 0.47  # the bar over the 0.75 s that Flower took where it was set: holds on a slower machine too


def figures() -> list[Figure]:
    return [*large(), *small()]


def large() -> list[Figure]:
    ways = {"silent": replace(LARGE, silent=(7,)), "lost": replace(LARGE, dropped=(7,))}
    made: list[Figure] = []
    for name, terms in ways.items():
        progress(f"round: {terms.hospitals} hospitals, {terms.parameters:,} parameters, one drops out ({name})")
        plain, secure = (
            [one_round(kind) for _ in range(REPEATS_LARGE)] for kind in (replace(terms, secure=False), terms)
        )
        coordinator = least(secure, "coordinator") - least(plain, "coordinator")
        worst = least(secure, "worst") - least(plain, "worst")
        made += [
            at_most(f"round.large.coordinator.{name}", coordinator, PARTY_BAR, "{:.2f} CPU-s above the plain round"),
            at_most(f"round.large.hospital.{name}", worst, PARTY_BAR, "{:.2f} CPU-s above the plain round"),
        ]
        if name == "silent":
            made += [told("round.large.mean", error(secure[0].model, terms), "{:.1e} off, sd 0.01 at bound 1.5")]
    return made


def small() -> list[Figure]:
    progress(f"round: {SMALL.hospitals} hospitals, {SMALL.parameters:,} parameters")
    plain = [one_round(replace(SMALL, secure=False), 2) for _ in range(REPEATS_SMALL)]
    secure = [one_round(SMALL, 2) for _ in range(REPEATS_SMALL)]
    updates, rows = [SMALL.update(k) for k in range(SMALL.hospitals)], [500] * SMALL.hospitals
    theirs = [run(updates, rows)[1] for run in (flower_round.secure_round, flower_round.plain_round)]
    flower, wall = theirs[0] - theirs[1], least(secure, "wall") - least(plain, "wall")
    cpu = least(secure, "cpu") - least(plain, "cpu")
    return [
        at_most("round.small", wall, WALL_BAR, "{:.3f} s above the plain round"),
        told("round.small.cpu", cpu, "{:.3f} CPU-s of all parties"),
        told("round.small.flower", flower, "{:.2f} s above its FedAvg"),
        at_most("round.small.of-flower", wall / flower, RATIO_BAR, "{:.2f} of Flower's, in one run"),
    ]


def least(costs: list[Cost], name: str) -> float:
    return min(getattr(cost, name) for cost in costs)
