"""A generator of invented patients: it learns how a table's columns go together, and under DP little of any patient.

``chain``: each column by a regression on those before it, in the plan's order. ``vae``: a variational autoencoder.
What is drawn from a model that was trained under DP costs no further epsilon, however much of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cloister_shared.inputs import plan_constants, scalars
from cloister_shared.schema import BooleanFeature, CategoryFeature, NumberFeature, Schema, Shaped
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Category, Count

if TYPE_CHECKING:
    from torch import nn

    from cloister_shared.networks.losses import Loss
    from cloister_shared.networks.synthesis import Part

Cells = dict[str, NDArray[Any]]

LATENT, HIDDEN = 8, 64
"""Of model vae where the plan does not say: numbers of the code, and units between it and the table."""


class Synthetic(TaskTerms):
    """Layers are called ``heads.0``, … (chain), or ``into``, ``code``, ``out`` and ``head`` (vae)."""

    answers: ClassVar = ("itself",)
    name: Literal["synthetic"]
    model: Literal["chain", "vae"] = "chain"
    bins: Annotated[int, Field(ge=2, le=256)] = 16
    """Parts of a number's range, or of its mean and three deviations around it. A range of so many whole numbers or
    fewer is taken number by number."""
    latent: Count = LATENT
    hidden: Count = HIDDEN

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        return ("heads",) if self.model == "chain" else ("into", "code", "out", "head")

    @property
    def mixes_records(self) -> bool:
        """No layer does."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        if many := [f.name for f in schema.features if isinstance(f, Shaped)]:
            yield Broken(("name",), f"draws no {many[0]}, which is not one number", "Take it out.")
        if self.model == "chain" and (self.latent, self.hidden) != (LATENT, HIDDEN):
            key = "latent" if self.latent != LATENT else "hidden"
            yield Broken((key,), "belongs to model vae", f"Write model: vae, or take {key} out.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.synthesis import Autoencoder, Chain

        made = parts(schema, self.bins)
        return Chain(made) if self.model == "chain" else Autoencoder(made, self.latent, self.hidden)

    def loss(self, schema: Schema) -> Loss:
        """Minus the log-likelihood of a record, or its bound."""
        from cloister_shared.networks.synthesis import likelihood

        return likelihood(parts(schema, self.bins), self.latent if self.model == "vae" else 0)

    def sample(self, schema: Schema, model: nn.Module, count: int, seed: int) -> Cells:
        """So many invented records: column by column, in the plan's units and categories; None where missing."""
        import torch

        from cloister_shared.networks.synthesis import Autoencoder, Chain

        assert isinstance(model, Chain | Autoencoder)
        drawn = model.draw(count, torch.Generator().manual_seed(seed)).numpy()
        chance, cells, at = np.random.default_rng(seed), Cells(), 0
        for feature in scalars(schema):
            cells[feature.name] = self._cells(feature, drawn[:, at], chance)
            at += 1
            if feature.missing == "indicator":
                cells[feature.name] = cells[feature.name].astype(object)
                cells[feature.name][drawn[:, at] > 0] = None
                at += 1
        return cells

    def _cells(
        self,
        feature: NumberFeature | CategoryFeature | BooleanFeature,
        drawn: NDArray[np.int64],
        chance: np.random.Generator,
    ) -> NDArray[Any]:
        match feature:
            case CategoryFeature(categories=categories):
                names: list[Category] = list(categories)
                return np.array([names[value] for value in drawn], dtype=object)
            case BooleanFeature():
                return drawn
            case NumberFeature():
                edges, centres = _bins(feature, self.bins)
                if _whole(feature, self.bins):
                    return centres[drawn].astype(np.int64)
                low, high = edges[drawn], edges[drawn + 1]
                return low + (high - low) * chance.random(len(drawn))


def parts(schema: Schema, bins: int) -> tuple[Part, ...]:
    """The values that each feature may have, in the order of the inputs."""
    from cloister_shared.networks.synthesis import Part

    made, start = list[Part](), 0
    for feature in scalars(schema):
        match feature:
            case NumberFeature():
                centre, scale = plan_constants(feature)
                edges, centres = ((given - centre) / scale for given in _bins(feature, bins))
                made.append(Part(start, 1, len(centres), tuple(map(float, edges[1:-1])), tuple(map(float, centres))))
            case CategoryFeature(categories=categories):
                made.append(Part(start, len(categories), len(categories)))
            case BooleanFeature():
                made.append(Part(start, 1, 2))
        start += made[-1].columns
        if feature.missing == "indicator":
            made.append(Part(start, 1, 2))
            start += 1
    return tuple(made)


def _whole(feature: NumberFeature, bins: int) -> bool:
    low, high = feature.range
    return float(low).is_integer() and float(high).is_integer() and high - low < bins


def _bins(feature: NumberFeature, bins: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges and centres, in the plan's unit."""
    low, high = feature.range
    if _whole(feature, bins):
        centres = np.arange(low, high + 1)
        return np.append(centres - 0.5, high + 0.5), centres
    if feature.mean is not None and feature.sd is not None:
        low, high = max(low, feature.mean - 3 * feature.sd), min(high, feature.mean + 3 * feature.sd)
    edges = np.linspace(low, high, bins + 1)
    return edges, (edges[1:] + edges[:-1]) / 2
