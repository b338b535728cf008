"""What a private step costs above the ordinary step of the same plain model, one thread, in CPU time.

A private step is norms, clip, fresh Gaussian noise and the optimiser's step; torch's noise, since the real one (of
the operating system's bytes, ``clip.noise``) is the mechanism's. Beside it Opacus's hooks and ghost clipping. All
take turns in one process; each figure is a ratio of medians. Memory is the peak of a fresh process above its
imports, model included.

    python simulations/benchmarks/clipping_steps.py KIND    prints the memory of one kind of step, as JSON
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy

import clipping_models
import torch
from clipping_models import Case
from figures import Figure, at_most, in_fresh_process, progress, told

from cloister_client.clipping import Clipper

CLIP, SIGMA, RATE = 1.0, 1.0, 1e-3
BARS = {"mlp": 1.7, "cnn": 1.55, "resnet": 1.75, "transformer": 1.35, "lstm": 3.1}
TURNS = {"mlp": (60, 20), "cnn": (15, 1), "resnet": (7, 1), "transformer": (9, 1), "lstm": (25, 1)}
"""How often each method has its turn, and how many steps a turn has."""
MEMORY_BAR = 2.0

Step = Callable[[], None]


def ordinary(case: Case) -> Step:
    optimizer = torch.optim.SGD(case.model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(case.model(case.x), case.y).backward()
        optimizer.step()

    return step


def booked(case: Case) -> Step:
    clipper = Clipper(case.model, case.loss, CLIP)
    optimizer = torch.optim.SGD(clipper.parameters, lr=RATE)
    count = len(case.x)
    units = torch.arange(count)
    sizes = [parameter.numel() for parameter in clipper.parameters]
    size = sum(sizes)

    def step() -> None:
        clipper.add(case.x, case.y, units, count)
        sums = clipper.take()
        noise = [part.view_as(one) for part, one in zip(torch.randn(size).split(sizes), sums, strict=True)]
        torch._foreach_add_(sums, noise, alpha=SIGMA * CLIP)
        torch._foreach_div_(sums, count)
        for parameter, one in zip(clipper.parameters, sums, strict=True):
            parameter.grad = one
        optimizer.step()

    return step


def hooks(case: Case) -> Step:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(case.hooked)
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = DPOptimizer(inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=len(case.x))

    def step() -> None:
        optimizer.zero_grad()
        case.loss(model(case.x), case.y).backward()
        optimizer.step()

    return step


def ghost(case: Case) -> Step:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = GradSampleModuleFastGradientClipping(case.hooked, max_grad_norm=CLIP, use_ghost_clipping=True)
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=len(case.x)
    )
    loss = DPLossFastGradientClipping(model, optimizer, case.loss)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(case.x), case.y).backward()
        optimizer.step()

    return step


KINDS = {"ordinary": ordinary, "clip": booked, "hooks": hooks, "ghost": ghost}


def figures() -> list[Figure]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, on every model
    made: list[Figure] = []
    for name, bar in BARS.items():
        progress(f"clip: steps of the {name}")
        ratio = ratios(name)
        made.append(at_most(f"clip.{name}", ratio["clip"], bar, "{:.2f} of an ordinary step"))
        made += [told(f"clip.{name}.opacus-{kind}", ratio[kind], "{:.2f} of it") for kind in ("hooks", "ghost")]
        made.append(told(f"clip.{name}.ordinary", 1e3 * ratio["ordinary"], "{:.2f} ms"))
    progress("clip: memory of the resnet")
    peaks = {kind: float(in_fresh_process(__file__, kind)["peak"]) for kind in KINDS}
    clip, *theirs = (peaks[kind] / peaks["ordinary"] for kind in ("clip", "hooks", "ghost"))
    made.append(at_most("clip.resnet.memory", clip, MEMORY_BAR, "{:.2f} of an ordinary step's"))
    named = zip(("hooks", "ghost"), theirs, strict=True)
    made += [told(f"clip.resnet.memory.opacus-{kind}", value, "{:.2f} of it") for kind, value in named]
    return [*made, told("clip.noise", noise(), "{:.1f} ns a number, from the OS (torch: see below)")]


def ratios(name: str) -> dict[str, float]:
    """Median CPU seconds of an ordinary step, and the other kinds' over it; each kind has a model of its own."""
    torch.manual_seed(0)
    case = clipping_models.CASES[name]()
    steps = {kind: make(deepcopy(case)) for kind, make in KINDS.items()}
    turns, repeats = TURNS[name]
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 2):
        for kind, step in steps.items():
            began = time.process_time()
            for _ in range(repeats):
                step()
            if turn >= 2:  # the first two warm up
                taken[kind].append((time.process_time() - began) / repeats)
    median = {kind: statistics.median(times) for kind, times in taken.items()}
    return {kind: time_ / (1.0 if kind == "ordinary" else median["ordinary"]) for kind, time_ in median.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(json.dumps({"peak": 0}))
