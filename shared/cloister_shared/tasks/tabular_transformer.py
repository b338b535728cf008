"""Risk score on an EHR table by a small transformer, to which every feature is a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.inputs import columns
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import Schema, Shaped
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken

if TYPE_CHECKING:
    from torch import nn


class TabularTransformer(TaskTerms):
    """Layers are called ``slope``, ``place``, ``attention.0``, …, ``norm``, ``head``."""

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    name: Literal["tabular-transformer"]
    width: Annotated[int, Field(ge=4, le=256)] = 16
    """Numbers of a token. What is clipped grows with its square, so that under DP smaller is mostly better."""
    heads: Annotated[int, Field(ge=1, le=16)] = 2
    depth: Annotated[int, Field(ge=1, le=6)] = 1

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return "slope", "place", *(f"attention.{number}" for number in range(self.depth)), "norm", "head"

    @property
    def mixes_records(self) -> bool:
        """Tokens of one record see each other, and no other record."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if self.width % self.heads:
            yield Broken(("width",), "is no multiple of heads", "Write a width such as 16 and heads: 2.")
        if many := [f.name for f in schema.features if isinstance(f, Shaped)]:
            yield Broken(
                ("name",), f"takes no {many[0]}, which is not one number", "Write another task, or take it out."
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.transformer import FeatureTransformer

        names = list(dict.fromkeys(column.feature for column in columns(schema)))
        feature_of = [names.index(column.feature) for column in columns(schema)]
        return FeatureTransformer(feature_of, self.width, self.heads, self.depth, outputs(schema.target))
