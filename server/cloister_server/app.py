"""The coordinator's side of a study as a Flower ServerApp: open the study, run the rounds, hand over the model."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from cloister_server.cohort import enrol
from cloister_server.rounds import Study, ask, collect, run_round, send
from cloister_server.store import Checkpoint, Constants, RoundRecord, Store
from cloister_shared.errors import PlanRefused, QuorumLost, ReplyRejected
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import numbers
from cloister_shared.tasks.layout import Layout, gathered, initial_model, layout_of
from cloister_shared.wire import ReplyHeader, unpack_reply

Notice = Callable[[RoundRecord], None]


@dataclass(frozen=True)
class Finished:
    """A study after its last round: the final model and each hospital's own judgement of it."""

    checkpoint: Checkpoint
    enrolled: tuple[str, ...]
    judged: dict[str, ReplyHeader]
    silent: dict[str, str]


def run_study(plan: StudyPlan, store: Store, grid: Grid, notice: Notice = lambda record: None) -> Finished:
    """Open or resume a study and run it to its end. A round begins from the checkpoint of the one before.

    Raises:
        PlanRefused: the plan asks for what this version cannot give.
        CohortTooSmall, QuorumLost: too few hospitals; what was reached is kept.
    """
    study = open_study(plan, store, grid)
    for number in range(study.checkpoint().round + 1, plan.rounds + 1):
        notice(run_round(study, number, grid))
    judged: dict[str, ReplyHeader] = {}

    def accept(site: str, message: Message) -> None:
        judged[site] = unpack_reply(message.content).header

    silent = collect(grid, send(study, plan.rounds + 1, grid, "evaluate"), plan.round_timeout, accept)
    return Finished(study.checkpoint(), tuple(study.enrolled), judged, silent)


def open_study(plan: StudyPlan, store: Store, grid: Grid) -> Study:
    """Enrol the hospitals and make sure of a checkpoint: the one on disk, or the untrained model's."""
    refuse_unbuilt(plan)
    untrained = initial_model(plan)
    layout = layout_of(plan, untrained)
    study = Study(plan, layout, _enrol(plan, layout, grid), store)
    if store.load(plan.digest) is None:
        run = f"{plan.study}-{secrets.token_hex(4)}"[-64:]
        store.save(Checkpoint(run, plan.digest, 0, gathered(untrained, layout.shared)))
    if plan.normalisation.method == "federated" and study.checkpoint().normalisation is None:
        store.save(replace(study.checkpoint(), normalisation=_federated_constants(study, grid)))
    return study


def refuse_unbuilt(plan: StudyPlan) -> None:
    """Refuse what a plan may ask for and this version cannot give.

    Raises:
        PlanRefused: names it.
    """
    if plan.aggregation.secure_sum:
        raise PlanRefused(
            "aggregation.secure_sum is on, and this version cannot add up encrypted updates yet.",
            mend="Write aggregation.secure_sum: false; the coordinator then sees each hospital's update.",
        )


def _enrol(plan: StudyPlan, layout: Layout, grid: Grid) -> dict[str, int]:
    introduced: dict[int, ReplyHeader] = {}

    def accept(node: int, message: Message) -> None:
        introduced[node] = unpack_reply(message.content).header

    sent = ask(grid, list(grid.get_node_ids()), "query.enrol")
    absent = collect(grid, sent, plan.round_timeout, accept)
    return enrol(plan, layout.digest, introduced, absent)


def _federated_constants(study: Study, grid: Grid) -> Constants:
    """Centre and scale of each number feature from the hospitals' (noisy) sums: post-processing, costs nothing.

    Raises:
        QuorumLost: too few hospitals gave their sums.
    """
    plan, features = study.plan, numbers(study.plan.table)
    total, answered = np.zeros((3, len(features))), list[str]()

    def accept(site: str, message: Message) -> None:
        sums = unpack_reply(message.content).vectors.get("statistics")
        if sums is None or sums.size != total.size or not np.isfinite(sums).all():
            raise ReplyRejected(f"the statistics are not {total.size} finite numbers")
        total[:] += sums.reshape(total.shape)
        answered.append(site)

    silent = collect(grid, send(study, 0, grid, "query.statistics"), plan.round_timeout, accept)
    if len(answered) < plan.cohort.min_sites:
        why = "; ".join(f"{site}: {reason}" for site, reason in silent.items())
        raise QuorumLost(
            f"Statistics: {len(answered)} of the {plan.cohort.min_sites} hospitals needed answered ({why})."
        )
    ranges = np.array([feature.range for feature in features])
    middle, half = ranges.mean(axis=1), (ranges[:, 1] - ranges[:, 0]) / 2
    count = np.maximum(total[0], 1.0)
    mean = np.clip(total[1] / count, -1, 1)
    # Noise may push the variance below zero; a twentieth of the range is the least spread that is believed.
    sd = np.sqrt(np.clip(total[2] / count - mean**2, 0.05**2, 1.0))
    return tuple((float(m), float(s)) for m, s in zip(middle + half * mean, half * sd, strict=True))


def server_app(plan: StudyPlan, store: Store, finished: Callable[[Finished], None], notice: Notice) -> ServerApp:
    """The study as Flower runs it, on whichever grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        finished(run_study(plan, store, grid, notice))

    return app
