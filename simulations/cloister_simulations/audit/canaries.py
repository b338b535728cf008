"""A run of the mechanism with canaries in it, and what an observer of every step sees (Nasr et al. 2023).

A canary is a row whose gradient fills the clip bound in a direction of its own, so that the released sum along that
direction is C times whether it was drawn, plus noise. The directions are the weights of a zero linear layer on
one-hot columns of huge scale, beside an ordinary perceptron which trains on ordinary rows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_client.dataset import Rows
from cloister_client.privacy import Mechanism
from cloister_shared.budget import Event
from cloister_shared.noise import Entropy
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan
from cloister_simulations.audit.mechanism import Build

FEATURES, HIDDEN = 8, 16
MARK = FEATURES - 1
"""A feature that is 0 in every row but the first canary's: what a leak of raw values is seen by."""
SCALE = 1e7
"""Of the one-hot columns. A canary's gradient is this times the slope of its loss, cut down to the clip bound."""
RATE, CANARY_RATE = 0.1, 1e-12
"""Learning rates. The canaries' weights do move, by far too little to move a logit."""
CLIP, DELTA = 1.0, 1e-5
_LEAST_STEPS = 20
"""Observed even where time is up."""
_PROBED = 30
"""Steps with half of the rows each, after which one row has been drawn but for a chance of 2^-30."""


@dataclass(frozen=True)
class Size:
    """How much is run: ``steps`` of ``batch_size`` expected rows."""

    rows: int = 4000
    canaries: int = 4000
    """Directions, one for each canary. The rows that are not canaries are ordinary."""
    coins: int = 2000
    """Canaries that are rows only if a coin says so; the one-run audit guesses these coins."""
    batch_size: int = 200
    steps: int = 500


class FrozenNorm(nn.Module):
    """BatchNorm that normalises by what it has counted so far, and goes on counting: no gradient shows that it does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        if mean is None or variance is None:
            raise RuntimeError("BatchNorm keeps no statistics here, so nothing can leak from it.")
        normed = nn.functional.batch_norm(x, mean.clone(), variance.clone())
        if self.training and len(x) > 1:
            self.norm(x)
        return normed


class CanaryModel(nn.Module):
    """A perceptron plus a linear layer on the one-hot canary column. Notes the numbers of the rows that it is shown.

    Its input is [row number, canary column or ``canaries`` for none, features].
    """

    def __init__(self, canaries: int, norm: bool = False) -> None:
        super().__init__()
        self.canaries = canaries
        first = [FrozenNorm(FEATURES)] if norm else []
        self.net = nn.Sequential(*first, nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.canary = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.canary.weight)
        self.seen: list[NDArray[np.int64]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape [n, 1]."""
        # A row without numbers holds a free place in a batch, and one that is no row's was made up to try the model.
        ours = (x[:, 0] >= 0) & (x[:, 0] == x[:, 0].round())
        self.seen.append(x[ours, 0].long().numpy())
        column = torch.where(ours, x[:, 1], float(self.canaries)).long()
        hot = torch.zeros(len(x), self.canaries + 1).scatter_(1, column[:, None], SCALE)
        return self.net(x[:, 2:]) + self.canary(hot[:, : self.canaries])

    def shown(self, rows: int) -> NDArray[np.int64]:
        """How often each of the rows was in a batch since ``seen`` was cleared, [rows].

        A mechanism may pass a batch in parts, or some of its rows again to try the model; so the most often that a
        row was in any one pass counts.
        """
        return np.max([np.bincount(batch, minlength=rows) for batch in self.seen] or np.zeros((1, rows), int), axis=0)

    def reach(self) -> float:
        """The norm of a canary's gradient before it is clipped, at the present weights."""
        was = self.training
        with torch.no_grad():
            logit = self.eval().net(torch.zeros(1, FEATURES))
        self.train(was)
        return float(torch.sigmoid(logit)) * SCALE


@dataclass(frozen=True)
class Observed:
    """What was seen of a run. Sums are over the batch, in units of the clip bound."""

    event: Event
    """As claimed, for the whole run."""
    sums: NDArray[np.float32]
    """Released sum along each canary's direction, [steps, canaries]."""
    drawn: NDArray[np.bool_]
    """Which canaries were in which batch, [steps, canaries], by the rows that the model was shown."""
    member: NDArray[np.bool_]
    """Which canaries are rows at all, [canaries]."""
    coins: int
    """The first so many canaries tossed for it."""
    counts: NDArray[np.int64]
    """How often each row was in a batch, [steps, rows]."""
    reach: float
    """The least norm of a canary's gradient before clipping, over the steps, in clip bounds."""
    final: NDArray[np.float64]
    """The canaries' weights in the final model, as the sum of steps that they are, [canaries]."""
    moved: tuple[str, ...]
    """Entries of the model's state that changed though the mechanism gives no gradient for them."""

    @property
    def steps(self) -> int:
        """Steps that were observed; fewer than the claim's where time ran out."""
        return len(self.sums)


def plan_of(epsilon: float, size: Size) -> StudyPlan:
    """A plan in one round with this epsilon for its whole run."""
    features = "".join(f"    - {{name: f{i}, kind: number, range: [-4, 4]}}\n" for i in range(FEATURES))
    return read_plan(
        f"study: audit\ntitle: Audit of the mechanism\ntask: {{name: tabular}}\n"
        f"table:\n  target: {{name: outcome, positive: 1, negative: 0}}\n  features:\n{features}"
        f"rounds: 1\nstrategy: {{name: fedavg}}\n"
        f"training: {{learning_rate: {RATE}, batch_size: {size.batch_size}, local_steps: {size.steps}}}\n"
        f"privacy: {{mechanism: site, unit: record, epsilon: {epsilon}, delta: {DELTA}, clip_norm: {CLIP}}}\n"
    )


