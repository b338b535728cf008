"""What the pages tell, read from the registry: plain values, which the templates escape and lay out.

What a round told is a ``RoundRecord`` as JSON (see ``store``), with the time of its end under ``at``, if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from cloister_server import readiness
from cloister_server.dashboard.curve import Curve, curve
from cloister_server.records import Hospital, Study
from cloister_server.registry import Registry
from cloister_shared import plan_text
from cloister_shared.agreement import Decision, read_decision, roster_digest
from cloister_shared.charges import certificate
from cloister_shared.errors import CloisterError, EnvelopeRefused
from cloister_shared.outcomes.outcome import title
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan
from cloister_shared.shared_noise import Standing
from cloister_shared.tally import glance

ONLINE = timedelta(seconds=90)
"""A hospital that called within this time is online; while its stream stands that is noted every 30 s."""

WARNING = timedelta(days=30)
"""Before a certificate's end."""

UNDER_WAY = ("running", "waiting")


# --- all studies and hospitals -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """A study in a line."""

    study: Study
    rounds: int | None
    """Of the plan; None if this release cannot read it."""
    approved: list[str]
    last: Mapping[str, Any] | None


@dataclass(frozen=True)
class Member:
    """A hospital, and for how many whole days its certificate still holds."""

    hospital: Hospital
    online: bool
    days: int
    ends_soon: bool


def lines(registry: Registry) -> list[Line]:
    """Every study, those under way first and then the newest."""
    found: list[Line] = []
    for study in registry.studies():
        plan, _ = _read(study.plan, study.file)
        approved = [site for site, said in sorted(registry.decisions(study.digest).items()) if said == "approved"]
        last = registry.rounds(study.digest, study.round - 1) if study.round else []
        found.append(Line(study, plan.rounds if plan else None, approved, last[-1] if last else None))
    return sorted(found, key=lambda line: (line.study.state not in UNDER_WAY, -line.study.at.timestamp()))


def members(registry: Registry) -> list[Member]:
    """Every hospital that is enrolled or was."""
    now = datetime.now(UTC)
    return [
        Member(
            each,
            each.standing == "enrolled" and each.seen is not None and now - each.seen <= ONLINE,
            math.floor((each.not_after - now) / timedelta(days=1)),
            each.standing == "enrolled" and each.not_after - now < WARNING,
        )
        for each in registry.hospitals()
    ]


# --- one study ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """A plan in words. ``fault`` says why there are none, if this release cannot read it."""

    title: str = ""
    rounds: int | None = None
    words: dict[str, str] = field(default_factory=dict[str, str])
    off: tuple[str, ...] = ()
    standings: tuple[Standing, ...] = ()
    sites: int = 0
    """The quorum."""
    promised: float | None = None
    """Epsilon."""
    delta: float | None = None
    fault: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a hospital says of a study, and what it signed to that end, if anything."""

    site: str
    decision: str
    signed: Decision | None = None
    doubt: str = ""
    """Why the signed words are not to be believed."""


@dataclass(frozen=True)
class Round:
    """Who took part in a round, who did not and why, and the means of metrics that are known."""

    number: int
    answered: list[str]
    missed: dict[str, str]
    metrics: dict[str, float | None]
    seconds: float
    at: str | None


@dataclass(frozen=True)
class Told:
    """All that the page of a study shows."""

    study: Study
    asked: Asked
    verdicts: list[Verdict]
    rounds: list[Round]
    """The newest first."""
    shown: list[str]
    """Metrics of the rounds, as people write them."""
    curves: dict[str, Curve]


def told(registry: Registry, called: str) -> Told:
    """One study.

    Raises:
        StudyRefused: there is none that is called so, or several.
    """
    study = registry.study(called)
    asked = _asked(study.plan, study.file)
    plan, _ = _read(study.plan, study.file)
    shown = glance(plan) if plan else ()
    rounds = [_round(said, study.roster, shown) for said in registry.rounds(study.digest)]
    drawn = {title(name): curve({each.number: each.metrics[title(name)] for each in rounds}) for name in shown}
    curves = {name: found for name, found in drawn.items() if found}
    return Told(study, asked, _verdicts(registry, study), rounds[::-1], list(map(title, shown)), curves)


def readiness_page(study: Study, folder: Path) -> str:
    """What the hospitals told of their records before training, as a terminal shows it; "" if nothing."""
    plan, _ = _read(study.plan, study.file)
    table = readiness.load(folder / "studies" / study.digest[:16]) if plan else None
    return readiness.page(plan, table) if plan and table else ""


@lru_cache(maxsize=512)
def _read(text: str, file: str) -> tuple[StudyPlan | None, str]:
    """A plan, which never changes once submitted; or why this release cannot read it."""
    try:
        return read_plan(text, file), ""
    except CloisterError as error:
        return None, str(error)


@lru_cache(maxsize=512)
def _asked(text: str, file: str) -> Asked:
    plan, fault = _read(text, file)
    if plan is None:
        return Asked(fault=fault)
    try:
        words, standings = plan_text.terms(plan), certificate(plan)
    except CloisterError as error:
        return Asked(plan.title, plan.rounds, fault=str(error))
    terms = plan.privacy
    off, sites = tuple(plan_text.turned_off(plan)), plan.cohort.min_sites
    return Asked(plan.title, plan.rounds, words, off, standings, sites, terms.epsilon, terms.delta)


def _verdicts(registry: Registry, study: Study) -> list[Verdict]:
    decisions, envelopes = registry.decisions(study.digest), registry.envelopes(study.digest)
    return [_verdict(study, site, decisions.get(site, ""), envelopes.get(site)) for site in sorted(study.roster)]


def _verdict(study: Study, site: str, decision: str, envelope: str | None) -> Verdict:
    """A decision with the people behind it, once its signature was checked against the key in the study's roster."""
    if not decision or envelope is None:
        return Verdict(site, decision)
    try:
        signed = read_decision(envelope, study.roster)
    except EnvelopeRefused as refusal:
        return Verdict(site, decision, doubt=refusal.said)
    if (signed.site, signed.decision) != (site, decision):
        return Verdict(site, decision, doubt=f"{signed.site} signed “{signed.decision}”.")
    if (signed.plan, signed.roster) != (study.digest, roster_digest(study.roster)):
        return Verdict(site, decision, signed, "It was signed for another plan, or for other hospitals.")
    return Verdict(site, decision, signed)


def _round(said: Mapping[str, Any], roster: Mapping[str, str], shown: Sequence[str]) -> Round:
    answered, missed = sorted(said["answered"]), dict(sorted(said["rejected"].items()))
    absent = "not asked: it had not approved, or was not there"
    missed |= {site: absent for site in sorted(roster) if site not in answered and site not in missed}
    metrics = {title(name): said["numbers"].get(name) for name in shown}
    return Round(said["round"], answered, missed, metrics, said["seconds"], said.get("at"))
