"""StudyPlan: the terms of a study. Frozen, strict, and named by its digest.

What one term may hold is said here; what two terms may not be together, in ``plan_rules``; how a plan is read
from a file, in ``plan_file``.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from cloister_shared.schema import Schema
from cloister_shared.tasks.task import Augment
from cloister_shared.tasks.zoo import Task
from cloister_shared.terms import Count, Name, Positive, Slug, Terms


class Normalisation(Terms):
    """Where the constants that centre and scale number features come from.

    ``plan``: each feature's ``mean`` and ``sd``, or the middle and a quarter of its ``range``; touches no data.
    ``federated``: noisy sums over all hospitals, part of each hospital's epsilon.
    ``site``: each hospital's own mean and sd; refused with DP, since it couples the rows.
    """

    method: Literal["plan", "federated", "site"] = "plan"


class Combat(Terms):
    """As ``federated``, and what each hospital adds and multiplies is taken out (Johnson, Li and Rabinovic 2007)."""

    method: Literal["combat"]
    keep: tuple[Name, ...] = ()
    """Features in which hospitals differ by right, such as age; what follows from them is left in."""


class Statistics(Terms):
    """What the hospitals sum up before round 1: for federated normalisation, and of the cohort."""

    histograms: Annotated[int, Field(ge=2, le=50)] | None = None
    """Bins of a histogram of each number feature, beside counts of each category and outcome; none if absent."""
    epsilon_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With DP: the part of epsilon that the statistics alone may use (0.1 if absent)."""


class Readiness(Terms):
    """What each hospital tells of its own records before any training, by itself: see ``readiness``."""

    epsilon_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With DP: the part of epsilon that it alone may use (0.05 if absent)."""
    hold: bool = False
    """The study stops once it is told, until a person resumes it."""

    @property
    def share(self) -> float:
        """The part of epsilon, where there is one."""
        return self.epsilon_share or 0.05


# --- the strategy: how the coordinator turns replies into the next model -------------------------------------
class FedAvg(Terms):
    """McMahan et al. 2017. ``server_learning_rate`` 1 is the plain mean."""

    name: Literal["fedavg"]
    server_learning_rate: Positive = 1.0


class FedProx(Terms):
    """Li et al. 2020: FedAvg whose local loss is pulled to the incoming model by ``mu``."""

    name: Literal["fedprox"]
    mu: Positive
    server_learning_rate: Positive = 1.0


class FedAvgM(Terms):
    """Hsu et al. 2019: server momentum."""

    name: Literal["fedavgm"]
    server_learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class _Adaptive(Terms):
    server_learning_rate: Positive = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    tau: Positive = 1e-8


class FedAdam(_Adaptive):
    """Reddi et al. 2021, algorithm 2, Adam."""

    name: Literal["fedadam"]
    correct_noise: bool = False
    """DP-AdamBC (Tang et al. 2024): the noise's variance, which the plan tells, is taken out of the second moment."""


class FedYogi(_Adaptive):
    """Reddi et al. 2021, algorithm 2, Yogi."""

    name: Literal["fedyogi"]


class FedAdagrad(_Adaptive):
    """Reddi et al. 2021, algorithm 2, Adagrad."""

    name: Literal["fedadagrad"]
    server_learning_rate: Positive = 0.1


class Scaffold(Terms):
    """Karimireddy et al. 2020, option II. Control variates travel beside the update."""

    name: Literal["scaffold"]
    server_learning_rate: Positive = 1.0


class TrimmedMean(Terms):
    """Yin et al. 2018: drop the ``trim`` largest and smallest values of every coordinate."""

    name: Literal["trimmed-mean"]
    trim: Count = 1


class Median(Terms):
    """Yin et al. 2018: the median of every coordinate."""

    name: Literal["median"]


class Krum(Terms):
    """Blanchard et al. 2017: the update nearest to its neighbours, for up to ``hostile`` bad hospitals."""

    name: Literal["krum"]
    hostile: Count = 1


