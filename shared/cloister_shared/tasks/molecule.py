"""A property of a molecule: whether it passes a barrier, binds, harms; how well it dissolves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from cloister_shared.outcomes.outcome import outputs
from cloister_shared.schema import MoleculeFeature, Schema
from cloister_shared.tasks.task import TaskTerms
from cloister_shared.terms import Broken, Count

if TYPE_CHECKING:
    from torch import nn


class Molecule(TaskTerms):
    """``mlp``: dense layers on Morgan's fingerprint. ``message-passing``: along the bonds of the graph.

    Layers are called ``hidden_0``, …, ``head``; or ``enter``, ``own``, ``heard``, ``norm``, ``join``, ``head``.
    """

    answers: ClassVar = ("binary", "classes", "labels", "quantity")
    name: Literal["molecule"]
    model: Literal["mlp", "message-passing"] = "mlp"
    hidden: tuple[Count, ...] = ()
    """Widths of ``mlp``; without any it is linear."""
    width: Count = 32
    """Numbers of an atom's state, of ``message-passing``."""
    steps: Count = 3
    """How far along bonds an atom hears."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names."""
        if self.model == "mlp":
            return (*(f"hidden_{i}" for i in range(len(self.hidden))), "head")
        return "enter", "own", "heard", "norm", "join", "head"

    @property
    def mixes_records(self) -> bool:
        """Never."""
        return False

    def broken(self, schema: Schema) -> Iterator[Broken]:
        """Terms that do not go together."""
        found = [feature for feature in schema.features if isinstance(feature, MoleculeFeature)]
        if len(found) != 1 or len(schema.features) != 1:
            yield Broken(("name",), "takes one molecule and nothing else", "Keep one feature of kind molecule.")
        wanted = "fingerprint" if self.model == "mlp" else "graph"
        if any(feature.encoding != wanted for feature in found):
            yield Broken(("model",), f"takes a molecule's {wanted}", f"Write encoding: {wanted} of the feature.")
        given = {"width": self.width, "steps": self.steps} if self.model == "mlp" else {"hidden": self.hidden}
        for key in (key for key, value in given.items() if value != type(self).model_fields[key].default):
            yield Broken((key,), f"is no term of model {self.model}", f"Take {key} out, or write another model.")

    def network(self, schema: Schema) -> nn.Module:
        """The untrained network; weights come from torch's generator."""
        from cloister_shared.networks.dense import perceptron
        from cloister_shared.networks.molecules import MessagePassing

        feature = next(feature for feature in schema.features if isinstance(feature, MoleculeFeature))
        said = outputs(schema.target)
        if self.model == "mlp":
            return perceptron(feature.bits, self.hidden, said)
        return MessagePassing(feature.atoms, self.width, self.steps, said)
