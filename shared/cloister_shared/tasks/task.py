"""What the terms of every task hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from cloister_shared.noise import Entropy
from cloister_shared.terms import Terms

if TYPE_CHECKING:
    from torch import Tensor

Augmentation = Callable[["Tensor", Entropy], "Tensor"]
"""Records' inputs, each of them changed a little and independently; the shape stays."""


class Pretrained(Terms):
    """Training begins from public weights: a safetensors file, ``pretrained.safetensors``, that every side holds.

    Weights of which the file says nothing are the seed's. Nothing of a patient who is not public may be in it.
    """

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    frozen: tuple[str, ...] = ()
    """Name prefixes of layers that are neither trained nor sent, so that no noise is spent on them: ``[hidden]``."""


class TaskTerms(Terms):
    """Of every task: where its weights come from."""

    pretrained: Pretrained | None = None


class Augment(Terms):
    """Under DP: every record of a step is taken ``copies`` times, each time a little different (De et al. 2022).

    All copies lie in the mean that is clipped of their patient or record, so that epsilon stays what it was.
    """

    copies: Annotated[int, Field(ge=2, le=64)]
    jitter: Annotated[float, Field(ge=0, le=10)]
    """Standard deviation of what is added to each number input, once centred and scaled; 0/1 inputs stay. Of a picture
    it is that of its brightness and of its contrast."""
    shift: Annotated[int, Field(ge=0, le=64)] = 0
    """Pictures alone: the most pixels by which each is moved along each of its sides."""
    flip: bool = False
    """Pictures alone: every second one is mirrored along its last side. Not where left and right differ in meaning."""
