"""Train the same study four ways on the same splits: pooled, each hospital alone, federated, federated with DP.

The federated ways run the real coordinator and the real hospital code; only the wire between them differs by
engine. Each way and seed has a folder of its own; what is finished there is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, Rows, load_dataset
from cloister_client.evaluate import at_a_glance, seen
from cloister_client.network import Network
from cloister_client.privacy import Units, most_records, plain
from cloister_client.site import Site
from cloister_client.train import train
from cloister_server import readiness
from cloister_server.app import Finished, server_app
from cloister_server.statistics import Seen, cohort_view
from cloister_server.store import RoundRecord, Store
from cloister_server.strategies import averaged
from cloister_shared import budget, durable
from cloister_shared.errors import DataRefused, WeightsBroken
from cloister_shared.layout import PRETRAINED, gathered, initial_model, layout_of
from cloister_shared.objective import objective_of
from cloister_shared.outcomes.binary import reliability
from cloister_shared.outcomes.judging import Estimate, judge
from cloister_shared.outcomes.outcome import Outcome, outcome_of
from cloister_shared.plan import Mechanism, Privacy, StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.schema import Binary
from cloister_shared.tally import glance
from cloister_shared.wire import Ticket, TicketHeader
from cloister_simulations.engines import ENGINES, ready
from cloister_simulations.grid import Fault
from cloister_simulations.hospitals import build
from cloister_simulations.one_place import alone, pooled
from cloister_simulations.scenario import Scenario
from cloister_simulations.site_folder import enrol_all

Metrics = dict[str, Estimate]


@dataclass(frozen=True)
class Arm:
    """One way to train: ``pooled``, ``alone``, ``federated``, or ``private`` at an epsilon."""

    kind: str
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """As tables show it."""
        return {
            "pooled": "Pooled, no privacy",
            "alone": "Each hospital alone",
            "federated": "Federated, no privacy",
            "private": f"Federated, ε = {self.epsilon:g}" if self.epsilon else "",
        }[self.kind]

    @property
    def folder(self) -> str:
        """As folders are called."""
        return f"private-{self.epsilon:g}" if self.epsilon else self.kind


@dataclass
class Result:
    """How one arm did with one seed. ``overall`` is over the held-out rows of all hospitals together."""

    arm: Arm
    seed: int
    overall: Metrics
    sites: dict[str, Metrics]
    curve: list[dict[str, float]]
    """After so many rounds: mean over hospitals of loss and headline metric."""
    reliability: list[tuple[float, float, int]]
    """Predicted risk, observed share, patients: the calibration plot."""
    epsilon: dict[str, float] = field(default_factory=dict[str, float])
    """Spent by each hospital, by its own ledger."""
    tuned: dict[str, Metrics] = field(default_factory=dict[str, Metrics])
    """After local fine-tuning, where the plan has it."""
    ditto: dict[str, Metrics] = field(default_factory=dict[str, Metrics])
    """Of each hospital's own model, trained beside the federation, where the plan has them."""
    rejected: list[str] = field(default_factory=list[str])
    """Who missed which round, and why."""
    learned: dict[str, float | None] = field(default_factory=dict[str, float | None])
    """Under the secure sum: all that the coordinator learned of the final model's metrics, means over hospitals; with
    ``evaluation.epsilon_share``, what noisy counts of all hospitals together tell."""
    clipped: float = 0.0
    """Under the secure sum: the largest share of an update's parameters that was clipped in any round."""
    glimpse: dict[str, Any] = field(default_factory=dict[str, Any])
    """Under the secure sum: what the coordinator received from one hospital in the last round, and what it learned."""
    cohort: dict[str, Seen] = field(default_factory=dict[str, Seen])
    """What the coordinator made of the plan's histograms, by feature."""
    readiness: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the hospitals told of their records before training, each by itself: a ``readiness.Table``."""
    seconds: float = 0.0
    plan: str = ""
    """Digest of the plan that this arm ran."""
    reproducible_noise: bool = False
    """Whether any round of it drew noise that can be drawn again, and so gave no privacy."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows."""

    scenario: Scenario
    results: list[Result]
    rows: dict[str, dict[str, int]]
    """Each hospital's training rows, held-out rows and outcomes, with the first seed."""
    engine: str
    reproducible_noise: bool
    folder: Path


@dataclass(frozen=True)
class Options:
    """How to run a comparison; none of it changes what a plan promises, but ``noise_seed``, which voids it."""

    folder: Path
    engine: str = "in-process"
    resume: bool = False
    faults: tuple[Fault, ...] = ()
    noise_seed: int | None = None
    seeds: tuple[int, ...] | None = None
    arms: tuple[str, ...] | None = None


