"""What the secure sum does not stop, shown rather than said. docs/threat-model.md tells what bounds it."""

from __future__ import annotations

import numpy as np

from cloister_shared.errors import CloisterError
from cloister_shared.masking import encoding_of
from cloister_shared.wire import Octets
from cloister_simulations.attacks.attack import attack
from cloister_simulations.attacks.consortium import (
    COORDINATOR,
    CULPRIT,
    HOSPITALS,
    MATHEMATICS,
    Consortium,
    Refused,
)
from cloister_simulations.attacks.hospital import altered
from cloister_simulations.attacks.question import halves


@attack("a third colludes", MATHEMATICS, "can be had")
def a_third_colludes(consortium: Consortium) -> str:
    """Two halves again, and two hospitals of six collude."""
    return halves(consortium, (CULPRIT, "birch"))


@attack("poisoning", COORDINATOR, "rejected")
def poisoning(consortium: Consortium) -> str:
    """A hospital sends an update at the plan's bound."""
    encoding = encoding_of(consortium.plan)
    most = int(encoding.bound / len(HOSPITALS) * 2**encoding.fraction_bits)

    def shift(octets: Octets) -> None:
        octets["update"].view("<u4")[:] += np.uint32(most)

    try:
        mean = altered(consortium, shift).vectors["update"]
    except CloisterError as refusal:
        raise Refused(COORDINATOR, f"rejected: {refusal}") from None
    moved = mean - np.mean([consortium.update(site) for site in HOSPITALS], axis=0)
    return f"moved every parameter of the mean by {moved.mean():.2f}, the bound over the number of hospitals"
