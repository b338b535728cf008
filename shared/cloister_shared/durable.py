"""Named float32 vectors with a header, in a file that is whole or absent: safetensors, data and never code."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cloister_shared.errors import CheckpointBroken

Arrays = dict[str, NDArray[np.float32]]


def save(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Write beside ``path``, flush to disk, then rename over it: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    save_file(dict(arrays), beside, metadata={"header": json.dumps(header)})
    replace(beside, path)


def save_text(path: Path, text: str) -> None:
    """The same promise for a text file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    replace(beside, path)


def replace(beside: Path, path: Path) -> None:
    """Flush ``beside`` to disk and rename it to ``path``; the rename itself is flushed too."""
    _flush(beside)
    os.replace(beside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a file that ``save`` wrote; each array is read once, into memory of its own.

    Raises:
        CheckpointBroken: the file is not one of ours, or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as checked:  # it holds every offset against the file's length
            header = json.loads(checked.metadata()["header"])
            parts = {name: checked.get_slice(name) for name in checked.offset_keys()}
            if any(part.get_dtype() != "F32" for part in parts.values()):
                raise ValueError("an array is not float32")
            shapes = {name: part.get_shape() for name, part in parts.items()}
        with path.open("rb") as file:  # a length, the safetensors header, then the arrays one after the other
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return header, {name: _read(file, shape) for name, shape in shapes.items()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointBroken(
            f"{path} is damaged or was not written by Cloister.", mend="Restore it from a backup, or start the run anew."
        ) from error


def _read(file: BinaryIO, shape: list[int]) -> NDArray[np.float32]:
    return np.fromfile(file, "<f4", math.prod(shape)).reshape(shape)
