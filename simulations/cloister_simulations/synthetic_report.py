"""What a table that a generator drew is worth: how near it comes, what it teaches, and whom it gives away.

The drawn table is written as a hospital's would be and read by the same connector, so that both are encoded alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Rows, load_dataset, normalised
from cloister_server.store import Store
from cloister_shared import durable
from cloister_shared.errors import DataRefused
from cloister_shared.inputs import columns, numbers, plan_constants
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.networks.synthesis import Part, one_hot, values_of
from cloister_shared.outcomes.binary import auroc
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_shared.tasks.synthetic import Synthetic, parts
from cloister_simulations.federation import Arm, plan_for
from cloister_simulations.scenario import Scenario
from cloister_simulations.site_folder import Hospital, write

COMPARED = 2000
"""Rows of each kind whose distances are taken."""


@dataclass(frozen=True)
class Worth:
    """All of it; of no figure is more than its bound better."""

    rows: int
    marginal: float
    """Total variation between drawn and real, mean over columns: 0 is alike. Numbers by the plan's bins."""
    worst_marginal: float
    """Of the column that is worst."""
    correlation: float
    """Mean difference of the correlations of any two columns' values, drawn against real: 0 is alike."""
    taught_by_real: float
    """AUROC of the outcome on held-out patients, by a regression on the patients that were trained on."""
    taught_by_drawn: float
    """The same, by a regression on as many drawn rows."""
    nearer_to_trained: float
    """Share of drawn rows that lie nearer to a patient trained on than to a held-out one: .5 gives nobody away."""
    membership: float
    """AUROC of telling patients trained on from held-out ones by how near the nearest drawn row is: .5 is a coin."""
    copies: float
    """Share of drawn rows that are alike a patient trained on, in every column's value."""
    copies_of_others: float
    """The same of held-out patients, as many: how many are alike by chance."""


def judge(scenario: Scenario, run: Path, arm: Arm, outcome: str, *, rows: int | None = None, seed: int = 0) -> Worth:
    """Draw a table from the generator that ``arm`` of a finished run trained, and hold it against the real ones.

    ``outcome`` is the yes/no column that is to be learned; ``rows`` how many to draw, as many as were trained on if
    not given. Writes ``synthetic/synthetic.csv``, a hospital's folder around it, and ``worth.json`` into the arm's
    folder.

    Raises:
        DataRefused: there is no such run, or the plan trains no generator.
    """
    plan = plan_for(scenario.plan, arm, seed)
    folder = run / f"seed-{seed}" / arm.folder
    trained, held_out = _real(plan, sorted((run / "hospitals").glob("*/site.yaml")))
    drawn = _drawn(plan, folder, rows or len(trained), seed)
    found = _worth(plan, trained, held_out, drawn, outcome, np.random.default_rng(seed))
    durable.save_text(folder / "worth.json", json.dumps(asdict(found), indent=2) + "\n")
    return found


def draw(plan: StudyPlan, folder: Path, rows: int, seed: int) -> pd.DataFrame:
    """So many invented records from the generator whose training the coordinator keeps in ``folder``.

    Raises:
        DataRefused: there is none.
    """
    checkpoint = Store(folder).load(plan.digest)
    if checkpoint is None or not isinstance(plan.task, Synthetic):
        raise DataRefused(f"There is no trained generator in {folder}.", mend="Run the scenario first.")
    model = initial_model(plan, folder)
    gathered(model, layout_of(plan, model).shared)[:] = checkpoint.model
    return pd.DataFrame(plan.task.sample(plan.table, model.eval(), rows, seed))


