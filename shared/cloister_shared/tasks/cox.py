"""Time to an event by proportional hazards, against which the discrete-time hazards of ``tabular`` are held.

Cox's partial likelihood compares each patient who had the event with all who were still at risk, here those of the
same hospital and batch (a model stratified by hospital). One patient moves the others' part, so no plan with
differential privacy may name this task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.inputs import width
from cloister_shared.schema import Schema, Shaped, Survival
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn

    from cloister_shared.networks.losses import Loss


class Cox(TaskTerms):
    """Layers are called ``risk`` and ``baseline``."""

    answers: ClassVar = ("survival",)
    name: Literal["cox"]
    hidden: tuple[Count, ...] = ()
    """None: Cox's own linear model."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return "risk", "baseline"

    @property
    def mixes_records(self) -> bool:
        """Its loss does."""
        return True

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if many := [f.name for f in schema.features if isinstance(f, Shaped)]:
            yield Broken(
                ("name",), f"takes no {many[0]}, which is not one number", "Write another task, or take it out."
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.cox import ProportionalHazards

        assert isinstance(schema.target, Survival)
        return ProportionalHazards(width(schema), self.hidden, len(schema.target.cuts))

    def loss(self, schema: Schema) -> Loss:
        """Cox's partial likelihood, which is no mean over records."""
        from cloister_shared.networks.cox import loss

        return loss
