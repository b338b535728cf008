"""Watching without an outcome: what is usual of a series, and an alarm for what is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.inputs import columns
from cloister_shared.schema import Schema
from cloister_shared.tasks.series import not_one_series, the_series
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken

if TYPE_CHECKING:
    from torch import nn

    from cloister_shared.networks.losses import Loss


class Monitoring(TaskTerms):
    """Layers are called ``expected`` and ``threshold``.

    The threshold is learned as the model is. With ``local_layers: [threshold]`` each hospital has one of its own.
    """

    answers: ClassVar = ("itself",)
    layers: ClassVar = ("expected", "threshold")
    mixes_records: ClassVar = False
    name: Literal["monitoring"]
    model: Literal["autoencoder", "forecast"] = "autoencoder"
    """``autoencoder``: the series through few units and back; ``forecast``: each step from those before it."""
    units: Annotated[int, Field(ge=1, le=1024)] = 8
    alarms: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the records trained on whose error lies above the threshold, and so raises an alarm."""

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        yield from not_one_series(schema)
        if columns(schema):
            yield Broken(("name",), "takes a series and nothing beside it", "Take the other features out.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.sequences import Grid
        from cloister_shared.networks.usual import usual

        steps, wide = the_series(schema).shape
        return usual(Grid(0, steps, wide // 2), self.model, self.units)

    def loss(self, schema: Schema) -> Loss:
        """Of what was expected, and of the threshold."""
        from cloister_shared.networks.usual import loss_with_alarm

        return loss_with_alarm(self.alarms)
