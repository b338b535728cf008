"""The round worker: one process for one study, which it brings to its end over lost quorums and restarts.

It talks to the hospitals through Flower's state alone, so neither a restart of the SuperLink nor one of its own
loses anything: each start is a new Flower run of the same study, which goes on from the checkpoint, and hospitals
that have answered already say the same again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloister_server import readiness
from cloister_server.app import run_study
from cloister_server.folder import open_consortium
from cloister_server.link import Link, open_link
from cloister_server.records import Study
from cloister_server.registry import Registry
from cloister_server.store import RoundRecord, Store
from cloister_shared.console import extras_named
from cloister_shared.errors import CloisterError, CohortTooSmall, LinkLost, QuorumLost, StudyHeld
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import read_plan

log = logging.getLogger("cloister.worker")

GATHER = 15.0
"""Seconds that a start waits for hospitals that are expected and not there yet, once there are enough."""
PAUSES = (2.0, 5.0, 15.0, 30.0, 60.0)
"""Seconds between tries of a round that lost its quorum; the last one again and again."""


def work(folder: Path, digest: str) -> None:
    """Run the study to its end, or until it cannot go on: the registry says which, and why.

    Raises:
        RegistryBroken: the coordinator's records cannot be used.
    """
    registry, link = open_consortium(folder).registry, open_link(folder / "link")
    study = registry.study(digest)
    plan, store = read_plan(study.plan, study.file), Store(folder / "studies" / digest[:16])
    if kept := store.load(digest):  # rounds that a crash kept from the registry
        for record in store.rounds(upto=kept.round):
            registry.add_round(digest, record["round"], _told(record))
    tried = 0
    while True:
        _gather(registry, link, study, plan)
        before = store.load(digest)
        try:
            with extras_named(), link.run(digest) as grid:
                registry.move(digest, "running", only_from=("running", "waiting"))
                run_study(
                    plan, store, grid, lambda record: _note(registry, digest, record), lambda: _may(registry, study)
                )
            registry.move(
                digest, "finished", who_took_part(registry.rounds(digest), study.roster), only_from=("running",)
            )
            return
        except (QuorumLost, CohortTooSmall) as lost:
            after = store.load(digest)
            tried = 0 if (after and after.round) != (before and before.round) else tried + 1
            pause = PAUSES[min(tried, len(PAUSES) - 1)]
            log.warning("%s Tried again in %g s.", lost.said, pause)
            registry.move(digest, "waiting", lost.said, only_from=("running", "waiting"))
            time.sleep(pause)
        except LinkLost:
            raise  # the Flower run is another's; whoever watches over this process starts it again
        except StudyHeld as held:
            registry.move(digest, "stopped", str(held), only_from=("running", "waiting"))
            readiness.released(store.folder)  # after it: a crash between them stops the study a second time, never none
            return
        except CloisterError as refusal:
            log.error("%s", refusal)
            registry.move(digest, "stopped", str(refusal), only_from=("running", "waiting"))
            return


def _gather(registry: Registry, link: Link, study: Study, plan: StudyPlan) -> None:
    """Wait until enough hospitals are there, and a little longer for those that are still expected."""
    began, said = time.monotonic(), ""
    while True:
        may = _may(registry, study)
        there = link.online() & set(may)
        waited = time.monotonic() - began
        if there and len(there) == len(may) >= plan.cohort.min_sites:
            return
        if len(there) >= plan.cohort.min_sites and waited > GATHER:
            return
        if waited > GATHER and said != (reason := _missing(registry, study, plan, {may[node] for node in there})):
            said = reason
            registry.move(study.digest, "waiting", reason, only_from=("running", "waiting"))
        time.sleep(0.2)


def _missing(registry: Registry, study: Study, plan: StudyPlan, there: Collection[str]) -> str:
    """One sentence: who is missing, and why."""
    enrolled = {each.name for each in registry.hospitals() if each.standing == "enrolled"}
    said, why = registry.decisions(study.digest), dict[str, list[str]]()
    for name in study.roster:
        if name not in enrolled:
            why.setdefault("no longer enrolled", []).append(name)
        elif (decision := said.get(name)) != "approved":
            why.setdefault(decision or "not decided", []).append(name)
        elif name not in there:
            why.setdefault("not there", []).append(name)
    missing = "; ".join(f"{what}: {', '.join(names)}" for what, names in why.items())
    return f"{len(there)} of the {plan.cohort.min_sites} hospitals needed are there; {missing}."


def _may(registry: Registry, study: Study) -> Mapping[int, str]:
    """The nodes of the study's hospitals that are enrolled and approve it at this moment."""
    said = registry.decisions(study.digest)
    return {
        hospital.node: hospital.name
        for hospital in registry.hospitals()
        if hospital.standing == "enrolled" and hospital.name in study.roster and said.get(hospital.name) == "approved"
    }


def _note(registry: Registry, digest: str, record: RoundRecord) -> None:
    registry.add_round(digest, record.round, {"at": datetime.now(UTC).isoformat(), **_told(vars(record))})
    log.info("round %d: %s", record.round, ", ".join(record.answered))


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the records keep of a round: no figure of a single hospital, and nothing of what one sent."""
    return {key: record[key] for key in ("round", "answered", "rejected", "numbers", "seconds")}


def who_took_part(rounds: Sequence[Mapping[str, Any]], roster: Collection[str]) -> str:
    """One sentence for the end: no study is finished without saying who was in which round, and who in none."""
    missed = {
        site: [str(record["round"]) for record in rounds if site not in record["answered"]] for site in sorted(roster)
    }
    always = [site for site, numbers in missed.items() if not numbers]
    never = [site for site, numbers in missed.items() if len(numbers) == len(rounds)]
    parts = [f"{', '.join(always)} in all {len(rounds)} rounds"] if always else []
    parts += [
        f"{site} in all but {', '.join(numbers)}"
        for site, numbers in missed.items()
        if site not in always and site not in never
    ]
    parts += [f"{', '.join(never)} in none"] if never else []
    return "; ".join(parts) + "."
