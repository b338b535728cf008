"""Twenty invented hospitals that train under differential privacy, all in one process and without a wire.

The rows are what the platform's own connector and encoder make of the scenario ``generated-ehr``, the model and the
coordinator's step are the platform's, the noise is what its accountant asks for. What is short-cut is the way
between: no messages, no masks, and since a sum over hospitals is one over patients, all hospitals' gradients are taken
at once. The noise has a seed, so nothing here is private; nobody's records are used.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset, normalised
from cloister_server.strategies import STRATEGIES, State, averaged, fedadam_without_noise, update_variance
from cloister_shared.budget import calibrate
from cloister_shared.inputs import columns, numbers, plan_constants
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.outcomes.binary import auroc
from cloister_shared.plan import FedAdam, FedAvg, FedAvgM, StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario

Vector = NDArray[np.float32]

HOSPITALS, PATIENTS, DELTA = 20, 20_000, 1e-5
PUBLIC = 200
"""Seed of the population whose rows everybody may see."""

CLINICAL: Mapping[str, tuple[float, float]] = {
    "age": (60, 18),
    "bmi": (27, 5),
    "weight": (80, 18),
    "systolic_bp": (130, 20),
    "heart_rate": (80, 15),
    "creatinine": (1.1, 0.5),
    "haemoglobin": (13.5, 2),
    "glucose": (120, 40),
    "sodium": (140, 4),
    "charlson": (1.5, 1.5),
    "prior_admissions": (1, 1),
}
"""Centre and scale of the number features: round figures of the clinic, written before any row was drawn, so that
they touch no patient and cost no epsilon."""


PLAIN_MEAN = FedAvg(name="fedavg")


@dataclass(frozen=True)
class Terms:
    """What is trained and how. ``learning_rate`` and ``clip_norm`` as in the plan; ``rounds`` of one step each."""

    mechanism: str
    """``none``, ``shared``, or ``local``: DP-SGD at each hospital, with the whole noise, and FedAvg."""
    learning_rate: float
    rounds: int = 400
    sample_rate: float = 0.1
    clip_norm: float = 1.0
    epsilon: float | None = None
    local_steps: int = 1
    """With ``local``: steps between two sums."""
    colluding: int = 0
    """Hospitals whose noise does not count; the others add more."""
    decay: float | None = None
    strategy: FedAvg | FedAvgM | FedAdam = PLAIN_MEAN
    task: tuple[tuple[str, Any], ...] = ()
    """What the task has beside the scenario's one hidden layer of 64 units."""
    hospitals: int = HOSPITALS
    public: bool = False
    """Hidden layers from a public population and held still; only the head is trained."""
    copies: int = 1
    """How often a step takes each record: ``training.augment``."""
    jitter: float = 0.0
    """Standard deviation of what is added to each copy's number inputs."""

    @property
    def noise(self) -> float:
        """The noise multiplier of the sum (of each hospital's own, with ``local``)."""
        if self.epsilon is None:
            return 0.0
        least = calibrate(self.sample_rate, self.rounds, self.epsilon, DELTA)
        return least * math.sqrt(self.hospitals / (self.hospitals - self.colluding))


@dataclass(frozen=True)
class Rows:
    """Encoded rows, those of one patient side by side; patients are numbered from 0 over all hospitals."""

    x: Tensor
    y: Tensor
    patient: Tensor

    @cached_property
    def count(self) -> int:
        return int(self.patient.max()) + 1

    @cached_property
    def share(self) -> Tensor:
        """Each row's part in its patient's mean."""
        return (1.0 / torch.bincount(self.patient).float())[self.patient]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every two rows of one patient, each pair once."""
        sizes = torch.bincount(self.patient)
        starts = torch.cumsum(sizes, 0) - sizes
        made = [torch.combinations(torch.arange(int(n))) + s for n, s in zip(sizes, starts, strict=True) if n > 1]
        both = torch.cat(made) if made else torch.zeros((0, 2), dtype=torch.long)
        return both[:, 0], both[:, 1]

    def copied(self, times: int) -> Rows:
        """Every row so many times, at its patient: a patient's mean stays what it was."""
        return (
            self if times == 1 else Rows(*(part.repeat_interleave(times, 0) for part in (self.x, self.y, self.patient)))
        )

    def of(self, chosen: Tensor) -> Rows:
        """The rows of these patients (a mask), who are numbered anew."""
        kept, anew = chosen[self.patient], torch.cumsum(chosen, 0) - 1
        picked = Rows(self.x[kept], self.y[kept], anew[self.patient[kept]])
        place, (one, other) = torch.cumsum(kept, 0) - 1, self.pairs
        both = kept[one]  # cached properties are filled in here: a draw is a part of what is known already
        vars(picked).update(
            count=int(chosen.sum()), share=self.share[kept], pairs=(place[one[both]], place[other[both]])
        )
        return picked


