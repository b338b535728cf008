"""What the commands print: hospitals, studies, rounds and the audit log, in lines of at most 100 signs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from textwrap import fill

from rich.cells import cell_len, set_cell_size

from cloister_shared.control_pb2 import AuditReply, Hospital, RoundReply, StudyReply

WIDTH = 100


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as what stands in them, as a terminal shows it; a line ends where the page does."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(cell_len(line[at]) for line in lines) for at in range(len(head))]
    spaced = ("  ".join(map(set_cell_size, line, widths)).rstrip() for line in lines)
    return "\n".join(line if cell_len(line) <= WIDTH else set_cell_size(line, WIDTH) for line in spaced)


def hospitals_page(hospitals: Sequence[Hospital]) -> str:
    """Each hospital on a line."""
    if not hospitals:
        return "No hospital is invited yet: cloister-coordinator invite NAME > NAME.invite"
    return table(
        ("HOSPITAL", "STANDING", "NOW", "SEEN", "UNTIL", "KEY", "RELEASE"),
        (
            (
                each.name[:30],
                each.standing,
                "there" if each.online else "-",
                _minute(each.seen),
                _minute(each.not_after)[:10],
                each.key_id[:8] or "-",
                _release(each.version),
            )
            for each in hospitals
        ),
    )


def studies_page(studies: Sequence[StudyReply]) -> str:
    """Each study with what was decided upon it."""
    if not studies:
        return "No study is submitted yet: cloister-coordinator study submit PLAN.yaml"
    return "\n".join(line for study in studies for line in (state_line(study), *decisions_lines(study)))


def state_line(study: StudyReply) -> str:
    """How a study stands."""
    reached = f", round {study.round} of {study.rounds}" if study.round or study.state == "running" else ""
    reason = f": {study.reason}" if study.reason else ""
    return _wrap(f"{study.name} {study.digest[:16]} is {study.state}{reached}{reason}", "")


def decisions_lines(study: StudyReply) -> list[str]:
    """Who approved, and who did not, is silent or took it back."""
    said: dict[str, list[str]] = {}
    for site, decision in sorted(study.decisions.items()):
        said.setdefault(decision or "not decided", []).append(site)
    return [_wrap(f"{decision}: {', '.join(sites)}", "  ") for decision, sites in sorted(said.items())]


def round_line(done: RoundReply, rounds: int) -> str:
    """One round: who took part, what was measured, who is missing and why."""
    numbers = "".join(f", {name} {value:.4g}" for name, value in sorted(done.numbers.items())[:3])
    line = f"round {done.round} of {rounds}: {len(done.took_part)} hospitals, {done.seconds:.1f} s{numbers}"
    missed = (_wrap(f"without {site}: {why}", "    ") for site, why in sorted(done.missed.items()))
    return "\n".join([_wrap(line, ""), *missed])


def audit_page(reply: AuditReply) -> str:
    """The entries, oldest first, and the head to write down elsewhere."""
    lines: list[str] = []
    for entry in map(json.loads, reply.entries):
        said = entry["said"]
        who = f"{said['account']} ({said['role']})" if said["account"] else "somebody"
        about = f" {said['about']}" if said["about"] else ""
        text = f"{entry['number']} {entry['at'][:19]} {who} {entry['what']}{about}: {said['outcome']}"
        lines.append(_wrap(_printable(text), ""))
    return "\n".join([*lines, f"head {reply.head}", "Write the head down elsewhere: it stands for every entry."])


def _release(stated: str) -> str:
    found = re.search(r"cloister ([^)]+)", stated)
    return found[1] if found else stated or "-"


def _minute(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}" if seconds else "-"


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _wrap(text: str, indent: str) -> str:
    return fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ")
