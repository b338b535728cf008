"""What a treatment changes, for whom: one network for each arm of a trial, and one for the difference.

``t-learner``: the effect is what the network of the treated says beyond that of the untreated (Künzel et al. 2019).
``dr-learner``: a network of its own is fitted to each patient's doubly robust effect (Kennedy 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.inputs import width
from cloister_shared.schema import Schema, Shaped
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn

    from cloister_shared.networks.losses import Loss


class TreatmentEffect(TaskTerms):
    """Layers are called ``untreated``, ``treated``, ``chance`` and, of the DR-learner, ``gain``."""

    answers: ClassVar = ("effect",)
    name: Literal["effect"]
    model: Literal["t-learner", "dr-learner"] = "dr-learner"
    hidden: tuple[Count, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return "untreated", "treated", "chance", *(("gain",) if self.model == "dr-learner" else ())

    @property
    def mixes_records(self) -> bool:
        """No layer does."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if many := [f.name for f in schema.features if isinstance(f, Shaped)]:
            yield Broken(
                ("name",), f"takes no {many[0]}, which is not one number", "Write another task, or take it out."
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.effects import Arms

        return Arms(width(schema), self.hidden, self.model == "dr-learner")

    def loss(self, schema: Schema) -> Loss:
        """Of both arms and the chance of treatment; of the DR-learner of the gain as well."""
        from cloister_shared.networks.effects import doubly_robust
        from cloister_shared.networks.losses import effect

        return doubly_robust if self.model == "dr-learner" else effect
