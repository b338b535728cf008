"""Secure aggregation, both halves of each step in one place. Pure functions: no file, no network, no clock.

    encode   decode     real numbers <-> integers modulo 2^32, so that no sum over the cohort can wrap
    Masks               what a site adds and what the coordinator takes away again
    deal     combine    Shamir's shares of the seeds, for those who do not stay
    seal     unseal     each share under a key of its own, which its holder may give away

Pairwise and self masks with shares follow Bonawitz et al. (CCS 2017); keys that are set up once a run follow
Flamingo (Ma et al., S&P 2023). docs/protocol.md has the steps and what each party knows after them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from cloister_shared.errors import ReplyRejected
from cloister_shared.plan import StudyPlan

VECTORS = ("update", "control")
"""What is masked, in the order in which the masks are read; the tally comes last."""

Ring = NDArray[np.uint32]
"""Integers modulo 2^32. A narrower wire format keeps the low bits, which are the integers modulo 2^bits."""

BLOCK = 1 << 18
"""Values handled at a time: 1 MiB, which stays in a core's cache under twenty keystreams."""


def threshold(sites: int) -> int:
    """Shares that rebuild a seed: two thirds of the cohort, so that no two answers can be had from it.

    A coordinator that shows one half of the honest sites a hospital as active and the other half the same
    hospital as dropped, with f sites on its side, would need 2t <= n + f; with 2n/3 that takes f >= n/3.
    """
    return max(2, -(-2 * sites // 3))


# --- real numbers <-> ring ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Encoding:
    """Fixed point: x is held as round(x * 2^fraction_bits), after x is clipped to +-bound.

    A mean holds ``room`` times the bound at most: noise that the hospitals share is not clipped.
    """

    bits: int
    bound: float
    fraction_bits: int
    room: int = 1

    def encode(self, values: NDArray[np.float32], weight: float, masks: Masks) -> tuple[Ring, int]:
        """``weight * values`` as masked ring elements, and how many were clipped. Works in place of ``values``.

        The weights of a cohort sum to 1 at most, so that a sum stays within the bound: see ``StudyPlan.could_wrap``.
        """
        ring, clipped = values.view(np.uint32), 0
        for at in range(0, ring.size, BLOCK):
            block = ring[at : at + BLOCK]
            clipped += self._write(values[at : at + BLOCK], weight, block)
            masks.add_to(block)
        return ring, clipped

    def mask(self, ring: Ring, masks: Masks) -> Ring:
        """The same for values that are ring elements already. Works in place."""
        for at in range(0, ring.size, BLOCK):
            masks.add_to(ring[at : at + BLOCK])
        return ring

    def add(self, total: Ring, values: NDArray[np.float32], weight: float) -> int:
        """Add ``weight * values`` to ``total``, as masks that cancel would leave it; how many were clipped."""
        ring, clipped = np.empty(min(BLOCK, values.size), np.uint32), 0
        for at in range(0, total.size, BLOCK):
            block = total[at : at + BLOCK]
            integers = ring[: block.size]
            clipped += self._write(values[at : at + BLOCK], weight, integers)
            block += integers
        return clipped

    def _write(self, values: NDArray[np.float32], weight: float, ring: Ring) -> int:
        """Write a block as ring elements, maybe over itself; how many were clipped."""
        factor, clipped = np.float32(weight * 2.0**self.fraction_bits), 0
        limit = np.float32(self.bound) * factor
        scaled = np.multiply(values, factor, out=ring.view(np.float32))
        if max(-scaled.min(), scaled.max()) > limit:
            clipped = int(np.count_nonzero(np.abs(scaled) > limit))
            np.clip(scaled, -limit, limit, out=scaled)
        np.rint(scaled, out=scaled)
        np.copyto(ring.view(np.int32), scaled, casting="unsafe")
        return clipped

    def decode(self, ring: Ring, weight: float, sites: int) -> NDArray[np.float32]:
        """The sum of what the sites encoded, divided by ``weight``. Works in place of ``ring``.

        Raises:
            ReplyRejected: a value lies outside what so many honest sites can reach, as it does when a mask is
                left over or blocks changed places.
        """
        most = self.room * self.bound * 2.0**self.fraction_bits * (1 + 2**-22) + sites / 2
        factor = 1.0 / (weight * 2.0**self.fraction_bits)
        mean = ring.view(np.float32)
        for at in range(0, ring.size, BLOCK):
            block = self.signed(ring[at : at + BLOCK])
            if max(-int(block.min()), int(block.max())) > most:
                raise ReplyRejected("the sum holds a value that no sum of the plan's bounds can hold")
            mean[at : at + BLOCK] = block * factor
        return mean

    def signed(self, ring: Ring) -> NDArray[np.int32]:
        """The low ``bits`` as signed integers."""
        shift = 32 - self.bits
        if not shift:
            return ring.view(np.int32)
        return (ring << np.uint32(shift)).view(np.int32) >> np.int32(shift)

    def pack(self, ring: Ring) -> NDArray[np.uint8]:
        """The low ``bits`` of each element, little-endian."""
        width = self.bits // 8
        if width in (2, 4):
            return ring.astype(f"<u{width}", copy=False).view(np.uint8)
        return ring.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)[:, :width].ravel()

    def add_packed(self, total: Ring, packed: NDArray[np.uint8]) -> None:
        """Add a packed vector, block by block, to ``total``."""
        width = self.bits // 8
        wide = np.zeros((BLOCK, 4), np.uint8)
        for at in range(0, total.size, BLOCK):
            block = packed[at * width : (at + BLOCK) * width]
            if width in (2, 4):
                total[at : at + BLOCK] += block.view(f"<u{width}")
            else:
                rows = block.size // width
                wide[:rows, :width] = block.reshape(-1, width)
                total[at : at + rows] += wide[:rows].view("<u4")[:, 0]


def encoding_of(plan: StudyPlan) -> Encoding:
    """How this plan's parameters are written as integers; both sides find it in the plan."""
    return Encoding(plan.aggregation.bits, plan.aggregation.bound, plan.fraction_bits, plan.room)


def weight(plan: StudyPlan, sites: int, rows: float) -> float:
    """A hospital's part in the mean, at most 1 / ``sites``. All of it is in the plan: nobody can choose it."""
    return 1 / sites if plan.aggregation.weights == "equal" else rows / (sites * plan.cohort.max_rows)


def norm(vector: NDArray[np.floating[Any]]) -> float:
    """ℓ² norm, block by block; not finite if any value is not."""
    blocks = [vector[at : at + BLOCK] for at in range(0, vector.size, BLOCK)]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [float(block @ block) for block in blocks]
    if not math.isfinite(sum(squares)):  # a square may overflow where the value does not
        squares = [float(np.square(block, dtype=np.float64).sum()) for block in blocks]
    return math.sqrt(sum(squares))


_LIMB, _LIMBS, _POINT = 24, 3, 24
MOST_SITES = 1 << (32 - _LIMB)
"""So many limbs can be added before one wraps."""


def to_limbs(numbers: NDArray[np.float64]) -> Ring:
    """A few numbers that need more than 32 bits, such as row counts: three limbs of 24 bits each.

    Limbs are added up apart, without a carry, and put together after. Holds |x| < 2^47 to 2^-24.
    """
    fixed = [round(min(max(float(x), -(2.0**46)), 2.0**46) * 2**_POINT) + 2 ** (_LIMB * _LIMBS - 1) for x in numbers]
    return np.array([x >> (_LIMB * k) & (1 << _LIMB) - 1 for x in fixed for k in range(_LIMBS)], np.uint32)


def from_limbs(total: Ring, sites: int) -> NDArray[np.float64]:
    """The sums of ``sites`` such numbers, exact to the last bit of a double."""
    sums = [sum(int(limb) << (_LIMB * k) for k, limb in enumerate(row)) for row in total.reshape(-1, _LIMBS)]
    return np.array([(x - sites * 2 ** (_LIMB * _LIMBS - 1)) / 2**_POINT for x in sums])


# --- masks -------------------------------------------------------------------------------------------------
class Masks:
    """AES-256-CTR keystreams (NIST SP 800-38A), read as ring elements and consumed from array to array."""

    def __init__(self, seeds: Iterable[tuple[bytes, int]], start: int = 0) -> None:
        """Each seed of 32 bytes with the sign +1 or -1 of its mask. No seed ever makes two masks.

        They begin ``start`` octets into it: a long mask can be taken off in several places at once.
        """
        blocks, odd = divmod(start, 16)
        self._streams = list[tuple[CipherContext, np.ufunc]]()
        for seed, sign in seeds:
            stream = Cipher(algorithms.AES(seed), modes.CTR(blocks.to_bytes(16))).encryptor()
            stream.update(bytes(odd))
            self._streams.append((stream, np.add if sign > 0 else np.subtract))
        self._bytes = bytearray()

    def add_to(self, ring: Ring) -> None:
        """Add the next masks, in place."""
        if len(self._bytes) < 4 * min(ring.size, BLOCK) + 15:  # which AES may write past the end
            self._bytes = bytearray(4 * min(ring.size, BLOCK) + 15)
            self._mask = np.frombuffer(self._bytes, "<u4", min(ring.size, BLOCK))
        for at in range(0, ring.size, BLOCK):
            block = ring[at : at + BLOCK]
            zeros, mask = _ZEROS[: 4 * block.size], self._mask[: block.size]
            for stream, combine in self._streams:
                stream.update_into(zeros, self._bytes)
                combine(block, mask, out=block)


_ZEROS = memoryview(bytes(4 * BLOCK))


def sign(me: str, peer: str) -> int:
    """The first of a pair by name adds its mask, the other takes it away."""
    return 1 if me < peer else -1


# --- seeds -------------------------------------------------------------------------------------------------
def new_key() -> tuple[bytes, str]:
    """A run's X25519 key (RFC 7748): the private half, and the public one in hex."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw().hex()


def first_chain(private: bytes, peer: str, context: Sequence[str]) -> bytes:
    """The secret that two sites share before round 0. ``context`` says for what; both must say the same.

    Raises:
        ReplyRejected: the peer's key is none, or one that leads to a secret that everybody knows.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(bytes.fromhex(peer))
        )
    except ValueError:
        raise ReplyRejected("a public key is no point of X25519") from None
    return _derive(shared, "pair", *context)


