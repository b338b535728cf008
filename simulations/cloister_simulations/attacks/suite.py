"""All attacks on the secure sum: run, held against the refusal that is meant, and shown as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

from rich import box
from rich.markup import escape
from rich.table import Table

from cloister_shared.errors import CloisterError, Fault
from cloister_simulations.attacks import coordinator, flower, hospital, limits, question
from cloister_simulations.attacks.attack import Attack
from cloister_simulations.attacks.consortium import Consortium, Refused

SECURE_SUM = tuple(
    found for part in (coordinator, question, hospital) for found in vars(part).values() if isinstance(found, Attack)
)
LIMITS = tuple(found for found in vars(limits).values() if isinstance(found, Attack))
"""What the threat model says is not stopped."""


class Unexpected(Fault):
    """An attack met a refusal, but not the one that should have stopped it: a check may be missing."""

    mend = "Mend the check, or say at the attack which refusal is meant."


@dataclass(frozen=True)
class Outcome:
    """How an attack went. ``flower`` is what Flower's SecAgg+ made of the same, where it applies."""

    name: str
    attempted: str
    refused: bool
    by: str
    reason: str
    """The sentence of the refusal, or what was gained."""
    flower: str = ""


def run(attack: Attack, folder: Path) -> Outcome:
    """One attack on hospitals of its own, which live in ``folder``.

    Raises:
        Unexpected: it met another refusal than it should.
        Exception: something broke, which is no refusal.
    """
    try:
        gained = attack.attempt(Consortium(folder))
    except (Refused, CloisterError) as refusal:
        by, reason = (refusal.by, refusal.reason) if isinstance(refusal, Refused) else (attack.by, str(refusal))
        if by != attack.by or attack.because not in reason:
            raise Unexpected(f"The attack {attack.name} met another end, by the {by}: {reason}") from refusal
        return Outcome(attack.name, attack.attempted, True, by, _telling(reason.replace(f"{folder}/", "")))
    return Outcome(attack.name, attack.attempted, False, "", gained)


def run_all(folder: Path, notice: Callable[[str, int, int], object]) -> tuple[list[Outcome], list[Outcome]]:
    """Every attack, and what is known not to be stopped.

    ``notice`` is told the name of each attack, how many went before, and how many there are.
    """
    found: list[Outcome] = []
    for number, attack in enumerate(SECURE_SUM):
        notice(attack.name, number, len(SECURE_SUM))
        outcome, measure = run(attack, folder / str(number)), flower.MEASURES.get(attack.name)
        found.append(replace(outcome, flower=measure()) if measure else outcome)
    return found, [run(limit, folder / f"limit-{number}") for number, limit in enumerate(LIMITS)]


def tables(found: Iterable[Outcome], known: Iterable[Outcome]) -> Iterator[Table]:
    """What ``run_all`` gave, to read."""
    table = _table({"attack": 17, "attempted": 27, "Cloister": 33, "Flower SecAgg+": 23})
    for outcome in found:
        said = f"[green]{outcome.by}[/]: {escape(shorten(outcome.reason, 100, placeholder=' …'))}"
        if not outcome.refused:
            said = f"[bold red]SUCCEEDED[/]: {escape(outcome.reason)}"
        table.add_row(f"[bold]{outcome.name}[/]", escape(outcome.attempted), said, escape(outcome.flower or "–"))
    yield table
    table = _table({"not stopped": 17, "attempted": 41, "gained": 42})
    for outcome in known:
        gained = f"nothing any more: {outcome.reason}" if outcome.refused else outcome.reason
        table.add_row(f"[bold]{outcome.name}[/]", escape(outcome.attempted), escape(gained))
    yield table


def as_markdown(found: Iterable[Outcome], known: Iterable[Outcome]) -> str:
    """The same for the documentation."""
    rows = [["attack", "attempted", "refused by", "because", "Flower's SecAgg+"]]
    for o in found:
        rows.append([o.name, o.attempted, o.by or "**nobody**", o.reason, o.flower or "–"])
    shown = [["not stopped", "attempted", "gained"], *([o.name, o.attempted, o.reason] for o in known)]
    return "\n\n".join("\n".join(_markdown(part)) for part in (rows, shown))


def _markdown(rows: list[list[str]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        if number == 0:
            yield "|---" * len(row) + "|"


def _table(columns: dict[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True, show_lines=False)
    for heading, share in columns.items():
        table.add_column(heading, ratio=share)
    return table


def _telling(sentences: str) -> str:
    """The refusal without its mend, and without what was being read."""
    said = sentences.removeprefix("The ticket cannot be read: ").removeprefix("attacked as amended: ")
    return said.split(". ", maxsplit=1)[0].rstrip(".")
