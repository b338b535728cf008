"""Risk score on an EHR table: logistic regression or a multi-layer perceptron on encoded features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.inputs import columns, width
from cloister_shared.noise import Entropy, gaussians
from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import Schema, Shaped
from cloister_shared.tasks.task import Augment, Augmentation, TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP = 8
"""Units that ``norm: group`` centres and scales together."""


class Tabular(TaskTerms):
    """Layers are called ``hidden_0``, ``norm_0``, …, ``head``."""

    answers: ClassVar = ("binary", "classes", "labels", "quantity", "survival")
    name: Literal["tabular"]
    model: Literal["logistic", "mlp"] = "logistic"
    hidden: tuple[Count, ...] = ()
    norm: Literal["none", "layer", "group", "batch"] = "none"
    """``group``: Wu and He 2018, eight units a group; like ``layer`` it looks at one row at a time."""
    standardise: bool = False
    """Weight standardisation of the hidden layers (Qiao et al. 2019): no unit can drown the others in its scale."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        depth = range(len(self.hidden))
        norms = [f"norm_{i}" for i in depth] if self.norm != "none" else []
        return (*(f"hidden_{i}" for i in depth), "head", *norms)

    @property
    def mixes_records(self) -> bool:
        """Whether a layer keeps means over records."""
        return self.norm == "batch"

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        given = {"hidden": self.hidden, "norm": self.norm != "none", "standardise": self.standardise}
        for key in (key for key, value in given.items() if value and self.model == "logistic"):
            yield Broken((key,), "belongs to model mlp", f"Write model: mlp, or take {key} out.")
        if self.norm == "group" and (odd := [units for units in self.hidden if units % GROUP]):
            yield Broken(
                ("norm",), f"cannot part {odd[0]} units into groups of eight", "Write hidden widths such as 16 or 64."
            )
        if self.model == "mlp" and not self.hidden:
            yield Broken(("model",), "needs the width of its hidden layers", "Add hidden: [64].")
        if many := [f.name for f in schema.features if isinstance(f, Shaped) and f.kind != "molecule"]:
            yield Broken(
                ("name",), f"takes no {many[0]}, which is not one number", "Write another task, or take it out."
            )

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.dense import perceptron

        return perceptron(width(schema), self.hidden, outputs(schema.target), self.norm, self.standardise)

    def augmentation(self, schema: Schema, terms: Augment) -> Augmentation:
        """Gaussian jitter on the number inputs, shapes [n, inputs]; what is 0 or 1 by its meaning stays as it is."""
        import numpy as np
        import torch

        at = [i for i, column in enumerate(columns(schema)) if column.kind == "number" and not column.absent]

        def jittered(x: Tensor, entropy: Entropy) -> Tensor:
            changed = x.clone()
            if terms.jitter and at:
                noise = gaussians(entropy, len(x) * len(at)).reshape(len(x), len(at))
                changed[:, at] += torch.from_numpy((terms.jitter * noise).astype(np.float32))
            return changed

        return jittered
