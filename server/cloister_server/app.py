"""The coordinator's side of a study as a Flower ServerApp: open the study, run the rounds, hand over the model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from cloister_server import readiness, statistics
from cloister_server.cohort import enrol
from cloister_server.rounds import Study, ask, ask_all, collect, run_round, send, ticket
from cloister_server.store import Checkpoint, RoundRecord, Store
from cloister_server.total import require_quorum
from cloister_shared import tally
from cloister_shared.envelope import read_roster
from cloister_shared.errors import EnvelopeRefused, QuorumLost, ReplyRejected, StudyHeld
from cloister_shared.layout import Layout, gathered, initial_model, layout_of
from cloister_shared.plan import StudyPlan
from cloister_shared.readiness import spread as spread_of
from cloister_shared.tally import Numbers
from cloister_shared.wire import Advert, ReplyHeader, Ticket, TicketHeader, read_signed, unpack_reply

Notice = Callable[[RoundRecord], None]
Members = Callable[[], Mapping[int, str]]
"""Between organisations: the Flower nodes that may take part at this moment, each under its certified name."""


@dataclass(frozen=True)
class Finished:
    """A study after its last round: the final model, and how the hospitals judge it."""

    checkpoint: Checkpoint
    enrolled: tuple[str, ...]
    judged: dict[str, ReplyHeader]
    """Each hospital's own judgement; empty under the secure sum."""
    numbers: Numbers
    """Under the secure sum: each metric's mean over the hospitals."""
    silent: dict[str, str]


def run_study(
    plan: StudyPlan,
    store: Store,
    grid: Grid,
    notice: Notice = lambda record: None,
    members: Members | None = None,
) -> Finished:
    """Open or resume a study and run it to its end. A round begins from the checkpoint of the one before.

    Without ``members``, as in a simulation, every node takes part under the name that it gives itself.

    Raises:
        CohortTooSmall, QuorumLost: too few hospitals; what was reached is kept.
    """
    study = open_study(plan, store, grid, members)
    begin = study.checkpoint().round + 1
    for number in range(begin, plan.rounds + 1):
        if number > begin and members and plan.cohort.late_joiners == "next-round":
            there = set(study.enrolled)
            study = with_late_joiners(study, grid, members)
            if plan.readiness and (new := set(study.enrolled) - there):
                _readiness(study, grid, new)
        notice(run_round(study, number, grid))
    judged: dict[str, ReplyHeader] = {}
    if plan.aggregation.secure_sum:
        mean = ask_all(study, plan.rounds + 1, grid)
        said = statistics.judged(plan, mean.numbers) if plan.evaluation.epsilon_share else mean.numbers
        return Finished(study.checkpoint(), tuple(study.enrolled), judged, said, mean.rejected)

    def accept(site: str, message: Message) -> None:
        judged[site] = unpack_reply(message.content).header

    sent = send(study, ticket(study, plan.rounds + 1), grid, "evaluate")
    silent = collect(grid, sent, plan.round_timeout, accept)
    return Finished(study.checkpoint(), tuple(study.enrolled), judged, {}, silent)


def open_study(plan: StudyPlan, store: Store, grid: Grid, members: Members | None = None) -> Study:
    """Enrol the hospitals and make sure of a checkpoint: the one on disk, or the untrained model's.

    Raises:
        WeightsBroken: the plan's public weights are not in the store's folder.
        StudyHeld: the hospitals told what they hold, and the plan waits until a person has read it.
    """
    first = initial_model(plan, store.folder)
    layout = layout_of(plan, first)
    secure = plan.aggregation.secure_sum
    roster = read_roster(store.folder / "roster.json") if secure else {}
    introduced, absent = _introduced(plan, layout, grid, list(grid.get_node_ids()), members)
    study = Study(plan, layout, enrol(plan, introduced, absent), store, roster)
    if store.load(plan.digest) is None:
        store.save(Checkpoint(_new_run(plan), plan.digest, 0, gathered(first, layout.shared)))
    if plan.readiness:
        _readiness_once(study, grid, members, absent)
    if secure:
        if not (now := study.checkpoint()).cohort:
            store.save(replace(now, cohort=_adverts(study, grid, now)))
        study = replace(study, cohort=study.checkpoint().cohort)
    if plan.asks_statistics and study.checkpoint().statistics is None:
        said = _statistics(study, grid)
        found = replace(study.checkpoint(), statistics=said, normalisation=statistics.constants(plan, said))
        store.save(found)
    return study


def _adverts(study: Study, grid: Grid, now: Checkpoint) -> dict[str, str]:
    """Each hospital's signed key for the run that ``now`` names: the cohort of all its secure sums.

    Raises:
        QuorumLost: too few hospitals gave one.
    """
    given: dict[str, str] = {}
    least: dict[str, int] = {}

    def accept(site: str, message: Message) -> None:
        envelope = unpack_reply(message.content).header.signed
        try:
            said = read_signed(envelope, Advert, study.roster)
        except EnvelopeRefused as refusal:
            raise ReplyRejected(refusal.said) from None
        if said.site != site:
            raise ReplyRejected(f"the key is {said.site}'s")
        given[site], least[site] = envelope, said.min_cohort

    asked = Ticket(TicketHeader(run=now.run, plan=now.plan, round=0, site=""))
    silent = collect(grid, send(study, asked, grid, "query.advertise"), study.plan.round_timeout, accept)
    while leaves := [site for site in given if least[site] > len(given)]:
        silent |= {site: f"takes part with {least[site]} hospitals or more" for site in leaves}
        given = {site: envelope for site, envelope in given.items() if site not in leaves}
    require_quorum("Keys for the secure sum", len(given), study.plan.cohort.min_sites, silent)
    return dict(sorted(given.items()))


