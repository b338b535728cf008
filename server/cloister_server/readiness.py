"""What the hospitals told of their records before training: kept beside the checkpoint, and shown as one table.

All that is made of the counts here is post-processing, and costs no epsilon.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from cloister_shared import durable, readiness
from cloister_shared.errors import CheckpointBroken, ReplyRejected, StudyRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan
from cloister_shared.readiness import UNITS, USABLE
from cloister_shared.tally import Numbers

if TYPE_CHECKING:
    from cloister_server.records import Study
    from cloister_server.registry import Registry
    from cloister_shared.wire import Reply

_FILE = "readiness.json"
_WIDTH, _NAME, _CELL = 100, 24, 16
_SURE = 2
"""Standard deviations of the noise that are given away before anything is called thin."""

_HALF = 0.5
"""A feature that fewer units have is thin: what is filled in would be most of it."""


@dataclass(frozen=True)
class Table:
    """What each hospital told, and why others did not. ``spread`` is the noise's standard deviation, in units."""

    told: dict[str, Numbers]
    missing: dict[str, str] = field(default_factory=dict[str, str])
    spread: float | None = None
    held: bool = False
    """Whether the study still waits until a person has read it."""


# --- what is kept ------------------------------------------------------------------------------------------
def load(folder: Path) -> Table | None:
    """The table of the study in ``folder``, or None before it was told.

    Raises:
        CheckpointBroken: it is damaged.
    """
    path = folder / _FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Table(found["told"], found["missing"], found["spread"], found["held"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise CheckpointBroken(f"{path} is damaged.", mend="Restore it from a backup.") from None


def save(folder: Path, table: Table) -> None:
    """Keep it, before anybody sees it: the hospitals tell it once."""
    durable.save_text(folder / _FILE, json.dumps(asdict(table), indent=1, sort_keys=True))


def released(folder: Path) -> None:
    """The study was stopped for its table: whoever resumes it has had the chance to read it."""
    if table := load(folder):
        save(folder, replace(table, held=False))


def checked(plan: StudyPlan, spread: float | None, site: str, reply: Reply) -> Numbers:
    """One hospital's numbers.

    Raises:
        ReplyRejected: says in what the reply is odd.
    """
    wanted, said = readiness.names(plan), reply.header.metrics
    if (reply.header.site, reply.header.round) != (site, 0):
        raise ReplyRejected(f"the readiness is {reply.header.site}'s for round {reply.header.round}")
    known = [value for value in said.values() if value is not None]
    withheld = len(known) < len(said)
    if set(said) != set(wanted) or reply.vectors or reply.octets or said[UNITS] is None or (withheld and plan.private):
        raise ReplyRejected(f"the readiness is not {len(wanted)} counts")
    most = plan.cohort.max_rows + 10 * (spread or 0.0)
    if not all(-10 * (spread or 0.0) <= value <= most for value in known):
        raise ReplyRejected(f"the readiness counts what the plan does not allow, more than {plan.cohort.max_rows}")
    return {name: said[name] for name in wanted}


def of_study(registry: Registry, folder: Path, called: str) -> tuple[Study, StudyPlan, Table]:
    """The table of the study ``called``, of the consortium in ``folder``.

    Raises:
        StudyRefused: there is no such study, or no table of it.
    """
    study = registry.study(called)
    plan, table = read_plan(study.plan, study.file), load(folder / "studies" / study.digest[:16])
    if table is None:
        mend = "It comes once the study runs." if plan.readiness else "A plan asks for it with readiness: {}."
        raise StudyRefused(f"{study.name}: no hospital told what it holds.", mend=mend)
    return study, plan, table


# --- what is made of it ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """A share of a hospital's units; ``mark`` is ``!`` where it is thin, ``?`` where the noise hides whether it is."""

    share: float | None
    mark: str = ""

    @property
    def text(self) -> str:
        """As tables show it."""
        return "–" if self.share is None else f"{self.share:.0%}{self.mark and ' ' + self.mark}"


def lines(plan: StudyPlan, table: Table) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Under each name a cell for each hospital, and for all of them together, under ``all``."""
    everyone = units(table)
    half = dict.fromkeys(everyone, _HALF)
    yield USABLE, _line(table, USABLE, half)
    for name, question in readiness.features(plan.table).items():
        yield name, _line(table, question, half)
    few = {site: least(plan) / max(count, 1.0) for site, count in everyone.items()}
    for name, question in readiness.outcomes(plan.table).items():
        yield name, _line(table, question, few)


def least(plan: StudyPlan) -> float:
    """Units with an outcome below which it is thin: so few of them are held out that no metric may leave."""
    return plan.evaluation.min_count / (plan.evaluation.holdout or 0.25)


def units(table: Table) -> dict[str, float]:
    """How many units each hospital has, 0 at least, and all together."""
    found = {site: max(0.0, said[UNITS] or 0.0) for site, said in sorted(table.told.items())}
    return found | {"all": sum(found.values())}


def noise(table: Table) -> dict[str, float | None]:
    """The noise's standard deviation as a share of a hospital's units; None where there is none."""
    everyone, count = units(table), len(table.told)
    if table.spread is None:
        return dict.fromkeys(everyone)
    spreads = dict.fromkeys(everyone, table.spread) | {"all": table.spread * count**0.5}
    return {site: spreads[site] / found if found > 0 else math.inf for site, found in everyone.items()}


def _line(table: Table, question: str, thin: dict[str, float]) -> dict[str, Cell]:
    counts = {site: said[question] for site, said in sorted(table.told.items())}
    known = [count for count in counts.values() if count is not None]
    counts["all"] = sum(known) if len(known) == len(table.told) else None
    everyone, spreads = units(table), noise(table)
    return {site: _cell(count, everyone[site], spreads[site] or 0.0, thin[site]) for site, count in counts.items()}


def _cell(count: float | None, of: float, spread: float, thin: float) -> Cell:
    if count is None or of <= 0:
        return Cell(None)
    share, sure = count / of, _SURE * spread
    mark = "!" if share + sure < thin else "?" if share - sure < thin and spread else ""
    return Cell(min(1.0, max(0.0, share)), mark)


# --- in words ----------------------------------------------------------------------------------------------
def page(plan: StudyPlan, table: Table) -> str:
    """The table for a terminal of 100 columns: features down, hospitals across, in as many parts as they need."""
    everyone, unit = units(table), plan.privacy.unit or "record"
    body = {f"{unit}s": {site: f"{count:,.0f}" for site, count in everyone.items()}}
    body |= {name: {site: cell.text for site, cell in row.items()} for name, row in lines(plan, table)}
    if table.spread is not None:
        body["noise of a share"] = {site: f"±{share:.1%}" for site, share in noise(table).items() if share is not None}
    first = min(max(map(len, body)), _NAME)
    width = min(max(6, *map(len, everyone)), _CELL) + 2
    at_once = max(2, (_WIDTH - first) // width)
    sites = [site for site in everyone if site != "all"]
    parts = [sites[at : at + at_once - 1] for at in range(0, len(sites), at_once - 1)]
    page = list[str]()
    for part in parts:
        shown = [*part, "all"]
        page.append(" " * first + "".join(f"{_cut(site, width - 2):>{width}}" for site in shown))
        for name, row in body.items():
            page.append(f"{_cut(name, first):<{first}}" + "".join(f"{row[site]:>{width}}" for site in shown))
        page.append("")
    notes = (line for note in notes_of(plan, table) for line in wrap(note, _WIDTH, subsequent_indent="   "))
    return "\n".join([*page, *notes])


def notes_of(plan: StudyPlan, table: Table) -> Iterator[str]:
    """What the signs in the table mean, of those that are in it, and who is not."""
    unit = plan.privacy.unit or "record"
    if table.spread is not None:
        yield (
            f"Each hospital added noise of its own: a standard deviation of {table.spread:.1f} {unit}s on how many"
            " there are. Of a share it is in the last line."
        )
    marks = {cell.mark or cell.text for _, row in lines(plan, table) for cell in row.values()}
    if marks & {"!", "?"}:
        thin = f"fewer than half of the {unit}s have it"
        thin += f"; of an outcome, fewer than {least(plan):.0f}" if readiness.outcomes(plan.table) else ""
        given = ", though two standard deviations be the noise's" if table.spread is not None else ""
        yield f"!  Thin: {thin}{given}." + (" ?  The noise hides whether it is so." if "?" in marks else "")
    if "–" in marks:
        yield (
            f"–  Withheld: fewer than {plan.evaluation.min_count} {unit}s have it, or lack it."
            if not plan.private
            else f"–  No {unit}s to tell of."
        )
    for site, why in sorted(table.missing.items()):
        yield f"Not told: {site}: {why}"


def as_json(plan: StudyPlan, table: Table) -> str:
    """The same for programs: the counts as told, and the shares with their marks."""
    shown: dict[str, object] = {
        "unit": plan.privacy.unit or "record",
        "noise": table.spread,
        "counts": table.told,
        "missing": table.missing,
        "shares": {name: {site: asdict(cell) for site, cell in row.items()} for name, row in lines(plan, table)},
    }
    return json.dumps(shown, indent=1, ensure_ascii=False)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
