"""Randomness that differential privacy may rest on: who is drawn, and the noise. Pure functions of a byte source.

    keystream     reproducible                      where bytes come from
    uniforms      gaussians      draw_subset        continuous noise, and Poisson sampling
    rounded       noisy                             releasing continuous noise so that no low bit tells
    discrete_gaussian            sum_gap            noise for integers, which a secure sum adds up

docs/decisions/0008 says why it is done so. What is called exact here is exact up to the rounding of doubles; each
function says how far its law may be from the one that is accounted for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Entropy = Callable[[int], bytes]
"""So many unpredictable bytes: ``keystream()`` wherever privacy is meant. Two calls never give the same bytes."""

Float = TypeVar("Float", np.float32, np.float64)

BLOCK = 1 << 20
"""Bytes of randomness handled at a time, so that a large model's noise needs no second vector of its size."""

REKEY = 1 << 30
"""Bytes from one key. A block cipher never repeats a block within a stream, as random bytes would: after 2^26 blocks
that tells them from random with an advantage below 2^-76 (Bellare et al. 1997)."""


# --- bytes -------------------------------------------------------------------------------------------------
def keystream() -> Entropy:
    """Bytes of AES-256-CTR (NIST SP 800-38A) under a fresh key of the operating system's, which nobody ever holds.

    As unpredictable as ``os.urandom`` and many times faster. Threads may share one; a forked child draws a key
    of its own, so that two processes never add the same noise.
    """
    return _Keystream().draw


