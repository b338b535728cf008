"""What a check of the doctor's found, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from textwrap import wrap

from cloister_shared.console import extras_named
from cloister_shared.errors import CloisterError

_WIDTH, _WHAT = 100, 22


class State(StrEnum):
    """Whether a thing does its work."""

    OK = "ok"
    WARNING = "warning"
    FAILS = "fails"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    what: str
    state: State
    found: str
    mend: str = ""


def ok(what: str, found: str) -> Finding:
    """It works."""
    return Finding(what, State.OK, found)


def warning(what: str, found: str, mend: str) -> Finding:
    """It works for now, or not as well as it could."""
    return Finding(what, State.WARNING, found, mend)


def fails(what: str, found: str, mend: str) -> Finding:
    """It does not work."""
    return Finding(what, State.FAILS, found, mend)


def tried(what: str, work: Callable[[], Finding | str]) -> Finding:
    """What ``work`` finds; an error of ours is what fails, in its own words."""
    try:
        with extras_named():
            found = work()
        return ok(what, found) if isinstance(found, str) else found
    except CloisterError as error:
        return fails(what, error.said, error.mend)
    except OSError as error:
        return fails(what, f"{error.filename or what}: {error.strerror or error}.", "Correct the file, or its rights.")


def as_text(finding: Finding) -> str:
    """A line or more of at most 100 columns."""
    start = f"{finding.state:<9}{finding.what:<{_WHAT}} "
    lines = wrap(finding.found, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [start]
    if finding.mend:
        lines += wrap(f"do: {finding.mend}", _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 13)
    return "\n".join(lines)


def in_all(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counted = {state: sum(finding.state is state for finding in findings) for state in State}
    return f"{counted[State.OK]} ok, {counted[State.WARNING]} warnings, {counted[State.FAILS]} fail."


def as_json(findings: Sequence[Finding]) -> str:
    """All of them, for a machine."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False)
