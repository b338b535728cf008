"""What a model says of one record, under names that a reader at a hospital understands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_shared.outcomes import itself
from cloister_shared.outcomes.judging import Array
from cloister_shared.outcomes.outcome import outcome_of
from cloister_shared.schema import Binary, Classes, Effect, Itself, Labels, Mask, Quantity, Schema, Survival

Raw = NDArray[np.float32]


def names(schema: Schema) -> tuple[str, ...]:
    """The columns of an answer."""
    match schema.target:
        case Binary(name=name):
            return (f"risk of {name}",)
        case Classes(classes=classes):
            return tuple(map(str, classes))
        case Labels(labels=labels):
            return labels
        case Quantity(name=name, unit=unit):
            return (f"{name} [{unit}]" if unit else name,)
        case Survival(cuts=cuts):
            return tuple(f"outlives {cut:g}" for cut in cuts)
        case Mask(name=name):
            return (f"share of {name}",)
        case Itself():
            return ("error",)
        case Effect(name=name):
            return f"{name} untreated", f"{name} treated", "difference"


def answers(schema: Schema, output: Raw, inputs: Raw) -> Array:
    """Outputs [n, ...] of a network as numbers [n, len(names)]; ``inputs`` [n, width] are those that it saw."""
    match schema.target:
        case Mask():
            return (output.reshape(len(output), -1) > 0).mean(axis=1, keepdims=True)
        case Itself():
            unknown = np.full((len(inputs), 1), np.nan, np.float32)
            said = itself.seen(output, np.concatenate([inputs, unknown], axis=1))[1]
            return said.reshape(len(output), -1)[:, :1]
        case Effect():
            said = outcome_of(schema).seen(output, np.zeros((len(output), 2), np.float32))[1]
            return said[:, [0, 1, 3]]
        case _:
            # Nobody knows the outcome; what is said does not depend on it.
            said = outcome_of(schema).seen(output, np.zeros((len(output), 3), np.float32))[1]
    return said.reshape(len(output), -1)
