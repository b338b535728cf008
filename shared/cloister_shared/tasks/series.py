"""Risk over the hours: vitals and laboratory values of a stay, as a GRU, an LSTM or a small transformer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.inputs import Block, blocks, columns
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import Schema, Shaped
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn


class Series(TaskTerms):
    """Layers are called ``encoder``, ``hidden`` and ``head``. The scalars of a record join the series at the end."""

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    mixes_records: ClassVar = False
    name: Literal["series"]
    model: Literal["gru", "lstm", "transformer"] = "gru"
    units: Annotated[int, Field(ge=4, le=1024)] = 32
    depth: Annotated[int, Field(ge=1, le=8)] = 1
    """Layers of the encoder, one on the other."""
    summaries: bool = False
    """Whether first, last, mean, least and most of each channel, and how often it was taken, join as well."""
    hidden: Count | None = None
    """Units of one more layer before the head."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return ("encoder", "head") if self.hidden is None else ("encoder", "hidden", "head")

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        yield from not_one_series(schema)
        if self.model == "transformer" and self.units % 4:
            yield Broken(("units",), "cannot be shared by 4 heads of attention", "Write a multiple of 4, as 32.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.sequences import Grid, SeriesNetwork

        steps, wide = the_series(schema).shape
        return SeriesNetwork(
            Grid(len(columns(schema)), steps, wide // 2),
            outputs(schema.target),
            self.model,
            self.units,
            self.depth,
            self.summaries,
            self.hidden,
        )


def the_series(schema: Schema) -> Block:
    """The one block of a schema that these tasks take."""
    (block,) = blocks(schema)
    return block


def not_one_series(schema: Schema) -> Iterator[Broken]:
    """What keeps a schema from being one series with scalars beside it."""
    kinds = [feature.kind for feature in schema.features if isinstance(feature, Shaped)]
    if others := [kind for kind in kinds if kind != "series"]:
        yield Broken(("name",), f"takes no {others[0]}", "Write task multimodal, or take the feature out.")
    elif len(kinds) != 1:
        yield Broken(
            ("name",),
            f"takes one series, and there are {len(kinds) or 'none'}",
            "Put all channels into one feature of kind series.",
        )