def rows_of(member: NDArray[np.bool_], rows: int, generator: np.random.Generator) -> Rows:
    """The canaries that are members, then ordinary rows. A canary's features are 0, but for the first one's mark."""
    columns = np.flatnonzero(member)
    x, y = np.zeros((rows, 2 + FEATURES), dtype=np.float32), np.zeros(rows, dtype=np.float32)
    x[:, 0], x[:, 1] = np.arange(rows), len(member)
    x[: len(columns), 1] = columns
    x[0, 2 + MARK] = 1.0
    ordinary = generator.normal(size=(rows - len(columns), FEATURES)).astype(np.float32)
    ordinary[:, MARK] = 0.0
    x[len(columns) :, 2:] = ordinary
    y[len(columns) :] = ordinary[:, 0] - ordinary[:, 1] + generator.normal(size=len(ordinary)) > 0
    return Rows(torch.from_numpy(x), torch.from_numpy(y), np.arange(rows))


def observe(
    build: Build,
    plan: StudyPlan,
    event: Event,
    size: Size,
    entropy: Entropy,
    *,
    norm: bool = False,
    until: float = float("inf"),
    notice: Callable[[int], object] = lambda steps: None,
) -> Observed:
    """Train with canaries and note what each step releases; stops early when ``time.monotonic()`` passes ``until``."""
    generator = np.random.default_rng(list(entropy(16)))
    member = np.ones(size.canaries, dtype=bool)
    member[1 : size.coins] = generator.random(size.coins - 1) < 0.5 if size.coins else False
    rows = rows_of(member, max(size.rows, int(member.sum())), generator)
    model = _new_model(size.canaries, norm, generator)
    mechanism = build(model, rows, plan, event, entropy)
    before = _not_noised(model, mechanism)
    sums = np.empty((size.steps, size.canaries), dtype=np.float32)
    counts = np.zeros((size.steps, len(rows)), dtype=np.int64)
    reach, done = float("inf"), 0
    for step in range(size.steps):
        reach = min(reach, model.reach() / CLIP)
        sums[step] = take_step(model, mechanism) * (plan.training.batch_size / CLIP)
        counts[step] = model.shown(len(rows))
        done = step + 1
        notice(done)
        if done >= _LEAST_STEPS and time.monotonic() > until:
            break
    drawn = np.zeros((done, size.canaries), dtype=bool)
    drawn[:, member] = counts[:done, : int(member.sum())] > 0
    after = _not_noised(model, mechanism)
    final = model.canary.weight.detach()[0].double().numpy() * (-plan.training.batch_size / CLIP / CANARY_RATE)
    moved = tuple(name for name, value in after.items() if not torch.equal(value, before[name]))
    return Observed(event, sums[:done], drawn, member, size.coins, counts[:done], reach, final, moved)


def take_step(model: CanaryModel, mechanism: Mechanism) -> NDArray[np.float32]:
    """One step of the run; the released gradient of the canaries' weights."""
    model.seen.clear()
    mechanism.gradient()
    released = model.canary.weight.grad
    if released is None:
        raise RuntimeError("The mechanism left no gradient for the canaries.")
    released = released[0].clone().numpy()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=CANARY_RATE if name == "canary.weight" else RATE)
    return released


def batch_sizes(
    build: Build, plan: StudyPlan, event: Event, rows: int, steps: int, entropy: Entropy, *, norm: bool = False
) -> NDArray[np.int64]:
    """How many rows each step takes of so many, [steps]."""
    generator = np.random.default_rng(0)
    model = _new_model(1, norm, generator)
    mechanism = build(model, rows_of(np.ones(1, dtype=bool), rows, generator), plan, event, entropy)
    sizes = np.zeros(steps, dtype=np.int64)
    for step in range(steps):
        take_step(model, mechanism)
        sizes[step] = model.shown(rows).sum()
    return sizes


def state_shows_a_row(build: Build, plan: StudyPlan, event: Event, entropy: Entropy, *, norm: bool) -> str:
    """An entry of the model's state that moves if the marked row is there and never without it, or nothing.

    Whoever sees that entry knows of the row: no epsilon describes it.
    """
    probed, rows = replace(event, sample_rate=0.5), 2 * plan.training.batch_size
    moved: list[dict[str, Tensor]] = []
    for out in (False, True):
        generator = np.random.default_rng(0)
        model, every = _new_model(1, norm, generator), rows_of(np.ones(1, dtype=bool), rows, generator)
        some = Rows(every.x[1:], every.y[1:], np.arange(rows - 1)) if out else every
        mechanism = build(model, some, plan, probed, entropy)
        fresh = copy.deepcopy(model.state_dict())
        take_step(model, mechanism)  # before which the mechanism may try the model with rows of its own making
        model.load_state_dict(fresh)
        before = _not_noised(model, mechanism)
        for _ in range(_PROBED):
            take_step(model, mechanism)
        moved.append({name: value != before[name] for name, value in _not_noised(model, mechanism).items()})
    return next((name for name, entries in moved[0].items() if bool((entries & ~moved[1][name]).any())), "")


def _new_model(canaries: int, norm: bool, generator: np.random.Generator) -> CanaryModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator.integers(2**31)))
        return CanaryModel(canaries, norm)


def _not_noised(model: nn.Module, mechanism: Mechanism) -> dict[str, Tensor]:
    """What would leave in the model's state without being one of the mechanism's parameters."""
    noised = {parameter.data_ptr() for parameter in mechanism.parameters}
    return {name: value.clone() for name, value in model.state_dict().items() if value.data_ptr() not in noised}
