"""What a private step costs above the ordinary step of the same plain model, one thread, in CPU time.

A private step is norms, clip, fresh Gaussian noise and the optimiser's step; torch's noise, since the real one (of
the operating system's bytes, ``clip.noise``) is the mechanism's. Beside it Opacus's hooks and ghost clipping. All
take turns in one process; each figure is a ratio of medians. Memory is the peak of a fresh process above its
imports, model included.

    python simulations/benchmarks/clipping_steps.py KIND    prints the memory of one kind of step, as JSON
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import clipping_models
import numpy as np
import torch
from clipping_models import Case
from figures import Figure, at_most, in_fresh_process, progress, told

from cloister_client.clipping import Clipper

CLIP, SIGMA, RATE = 1.0, 1.0, 1e-3
BARS = {"mlp": 1.7, "cnn": 1.55, "resnet": 1.75, "transformer": 1.35, "lstm": 3.1}
TURNS = {"mlp": (30, 60), "cnn": (15, 1), "resnet": (7, 1), "transformer": (9, 1), "lstm": (25, 1)}
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
        torch._foreach_add_(sums, noise, alpha=SIGMA * CLIP)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_div_(sums, count)  # pyright: ignore[reportPrivateImportUsage]
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

    model = GradSampleModuleFastGradientClipping(case.hooked, max_grad_norm=int(CLIP), use_ghost_clipping=True)
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    terms = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": len(case.x)}
    optimizer = DPOptimizerFastGradientClipping(inner, **terms)
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
    return [*made, *noise()]


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


def noise() -> list[Figure]:
    """What a million normal numbers cost: by torch, as above, and from the OS's bytes by Box and Muller in numpy."""
    count = 10**6

    def by_numpy() -> None:
        first, second = np.frombuffer(os.urandom(8 * count), dtype="<u8").reshape(2, -1) * 2.0**-64
        radius = np.sqrt(-2.0 * np.log1p(-first))
        np.concatenate([radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)]).astype(np.float32)

    found: list[Figure] = []
    for name, draw in {"torch": lambda: torch.randn(count), "os": by_numpy}.items():
        times: list[float] = []
        for _ in range(5):
            began = time.process_time()
            draw()
            times.append(time.process_time() - began)
        found.append(told(f"clip.noise.{name}", 1e9 * statistics.median(times) / count, "{:.1f} ns a number"))
    return found


def peak(kind: str) -> float:
    """Bytes above the imports at the height of three steps of the resnet, the model included."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _memory("VmRSS")
    torch.manual_seed(0)
    step = KINDS[kind](clipping_models.resnet())
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    import opacus.optimizers  # noqa: F401 (so that no kind of step pays for an import of its own)

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(json.dumps({"peak": peak(sys.argv[1])}))