Strategy = Annotated[
    FedAvg | FedProx | FedAvgM | FedAdam | FedYogi | FedAdagrad | Scaffold | TrimmedMean | Median | Krum,
    Field(discriminator="name"),
]


class Averaging(Terms):
    """The final model is the mean of the models of all rounds, each counting ``decay`` times as much as the next.

    Noise averages out where the models circle around a minimum (De et al. 2022). Whoever sees the models can take
    their mean, so it costs no epsilon. ``decay`` 0.9 is a mean over the last ten rounds or so.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]


# --- the terms ---------------------------------------------------------------------------------------------
class Cohort(Terms):
    """Who may take part, and how many must answer before a round counts (the quorum)."""

    min_sites: Annotated[int, Field(ge=2)] = 2
    max_sites: Annotated[int, Field(ge=2, le=200)] = 100
    """So many at most; no sum of so many updates may wrap."""
    min_patients: Count = 20
    """Training patients that a hospital must have; it refuses to train on fewer."""
    max_rows: Count = 10_000_000
    """Bound on the row count that is a hospital's weight."""
    late_joiners: Literal["next-round", "refuse"] = "next-round"
    """What becomes of a hospital that was not there at the start: it joins between two rounds, or stays out."""


class Aggregation(Terms):
    """How replies are added up."""

    secure_sum: bool = True
    """The coordinator sees only the sum. Off is explicit, and shown in the report."""
    weights: Literal["equal", "rows"] = "equal"
    """With ``rows`` the coordinator learns how many training rows all hospitals have together."""
    max_update_norm: Positive = 1000.0
    """An update with a larger ℓ² norm does not count: rejected, or under the secure sum never sent."""
    bound: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.5
    """Values of an update are clipped to +-bound; how many were is told, but where the hospitals share the noise."""
    bits: Literal[16, 24, 32] = 32
    """Bits of one parameter on the wire under the secure sum."""
    fraction_bits: Annotated[int, Field(ge=0, le=48)] | None = None
    """Bits after the point; as many as fit, if absent."""


class Training(Terms):
    """The local work of one round."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Count
    """Rows a step; under DP what its clipped sum is divided by, and the expected number of units that it draws."""
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Under DP: each unit's chance to enter a step; batch_size over the hospital's units if absent."""
    local_steps: Count
    augment: Augment | None = None


class Mechanism(StrEnum):
    """Who adds the noise.

    ``site``: each hospital the whole of it, trusting nobody. ``shared``: each its part, and the secure sum carries
    the whole. ``none``: nobody, so there is no differential privacy.
    """

    SITE = "site"
    SHARED = "shared"
    NONE = "none"


class Privacy(Terms):
    """What each hospital guarantees for the whole run. Neighbouring relation: add or remove one unit."""

    mechanism: Mechanism
    unit: Literal["patient", "record", "site"] | None = None
    """Whose presence cannot be told: a patient with all records, one record, or the hospital's whole table."""
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """Bound on what one unit adds to a step's sum, in ℓ². Far from where single precision ends, which would void it."""
    per_patient: Literal["mean", "sum"] = "mean"
    """What is clipped of a patient with several records: the mean of their gradients or the sum."""
    colluding: Annotated[int, Field(ge=0)] = 0
    """With ``shared``: epsilon holds though so many hospitals tell the coordinator the noise that they added."""
    epsilon_alone: Positive | None = None
    """With ``shared``: what epsilon is at most though all other hospitals tell theirs."""


class Ditto(Terms):
    """Ditto (Li et al. 2021): each hospital keeps a model of its own beside the common one, and sends none of it."""

    lam: Positive
    """How strongly each step draws the hospital's own model to the common one."""
    steps: Count
    """Local steps of the hospital's own model in each round."""


class Personalisation(Terms):
    """What stays at the hospital."""

    local_layers: tuple[str, ...] = ()
    """Name prefixes of layers that never leave the hospital (FedBN, Li et al. 2021: ``[norm]``)."""
    fine_tune_steps: Annotated[int, Field(ge=0)] = 0
    """Local steps on the final model, kept by the hospital; only its metrics are reported."""
    ditto: Ditto | None = None
    """A model of the hospital's own; only its metrics are reported."""


