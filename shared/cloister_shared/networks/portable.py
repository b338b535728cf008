"""A trained network as a file that other programs run: ONNX, or TorchScript where ONNX cannot say what it does."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cloister_shared.inputs import blocks, width
from cloister_shared.schema import Schema

CLOSE = 1e-4
"""How far the file's outputs may be from the network's, as a share of the largest."""


def written(model: nn.Module, inputs: Tensor, stem: Path) -> tuple[Path | None, str]:
    """Write ``stem``.onnx or ``stem``.ts and hold it against the network on ``inputs`` [n, width]; else why not.

    What does not answer as the network does is deleted.
    """
    why = list[str]()
    for suffix, write in ((".onnx", _onnx), (".ts", _torchscript)):
        path = stem.with_suffix(suffix)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch calls both old; what is new needs further packages
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                said = write(model, inputs, path)
                expected = _parted(model, inputs)
            if said.shape == expected.shape and (said - expected).abs().max() <= CLOSE * (1 + expected.abs().max()):
                return path, ""
            why.append(f"{suffix[1:]}: answers otherwise than the model")
        except Exception as error:  # each library raises what it likes
            why.append(f"{suffix[1:]}: {type(error).__name__}")
        path.unlink(missing_ok=True)
    return None, "; ".join(why)


def examples(schema: Schema) -> Tensor:
    """Inputs to hold another program's answers against; where only some numbers mean something, 0 does."""
    x = torch.randn((3, width(schema)), generator=torch.Generator().manual_seed(0))
    for block in blocks(schema):
        if block.feature.kind in ("text", "molecule"):
            x[:, block.start : block.start + block.size] = 0.0
    return x


def _onnx(model: nn.Module, inputs: Tensor, path: Path) -> Tensor:
    import onnxruntime

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole attention layer, which ONNX has not
    rows = {"inputs": {0: "rows"}, "outputs": {0: "rows"}}
    said, answered = ["inputs"], ["outputs"]
    try:
        with _silent():
            torch.onnx.export(
                model, (inputs,), str(path), dynamo=False, input_names=said, output_names=answered, dynamic_axes=rows
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    quiet = cast("Any", onnxruntime).SessionOptions()
    quiet.log_severity_level = 4  # a graph that cannot take other rows is refused here, and need not shout
    session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
    return _parted(lambda part: torch.from_numpy(session.run(None, {"inputs": part.numpy()})[0]), inputs)


@contextmanager
def _silent() -> Generator[None, None, None]:
    """Without what torch's C++ prints: of a network that ONNX cannot say, its whole graph."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _torchscript(model: nn.Module, inputs: Tensor, path: Path) -> Tensor:
    torch.jit.save(torch.jit.trace(model, (inputs,)), str(path))
    read = cast("nn.Module", torch.jit.load(str(path)))
    return _parted(read, inputs)


def _parted(answer: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Answers to two rows, then to the rest: what was written for one number of rows alone is found out."""
    return torch.cat([answer(inputs[:2]), answer(inputs[2:])])