Notice = Callable[[Arm, int, int, Mapping[str, float]], None]
"""Told after each round: arm, seed, round, and the round's mean metrics."""
Done = Callable[[Result], None]
"""Told after each arm and seed, resumed ones too."""


def arms_of(scenario: Scenario, only: Sequence[str] | None = None) -> list[Arm]:
    """The ways to compare, in the order that tables show them."""
    epsilons = scenario.simulation.epsilons or ((scenario.plan.privacy.epsilon,) if scenario.plan.private else ())
    private = [Arm("private", epsilon) for epsilon in epsilons]
    return [a for a in [Arm("pooled"), Arm("alone"), Arm("federated"), *private] if only is None or a.kind in only]


def plan_for(plan: StudyPlan, arm: Arm, seed: int) -> StudyPlan:
    """The plan as this arm runs it: with this seed and epsilon, or without privacy."""
    if arm.kind == "private":
        return amend(plan, seed=seed, privacy={"epsilon": arm.epsilon})
    none = Privacy(mechanism=Mechanism.NONE).model_dump(mode="json")
    return amend(
        plan,
        seed=seed,
        privacy=none,
        training={"sample_rate": None, "augment": None},
        statistics={"epsilon_share": None},
        evaluation={"epsilon_share": None},
        **({"readiness": {"epsilon_share": None}} if plan.readiness else {}),
    )


def compare(
    scenario: Scenario, options: Options, notice: Notice = lambda *_: None, done: Done = lambda result: None
) -> Comparison:
    """Set up the hospitals and run every arm with every seed.

    Raises:
        CloisterError: the plan, a table or a cohort was refused, or a round lost its quorum.
    """
    ready(options.engine, options.faults)
    site_files = build(scenario.simulation.hospitals, options.folder / "hospitals")
    if scenario.simulation.pretrained:
        _hand_out(Path(scenario.simulation.pretrained), [options.folder])
    results: list[Result] = []
    rows: dict[str, dict[str, int]] = {}
    for seed in options.seeds or scenario.simulation.seeds:
        datasets: dict[str, Dataset] = {}
        for arm in arms_of(scenario, options.arms):
            plan = plan_for(scenario.plan, arm, seed)
            folder = options.folder / f"seed-{seed}" / arm.folder
            kept = folder / "result.json"
            if not datasets:
                opened = [load_dataset(open_records(path), plan) for path in site_files]
                datasets = {dataset.quality.site: dataset for dataset in opened}
                if len(datasets) < len(opened):
                    raise DataRefused("Two hospitals have the same name.", mend="Give each site.yaml its own site.")
                rows = rows or {site: _counts(dataset) for site, dataset in datasets.items()}
            if options.resume and kept.exists():
                result = result_from_json(json.loads(kept.read_text(encoding="utf-8")))
                if result.plan == plan.digest:
                    results.append(result)
                    done(result)
                    continue
            began = time.perf_counter()
            run = {"pooled": run_pooled, "alone": run_alone}.get(arm.kind, run_federated)
            result = run(plan, datasets, arm, folder, options, notice)
            result.seconds, result.plan = time.perf_counter() - began, plan.digest
            folder.mkdir(parents=True, exist_ok=True)
            durable.save_text(kept, json.dumps(asdict(result)))
            results.append(result)
            done(result)
    reproducible = any(result.reproducible_noise for result in results)
    return Comparison(scenario, results, rows, options.engine, reproducible, options.folder)


# --- the ways ----------------------------------------------------------------------------------------------
def run_pooled(
    plan: StudyPlan, datasets: Mapping[str, Dataset], arm: Arm, folder: Path, options: Options, notice: Notice
) -> Result:
    """All rows in one place: what federation is measured against. As many rows a step as all hospitals together."""
    everyone, tests = pooled(plan, datasets)
    batch = plan.training.batch_size * len(datasets)
    curve, said = _train_here(plan, everyone, tests, batch, options.folder, arm, notice)
    return _result(plan, arm, said, curve)


