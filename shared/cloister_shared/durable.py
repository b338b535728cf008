"""Named arrays with a header, in a file that is whole or absent: safetensors, so data, never code."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_octets  # pyright: ignore[reportUnknownVariableType]
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from cloister_shared.errors import AlreadyRunning, CheckpointBroken, KeyBroken

Arrays = dict[str, NDArray[np.float32]]

_DTYPES = {"F32": "<f4", "U32": "<u4", "U8": "u1"}


def save(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write beside ``path``, flush to disk, then rename over it: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    save_file(dict(arrays), beside, metadata={"header": json.dumps(header)})
    replace(beside, path)


def octets(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What ``save`` writes."""
    return to_octets(dict(arrays), metadata={"header": json.dumps(header)})


@contextmanager
def saving(path: Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Generator[None, None, None]:
    """``save`` that waits for the disk while the caller's block works; past the block the file is safe, or this raises.

    The arrays are written before the block begins, which may change them.
    """
    beside = path.with_name(path.name + ".tmp")
    save_file(dict(arrays), beside, metadata={"header": json.dumps(header)})
    with ThreadPoolExecutor(1) as disk:
        flushed = disk.submit(replace, beside, path)
        yield
        flushed.result()


def save_text(path: Path, text: str) -> None:
    """The same promise for a text file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    replace(beside, path)


def save_secret(path: Path, text: str) -> None:
    """The same for a secret: nobody but the owner can read the file, at any moment."""
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)  # or it would keep the mode it has
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    replace(beside, path)


def load_secret(path: Path) -> bytes:
    """The octets that ``save_secret`` wrote in hex.

    Raises:
        KeyBroken: others on this machine can read the file.
        FileNotFoundError: there is none.
        ValueError: it holds something else; the error may quote it, so let it go no further.
    """
    if path.stat().st_mode & 0o077:
        raise KeyBroken(f"Others on this machine can read {path}.", mend=f"Run chmod 600 {path}.")
    return bytes.fromhex(path.read_text(encoding="ascii"))


@contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Wait until nobody else, thread or process, is between reading and replacing the file at ``path``."""
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def alone(path: Path) -> Generator[None, None, None]:
    """Be the only one that holds the lock at ``path``, thread or process.

    Raises:
        AlreadyRunning: somebody holds it.
    """
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"One is running already in {path.parent}.") from None
        yield


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


def load(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and arrays of a file that ``save`` wrote; each array is read once, into memory of its own.

    Raises:
        CheckpointBroken: the file is not one of ours, or is damaged.
    """
    with _checked(path) as (header, safe):
        names: list[str] = safe.offset_keys()
        parts = [safe.get_slice(name) for name in names]
        kinds = [_DTYPES[part.get_dtype()] for part in parts]
        shapes: list[list[int]] = [part.get_shape() for part in parts]
        with path.open("rb") as file:  # a length, the safetensors header, then the arrays one after the other
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return header, {
                name: np.fromfile(file, kind, math.prod(shape)).reshape(shape)
                for name, kind, shape in zip(names, kinds, shapes, strict=True)
            }


def load_header(path: Path) -> dict[str, Any]:
    """The same without the arrays, however large they are."""
    with _checked(path) as (header, _):
        return header


@contextmanager
def _checked(path: Path) -> Generator[tuple[dict[str, Any], Any], None, None]:
    try:
        safe: Any = safe_open(path, framework="numpy")  # it holds every offset against the file's length
        with safe as checked:
            yield json.loads(checked.metadata()["header"]), checked
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointBroken(
            f"{path} is damaged or was not written by Cloister.",
            mend="Restore it from a backup, or start the run anew.",
        ) from error
