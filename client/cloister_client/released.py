"""A released model at a hospital: verified, made whole with what the hospital keeps, and set right on its own rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cloister_client.answers import LocalState, known_moments
from cloister_client.calibrate import Calibration, fitted, kept
from cloister_client.combat import Effects, effects, inputs
from cloister_client.connectors.connector import Connector, open_records
from cloister_client.connectors.table import TableConnector
from cloister_client.dataset import Dataset, NewRows, Rows, load_dataset, new_rows
from cloister_client.network import Network
from cloister_client.site import own_constants
from cloister_client.site_file import SiteFile, read_site
from cloister_client.unusual import Usual, usual
from cloister_shared.combat import Constants
from cloister_shared.errors import CohortTooSmall, DataRefused, WeightsBroken
from cloister_shared.inputs import columns, scalars
from cloister_shared.layout import gathered, layout_of, with_weights
from cloister_shared.model_file import WEIGHTS, Model
from cloister_shared.objective import objective_of
from cloister_shared.plan import StudyPlan
from cloister_shared.schema import Itself, Schema, SeriesFeature
from cloister_shared.tally import Numbers


@dataclass(frozen=True)
class Released:
    """The model, and the hospital's own rows where they meet the plan."""

    model: Model
    network: Network
    own: Dataset | None
    without: str
    """Why there are no own rows."""
    folder: Path
    """Where the hospital keeps what it fitted."""
    moments: Numbers | None = None
    """The hospital's own noisy sums of the study, where the plan harmonises and it took part."""

    @property
    def plan(self) -> StudyPlan:
        """Of the study that trained it."""
        return self.model.plan

    @cached_property
    def constants(self) -> Constants:
        """Centre and scale of each number input: the manifest's, or this hospital's own.

        Raises:
            DataRefused: the plan has each hospital take its own, and there are no rows to take them of.
        """
        if self.model.manifest.constants is not None:
            return self.model.manifest.constants
        if self.own is None:
            raise DataRefused(f"Nothing can be scaled by this hospital's own rows: {self.without}")
        return own_constants(self.own.train, self._numbers)

    @cached_property
    def effects(self) -> Effects | None:
        """What this hospital adds and multiplies, where the plan takes it out and the hospital took part."""
        return effects(self.plan, self.moments, self.constants) if self.moments else None

    @property
    def unharmonised(self) -> bool:
        """Whether the plan takes out what hospitals add and multiply, and of this one it is not known."""
        return self.plan.harmonises and self.moments is None

    @cached_property
    def train(self) -> Rows | None:
        """Own training rows, as the model takes them."""
        return self._inputs(self.own.train) if self.own else None

    @cached_property
    def held_out(self) -> Rows | None:
        """Own held-out rows, as the model takes them."""
        return self._inputs(self.own.test) if self.own else None

    @cached_property
    def calibration(self) -> Calibration:
        """Fitted on the held-out rows, and kept at the hospital."""
        if self.held_out is None or not len(self.held_out):
            return Calibration(how="none", why=self.without or "there are no held-out rows")
        made = fitted(self.network, self.held_out, self.plan.table.target)
        return kept(self.folder / f"{self.model.manifest.files[WEIGHTS][:16]}.calibration.json", made)

    @cached_property
    def usual(self) -> Usual | None:
        """What the hospital's training rows look like; None if there are too few."""
        return usual(self.train.x.numpy(), self.plan.table) if self.train else None

    def scaled(self, rows: NewRows) -> Tensor:
        """New inputs, as the model takes them."""
        x = torch.where(torch.from_numpy(rows.read)[:, None], rows.x, torch.zeros(()))
        nobody = np.zeros(len(x), np.int64)
        return self._inputs(Rows(x, torch.zeros(len(x)), nobody)).x

    def _inputs(self, rows: Rows) -> Rows:
        return inputs(rows, self.plan, self.constants, self.effects)

    @property
    def _numbers(self) -> list[int]:
        return [i for i, c in enumerate(columns(self.plan.table)) if c.kind == "number" and not c.absent]


def open_released(model: Model, site_yaml: Path, state: Path | None = None) -> Released:
    """A verified model at the hospital of ``site_yaml``; ``state`` is its folder of the study, if it was in it.

    Raises:
        WeightsBroken: the model lacks layers that hospitals keep, and this one kept none.
    """
    plan = model.plan
    module = with_weights(plan, model.weights)
    layout = layout_of(plan, module)
    if layout.local:
        held = LocalState(state).before(plan.digest, plan.rounds + 1) if state and state.is_dir() else None
        if held is None:
            raise WeightsBroken(
                f"Layers of this model stay at each hospital ({', '.join(model.manifest.kept[:4])}), and this one kept"
                " none.",
                mend="Only a hospital that trained it can use it.",
            )
        gathered(module, layout.local)[:] = held["layers"]
    own, without = None, ""
    try:
        own = load_dataset(open_records(site_yaml), plan)
    except (CohortTooSmall, DataRefused) as refusal:
        without = refusal.said
    network, fitted = Network(module, objective_of(plan)), site_yaml.parent / "agent" / "models"
    moments = known_moments(state, plan.digest) if state and plan.harmonises else None
    return Released(model, network, own, without, fitted, moments)


# --- new rows ----------------------------------------------------------------------------------------------
def read_new(data: Path, site_yaml: Path, schema: Schema) -> NewRows:
    """Rows to be scored: of a table, or of the source that another ``site.yaml`` names.

    A column under the hospital's own name for it is in the hospital's unit, one under the plan's name as in its table.
    Files that a table's cells name, and files of measurements, lie where those of the hospital's own table do.

    Raises:
        DataRefused: the rows cannot be read.
    """
    own = read_site(site_yaml)
    if data.suffix in (".yaml", ".yml"):
        connector = open_records(data)
    else:
        table = own.table.model_copy(update={"path": str(data.resolve())})
        connector = TableConnector(own.model_copy(update={"table": table}), site_yaml.parent)
    if isinstance(connector, TableConnector):
        connector, schema = _as_it_is(connector, own, schema)
    return new_rows(connector, schema)


def _as_it_is(connector: TableConnector, own: SiteFile, schema: Schema) -> tuple[Connector, Schema]:
    """A table without outcomes, perhaps without patients' ids, by the hospital's own names where it has them."""
    there, table = set(connector.describe()), own.table
    used = {*(feature.name for feature in (*schema.features, *scalars(schema))), schema.patient_id}
    channels = {channel.name for f in schema.features if isinstance(f, SeriesFeature) for channel in f.channels}
    named = {n: column for n, column in table.columns.items() if n in channels or (n in used and column in there)}
    units = {n: u for n, u in table.units.items() if n in channels | used and (n in named or n not in table.columns)}
    file = connector.site.table.model_copy(update={"columns": named, "units": units})
    patient = schema.patient_id if named.get(schema.patient_id or "", schema.patient_id) in there else None
    site = connector.site.model_copy(update={"table": file})
    unlabelled = {"patient_id": patient, "target": Itself(kind="itself")}
    return TableConnector(site, connector.folder), schema.model_copy(update=unlabelled)