class Evaluation(Terms):
    """How models are judged, on rows that never train."""

    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of patients held out, drawn by a hash of the patient and the seed (0.25 if absent)."""
    split_column: Name | None = None
    """Instead of ``holdout``: a column that says ``train`` or ``test``."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    interval: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    min_count: Count = 5
    """Metrics over fewer rows of either outcome do not leave the hospital."""
    epsilon_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With DP: the final model alone is judged, by noisy counts of risks within this part of epsilon. If absent,
    metrics are exact, sent in every round, and outside epsilon."""


class StudyPlan(Terms):
    """The signed terms of one study."""

    study: Slug
    title: str = Field(min_length=1, max_length=200)
    version: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial model, splits and batch order. Never the noise of differential privacy."""
    task: Task
    table: Schema
    normalisation: Annotated[Normalisation | Combat, Field(discriminator="method")] = Normalisation()
    statistics: Statistics = Statistics()
    readiness: Readiness | None = None
    """Absent: no hospital tells anything of itself, and the plan's digest is what it was before there was this term."""
    cohort: Cohort = Cohort()
    rounds: Count
    round_timeout: Positive = 600.0
    """Seconds after which a round goes on without those who have not answered."""
    strategy: Strategy
    averaging: Averaging | None = None
    """Absent: the final model is that of the last round."""
    aggregation: Aggregation = Aggregation()
    training: Training
    privacy: Privacy
    personalisation: Personalisation = Personalisation()
    evaluation: Evaluation = Evaluation()

    @property
    def private(self) -> bool:
        """Whether differential privacy is on."""
        return self.privacy.mechanism is not Mechanism.NONE

    @property
    def normalises(self) -> bool:
        """Whether the constants that centre and scale come from sums over all hospitals."""
        return self.normalisation.method in ("federated", "combat")

    @property
    def harmonises(self) -> bool:
        """Whether each hospital's own effect on the number features is taken out."""
        return isinstance(self.normalisation, Combat)

    @property
    def keep(self) -> tuple[str, ...]:
        """The features whose effect on others is left in when these are harmonised."""
        return self.normalisation.keep if isinstance(self.normalisation, Combat) else ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Name prefixes of the layers that stay as the public file has them."""
        return self.task.pretrained.frozen if self.task.pretrained else ()

    @property
    def asks_statistics(self) -> bool:
        """Whether there is a round 0."""
        return self.normalises or self.statistics.histograms is not None

    @property
    def shared_noise(self) -> bool:
        """Whether only the sum over the hospitals carries the whole noise."""
        return self.privacy.mechanism is Mechanism.SHARED

    @property
    def room(self) -> int:
        """How often the bound fits into the ring: shared noise has as much room as the values themselves."""
        return 2 if self.shared_noise else 1

    @property
    def fraction_bits(self) -> int:
        """Bits after the point of the integers that are added up: the plan's, or as many as cannot make a sum wrap."""
        if self.aggregation.fraction_bits is not None:
            return self.aggregation.fraction_bits
        return next(bits for bits in range(48, -21, -1) if not self.could_wrap(bits))

    def could_wrap(self, fraction_bits: int) -> bool:
        """Whether a sum of ``cohort.max_sites`` updates can leave the ring of 2^bits integers.

        A hospital's weight is 1 / sites, or rows / (sites * max_rows), so the weights sum to 1 at most and what
        the hospitals encode to room * bound * 2^fraction_bits; each adds half a unit by rounding, and float32
        arithmetic a part in 2^22.
        """
        most = self.room * self.aggregation.bound * 2.0**fraction_bits * (1 + 2**-22) + self.cohort.max_sites / 2
        return most >= 2 ** (self.aggregation.bits - 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: JSON with sorted keys, no white space, ASCII."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """The bytes that are digested and, one day, signed: every term, defaults written out but for ``readiness``."""
        dumped = self.model_dump(mode="json", exclude=None if self.readiness else {"readiness"})
        return json.dumps(dumped, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
