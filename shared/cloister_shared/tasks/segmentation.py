"""Where a lesion is, in a picture or a volume: a yes or no for each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.schema import ImageFeature, Schema
from cloister_shared.tasks.image import one_picture, picture
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken

if TYPE_CHECKING:
    from torch import nn

LEAST = 16
"""Pixels along each side: the model halves it four times."""


class Segmentation(TaskTerms):
    """Layers are called ``body.conv_0``, ``body.down_1`` to ``_4``, ``body.upcat_4`` to ``_1`` and ``head``."""

    answers: ClassVar = ("mask",)
    mixes_records: ClassVar = False
    layers: ClassVar = (
        "body.conv_0",
        *(f"body.down_{i}" for i in (1, 2, 3, 4)),
        *(f"body.upcat_{i}" for i in (4, 3, 2, 1)),
        "head",
    )
    name: Literal["segmentation"]
    model: Literal["unet"] = "unet"
    width: Annotated[int, Field(ge=8, le=64, multiple_of=8)] = 8
    """Channels at full size; where the size is a sixteenth there are eight times as many."""

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        yield from one_picture(schema)
        if small := [f for f in schema.features if isinstance(f, ImageFeature) and min(f.size) < LEAST]:
            yield Broken(
                ("model",),
                f"needs {LEAST} pixels along each side, and {small[0].name} has {min(small[0].size)}",
                "Raise the feature's size.",
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.unet import unet

        return unet(picture(schema).shape, self.width)
