"""The table of studies, for a screen of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloister_client.approval_page import plain
from cloister_client.approvals import Standing, standing
from cloister_client.offers import Study
from cloister_shared.errors import CloisterError

_WIDTHS = (28, 12, 13, 21, 9, 7)


def table(agent: Path, studies: Sequence[Study], wanted: int) -> str:
    """A line a study, the newest last, and what to type next. ``wanted``: approvals that the policy demands."""
    if not studies:
        return "No study was offered to this hospital yet. The agent (cloister-site start) hears of them by itself."
    lines = [_line(("Study", "Digest", "Here", "By", "There", "Round"))]
    undecided = list[Study]()
    for study in studies:
        try:
            found = standing(agent, study.digest)
            here, people = _here(found, wanted), ", ".join(found.people or found.waiting)
            undecided += [study] if found.said == "offered" else []
        except CloisterError:
            here, people = "DAMAGED", "cloister-site show says how"
        news = study.news
        at = f"{news.round}/{news.rounds}" if news.rounds else "-"
        cells = (study.plan.study, study.digest[:12], here, people or "-", news.state or "-", at)
        lines.append(_line(cells))
        if news.reason:
            lines.append(f"  {_cut(f'the coordinator says: {news.reason}', 96)}")
    if undecided:
        lines += ["", f"Next: cloister-site show {undecided[-1].digest[:12]}"]
    return "\n".join(lines)


def _here(found: Standing, wanted: int) -> str:
    if found.waiting:
        return f"{len(found.waiting)} of {wanted} yes"
    return "undecided" if found.said == "offered" else found.said


def _line(cells: Sequence[str]) -> str:
    return "  ".join(f"{_cut(cell, width):<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    text = plain(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
