"""Named arrays with a header, in a file that is whole or absent. The format is safetensors: data, never code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cloister_shared.errors import CheckpointBroken

Arrays = dict[str, NDArray[Any]]


def save(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
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
    """Header and arrays of a file that ``save`` wrote.

    Raises:
        CheckpointBroken: the file is not one of ours, or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
            return json.loads(file.metadata()["header"]), arrays
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointBroken(
            f"{path} is damaged or was not written by Cloister.", mend="Restore it from a backup, or start the run anew."
        ) from error
