"""What the audit found, told to people: two tables, and a sentence for everything that is wrong."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloister_simulations.audit.canaries import Size
from cloister_simulations.audit.gate import Finding, audit
from cloister_simulations.audit.mechanism import Plant


def tell(
    epsilons: Sequence[float], plant: str | None, seconds: float, console: Console, *, as_json: bool = False
) -> bool:
    """Audit each claim and show what was found; whether every one holds. ``plant`` is one of ``Plant``."""
    found = watched(epsilons, Plant(plant) if plant else None, seconds)
    if as_json:
        sys.stdout.write(json.dumps([one.as_json() for one in found], indent=1, ensure_ascii=False) + "\n")
    else:
        for part in (*tables(found), *sentences(found)):
            console.print(part)
    return all(one.verdict == "holds" for one in found)


def watched(epsilons: Sequence[float], plant: Plant | None, seconds: float, size: Size | None = None) -> list[Finding]:
    """Audit each claim in its share of the time, with a bar for each on a terminal."""
    began, size = time.monotonic(), size or Size()
    said = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} steps"))
    console = Console(stderr=True, highlight=False)
    with Progress(*said, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(f"ε {epsilon:g}", total=size.steps, start=False) for epsilon in epsilons]
        found: list[Finding] = []
        for number, (epsilon, task) in enumerate(zip(epsilons, tasks, strict=True), start=1):
            bars.start_task(task)
            until = began + seconds * number / len(epsilons)
            found.append(
                audit(
                    epsilon,
                    plant,
                    size=size,
                    until=until,
                    notice=lambda steps, task=task: bars.update(task, completed=steps),
                )
            )
    return found


def tables(found: Iterable[Finding]) -> Iterator[Table]:
    """What was found of some claims, to read in 100 columns: the bounds, then every line of conformance."""
    found = list(found)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("claimed ε", "lower bound, 95 %", "of the claim", "charged (Rényi)", "verdict"):
        table.add_column(heading, justify="right" if heading != "verdict" else "left")
    for one in found:
        share = f"{one.share:.0%}" if math.isfinite(one.share) else "–"
        lower = f"{one.lower:.2f}" if math.isfinite(one.lower) else "infinite"
        colour = "green" if one.verdict == "holds" else "bold red"
        table.add_row(f"{one.claimed:g}", lower, share, f"{one.charged:.2f}", f"[{colour}]{one.verdict}[/]")
    yield table
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("conformance")
    table.add_column("should be")
    for one in found:
        table.add_column(f"ε {one.claimed:g}")
    for lines in zip(*(one.checks for one in found), strict=True):
        told = [check.found if check.holds else f"[bold red]{check.found} ✗[/]" for check in lines]
        bars = dict.fromkeys(check.bar for check in lines)
        table.add_row(lines[0].name, ", ".join(bars), *told)
    yield table


def sentences(found: Iterable[Finding]) -> Iterator[str]:
    """What is wrong, claim by claim, or that nothing is."""
    found = list(found)
    for one in found:
        said = one.caught
        if one.verdict == "loose":
            said = [
                f"The lower bound is {one.share:.0%} of what the event allows after {one.steps} steps: too little was"
                f" seen to vouch for the mechanism. Give it more --seconds."
            ]
        for sentence in said:
            yield f"ε {one.claimed:g}: {sentence}"
    if all(one.verdict == "holds" for one in found):
        yield "The mechanism is what its events say, as far as an observer of every step can tell."
