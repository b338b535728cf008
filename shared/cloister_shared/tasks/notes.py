"""What a clinical note is about: its specialty, its codes, an outcome; from hashed words, without a dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import Schema, TextFeature
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn


class Notes(TaskTerms):
    """``linear``: which words a note has. ``transformer``: words in their order. ``encoder``: the same transformer
    from a public file, frozen but for its head, so that differential privacy's noise falls on few parameters.

    Layers are called ``words``, or ``trunk`` and ``head``.
    """

    answers: ClassVar = ("binary", "classes", "labels")
    name: Literal["notes"]
    model: Literal["linear", "transformer", "encoder"] = "linear"
    width: Count = 32
    heads: Count = 2
    depth: Count = 1

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return ("words",) if self.model == "linear" else ("trunk", "head")

    @property
    def mixes_records(self) -> bool:
        """Never: a note's weights and attention look at that note alone."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        texts = [feature for feature in schema.features if isinstance(feature, TextFeature)]
        if len(texts) != 1 or len(schema.features) != 1:
            yield Broken(("name",), "reads one text and nothing else", "Keep one feature of kind text.")
        if self.model == "linear":
            given = {"width": self.width, "heads": self.heads, "depth": self.depth}
            for key in (key for key, value in given.items() if value != type(self).model_fields[key].default):
                yield Broken((key,), "belongs to a transformer", f"Write model: transformer, or take {key} out.")
        elif self.width % self.heads:
            yield Broken(("heads",), f"does not divide the width {self.width}", "Write a width of so many per head.")
        if any(text.distinct for text in texts) and self.model != "linear":
            yield Broken(("model",), "reads words in their order, and distinct keeps none", "Take distinct out.")
        frozen = self.pretrained.frozen if self.pretrained else ()
        if self.model == "encoder" and "trunk" not in frozen:
            yield Broken(
                ("model",),
                "is a trunk from a public file that stays as it is",
                "Add pretrained: {sha256: …, frozen: [trunk]}, or write model: transformer.",
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.notes import Bag, Reader, Trunk

        text, said = _text(schema), outputs(schema.target)
        if self.model == "linear":
            return Bag(text.buckets, said)
        return Reader(Trunk(text.tokens, text.buckets, self.width, self.heads, self.depth), self.width, said)


def _text(schema: Schema) -> TextFeature:
    return next(feature for feature in schema.features if isinstance(feature, TextFeature))
