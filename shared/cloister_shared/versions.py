"""Versions of the protocol that hospital and coordinator speak: stated by both, compared by both."""

from __future__ import annotations

from importlib.metadata import version

from cloister_shared.errors import VersionRefused

PROTOCOL = (1, 0)
"""Major and minor. Another minor works with this one; another major does not."""

RELEASE = version("cloister")


def spoken() -> str:
    """What this side states: protocol and release, as ``1.0 (cloister 0.1.0)``."""
    return f"{PROTOCOL[0]}.{PROTOCOL[1]} (cloister {RELEASE})"


def agree(theirs: str, who: str, here: str) -> None:
    """Hold what ``who`` stated against what ``here``, this side, speaks. Either side may read the refusal.

    Raises:
        VersionRefused: its major version is another one; says which side to upgrade, and to what.
    """
    stated = theirs.partition(" ")[0].split(".")
    if len(stated) != 2 or not all(part.isdecimal() for part in stated):
        raise VersionRefused(f"{_capital(who)} states no protocol version.", mend=f"Upgrade it to cloister {RELEASE}.")
    major = int(stated[0])
    if major == PROTOCOL[0]:
        return
    older, newer = (who, here) if major < PROTOCOL[0] else (here, who)
    raise VersionRefused(
        f"{_capital(who)} speaks protocol {theirs}, and {here} {spoken()}.",
        mend=f"Upgrade {older} to the release of {newer}.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
