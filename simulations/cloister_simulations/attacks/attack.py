"""What an attack is: what is tried, and the refusal that it should meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cloister_simulations.attacks.consortium import Consortium


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
