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


def agree(theirs: str, who: str) -> None:
    """Hold what ``who`` stated against this side.

    Raises:
        VersionRefused: its major version is another one; says which side to upgrade, and to what.
    """
    stated = theirs.partition(" ")[0].split(".")
    if len(stated) != 2 or not all(part.isdecimal() for part in stated):
        raise VersionRefused(f"{who} states no protocol version.", mend=f"Upgrade it to cloister {RELEASE}.")
    major = int(stated[0])
    if major == PROTOCOL[0]:
        return
    older, newer = (who, "this side") if major < PROTOCOL[0] else ("this side", who)
    raise VersionRefused(
        f"{who} speaks protocol {theirs}; this side {spoken()}.", mend=f"Upgrade {older} to the release of {newer}."
    )
