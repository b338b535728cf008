"""Adding up updates that the coordinator may see, one at a time, into one vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from cloister_server.cores import each, parts
from cloister_server.strategies import ROBUST_RULES, Vector
from cloister_shared.errors import QuorumLost, ReplyRejected
from cloister_shared.layout import Layout
from cloister_shared.masking import Ring, encoding_of, norm, weight
from cloister_shared.plan import Scaffold, StudyPlan
from cloister_shared.tally import Numbers, glance
from cloister_shared.wire import Reply


@dataclass(frozen=True)
class Glimpse:
    """A few parameters as the coordinator saw them: for people who would rather look than believe."""

    site: str
    received: list[int]
    """From this hospital: integers modulo 2^bits, as signed ones."""
    learned: list[float]
    """The mean update's."""


@dataclass(frozen=True)
class Mean:
    """What a round came to, whether the coordinator saw each update or their sum alone."""

    answered: tuple[str, ...]
    rejected: dict[str, str]
    """Hospital to reason."""
    vectors: dict[str, Vector]
    """``update`` is the weighted mean; ``control``, with SCAFFOLD, the mean over those who answered."""
    numbers: Numbers
    """Means of metrics, and sums of what is counted, over those who answered."""
    norm: float
    """ℓ²; of the largest update, or under the secure sum of the mean."""
    metrics: dict[str, Numbers] = field(default_factory=dict[str, Numbers])
    """Each hospital's own; empty under the secure sum."""
    glimpse: Glimpse | None = None


def require_quorum(what: str, answered: int, need: int, rejected: Mapping[str, str]) -> None:
    """Refuse to go on with too few.

    Raises:
        QuorumLost: names who is missing and why.
    """
    if answered < need:
        why = "; ".join(f"{site}: {reason}" for site, reason in rejected.items())
        raise QuorumLost(f"{what}: {answered} of the {need} hospitals needed gave a valid reply ({why}).")


class Total:
    """The sum so far, and who is in it. Robust rules keep every update instead: they compare them.

    It is added up in the integers of the secure sum, so that whether the coordinator may look or not, and in
    whatever order replies come, the model is the same to the last bit.
    """

    def __init__(self, plan: StudyPlan, layout: Layout, number: int, sites: int) -> None:
        """``sites`` were asked."""
        self.plan, self.layout, self.number, self.sites = plan, layout, number, sites
        self.metrics: dict[str, Numbers] = {}
        self._encoding = encoding_of(plan)
        self._rows, self._norm, self._clipped = 0, 0.0, 0.0
        self._sums: dict[str, Ring] = {}
        self._kept: list[Vector] = []

    def add(self, site: str, reply: Reply) -> None:
        """Check a reply and add it.

        Raises:
            ReplyRejected: says in what it is odd; nothing of it was added.
        """
        norm, rows = check_update(self.plan, self.layout, reply, site, self.number), reply.header.rows
        weights = {"update": weight(self.plan, self.sites, rows)}
        if self.plan.strategy.name in ROBUST_RULES:
            self._kept.append(reply.vectors["update"])
        else:
            for name, vector in reply.vectors.items():
                total = self._sums.setdefault(name, np.zeros(self.layout.size, dtype=np.uint32))
                over = self._encoding.add(total, vector, weights.get(name, 1 / self.sites))
                self._clipped += over / vector.size
        self.metrics[site] = reply.header.metrics
        self._rows += rows
        self._norm = max(self._norm, norm)

    def mean(self, rejected: dict[str, str]) -> Mean:
        """The weighted mean, or what the robust rule makes of all updates. Gives the sum away.

        Raises:
            QuorumLost: fewer valid replies than ``cohort.min_sites``.
        """
        here = len(self.metrics)
        require_quorum(f"Round {self.number}", here, self.plan.cohort.min_sites, rejected)
        said: Numbers = {"rows": float(self._rows), "clipped": self._clipped / here}
        for name in glance(self.plan):
            known = [value for found in self.metrics.values() if (value := found.get(name)) is not None]
            said[name] = fmean(known) if known else None
        if self._kept:
            means = {"update": ROBUST_RULES[self.plan.strategy.name](self._kept, self.plan.strategy)}
        else:
            means = decoded(self.plan, self._sums, self.sites, here, self._rows)
        return Mean(tuple(self.metrics), rejected, means, said, self._norm, self.metrics)


def decoded(plan: StudyPlan, sums: dict[str, Ring], sites: int, here: int, rows: float) -> dict[str, Vector]:
    """The means of what ``here`` of ``sites`` hospitals with so many ``rows`` encoded. Works in place of ``sums``.

    Raises:
        ReplyRejected: a value lies outside what they can have sent.
    """
    equal = here / sites
    weights = {"update": equal if plan.aggregation.weights == "equal" else weight(plan, sites, rows)}
    encoding = encoding_of(plan)
    for name, total in sums.items():
        own = weights.get(name, equal)
        each(lambda part, total=total, own=own: encoding.decode(total[part], own, here), parts(total.size))
    return {name: total.view(np.float32) for name, total in sums.items()}


def check_update(plan: StudyPlan, layout: Layout, reply: Reply, site: str, number: int) -> float:
    """Hold a reply against the plan; the ℓ² norm of its update.

    Raises:
        ReplyRejected: says in what the reply is odd.
    """
    header = reply.header
    wanted = {"update", "control"} if isinstance(plan.strategy, Scaffold) else {"update"}
    if (header.site, header.round) != (site, number):
        raise ReplyRejected(f"the reply is {header.site}'s for round {header.round}")
    if header.layout != layout.digest or set(reply.vectors) != wanted:
        raise ReplyRejected(f"the reply holds {', '.join(sorted(reply.vectors)) or 'nothing'} of another model")
    if not plan.cohort.min_patients <= header.rows <= plan.cohort.max_rows:
        raise ReplyRejected(f"a weight of {header.rows} rows is outside the plan's bounds")
    norms: dict[str, float] = {}
    for name, vector in reply.vectors.items():
        if vector.size != layout.size:
            raise ReplyRejected(f"{name} holds {vector.size} parameters, not {layout.size}")
        norms[name] = norm(vector)
        if not np.isfinite(norms[name]):
            raise ReplyRejected(f"{name} holds a value that is not finite")
    if norms["update"] > plan.aggregation.max_update_norm:
        raise ReplyRejected(f"the update's norm {norms['update']:.4g} is above {plan.aggregation.max_update_norm:g}")
    return norms["update"]
