"""One outcome from pictures, notes, series and a table together, of which a hospital may lack some.

Write ``required: false`` at what a hospital may lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.inputs import blocks, columns
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import ImageFeature, MoleculeFeature, Schema
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn


class Multimodal(TaskTerms):
    """Layers are called ``scalars``, ``parts.0``, … in the order of the features of many values, and ``head``."""

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    name: Literal["multimodal"]
    width: Annotated[int, Field(ge=2, le=512)] = 16
    """Numbers that each encoder makes of its input."""
    hidden: tuple[Count, ...] = ()
    """Of the head, over what all encoders say."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return "scalars", "parts", "head"

    @property
    def mixes_records(self) -> bool:
        """No layer does."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if not blocks(schema):
            yield Broken(("name",), "has numbers alone to read", "Write name: tabular.")
        for feature in schema.features:
            if isinstance(feature, MoleculeFeature):
                yield Broken(("name",), f"takes no molecule, such as {feature.name}", "Take it out.")
            if isinstance(feature, ImageFeature) and len(feature.size) != 2:
                yield Broken(("name",), f"takes no volume, such as {feature.name}", "Write a picture's size.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.fusion import Fusion

        return Fusion(len(columns(schema)), blocks(schema), self.width, self.hidden, outputs(schema.target))