def run_alone(
    plan: StudyPlan, datasets: Mapping[str, Dataset], arm: Arm, folder: Path, options: Options, notice: Notice
) -> Result:
    """Each hospital with its own rows only, judged on its own patients."""
    said: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    curves: list[list[dict[str, float]]] = []
    for site, dataset in datasets.items():
        own, test = alone(plan, dataset)
        curve, one = _train_here(
            plan, own, {site: test}, plan.training.batch_size, options.folder, arm, lambda *_: None
        )
        said |= one
        curves.append(curve)
        notice(arm, plan.seed, plan.rounds * len(said) // len(datasets), curve[-1])
    mean = [{"round": n, **_mean_metrics(plan, points)} for n, points in enumerate(zip(*curves, strict=True))]
    return _result(plan, arm, said, mean)


def run_federated(
    plan: StudyPlan, datasets: Mapping[str, Dataset], arm: Arm, folder: Path, options: Options, notice: Notice
) -> Result:
    """The real coordinator and the real hospitals, over the engine that the options name."""
    if not options.resume:
        _clear(folder)
    store, ended = Store(folder), list[Finished]()
    if plan.aggregation.secure_sum or plan.private:
        enrol_all(folder, list(datasets), plan)
    if plan.task.pretrained:
        _hand_out(options.folder / PRETRAINED, [folder, *(folder / "sites" / name for name in datasets)])
    reproducible = folder / "noise-is-reproducible"  # a file, so that a run resumed without the seed still says so
    if plan.private and options.noise_seed is not None:
        reproducible.touch()
    sites = {
        name: Site(plan, dataset, folder / "sites" / name, noise_seed=options.noise_seed)
        for name, dataset in datasets.items()
    }

    def each(record: RoundRecord) -> None:
        notice(arm, plan.seed, record.round, _glance(plan, record.numbers))

    ENGINES[options.engine](server_app(plan, store, ended.append, each), sites, options.faults)
    final = ended[0]
    rounds = store.rounds(upto=final.checkpoint.round)
    tickets = {name: _final_ticket(final, name) for name in sites}
    said = {name: site.final_predictions(tickets[name]) for name, site in sites.items()}
    curve = [{"round": record["round"] - 1, **_glance(plan, record["numbers"])} for record in rounds]
    result = _result(plan, arm, said, curve)
    result.reproducible_noise = reproducible.exists()
    # What the report shows of a hospital is what that hospital sent; under the secure sum it sends no figure of
    # its own, and the simulation, which is all hospitals at once, asks each behind the coordinator's back.
    sent = {name: header.estimates for name, header in final.judged.items()}
    if plan.aggregation.secure_sum:
        sent = {name: site.judge(tickets[name]) for name, site in sites.items() if name not in final.silent}
        result.learned, result.clipped = final.numbers, max(record["numbers"].get("clipped", 0.0) for record in rounds)
        result.glimpse = rounds[-1]["glimpse"]
    if plan.statistics.histograms and final.checkpoint.statistics:
        result.cohort = cohort_view(plan, final.checkpoint.statistics)
    if table := readiness.load(folder):
        result.readiness = asdict(table)
    judged = {name: _estimates(estimates, len(said[name][0])) for name, estimates in sent.items()}
    result.sites = {name: judged.get(name, {}).get("final", {}) for name in sites}
    result.tuned = {name: found["fine-tuned"] for name, found in judged.items() if found.get("fine-tuned")}
    result.ditto = {name: found["ditto"] for name, found in judged.items() if found.get("ditto")}
    result.rejected = [
        f"round {record['round']}, {name}: {reason}" for record in rounds for name, reason in record["rejected"].items()
    ] + [f"final evaluation, {name}: {reason}" for name, reason in final.silent.items()]
    for name, site in sites.items():
        if site.ledger and plan.privacy.delta:
            result.epsilon[name] = budget.epsilon(site.ledger.history(plan.digest), plan.privacy.delta)
            site.ledger.close()
    return result


def _final_ticket(final: Finished, site: str) -> Ticket:
    """What the coordinator would ask of a hospital about the final model."""
    checkpoint = final.checkpoint
    header = TicketHeader(
        run=checkpoint.run,
        plan=checkpoint.plan,
        round=checkpoint.round + 1,
        site=site,
        normalisation=checkpoint.normalisation,
    )
    return Ticket(header, {"model": checkpoint.model})


def _train_here(
    plan: StudyPlan, rows: Rows, tests: Mapping[str, Rows], batch: int, public: Path, arm: Arm, notice: Notice
) -> tuple[list[dict[str, float]], dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Train one model in this process; its curve, and outcomes and risks of each hospital's held-out rows.

    ``public`` is the folder of the public weights, if the plan names some.
    """
    model = initial_model(plan, public)
    layout = layout_of(plan, model)
    vector = gathered(model, layout.shared + layout.local)
    network = Network(model, objective_of(plan), vector)
    average: NDArray[np.float32] | None = None
    generator = torch.Generator().manual_seed(plan.seed)
    mechanism = plain(network, rows, batch, generator)
    curve: list[dict[str, float]] = []
    for number in range(plan.rounds + 1):
        if number and plan.averaging:  # as the coordinator does
            average = averaged(average, vector, number, plan.averaging.decay)
            if number == plan.rounds:
                vector[:] = average
        found = _mean_metrics(plan, (at_a_glance(network, test, plan.evaluation) for test in tests.values()))
        curve.append({"round": number, **found})
        notice(arm, plan.seed, number, found)
        if number < plan.rounds:
            train(mechanism, plan.training, plan.training.local_steps)
    said = {site: seen(network, test) for site, test in tests.items()}
    return curve, said


def _result(
    plan: StudyPlan,
    arm: Arm,
    said: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    curve: list[dict[str, float]],
) -> Result:
    y, p = (np.concatenate([pair[i] for pair in said.values()]) for i in (0, 1))
    outcome, terms = outcome_of(plan.table, plan.evaluation.threshold), plan.evaluation
    overall = _judge(plan, outcome, y, p)
    # As at a real hospital, too few patients of either outcome are not judged.
    sites = {
        site: _judge(plan, outcome, *pair) if outcome.enough(pair[0], terms.min_count) else {}
        for site, pair in said.items()
    }
    if not curve or curve[-1]["round"] < plan.rounds:
        known = [value for found in sites.values() if found and (value := found[outcome.headline].value) is not None]
        curve = [*curve, {"round": plan.rounds, **({outcome.headline: float(np.mean(known))} if known else {})}]
    calibration = reliability(y, p) if isinstance(plan.table.target, Binary) else []
    return Result(arm, plan.seed, overall, sites, curve, calibration)


def _judge(plan: StudyPlan, outcome: Outcome, y: NDArray[np.float64], p: NDArray[np.float64]) -> Metrics:
    terms = plan.evaluation
    return judge(outcome.metrics, y, p, level=terms.interval, resamples=terms.resamples, seed=plan.seed)


# --- small things --------------------------------------------------------------------------------------------
def _mean_metrics(plan: StudyPlan, found: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean over hospitals of what they reported."""
    seen: dict[str, list[float]] = {}
    for metrics in found:
        for name in glance(plan):
            if (value := metrics.get(name)) is not None:
                seen.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in seen.items()}


def _glance(plan: StudyPlan, numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name in glance(plan) if (value := numbers.get(name)) is not None}


def _counts(dataset: Dataset) -> dict[str, int]:
    return {
        "train": len(dataset.train),
        "test": len(dataset.test),
        "patients": dataset.quality.patients,
        "training patients": len(Units.of(dataset.train, "patient")),
        "most records": most_records(dataset),
        "positives": dataset.quality.positives,
        "left out": dataset.quality.rows - len(dataset.train) - len(dataset.test),
    }


def _estimates(found: Mapping[str, Mapping[str, Sequence[float | None]]], n: int) -> dict[str, Metrics]:
    return {
        model: {name: Estimate(value, low, high, n) for name, (value, low, high) in metrics.items()}
        for model, metrics in found.items()
    }


def _hand_out(file: Path, folders: Sequence[Path]) -> None:
    """A copy of the public weights for each.

    Raises:
        WeightsBroken: there is no such file.
    """
    try:
        weights = file.read_bytes()
    except OSError:
        raise WeightsBroken(f"There are no public weights at {file}.", mend="Mend simulation.pretrained.") from None
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PRETRAINED).write_bytes(weights)


def _clear(folder: Path) -> None:
    """Forget an earlier run of this arm: without --resume it begins anew."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def result_from_json(value: Mapping[str, Any]) -> Result:
    """What ``asdict`` wrote, read back."""

    def metrics(found: Mapping[str, Mapping[str, Any]]) -> Metrics:
        return {name: Estimate(**estimate) for name, estimate in found.items()}

    return Result(
        **{
            **value,
            "arm": Arm(**value["arm"]),
            "overall": metrics(value["overall"]),
            "sites": {site: metrics(found) for site, found in value["sites"].items()},
            "tuned": {site: metrics(found) for site, found in value["tuned"].items()},
            "ditto": {site: metrics(found) for site, found in value.get("ditto", {}).items()},
            "reliability": [tuple(point) for point in value["reliability"]],
        }
    )
