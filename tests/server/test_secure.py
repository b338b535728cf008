"""The coordinator takes masks off in several places at once, and what is left is the same."""

import numpy as np
import pytest

from cloister_server.secure import _take_off
from cloister_shared.masking import BLOCK, Masks


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 3, 5 * BLOCK + 1])
def test_a_large_sum_is_unmasked_like_a_small_one(size):
    seeds = [(bytes([at]) * 32, sign) for at, sign in enumerate((1, -1, 1))]
    first, whole, parts = np.zeros(3, np.uint32), np.arange(size, dtype=np.uint32), np.arange(size, dtype=np.uint32)
    masks = Masks(seeds)
    masks.add_to(first)
    masks.add_to(whole)
    _take_off(parts, seeds, first.nbytes)
    assert (parts == whole).all()
    assert (whole != np.arange(size)).any()
