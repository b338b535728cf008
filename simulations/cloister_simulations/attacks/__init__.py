"""Attacks on the secure sum: a hostile coordinator, or a hostile hospital, among real ones that must refuse it.

``suite`` lists and runs them. An attack says what it gained, or meets a refusal. Only the refusal that it should
meet counts as one; whatever else goes wrong is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_simulations.attacks.consortium import Consortium

HOSPITAL, COORDINATOR, MATHEMATICS = "hospital", "coordinator", "mathematics"
"""Who can refuse. Mathematics does where nobody need say no: too few shares open, or too many keys are possible."""


class Refused(Exception):
    """Somebody said no, or the mathematics did."""

    def __init__(self, by: str, reason: str) -> None:
        super().__init__(reason)
        self.by, self.reason = by, reason


@dataclass(frozen=True)
class Attack:
    """What an attacker tries, and the refusal that it should meet."""

    name: str
    attempted: str
    by: str
    because: str
    """A part of the sentence that refuses it."""
    attempt: Callable[[Consortium], str]
    """Says what was gained, or raises ``Refused`` or one of Cloister's own errors."""


def attack(name: str, by: str, because: str) -> Callable[[Callable[[Consortium], str]], Attack]:
    """Make an attack of a function, whose docstring says what is attempted."""

    def made(attempt: Callable[[Consortium], str]) -> Attack:
        return Attack(name, " ".join((attempt.__doc__ or "").split()).rstrip("."), by, because, attempt)

    return made