class _Keystream:
    __slots__ = ("__weakref__", "_left", "_lock", "_stream")

    def __init__(self) -> None:
        self.rekey()
        _keystreams.add(self)

    def rekey(self) -> None:
        """The cipher alone knows the key. The lock is new too: in a forked child nobody may be left to open it."""
        self._lock = Lock()
        self._turn()

    def _turn(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        self._left = REKEY

    def draw(self, count: int) -> bytes:
        # Two threads in one cipher at once might be handed the same bytes.
        with self._lock:
            if count <= BLOCK:
                self._spend(count)
                return self._stream.update(_ZEROS[:count])
            drawn = bytearray(count + 15)  # which AES may write past the end
            for at in range(0, count, BLOCK):
                size = min(BLOCK, count - at)
                self._spend(size)
                self._stream.update_into(_ZEROS[:size], memoryview(drawn)[at:])
            return bytes(memoryview(drawn)[:count])

    def _spend(self, count: int) -> None:
        if count > self._left:
            self._turn()
        self._left -= count


_ZEROS = memoryview(bytes(BLOCK))
_keystreams: weakref.WeakSet[_Keystream] = weakref.WeakSet()


def _part_from_parent() -> None:
    for stream in _keystreams:
        stream.rekey()


os.register_at_fork(after_in_child=_part_from_parent)


def reproducible(seed: str) -> Entropy:
    """Bytes that anyone with the seed can draw again. VOIDS PRIVACY; for simulations that say so."""
    return np.random.default_rng(list(seed.encode())).bytes


def _words(entropy: Entropy, count: int) -> NDArray[np.uint64]:
    return np.frombuffer(entropy(8 * count), dtype="<u8")


# --- continuous noise --------------------------------------------------------------------------------------
def uniforms(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), 53 bits each."""
    drawn = np.empty(count)
    for at in range(0, count, BLOCK // 8):
        block = drawn[at : at + BLOCK // 8]
        np.multiply(_words(entropy, block.size) >> np.uint64(11), 2.0**-53, out=block)
    return drawn


def gaussians(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """Independent standard normal numbers, by the ziggurat of 256 layers (Marsaglia and Tsang 2000).

    Nearly all are one word of 64 bits: a layer, and a place in it on a lattice of 2^53; the tail ends at 17 standard
    deviations. Released by way of ``rounded``, the chance of each grid cell is right to one part in 2^30.
    """
    drawn = np.empty(count)
    size = min(count, BLOCK // 8)
    held = np.empty(size), np.empty(size)  # fresh memory for each step would cost more than the step
    for at in range(0, count, BLOCK // 8):
        block = drawn[at : at + BLOCK // 8]
        _fill(block, held[0][: block.size], held[1][: block.size], entropy)
    return drawn


def _fill(drawn: NDArray[np.float64], held: NDArray[np.float64], also: NDArray[np.float64], entropy: Entropy) -> None:
    words = _words(entropy, drawn.size).view(np.int64)
    layers = np.bitwise_and(words, 255, out=held.view(np.int64))
    np.copyto(drawn, np.right_shift(words, 11, out=also.view(np.int64)))
    drawn *= _STEP.take(layers, out=also, mode="clip")
    # Inside the next layer's width every point lies under the curve. One in eighty does not.
    inner = _WIDTH[1:].take(layers, out=also, mode="clip")
    outer = np.flatnonzero(np.abs(drawn, out=held) >= inner)
    if not outer.size:
        return
    x, layer = drawn[outer], words[outer] & 255
    height = _HEIGHT[layer] + uniforms(entropy, outer.size) * (_HEIGHT[layer + 1] - _HEIGHT[layer])
    kept = height < np.exp(-0.5 * x * x)
    tail = layer == 0  # whose area stands for the curve beyond the last layer
    drawn[outer[tail]] = np.copysign(_tail(entropy, int(tail.sum())), x[tail])
    again = outer[~(kept | tail)]
    drawn[again] = gaussians(entropy, again.size)


def _tail(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """Normal numbers above the last layer (Marsaglia 1964)."""
    found = np.empty(0)
    while found.size < count:
        beyond = _exponentials(entropy, count) / _LAST
        found = np.concatenate([found, beyond[beyond * beyond < 2.0 * _exponentials(entropy, count)]])
    return _LAST + found[:count]


_LAST = 3.6541528853610088
"""Where 256 layers of one area, the tail's among them, close at the top of exp(-x² / 2)."""


def _layers() -> NDArray[np.float64]:
    """Half the width of each layer from the lowest, whose tail is counted in, to the top's, which is 0."""
    foot = math.exp(-0.5 * _LAST**2)
    area = _LAST * foot + math.sqrt(math.pi / 2) * math.erfc(_LAST / math.sqrt(2))
    widths = [area / foot, _LAST]
    while len(widths) < 256:
        widths.append(math.sqrt(-2.0 * math.log(area / widths[-1] + math.exp(-0.5 * widths[-1] ** 2))))
    return np.array([*widths, 0.0])


_WIDTH = _layers()
_HEIGHT = np.exp(-0.5 * _WIDTH**2)
_STEP = _WIDTH * 2.0**-52


def _exponentials(entropy: Entropy, count: int) -> NDArray[np.float64]:
    """-log of a uniform number in (0, 1). One below 2^-24 is made of 128 bits, or the tail would be coarse."""
    words = _words(entropy, count)
    found = words.astype(np.float64)
    if words.min(initial=_COARSE) < _COARSE:
        few = np.flatnonzero(words < _COARSE)
        found[few] += (_words(entropy, few.size).astype(np.float64) + 0.5) * 2.0**-64
    found *= 2.0**-64
    np.log(found, out=found)
    return np.negative(found, out=found)


_COARSE = np.uint64(1 << 40)


def grid(spread: float) -> float:
    """The power of two that releases under noise of this standard deviation are multiples of: spread / 1024 or less.

    Rounding to it adds a ten-millionth of the noise's variance.

    Raises:
        ValueError: there is no noise, or too little or too much for a double to be rounded under.
    """
    if not 1e-290 < spread < 1e290:
        raise ValueError(f"noise of standard deviation {spread} cannot be rounded: it must be positive and finite")
    return 2.0 ** (math.frexp(spread)[1] - 11)


def rounded(values: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
    """Values that hold continuous noise of standard deviation ``spread``, as multiples of ``grid(spread)``.

    A double of value + noise tells the value by its low bits: which doubles can come out depends on it (Mironov
    2012; Haney et al. 2022; Holohan and Braghin 2021), and the guarantee, which is proved for real numbers, is lost.
    The grid depends on the noise alone. Rounding to it is post-processing of the real sum, and a double is further
    than 2^-30 of a cell from the real sum only where |value| > 2^12 spreads: every multiple comes from every value,
    with the right chance. A multiple within 2^24 cells of 0 is a float32 as it is; casting larger ones, which
    rounds once more, is post-processing too.

    Raises:
        ValueError: the values are not doubles, so that the sum was rounded already, or see ``grid``.
    """
    if values.dtype != np.float64:
        raise ValueError(f"noisy values of type {values.dtype} were rounded before: add the noise in float64")
    cell = grid(spread)
    cells = values / cell
    np.rint(cells, out=cells)
    cells *= cell
    cells += 0.0  # there are two zeros, and which one it is would tell the sign
    return cells


def noisy(entropy: Entropy, values: NDArray[Float], spread: float) -> NDArray[Float]:
    """``values`` with Gaussian noise of standard deviation ``spread``, safe to release: see ``rounded``.

    Shape and type are those of ``values``; the sum is made in float64, a block at a time.
    """
    flat = values.reshape(-1)
    released: NDArray[Float] = np.empty(flat.size, flat.dtype)
    for at in range(0, flat.size, BLOCK // 8):
        block = gaussians(entropy, min(BLOCK // 8, flat.size - at))
        block *= spread
        block += flat[at : at + block.size]
        released[at : at + block.size] = rounded(block, spread)
    return released.reshape(values.shape)


# --- who is drawn ------------------------------------------------------------------------------------------
def draw_subset(entropy: Entropy, population: int, rate: float) -> NDArray[np.int64]:
    """Who enters a step when each of ``population`` has a chance of ``rate``, independently (Poisson sampling).

    Where few are drawn, in time that grows with them alone: first how many, from the binomial law, then that many
    of all alike, which is the same law as a coin for each. Positions 0 .. population - 1 in rising order. The law is
    within 1e-12 of the coins' in total variation.

    Raises:
        ValueError: the rate is no probability.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a sample rate of {rate} is no probability")
    if rate > _MANY or population < _SMALL:
        return np.flatnonzero(uniforms(entropy, population) < rate)
    least, below = _binomial(population, rate)
    size = least + int(np.searchsorted(below, float(uniforms(entropy, 1)[0]), side="right"))
    return _choose(entropy, population, size)


_MANY, _SMALL = 1 / 16, 1 << 14
"""Of a higher rate or in a smaller population the coins themselves are the quicker way."""


@lru_cache(maxsize=16)
def _binomial(trials: int, rate: float) -> tuple[int, NDArray[np.float64]]:
    """The least number worth counting, and the chance of at most that many, one more, ... short of the last.

    From the mode outwards each chance is a multiple of the one before. Beyond 12 standard deviations and 80 more
    there is less than 2^-100.
    """
    if trials == 0 or rate == 0:
        return 0, np.empty(0)
    mode = min(trials, int((trials + 1) * rate))
    reach = int(12 * math.sqrt(trials * rate * (1 - rate))) + 80
    least, most = max(0, mode - reach), min(trials, mode + reach)
    odds = rate / (1 - rate)
    up, down = np.arange(mode, most, dtype=np.float64), np.arange(mode, least, -1, dtype=np.float64)
    above = np.cumprod((trials - up) / (up + 1) * odds)
    under = np.cumprod(down / (trials - down + 1) / odds)
    chances = np.concatenate([under[::-1], [1.0], above])
    return least, (np.cumsum(chances) / math.fsum(chances))[:-1]


def _choose(entropy: Entropy, population: int, size: int) -> NDArray[np.int64]:
    """``size`` of ``population``, each such set alike; those drawn twice are made up for.

    Names play no part in how the set grows, so no set of its size is likelier than another.
    """
    chosen = np.empty(0, np.int64)
    while chosen.size < size:
        more = _below(entropy, population, size - chosen.size)
        chosen = np.sort(np.concatenate([chosen, more]))
        chosen = chosen[np.diff(chosen, append=-1) != 0]
    return chosen


def _below(entropy: Entropy, bound: int, count: int) -> NDArray[np.int64]:
    """Integers in [0, bound), all alike: words beyond the last whole multiple of the bound are drawn again."""
    words = _words(entropy, count)
    usable = (1 << 64) // bound * bound
    while usable < 1 << 64 and (beyond := np.flatnonzero(words >= np.uint64(usable))).size:
        words = words.copy()
        words[beyond] = _words(entropy, beyond.size)
    return (words - words // np.uint64(bound) * np.uint64(bound)).astype(np.int64)


# --- noise for integers ------------------------------------------------------------------------------------
MOST_SIGMA = 2.0**40


def discrete_gaussian(entropy: Entropy, sigma: float, count: int) -> NDArray[np.int64]:
    """Integers x with chance proportional to exp(-x² / 2 sigma²) (Canonne, Kamath and Steinke 2020, algorithm 3).

    A two-sided geometric number is proposed, and kept with a chance that turns its law into the Gaussian's. Its
    parts u + t v are drawn exactly and by inversion; the two coins of the algorithm are one here, whose chance is the
    product of theirs. That chance is a double's and is met to 2^-64, so the law's distance from the exact one
    (total variation) is below 2^-43 a draw; where it differs, it is by a factor within 1 ± 2^-43, but for cells of
    chance below 2^-60.

    The sum of n such numbers is not quite the one of sigma √n: ``sum_gap``.

    Raises:
        ValueError: sigma is not positive, or beyond 2^40.
    """
    if not 0 < sigma <= MOST_SIGMA:
        raise ValueError(f"discrete noise of sigma {sigma} cannot be drawn: it must be positive and at most 2^40")
    drawn = np.empty(count, np.int64)
    at = 0
    while at < count:
        # About half of the proposals are kept; what is missing then is proposed again.
        kept = _proposed(entropy, sigma, min(BLOCK // 16, 2 * (count - at) + 16))[: count - at]
        drawn[at : at + kept.size] = kept
        at += kept.size
    return drawn


def _proposed(entropy: Entropy, sigma: float, count: int) -> NDArray[np.int64]:
    scale = math.floor(sigma) + 1
    part = _below(entropy, scale, count)
    size = part + scale * _exponentials(entropy, count).astype(np.int64)
    coins = _words(entropy, count)
    negative = (coins & np.uint64(1)).astype(bool)
    chance = size - sigma * sigma / scale
    chance *= chance
    chance /= -2.0 * sigma * sigma
    chance -= part / scale
    np.exp(chance, out=chance)
    kept = coins.astype(np.float64) * 2.0**-64 < chance
    kept &= ~(negative & (size == 0))  # or zero would be proposed twice
    np.negative(size, out=size, where=negative)
    return size[kept]


def sum_gap(sigma: float, sites: int, dimension: int) -> float:
    """How far the sum of ``sites`` discrete Gaussians may be from the one of sigma √sites, over a whole vector.

    It bounds |log(P / Q)| of the two laws at every vector of ``dimension`` integers: the tau of Kairouz, Liu and
    Steinke (2021), 10 Σ exp(-2π² sigma² k / (k + 1)) for k = 1 .. sites - 1, times the dimension. Twice as much, once
    a release, is what epsilon may lack when the sum is accounted for as one Gaussian. Nothing from sigma = 10 on;
    below 0.5, where nothing is proved, infinite.
    """
    if sigma < 0.5:
        return 0.0 if sites == 1 else math.inf
    return dimension * 10 * math.fsum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, sites))
