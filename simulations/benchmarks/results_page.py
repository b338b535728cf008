"""Every shipped scenario of a clinical task, run as anybody would, and the page of the documentation that comes of it.

make results                                   all of them; half an hour on 4 cores
make results ARGS="mortality pneumonia"        some; the page keeps what it says of the others
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cloister_shared.outcomes.outcome import outcome_of
from cloister_shared.outcomes.words import title
from cloister_shared.plan import StudyPlan
from cloister_shared.schema_text import predicts
from cloister_simulations.scenario import Scenario, read_scenario, shipped

ROOT = Path(__file__).resolve().parents[2]
PAGE, RUNS = ROOT / "docs/results.md", ROOT / "runs"

HEAD = """# What the tasks reach

Each row is one scenario that comes with Cloister, run by the command beside it. **Pooled** is trained on all hospitals'
records in one place, **alone** is each hospital's own model on its own patients, **federated** is trained without
records that leave, and **private** is that with differential privacy, at each epsilon (ε) that the scenario names; the
latter two are under the secure sum. Values are of held-out records of all hospitals together, with their 95 %
intervals, over the scenario's seeds. Sites that a scenario's first lines call proxies are no real hospitals.

This page is written by `make results`; the test of each scenario is a smaller run of the same.

"""
ARMS = ("pooled", "alone", "federated")
COLUMNS = ("scenario", "what it learns", "measure", *ARMS, "private", "command")


def main() -> None:
    """Run what is asked for, some at once, and write the page."""
    parser = argparse.ArgumentParser(description="Run the scenarios and write docs/results.md.")
    parser.add_argument("scenarios", nargs="*", help="all, if none is named")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--page-only", action="store_true", help="run nothing; read what runs/ holds")
    asked = parser.parse_args()
    names = asked.scenarios or list(shipped())
    if not asked.page_only:
        with ThreadPoolExecutor(asked.at_once) as pool:
            for name, said in pool.map(run, names):
                print(f"{name}: {said}", flush=True)
    table = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *rows(shipped())]
    PAGE.write_text(HEAD + "".join(table), encoding="utf-8")


def run(name: str) -> tuple[str, str]:
    """One scenario into its folder of ``runs``; how it ended."""
    began = time.monotonic()
    command = [sys.executable, "-m", "cloister_simulations.cli", "run", name, "--out", str(RUNS / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    took = f"{time.monotonic() - began:.0f} s"
    return name, took if done.returncode == 0 else f"ended with {done.returncode} after {took}: {done.stderr[-300:]}"


def rows(names: Iterable[str]) -> Iterator[str]:
    """A line for each scenario that ``runs`` holds results of."""
    for name in names:
        path = RUNS / name / "metrics.jsonl"
        if path.exists():
            yield row(read_scenario(name), [json.loads(line) for line in path.read_text().splitlines()])


def row(scenario: Scenario, lines: list[dict[str, Any]]) -> str:
    """One line of the table."""
    plan = scenario.plan
    headline = outcome_of(plan.table).headline
    whole = [line for line in lines if line["of"] == "all hospitals"]
    private = dict.fromkeys(line["arm"] for line in whole if line["arm"].startswith("private"))

    def reached(arm: str) -> str:
        return value([line["metrics"].get(headline) for line in whole if line["arm"] == arm])

    cells = [
        scenario.name,
        f"{predicts(plan.table)}; {plan.task.name}{_model(plan)}",
        title(headline),
        *map(reached, ARMS),
        "<br>".join(f"ε {arm.partition('-')[2]}: {reached(arm)}" for arm in private) or "–",
        f"`cloister-sim run {scenario.name}`",
    ]
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _model(plan: StudyPlan) -> str:
    model = getattr(plan.task, "model", "")
    return f", {model}" if model else ""


def value(estimates: list[dict[str, Any] | None]) -> str:
    """Mean over seeds, of the value and of the limits of its interval."""
    known = [estimate for estimate in estimates if estimate and estimate["value"] is not None]
    if not known:
        return "–"
    mean, low, high = (
        sum(part) / len(part) if (part := [e[key] for e in known if e[key] is not None]) else None
        for key in ("value", "low", "high")
    )
    return f"{mean:.3f}" + (f" ({low:.3f}–{high:.3f})" if low is not None and high is not None else "")


if __name__ == "__main__":
    main()
