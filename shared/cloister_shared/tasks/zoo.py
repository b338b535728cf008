"""Every task that a plan can name, on one page. A task is one file beside this one and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

from pydantic import Field

from cloister_shared.schema import Schema
from cloister_shared.tasks.cox import Cox
from cloister_shared.tasks.effect import TreatmentEffect
from cloister_shared.tasks.genomics import Genomics
from cloister_shared.tasks.image import Image
from cloister_shared.tasks.molecule import Molecule
from cloister_shared.tasks.monitoring import Monitoring
from cloister_shared.tasks.multimodal import Multimodal
from cloister_shared.tasks.notes import Notes
from cloister_shared.tasks.segmentation import Segmentation
from cloister_shared.tasks.series import Series
from cloister_shared.tasks.synthetic import Synthetic
from cloister_shared.tasks.tabular import Tabular
from cloister_shared.tasks.tabular_transformer import TabularTransformer
from cloister_shared.tasks.task import Augment, Augmentation

if TYPE_CHECKING:
    from torch import nn

    from cloister_shared.networks.losses import Loss

Task = Annotated[
    Tabular
    | TabularTransformer
    | Series
    | Monitoring
    | Image
    | Segmentation
    | Cox
    | TreatmentEffect
    | Synthetic
    | Multimodal
    | Notes
    | Molecule
    | Genomics,
    Field(discriminator="name"),
]


class Networked(Protocol):
    """What every task offers beside its terms: see any of them."""

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network from a record's inputs, [n, width], to outputs; weights from torch's generator."""
        ...


@runtime_checkable
class Augmenting(Protocol):
    """A task whose records can be varied without changing what they mean: optional, for ``training.augment``."""

    def augmentation(self, schema: Schema, terms: Augment) -> Augmentation:
        """How. No record's change may depend on another record, or no clip would bound what one does."""
        ...


@runtime_checkable
class Costing(Protocol):
    """A task with a loss of its own: optional; others have that of their outcome."""

    def loss(self, schema: Schema) -> Loss:
        """What is minimised."""
        ...