def next_chain(chain: bytes) -> bytes:
    """The secret of the next round. Nobody finds the way back, so what is erased is gone."""
    return _derive(chain, "next")


def round_seed(chain: bytes, transcript: str, purpose: str) -> bytes:
    """The seed of one mask: two sites find the same from their chain, and nobody from another transcript."""
    return _derive(chain, purpose, transcript)


def seal_keys(chain: bytes, transcript: str, sender: str, holder: str, slots: int) -> list[bytes]:
    """A key for each share that ``sender`` deals to ``holder``: both find it, and it seals that share alone.

    They are the blocks of one HKDF output; a block that is given away leads to no other (RFC 5869).
    """
    keys = _derive(chain, "seal", transcript, sender, holder, size=32 * slots)
    return [keys[at : at + 32] for at in range(0, len(keys), 32)]


def _derive(secret: bytes, *context: str, size: int = 32) -> bytes:
    # JSON keeps ["ab", "c"] and ["a", "bc"] apart.
    info = b"cloister secure sum v1 " + json.dumps(context).encode()
    return HKDF(SHA256(), size, salt=None, info=info).derive(secret)


# --- shares ------------------------------------------------------------------------------------------------
PRIME = 2**256 + 297
"""The first prime above all seeds of 32 bytes."""

SEALED = 33 + 16
"""Bytes of a sealed share: a number below PRIME and a tag."""


