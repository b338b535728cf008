"""The audit from the claim to the verdict."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cloister_shared.budget import Event
from cloister_shared.budget import epsilon as priced
from cloister_shared.errors import PlanRefused
from cloister_shared.noise import Entropy, keystream
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.audit import bounds
from cloister_simulations.audit.bounds import StepBound
from cloister_simulations.audit.canaries import DELTA, Size, batch_sizes, observe, plan_of, state_shows_a_row
from cloister_simulations.audit.conformance import Check, checks
from cloister_simulations.audit.mechanism import MECHANISMS, Build, Plant, claim

TIGHT = 0.9
"""A lower bound below this share of what the event allows vouches for nothing."""
_KEPT = 4.0
"""Seconds of a claim's time that are left for the statistics."""
_FEW, _SOME = 10, 160
"""Rows a step and steps in which batch sizes are looked at."""


@dataclass(frozen=True)
class Finding:
    """What the audit of one claim found."""

    claimed: float
    """Epsilon that the noise is made for, by exact accounting."""
    event: Event
    delta: float
    allowed: float
    """The same rounded up by the accountant: what a flawless mechanism releases, and an audit can find at most."""
    lower: float
    """Lower bound on epsilon of what was released, with 95 % confidence. Infinite where no noise hides a row."""
    one_run: float
    """A second lower bound, from the final model alone."""
    steps: int
    """Steps that were observed, of the event's."""
    checks: tuple[Check, ...]
    seconds: float

    @property
    def charged(self) -> float:
        """What the hospital's ledger, whose Rényi accounting also holds for studies chosen in turn, counts for it."""
        return priced([self.event], self.delta)

    @property
    def share(self) -> float:
        """The lower bound over what the event allows."""
        return self.lower / self.allowed

    @property
    def caught(self) -> list[str]:
        """Everything wrong with the mechanism, a sentence each; empty for a sound one."""
        said = [check.said for check in self.checks if not check.holds]
        if math.isinf(self.lower):
            said.append("What leaves shows one row for certain: no epsilon describes that.")
        elif self.lower > self.allowed:
            said.append(f"Epsilon is at least {self.lower:.2f}, where the event allows {self.allowed:.2f}.")
        return said

    @property
    def verdict(self) -> str:
        """``caught``, ``loose`` where too little was seen to vouch for the mechanism, or ``holds``."""
        return "caught" if self.caught else "holds" if self.share >= TIGHT else "loose"

    def as_json(self) -> dict[str, Any]:
        """For programs; an infinite bound is a null."""
        said = dataclasses.asdict(self) | {"share": self.share, "verdict": self.verdict, "caught": self.caught}
        return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in said.items()}


def audit(
    epsilon: float,
    plant: Plant | None = None,
    *,
    size: Size | None = None,
    entropy: Entropy | None = None,
    until: float = math.inf,
    notice: Callable[[int], object] = lambda steps: None,
) -> Finding:
    """Audit the client's mechanism, or a broken one, at a plan's epsilon.

    ``until`` is when to be done, by ``time.monotonic()``; ``notice`` is told the steps that are observed.

    Raises:
        BudgetExceeded: no noise meets this epsilon.
    """
    began, size, entropy = time.monotonic(), size or Size(), entropy or keystream()
    plan = plan_of(epsilon, size)
    event, build = claim(plan, size.rows), MECHANISMS[plant]
    norm = plant is Plant.BATCHNORM
    seen = observe(build, plan, event, size, entropy, norm=norm, until=until - _KEPT, notice=notice)
    step = bounds.per_step(seen, DELTA)
    refused = _refuses_statistics(build, plan, event, size, entropy)
    allowed, last = bounds.spent(event, DELTA), bounds.one_run(seen, DELTA)
    made = (*checks(seen, refused), _end_to_end(last, allowed))
    lower = step.epsilon
    if any(check.sampling and not check.holds for check in made):
        lower = _without_poisson(build, plan, event, step, entropy)
    if seen.moved and state_shows_a_row(build, plan, event, entropy, norm=norm):
        lower = math.inf
    return Finding(epsilon, event, DELTA, allowed, lower, last, seen.steps, made, time.monotonic() - began)


def _end_to_end(last: float, allowed: float) -> Check:
    return Check(
        "final model alone, ε at least",
        "the event's at most",
        f"{last:.2f}",
        last <= allowed,
        f"The final model alone shows an epsilon of at least {last:.2f}, where the event allows {allowed:.2f}.",
    )


def _refuses_statistics(build: Build, plan: StudyPlan, event: Event, size: Size, entropy: Entropy) -> bool:
    """Whether the client turns down a model whose running means would leave it without noise."""
    try:
        batch_sizes(build, plan, event, size.rows, 0, entropy, norm=True)
    except PlanRefused:
        return True
    return False


def _without_poisson(build: Build, plan: StudyPlan, event: Event, step: StepBound, entropy: Entropy) -> float:
    """The bound where draws are no coins: from the sizes of batches with and without a row, each seen twice.

    At the event's rate, but of few rows and over some of the steps, to be quick: all would show more yet.
    """
    few = amend(plan, training={"batch_size": _FEW})
    sizes = partial(batch_sizes, build, few, event, steps=min(_SOME, event.steps), entropy=entropy)
    rows = round(_FEW / event.sample_rate)
    full, less = ([sizes(count) for _ in range(2)] for count in (rows, rows - 1))
    return bounds.known_batches(full, less, step, DELTA) or 0.0
