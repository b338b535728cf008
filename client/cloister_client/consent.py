"""The hospital's own policy, from its ``site.yaml``, and its veto, whoever else approved a plan."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_shared.errors import ConsentRefused
from cloister_shared.plan import Mechanism, StudyPlan

MIN_COHORT = 3
"""Unless the hospital says otherwise: of a sum of two, each partner learns the other's update."""


@dataclass(frozen=True)
class Policy:
    """What a hospital takes part in, unless it says otherwise."""

    min_cohort: int = MIN_COHORT
    """The fewest hospitals in a secure sum that it helps to open."""
    mechanisms: tuple[Mechanism, ...] = (Mechanism.SITE, Mechanism.SHARED)
    """The mechanisms of privacy that it accepts; ``none`` must be named."""
    approvals: int = 1
    """How many of its officers must approve a study, each with a key of their own."""


ANY = Policy(mechanisms=tuple(Mechanism))
"""For simulations, which also train without privacy, to compare."""


def consent(policy: Policy, plan: StudyPlan, site: str) -> None:
    """Hold a plan against the hospital's policy.

    Raises:
        ConsentRefused: the plan asks for what the policy does not allow.
    """
    asked = plan.privacy.mechanism
    if asked not in policy.mechanisms:
        accepted = ", ".join(policy.mechanisms)
        raise ConsentRefused(
            f"{site} takes part under privacy.mechanism {accepted} only, and the plan says {asked}.",
            mend=f"Amend the plan; or write policy: {{mechanisms: [{accepted}, {asked}]}} in the hospital's site.yaml.",
        )