def deal(secrets: Sequence[bytes], threshold: int, holders: int, seed: bytes) -> list[list[int]]:
    """Shamir's shares (CACM 1979) of each secret: a row for each holder, a column for each secret.

    ``seed`` decides the polynomials, so that a round done over deals the same. Holder k has the value at k + 1.
    """
    wide = 48  # bytes for a coefficient: modulo PRIME they are uniform but for 2^-127
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    rows: list[list[int]] = [[] for _ in range(holders)]
    for secret in secrets:
        drawn = stream.update(bytes(wide * (threshold - 1)))
        coefficients = [int.from_bytes(drawn[at : at + wide]) % PRIME for at in range(0, len(drawn), wide)]
        for k, row in enumerate(rows):
            value = 0
            for coefficient in coefficients:
                value = (value + coefficient) * (k + 1)
            row.append((value + int.from_bytes(secret)) % PRIME)
    return rows


def combine(shares: Mapping[int, int]) -> bytes:
    """The secret of exactly ``threshold`` shares, by holder: the polynomial's value at 0.

    Raises:
        ReplyRejected: they are not shares of one seed.
    """
    weights = _lagrange(tuple(shares))
    value = sum(weights[k] * share for k, share in shares.items()) % PRIME
    if value >> 256:
        raise ReplyRejected("the shares belong to no seed")
    return value.to_bytes(32)


@cache
def _lagrange(holders: tuple[int, ...]) -> dict[int, int]:
    found: dict[int, int] = {}
    for k in holders:
        others = [j for j in holders if j != k]
        above = math.prod(j + 1 for j in others)
        below = math.prod(j - k for j in others)
        found[k] = above * pow(below, -1, PRIME) % PRIME
    return found


def seal(share: int, key: bytes) -> bytes:
    """AES-256-GCM under a key that seals nothing else, hence the fixed nonce."""
    return AESGCM(key).encrypt(bytes(12), share.to_bytes(33), None)


def unseal(sealed: bytes, key: bytes) -> int:
    """A share, by the key that its holder gave away. A wrong key opens nothing, so no wrong share gets in.

    Raises:
        ReplyRejected: the key does not open it.
    """
    try:
        return int.from_bytes(AESGCM(key).decrypt(bytes(12), sealed, None))
    except InvalidTag:
        raise ReplyRejected("the key does not open the share") from None


def fingerprint(secret: bytes, transcript: str, dealer: str, slot: int) -> bytes:
    """What a dealer says beforehand of each seed; a seed that was put together wrongly has another."""
    return hashlib.sha256(json.dumps(["cloister seed", transcript, dealer, slot]).encode() + secret).digest()


def draw() -> bytes:
    """A site's own secret of a run."""
    return os.urandom(32)