def _real(plan: StudyPlan, site_files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    datasets = [load_dataset(open_records(path), plan) for path in site_files]
    return _inputs(plan, [data.train for data in datasets]), _inputs(plan, [data.test for data in datasets])


def _drawn(plan: StudyPlan, folder: Path, rows: int, seed: int) -> Tensor:
    table = draw(plan, folder, rows, seed)
    if name := plan.table.patient_id:
        table.insert(0, name, [f"S{number:07d}" for number in range(1, rows + 1)])
    site = write(Hospital("synthetic", table), folder / "synthetic", "synthetic.csv")
    data = load_dataset(open_records(site), amend(plan, table={"duplicates": "allow"}))
    return _inputs(plan, [data.train, data.test])


def _inputs(plan: StudyPlan, rows: Sequence[Rows]) -> Tensor:
    constants = [plan_constants(feature) for feature in numbers(plan.table)]
    return torch.cat([normalised(part, columns(plan.table), constants).x for part in rows])


def _worth(
    plan: StudyPlan, trained: Tensor, held_out: Tensor, drawn: Tensor, outcome: str, chance: np.random.Generator
) -> Worth:
    assert isinstance(plan.task, Synthetic)
    made = parts(plan.table, plan.task.bins)
    real, invented = (one_hot(made, values_of(made, x)).double() for x in (trained, drawn))
    gaps = (real.mean(dim=0) - invented.mean(dim=0)).abs()
    marginals = [float(own.sum()) / 2 for own in gaps.split([part.size for part in made])]
    some, others, some_drawn = (_some(x, chance) for x in (trained, held_out, drawn))
    least = min(len(some), len(others))
    some, others = some[:least], others[:least]
    to_some, to_others = torch.cdist(some_drawn, some), torch.cdist(some_drawn, others)
    near, far = to_some.min(dim=1).values, to_others.min(dim=1).values
    told = np.concatenate([-to_some.min(dim=0).values.numpy(), -to_others.min(dim=0).values.numpy()])
    label = [column.name for column in columns(plan.table)].index(outcome)
    set_of_trained, set_of_others = (set(_codes(made, x)) for x in (some, others))
    invented_rows = _codes(made, some_drawn)
    return Worth(
        rows=len(drawn),
        marginal=float(np.mean(marginals)),
        worst_marginal=max(marginals),
        correlation=float((_correlation(real) - _correlation(invented)).abs().mean()),
        taught_by_real=_taught(trained, held_out, label),
        taught_by_drawn=_taught(drawn, held_out, label),
        nearer_to_trained=float(((near < far).double() + 0.5 * (near == far).double()).mean()),
        membership=auroc(np.repeat([1.0, 0.0], least), (1 / (1 - told)).astype(np.float64)),
        copies=float(np.mean([row in set_of_trained for row in invented_rows])),
        copies_of_others=float(np.mean([row in set_of_others for row in invented_rows])),
    )


def _some(x: Tensor, chance: np.random.Generator) -> Tensor:
    return x[torch.from_numpy(chance.permutation(len(x))[:COMPARED])]


def _codes(made: Sequence[Part], x: Tensor) -> list[bytes]:
    return [row.tobytes() for row in values_of(made, x).numpy()]


def _correlation(values: Tensor) -> Tensor:
    """Of any two columns; 0 for one that never changes."""
    centred = values - values.mean(dim=0)
    spread = centred.square().mean(dim=0).sqrt()
    scaled = torch.where(spread > 1e-9, centred / spread.clamp(min=1e-9), torch.zeros(()).double())
    return scaled.T @ scaled / len(values)


def _taught(x: Tensor, held_out: Tensor, label: int) -> float:
    """AUROC on held-out patients of a logistic regression on x."""
    from sklearn.linear_model import LogisticRegression

    def split(rows: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        kept = [at for at in range(rows.shape[1]) if at != label]
        return rows[:, kept].numpy(), (rows[:, label] > 0.5).double().numpy()

    features, outcome = split(x)
    if len(np.unique(outcome)) < 2:
        return float("nan")
    model = LogisticRegression(max_iter=500).fit(features, outcome)
    features, outcome = split(held_out)
    return auroc(outcome, model.predict_proba(features)[:, 1])