def with_late_joiners(study: Study, grid: Grid, members: Members) -> Study:
    """The study with the hospitals that have come since, if any. Only between two rounds, when nothing is under way.

    Under the secure sum one that has keys of this run takes part again with those. For one that has none all hospitals
    that are there agree on new keys: a new run of the same study. Where nobody adds noise there is no second run, since
    two sums over other hospitals tell the difference, and each hospital refuses it: who has no keys stays out.
    """
    plan, known = study.plan, set(study.enrolled.values())
    may = members()
    new = [node for node in grid.get_node_ids() if node in may and node not in known]
    if plan.aggregation.secure_sum and not plan.private:
        new = [node for node in new if may[node] in study.cohort]
    if not new or len(known) >= plan.cohort.max_sites:
        return study
    introduced, _ = _introduced(plan, study.layout, grid, new[: plan.cohort.max_sites - len(known)], members)
    if not introduced:
        return study
    joined = replace(study, enrolled=dict(sorted({**study.enrolled, **{s: n for n, s in introduced.items()}}.items())))
    if not plan.aggregation.secure_sum or set(introduced.values()) <= set(study.cohort):
        return joined
    now = replace(study.checkpoint(), run=_new_run(plan), cohort={})
    try:
        cohort = _adverts(replace(joined, cohort={}), grid, now)
    except QuorumLost:
        return study  # as it was: the old keys still serve those that have them
    if not set(introduced.values()) & set(cohort):
        return study
    study.store.save(replace(now, cohort=cohort))
    return replace(joined, cohort=cohort)


def _new_run(plan: StudyPlan) -> str:
    return f"{plan.study}-{secrets.token_hex(4)}"[-64:]


def _introduced(
    plan: StudyPlan, layout: Layout, grid: Grid, nodes: Collection[int], members: Members | None
) -> tuple[dict[int, str], dict[int, str]]:
    """Node to hospital, of the nodes that speak the plan's layout; and why others do not take part."""
    introduced: dict[int, str] = {}
    certified = members() if members else None
    asked = [node for node in nodes if certified is None or node in certified]

    def accept(node: int, message: Message) -> None:
        said = unpack_reply(message.content).header
        if certified is not None and said.site != certified[node]:
            raise ReplyRejected(f"{certified[node]} calls itself {said.site}")
        if said.layout != layout.digest:
            raise ReplyRejected(f"{said.site} has another model")
        introduced[node] = said.site

    absent = collect(grid, ask(grid, asked, "query.enrol", plan.digest), plan.round_timeout, accept)
    return introduced, absent


def _readiness_once(study: Study, grid: Grid, members: Members | None, absent: Mapping[int, str]) -> None:
    """Have the hospitals tell what they hold, if they have not yet: asked anew they would add other noise, for more.

    Raises:
        QuorumLost: too few told it.
        StudyHeld: between organisations, if the plan holds for it.
    """
    if (table := readiness.load(study.store.folder)) is None:
        known = members() if members else {}
        silent = {known.get(node, f"node {node}"): why for node, why in absent.items()}
        table = _readiness(study, grid, study.enrolled, silent)
    if table.held and members:
        raise StudyHeld(f"{len(table.told)} hospitals told what they hold, and the plan waits until it is read.")


def _readiness(
    study: Study, grid: Grid, asked: Collection[str], absent: Mapping[str, str] | None = None
) -> readiness.Table:
    """The table with what these hospitals tell, each by itself; durable before anybody sees it.

    Raises:
        QuorumLost: fewer have told it than the plan needs.
    """
    plan, now = study.plan, study.checkpoint()
    spread = spread_of(plan)
    before = readiness.load(study.store.folder) or readiness.Table(
        {}, {}, spread, bool(plan.readiness and plan.readiness.hold)
    )
    told: dict[str, Numbers] = {}

    def accept(site: str, message: Message) -> None:
        told[site] = readiness.checked(plan, spread, site, unpack_reply(message.content))

    to = {site: node for site, node in study.enrolled.items() if site in asked and site not in before.told}
    question = Ticket(TicketHeader(run=now.run, plan=now.plan, round=0, site=""))
    alone = replace(study, enrolled=to, cohort={})
    silent = collect(grid, send(alone, question, grid, "query.readiness"), plan.round_timeout, accept)
    told = {**before.told, **told}
    missing = {site: why for site, why in {**before.missing, **(absent or {}), **silent}.items() if site not in told}
    require_quorum("Readiness", len(told), plan.cohort.min_sites, missing)
    table = replace(before, told=told, missing=missing)
    readiness.save(study.store.folder, table)
    return table


def _statistics(study: Study, grid: Grid) -> Numbers:
    """The hospitals' (noisy) sums and counts: round 0.

    Raises:
        QuorumLost: too few hospitals gave theirs.
    """
    plan = study.plan
    if plan.aggregation.secure_sum:
        return ask_all(study, 0, grid).numbers
    total, answered = dict.fromkeys(tally.statistics(plan), 0.0), list[str]()

    def accept(site: str, message: Message) -> None:
        said = {name: value or 0.0 for name, value in unpack_reply(message.content).header.metrics.items()}
        if set(said) != set(total) or not np.isfinite(list(said.values())).all():
            raise ReplyRejected(f"the statistics are not {len(total)} finite numbers")
        for name, value in said.items():
            total[name] += value
        answered.append(site)

    silent = collect(grid, send(study, ticket(study, 0), grid, "query.statistics"), plan.round_timeout, accept)
    require_quorum("Statistics", len(answered), plan.cohort.min_sites, silent)
    return dict(total)


def server_app(plan: StudyPlan, store: Store, finished: Callable[[Finished], None], notice: Notice) -> ServerApp:
    """The study as Flower runs it, on whichever grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        finished(run_study(plan, store, grid, notice))

    return app
