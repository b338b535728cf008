"""A comparison for the terminal, for people (``report.html``) and for programs (``metrics.jsonl``)."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import Any

import jinja2
import yaml
from rich import box
from rich.table import Table

from cloister_shared import durable, plan_text
from cloister_shared.outcomes.judging import Estimate
from cloister_shared.outcomes.words import counted_as, meaning, narrow, title
from cloister_shared.schema import Binary
from cloister_simulations import figures, guarantees, learned
from cloister_simulations.federation import Arm, Comparison, Metrics
from cloister_simulations.findings import (
    DASH,
    NOTHING,
    VOID,
    HospitalRow,
    arm_rows,
    by_arm,
    hospital_rows,
    interval_level,
    judged_by,
    seeds_of,
    summary,
    text,
)

_MOST_IN_FIGURE, _MOST_IN_TERMINAL, _MOST_ARMS, _MOST_MISSED = 24, 20, 5, 60

SOURCES = {
    "breast-cancer": "One real hospital's published patients, dealt out here to invented hospitals.",
    "heart-disease": "Published patients of four real hospitals.",
    "readmission": "Published encounters that name no hospital: each site here is a way into a hospital"
    " (admission source) that stands in for one. No figure here speaks for a real hospital.",
    "tables": "The hospitals' own tables, as the scenario names them.",
    "eicu": "Published stays of 116 real hospitals; hospitals of one region and size stand together as one network.",
    "censored-ehr": "Invented patients at invented hospitals. No figure here speaks for real ones.",
    "trial": "Invented patients at invented hospitals. No figure here speaks for real ones.",
    "multimodal-ehr": "Invented patients at invented hospitals. No figure here speaks for real ones.",
    "generated-ehr": "Invented patients at invented hospitals. No figure here speaks for real ones.",
}
"""Whose records they are, by the scenario's source."""


# --- files -------------------------------------------------------------------------------------------------
def write(comparison: Comparison) -> Path:
    """Write ``report.html`` and ``metrics.jsonl`` into the comparison's folder; the path of the report."""
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in metrics_lines(comparison))
    durable.save_text(comparison.folder / "metrics.jsonl", "".join(lines))
    path = comparison.folder / "report.html"
    durable.save_text(path, html(comparison))
    return path


def metrics_lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A line for each round; then for each arm and seed one for each hospital and one for all together."""
    for result in comparison.results:
        for point in result.curve:
            yield {"of": "round", "arm": result.arm.folder, "seed": result.seed, **point}
    for result in comparison.results:
        of = {"arm": result.arm.folder, "seed": result.seed, "plan": result.plan}
        of |= {"reproducible_noise": True} if result.reproducible_noise else {}
        for site, metrics in result.sites.items():
            tuned = {"fine_tuned": _plain(result.tuned[site])} if site in result.tuned else {}
            tuned |= {"ditto": _plain(result.ditto[site])} if site in result.ditto else {}
            spent = {"hospital": site, "epsilon": result.epsilon.get(site)}
            yield {"of": "hospital", **of, **spent, "metrics": _plain(metrics), **tuned}
        most = {"epsilon": max(result.epsilon.values(), default=None), "seconds": round(result.seconds, 3)}
        told = {"learned": result.learned} if result.learned else {}
        yield {"of": "all hospitals", **of, **most, "metrics": _plain(result.overall), **told}


def html(comparison: Comparison) -> str:
    """The whole page. It needs no network and runs no script."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cloister_simulations"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms, plan = by_arm(comparison), comparison.scenario.plan
    rows, hospitals, judged = arm_rows(comparison), hospital_rows(comparison), judged_by(comparison)
    drawn = {row.name: row.headline for row in hospitals if row.headline}
    missed = [
        f"{result.arm.name}, seed {result.seed}: {why}" for result in comparison.results for why in result.rejected
    ]
    return templates.get_template("report.html.j2").render(
        comparison=comparison,
        plan=plan,
        plan_yaml=yaml.safe_dump(
            plan.model_dump(mode="json"),
            sort_keys=False,
            default_flow_style=None,
            width=100,
            allow_unicode=True,
        ),
        source=SOURCES.get(comparison.scenario.simulation.hospitals.source, ""),
        when=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC".lstrip("0"),
        versions=versions(),
        seeds=seeds_of(comparison),
        seconds=sum(result.seconds for result in comparison.results),
        summary=" ".join(summary(comparison)),
        arms=arms,
        rows=rows,
        void=[row.arm for row in rows if row.epsilon == VOID],
        hospitals=hospitals,
        columns=_columns(comparison),
        personal=_personal(hospitals),
        outcome=judged,
        headline=title(judged.headline),
        title=title,
        meaning=meaning,
        counted=counted_as(plan.table.target),
        level=interval_level(comparison),
        nothing=NOTHING,
        text=text,
        curves=figures.curves({arm: found for arm, found in arms.items() if arm.kind != "alone"}, judged.headline),
        calibrations={
            arm: figures.calibration(arm, list(arms), found)
            for arm, found in arms.items()
            if isinstance(plan.table.target, Binary)
        },
        forest=figures.forest(dict(list(drawn.items())[:_MOST_IN_FIGURE]), judged.headline) if drawn else "",
        in_figure=min(len(drawn), _MOST_IN_FIGURE),
        coordinator=learned.glimpse(comparison),
        judged=learned.judged(comparison),
        cohort=learned.cohort(comparison),
        readiness=learned.readiness(comparison),
        guarantee=plan_text.guarantee(plan),
        by_records=guarantees.by_records(comparison),
        certificates=guarantees.certificates(comparison),
        missed=missed[:_MOST_MISSED],
        missed_more=max(0, len(missed) - _MOST_MISSED),
    )


