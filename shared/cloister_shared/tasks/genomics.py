"""Thousands of measurements of one kind: gene expression to a cell's type, variants to a polygenic score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.inputs import width
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import Schema, Shaped, VectorFeature
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count, Positive

if TYPE_CHECKING:
    from torch import nn


class Genomics(TaskTerms):
    """``linear``: one effect for each gene or variant, such as a polygenic score. ``mlp``: dense layers.

    Number features beside the vector, such as age or principal components, are further inputs. Layers are called
    ``hidden_0``, …, ``head``.
    """

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    name: Literal["genomics"]
    model: Literal["linear", "mlp"] = "linear"
    hidden: tuple[Count, ...] = ()
    most: Positive = 5.0
    """Standard deviations that a scaled input is held to."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return (*(f"hidden_{i}" for i in range(len(self.hidden))), "head")

    @property
    def mixes_records(self) -> bool:
        """Never."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if bool(self.hidden) != (self.model == "mlp"):
            yield Broken(("hidden",), "is the widths of model mlp", "Write model: mlp and hidden: [64], or neither.")
        if not any(isinstance(feature, VectorFeature) for feature in schema.features):
            yield Broken(("name",), "takes a vector of measurements", "Add a feature of kind vector, or task: tabular.")
        if many := [feature.name for feature in schema.features if isinstance(feature, Shaped)]:
            yield Broken(("name",), f"takes no {many[0]}, which is not one number", "Take it out.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.wide import wide

        return wide(width(schema), self.hidden, outputs(schema.target), self.most)