@dataclass(frozen=True)
class Population:
    """Training rows of all hospitals, the hospital of each patient, and all held-out rows."""

    train: Rows
    hospital: Tensor
    test: tuple[Tensor, NDArray[np.float64]]


def study(seed: int, task: tuple[tuple[str, Any], ...] = ()) -> StudyPlan:
    """The scenario's plan with constants that touch no row."""
    plan = read_scenario("generated-ehr").plan
    features = [feature.model_dump(mode="json") for feature in plan.table.features]
    for feature in features:
        if feature["name"] in CLINICAL:
            feature["mean"], feature["sd"] = map(float, CLINICAL[feature["name"]])
    return amend(
        plan,
        seed=seed,
        table={"features": features},
        normalisation={"method": "plan"},
        task=dict(task),
    )


@cache
def population(seed: int) -> Population:
    """Another seed is another population, at hospitals that differ otherwise; 25 % of patients are held out."""
    plan = study(seed)
    constants = [plan_constants(feature) for feature in numbers(plan.table)]
    source = read_scenario("generated-ehr").simulation.hospitals
    assert isinstance(source, GeneratedEhr)
    drawn = source.model_copy(update={"sites": HOSPITALS, "patients": PATIENTS, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        loaded = [load_dataset(open_records(path), plan) for path in build(drawn, Path(folder))]
    xs, ys, patients, hospital = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for at, data in enumerate(loaded):
        own = normalised(data.train, data.columns, constants)
        order = np.argsort(own.patients, kind="stable")
        numbered = torch.from_numpy(np.unique(own.patients[order], return_inverse=True)[1])
        xs.append(own.x[order])
        ys.append(own.y[order])
        patients.append(numbered + sum(map(len, hospital)))
        hospital.append(torch.full((int(numbered.max()) + 1,), at))
    train = Rows(torch.cat(xs), torch.cat(ys), torch.cat(patients))
    tests = [normalised(data.test, data.columns, constants) for data in loaded]
    judged = torch.cat([test.x for test in tests]), torch.cat([test.y for test in tests]).numpy().astype(float)
    return Population(train, torch.cat(hospital), judged)


# --- one run -------------------------------------------------------------------------------------------------
def trained_auroc(terms: Terms, seed: int) -> float:
    """AUROC of the final model over the held-out rows of all hospitals; ``seed`` is the population's and the run's."""
    everyone = population(seed)
    plan = study(seed, terms.task)
    model = initial_model(plan)
    if terms.public:
        model.load_state_dict(_public(terms.task))
    vector = gathered(model, layout_of(plan, model).shared)
    here = everyone.hospital < terms.hospitals
    rows, hospital = everyone.train.of(here).copied(terms.copies), everyone.hospital[here]
    rng = np.random.default_rng([seed, 1])
    if terms.mechanism == "local":
        _apart(model, vector, rows, hospital, terms, rng)
    else:
        _together(model, vector, rows, terms, rng)
    x, y = everyone.test
    with torch.no_grad():
        return float(auroc(y, torch.sigmoid(model(x)).numpy()[:, 0].astype(float)))


def _together(model: nn.Module, vector: Vector, rows: Rows, terms: Terms, rng: np.random.Generator) -> None:
    """DP-FedSGD: a step a round by the noisy sum over all hospitals, over what the plan expects to be drawn."""
    strategy, state, average, expected = terms.strategy, State(), None, terms.sample_rate * rows.count
    spread = terms.noise * terms.clip_norm
    # The sum over so many hospitals is over hospitals * batch_size; here both are one number.
    variance = update_variance(spread, terms.learning_rate, expected, 1)
    head = sum(part.numel() for part in model.get_submodule("head").parameters())
    free = slice(len(vector) - head if terms.public else 0, None)
    for number in range(1, terms.rounds + 1):
        total = _noisy(model, rows, spread, terms, rng)
        update = np.zeros_like(vector)
        update[free] = -np.float32(terms.learning_rate / expected) * total[free]
        if isinstance(strategy, FedAdam) and strategy.correct_noise:
            vector[:], state = fedadam_without_noise(vector, update, state, strategy, variance)
        else:
            vector[:], state = STRATEGIES[strategy.name](vector, update, state, strategy)
        if terms.decay:
            average = averaged(average, vector, number, terms.decay)
    if average is not None:
        vector[:] = average


def _apart(
    model: nn.Module, vector: Vector, rows: Rows, hospital: Tensor, terms: Terms, rng: np.random.Generator
) -> None:
    """DP-SGD at each hospital, which trusts nobody and adds the whole noise itself; then the mean of the models."""
    own = [rows.of(hospital == at) for at in range(terms.hospitals)]
    spread = terms.noise * terms.clip_norm
    for _ in range(terms.rounds // terms.local_steps):
        start, mean = vector.copy(), np.zeros_like(vector)
        for here in own:
            vector[:] = start
            scale = np.float32(terms.learning_rate / (terms.sample_rate * here.count))
            for _ in range(terms.local_steps):
                vector -= scale * _noisy(model, here, spread, terms, rng)
            mean += vector / len(own)
        vector[:] = mean


def _noisy(model: nn.Module, rows: Rows, spread: float, terms: Terms, rng: np.random.Generator) -> Vector:
    """One Poisson draw of patients: the sum of their clipped gradients and the noise."""
    drawn = rows.of(torch.from_numpy(rng.random(rows.count) < terms.sample_rate))
    if terms.jitter:
        at, (own,) = _numbers(), rng.spawn(1)  # so that draws and noise are those of the plan without copies
        jitter = np.float32(terms.jitter) * own.standard_normal((len(drawn.y), len(at)), dtype=np.float32)
        drawn.x[:, at] += torch.from_numpy(jitter)
    total = clipped_sum(model, drawn, None if terms.mechanism == "none" else terms.clip_norm)
    total += np.float32(spread) * rng.standard_normal(total.size, dtype=np.float32)
    return total


@cache
def _numbers() -> list[int]:
    """Which inputs are numbers."""
    everything = enumerate(columns(study(0).table))
    return [at for at, column in everything if column.kind == "number" and not column.absent]


@cache
def _public(task: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    """A model of a population that has published its rows, with a head of nothing."""
    plan = study(PUBLIC, task)
    model, rows = initial_model(plan), population(PUBLIC).train
    vector = gathered(model, layout_of(plan, model).shared)
    _together(model, vector, rows, Terms("none", 1.5, rounds=200), np.random.default_rng(PUBLIC))
    for part in model.get_submodule("head").parameters():
        nn.init.zeros_(part)
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- gradients -----------------------------------------------------------------------------------------------
def clipped_sum(model: nn.Module, rows: Rows, clip_norm: float | None) -> Vector:
    """The sum over patients of each one's mean gradient, clipped in l2 as a whole (None: not at all)."""
    if not len(rows.y):
        return np.zeros(sum(part.numel() for part in model.parameters()), dtype=np.float32)
    dense = all(type(layer) in (nn.Linear, nn.ReLU) for layer in model.children())
    return (dense_sum if dense else any_sum)(model, rows, clip_norm).numpy()


def any_sum(model: nn.Module, rows: Rows, clip_norm: float | None) -> Tensor:
    """By torch, of whatever model: every row's gradient is written out."""
    parameters = {name: part.detach() for name, part in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        said = functional_call(model, parameters, (x[None],))[0, 0]
        return functional.binary_cross_entropy_with_logits(said, y)

    of_row: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, rows.x, rows.y)
    flat = torch.cat([part.flatten(1) for part in of_row.values()], dim=1) * rows.share[:, None]
    of_patient = torch.zeros((rows.count, flat.shape[1])).index_add_(0, rows.patient, flat)
    return (of_patient * _factors(of_patient.square().sum(dim=1), clip_norm)[:, None]).sum(dim=0)


@torch.no_grad()
def dense_sum(model: nn.Module, rows: Rows, clip_norm: float | None) -> Tensor:
    """Of Linear layers with ReLU between them, and no gradient written out.

    A row's gradient of a layer is the outer product of the slope of its output and its input, so that of two rows
    the inner product is that of their slopes times that of their inputs (Goodfellow 2015); a patient's squared norm
    is the sum over all pairs of the patient's rows.
    """
    layers, inputs = [layer for layer in model.children() if isinstance(layer, nn.Linear)], [rows.x]
    for layer in layers[:-1]:
        inputs.append(functional.linear(inputs[-1], layer.weight, layer.bias).relu())
    said = functional.linear(inputs[-1], layers[-1].weight, layers[-1].bias)
    slopes = [(torch.sigmoid(said) - rows.y[:, None]) * rows.share[:, None]]
    for layer, came in zip(reversed(layers[1:]), reversed(inputs[1:]), strict=True):
        slopes.insert(0, (slopes[0] @ layer.weight) * (came > 0))
    one, other = rows.pairs
    square = torch.zeros(rows.count)
    for slope, came in zip(slopes, inputs, strict=True):
        square.index_add_(0, rows.patient, slope.square().sum(1) * (came.square().sum(1) + 1))
        cross = (slope[one] * slope[other]).sum(1) * ((came[one] * came[other]).sum(1) + 1)
        square.index_add_(0, rows.patient[one], 2 * cross)
    factor = _factors(square, clip_norm)[rows.patient][:, None]
    parts = [((slope * factor).T @ came, (slope * factor).sum(0)) for slope, came in zip(slopes, inputs, strict=True)]
    return torch.cat([part.flatten() for pair in parts for part in pair])


def _factors(square: Tensor, clip_norm: float | None) -> Tensor:
    if clip_norm is None:
        return torch.ones_like(square)
    return (clip_norm / square.clamp(min=1e-12).sqrt()).clamp(max=1)