def versions() -> dict[str, str]:
    """What this ran on."""
    found: dict[str, str] = {}
    for name in ("cloister", "flwr", "torch", "opacus", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found | {"python": platform.python_version()}


def _plain(metrics: Metrics) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in metrics.items()}


def _personal(rows: Sequence[HospitalRow]) -> dict[str, Callable[[HospitalRow], Estimate]]:
    """The columns of models that hospitals keep for themselves, of those that the plan has."""
    kinds: dict[str, Callable[[HospitalRow], Estimate]] = {
        "fine-tuned": lambda row: row.tuned,
        "ditto": lambda row: row.ditto,
    }
    return {name: of for name, of in kinds.items() if any(of(row).value is not None for row in rows)}


def _columns(comparison: Comparison) -> list[Arm]:
    """The arms that a table of hospitals compares: a pooled model is no hospital's choice.

    Where hospitals keep models of their own, it stands there for what these could reach at most.
    """
    kept = any(result.tuned or result.ditto for result in comparison.results)
    return [arm for arm in by_arm(comparison) if kept or arm.kind != "pooled"]


# --- the terminal ------------------------------------------------------------------------------------------
def tables(comparison: Comparison) -> list[Table]:
    """How well each arm predicts, and each hospital's part. Both fit a terminal of 100 columns."""
    return [_arm_table(comparison), _hospital_table(comparison)]


def _arm_table(comparison: Comparison) -> Table:
    level, notes = interval_level(comparison), list[str]()
    judged = judged_by(comparison)
    slope = " Slope: of calibration, 1 is best." if "calibration_slope" in judged.beside else ""
    notes.append(f"Means over seeds.{slope}{'' if judged.rises else f' {title(judged.headline)}: less is better.'}")
    if any(arm.epsilon for arm in by_arm(comparison)):
        notes.append("ε: the most that any hospital's ledger counts, in patients.")
    if any(arm.kind == "alone" for arm in by_arm(comparison)):
        notes.append("Alone: each hospital's own model on its own patients, then all patients taken together.")
    shown = fill(f"{title(judged.headline)} ({level} interval)", 20)
    heads = (shown, "over seeds", *(fill(narrow(name), 9) for name in judged.beside), "ε")
    table = _table("How well does it predict?", notes, *heads)
    for row in arm_rows(comparison):
        others = (text(row[name], interval=False) for name in judged.beside)
        table.add_row(row.arm.name, text(row[judged.headline]), row.over_seeds, *others, row.epsilon)
    return table


def _hospital_table(comparison: Comparison) -> Table:
    rows, columns = hospital_rows(comparison), _columns(comparison)[:_MOST_ARMS]
    personal, counted = _personal(rows), counted_as(comparison.scenario.plan.table.target)
    shown, notes = rows[:_MOST_IN_TERMINAL], list[str]()
    if any(arm not in row.headline for row in shown for arm in columns):
        least = comparison.scenario.plan.evaluation.min_count
        few = f"fewer than {least} held-out rows of either outcome" if counted else "too few held-out rows"
        notes.append(f"{DASH}: {few}, so no metrics leave the hospital.")
    if len(rows) > len(shown):
        notes.append(f"The {len(shown)} largest of {len(rows)} hospitals; report.html shows all.")
    names = [f"ε = {arm.epsilon:g}" if arm.epsilon else arm.kind for arm in columns]
    heads = ["training rows", "held out", *([counted] if counted else []), *names, *personal]
    table = _table(f"{title(judged_by(comparison).headline)} at each hospital", notes, *heads)
    for row in shown:
        found = [row.headline.get(arm, NOTHING) for arm in columns] + [of(row) for of in personal.values()]
        values = (text(estimate, interval=False) for estimate in found)
        share = [f"{row.positive:.0%}"] if counted else []
        table.add_row(row.name, f"{row.train:,}", f"{row.test:,}", *share, *values)
    return table


def _table(title: str, notes: list[str], *heads: str) -> Table:
    table = Table(
        title=title,
        caption="\n".join(["", *notes]) if notes else None,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True, max_width=24)
    for head in heads:
        table.add_column(head, justify="right")
    return table
