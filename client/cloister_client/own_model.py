"""A model of the hospital's own, trained beside the federation and drawn to the common one: Ditto (Li et al. 2021).

Nothing of it is in any update. It lies with what else the hospital keeps between rounds, and judges like the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.dataset import Rows
from cloister_client.network import Network
from cloister_client.privacy import plain
from cloister_client.train import train
from cloister_shared.layout import Layout, gathered, initial_model
from cloister_shared.objective import objective_of
from cloister_shared.plan import Ditto, StudyPlan
from cloister_shared.wire import Vectors

Values = NDArray[np.float32]


class OwnModel:
    """It begins where the common model begins; ``folder`` has the public weights, if the plan names some."""

    def __init__(self, plan: StudyPlan, folder: Path, layout: Layout) -> None:
        model = initial_model(plan, folder)
        self._vector = gathered(model, layout.shared + layout.local)
        self._initial, self._training = self._vector.copy(), plan.training
        self.network = Network(model, objective_of(plan), self._vector)

    def load(self, kept: Vectors | None) -> None:
        """Be as the last round left it."""
        self._vector[:] = (kept or {}).get("ditto", self._initial)

    def trained(self, terms: Ditto, common: Values, rows: Rows, generator: torch.Generator) -> Values:
        """Its values after one round; ``common`` are those of the model that came in, layers kept here included."""
        mechanism = plain(self.network, rows, self._training.batch_size, generator)
        place = [(part.size(), part.stride(), part.storage_offset()) for part in mechanism.parameters]
        towards = [torch.from_numpy(common).as_strided(*each) for each in place]
        train(mechanism, self._training, terms.steps, pull=terms.lam, towards=towards)
        return self._vector.copy()
