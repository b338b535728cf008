"""Names that stand for patients' ids, which nobody can make, or take back to an id, without the hospital's own key.

A pseudonym is the first 16 octets of HMAC-SHA256 (RFC 2104, FIPS 198-1) of an id under a key of 32 random octets. Of a
million patients two share one with a chance of 2^-89.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC
from numpy.typing import NDArray

from cloister_shared import durable
from cloister_shared.errors import KeyBroken

SIZE = 16
"""Octets of a pseudonym."""

Names = NDArray[np.bytes_]
"""Pseudonyms, of dtype ``S16``: numpy pads with zeros, so that two are equal where all 16 octets are."""


def pseudonyms(key: bytes, ids: Iterable[str]) -> Names:
    """Of each id its pseudonym, in the same order."""
    empty, made = HMAC(key, hashes.SHA256()), bytearray()
    for id_ in ids:
        begun = empty.copy()
        begun.update(id_.encode("utf-8", "surrogatepass"))  # or an error would quote the id
        made += begun.finalize()[:SIZE]
    return from_octets(bytes(made))


def from_octets(octets: bytes) -> Names:
    """Pseudonyms that were laid one behind the other; ``tobytes`` is the way back."""
    return np.frombuffer(octets, dtype=f"S{SIZE}")


def among(names: Names, members: Names) -> NDArray[np.bool_]:
    """Which of ``names`` are in ``members``, which is sorted."""
    if not len(members):
        return np.zeros(len(names), dtype=bool)
    at: NDArray[Any] = np.minimum(np.searchsorted(members, names), len(members) - 1)
    return np.asarray(members[at] == names, dtype=bool)


# --- the key -----------------------------------------------------------------------------------------------
def new_key(path: Path) -> bytes:
    """A key for ``path``, which its owner alone can read; the one that lies there, if another process was first."""
    with durable.locked(path):
        if not path.exists():
            durable.save_secret(path, os.urandom(32).hex())
    return read_key(path)


def read_key(path: Path) -> bytes:
    """The key that ``new_key`` wrote.

    Raises:
        KeyBroken: it is missing, damaged, or others on this machine can read it.
    """
    try:
        key = durable.load_secret(path)
    except FileNotFoundError:
        raise KeyBroken(f"{path} is not there.", mend="Restore it from a backup.") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise KeyBroken(f"{path} is no key for patients' pseudonyms.", mend="Restore it from a backup.")
    return key


def key_name(key: bytes) -> str:
    """What a key is known by; tells nothing of it."""
    return hashlib.sha256(b"the key of a hospital's pseudonyms\0" + key).hexdigest()[:16]
