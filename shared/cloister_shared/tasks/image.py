"""What a picture or a volume shows: one outcome, one of several, or any number of findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cloister_shared.inputs import Block, blocks
from cloister_shared.noise import Entropy
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import ImageFeature, Schema
from cloister_shared.tasks.task import Augment, Augmentation, TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP = 8
"""Channels that are centred and scaled together."""


class Image(TaskTerms):
    """Layers are called ``conv_0``, ``norm_0``, …, ``head``; those of MONAI's models ``body`` and ``head``."""

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    mixes_records: ClassVar = False
    name: Literal["image"]
    model: Literal["cnn", "densenet121", "efficientnet-b0"] = "cnn"
    widths: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (16, 32, 64)
    """Channels of each stage of the ``cnn``; between two stages the size is halved."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        if self.model != "cnn":
            return "body", "head"
        depth = range(len(self.widths))
        return (*(f"conv_{i}" for i in depth), *(f"norm_{i}" for i in depth), "head")

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        yield from one_picture(schema)
        if odd := [width for width in self.widths if width % GROUP]:
            yield Broken(
                ("widths",), f"cannot part {odd[0]} channels into groups of eight", "Write widths such as 16 or 64."
            )
        if self.model != "cnn" and "widths" in self.model_fields_set and self.widths != (16, 32, 64):
            yield Broken(("widths",), "belongs to model cnn", "Write model: cnn, or take widths out.")
        least = 2 ** (len(self.widths) - 1) if self.model == "cnn" else 32
        if small := [f for f in schema.features if isinstance(f, ImageFeature) and min(f.size) < least]:
            yield Broken(
                ("model",),
                f"needs {least} pixels along each side, and {small[0].name} has {min(small[0].size)}",
                "Raise the feature's size, or write a smaller model.",
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks import images

        shape, answers = picture(schema).shape, outputs(schema.target)
        match self.model:
            case "cnn":
                return images.convolutional(shape, self.widths, answers)
            case "densenet121":
                return images.densenet121(shape, answers)
            case "efficientnet-b0":
                return images.efficientnet_b0(shape, answers)

    def augmentation(self, schema: Schema, terms: Augment) -> Augmentation:
        """Each picture moved, mirrored and dimmed a little."""
        from cloister_shared.networks.images import varied

        shape = picture(schema).shape

        def changed(x: Tensor, entropy: Entropy) -> Tensor:
            return varied(x.view(len(x), *shape), terms, entropy).reshape(len(x), -1)

        return changed


def one_picture(schema: Schema) -> Iterator[Broken]:
    """What a task that looks at one picture says of other features."""
    pictures = [feature for feature in schema.features if isinstance(feature, ImageFeature)]
    if len(pictures) != 1 or len(schema.features) != 1:
        yield Broken(
            ("name",),
            "looks at one picture, and at nothing else",
            "Give one feature of kind image alone, or write another task.",
        )


def picture(schema: Schema) -> Block:
    """The block of the only picture."""
    return blocks(schema)[0]
