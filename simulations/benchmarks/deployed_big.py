"""Rounds of 10 hospitals with 25 million parameters: how long, and what they take of memory and disk.

Ten hospitals share this machine's cores, which a consortium's do not, so they do not train: each adds a fixed number
to every parameter. Whatever else a hospital and the coordinator do is done. Memory and disk are in models, of four
octets a parameter. The worker's memory is its peak over the whole study, above the peak of a worker whose study
has a few parameters: what both import counts in neither.
"""

from __future__ import annotations

import os
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import deployed
import numpy as np
import tcp_floor
from deployed import agree, between, plan_of, records, service
from figures import Figure, at_most, in_fresh_process, progress, told
from processes import family, forget_peak, peak, watched
from unlearned_hospital import STEP

from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.plan import StudyPlan
from cloister_simulations.deployment import CommandFailed, Consortium

SITES, WIDTH, ROUNDS, LONGEST = 10, 4990, 4, 900.0
ROUND_BAR, WORKER_BAR, LINK_BAR, LEFT_BAR = 6.0, 4.0, 400.0, 5.0
LOOK = 0.1


@dataclass
class Run:
    """What a study took: seconds of each round but the first, and octets."""

    rounds: list[float]
    parameters: int
    worker: int = 0
    """Its peak."""
    link: int = 0
    """The SuperLink's peak above what it had before."""
    disk: int = 0
    """Peak of the SuperLink's files above what they were before, and at the end."""
    left: int = 0


def figures() -> list[Figure]:
    with deployed.consortium(SITES, "unlearned_hospital") as consortium:
        progress(f"big: {SITES} hospitals, first with a small model, then two large ones")
        small = measured(consortium, plan_of("few", SITES, 2))
        large, packed = (measured(consortium, wide(bits)) for bits in (32, 16))
    model = 4 * large.parameters
    floor = statistics.median(in_fresh_process(tcp_floor.__file__, str(SITES), str(model)))
    seconds = statistics.median(large.rounds)
    return [
        at_most("big.round", seconds, ROUND_BAR, f"{{:.2f}} s, {large.parameters / 1e6:.1f}M, without training"),
        told("big.round.16-bits", statistics.median(packed.rounds), "{:.2f} s"),
        told("big.round.tcp", floor, f"{{:.2f}} s plain TCP, {seconds / floor:.1f} times less"),
        at_most("big.worker-models", (large.worker - small.worker) / model, WORKER_BAR, "{:.2f} models at its peak"),
        at_most("big.link-memory", large.link / 1e6, LINK_BAR, "{:.0f} MB above its start"),
        told("big.link-disk", large.disk / model, "{:.1f} models at their peak"),
        at_most("big.link-disk.left", large.left / 1e6, LEFT_BAR, "{:.2f} MB after the run"),
    ]


def wide(bits: int) -> StudyPlan:
    """A study with a large model, so many bits of each parameter on the wire."""
    task = {"model": "mlp", "hidden": [WIDTH, WIDTH]}
    return plan_of(f"bits-{bits}", SITES, ROUNDS, task=task, aggregation={"bits": bits})


def measured(of: Consortium, plan: StudyPlan) -> Run:
    """Run a study to its end under watch.

    Raises:
        CommandFailed: it did not finish, or its model is not what the hospitals' fixed updates come to.
    """
    agree(of, plan)
    folder, link = of.home / "link", family(service(of, "rounds"))
    before, empty, seen = sum(map(forget_peak, link)), size(folder), Run([], 0)
    worker = deployed.begin(of, plan)

    def look() -> None:
        with suppress(OSError):  # it ends before the study is seen to
            seen.worker = max(seen.worker, peak(worker))
        seen.disk = max(seen.disk, size(folder) - empty)

    with watched(look, LOOK):
        deployed.finish(of, plan, LONGEST)
    seen.link = sum(map(peak, link)) - before
    seen.left = size(folder) - empty
    seen.rounds, seen.parameters = between(records(of, plan)), checked(of, plan)
    return seen


def checked(of: Consortium, plan: StudyPlan) -> int:
    """The model's parameters, each of which is what the hospitals' steps come to.

    Raises:
        CommandFailed: one is not.
    """
    first = initial_model(plan, of.folder)
    wanted = gathered(first, layout_of(plan, first).shared) + np.float32(plan.rounds * STEP)
    found = of.model(plan)
    margin = plan.rounds * (SITES / 2 * 2.0**-plan.fraction_bits + 2.0**-22)
    if (apart := float(np.abs(found - wanted).max())) > margin:
        raise CommandFailed(f"The model of {plan.study} is {apart:.3g} from what the hospitals' steps come to.")
    return found.size


def size(folder: Path) -> int:
    """Octets of all files in a folder and below it."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
    return total
