"""The arithmetic of the secure sum: nothing wraps, masks cancel to the last bit, shares open by two thirds."""

import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_shared import masking, tally
from cloister_shared.errors import ReplyRejected
from cloister_shared.masking import BLOCK, PRIME, Encoding, Masks, combine, deal, threshold
from cloister_shared.plan_file import amend, read_plan

SEEDS = st.binary(min_size=32, max_size=32)
PLAN = read_plan("""
study: sums
title: Sums
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
rounds: 3
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
""")
NONE = Masks([])


def updates(sites: int, size: int, scale: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((sites, size)) * scale).astype(np.float32)


# --- encoding ----------------------------------------------------------------------------------------------
@given(
    bits=st.sampled_from([16, 24, 32]),
    bound=st.floats(1e-4, 1e6),
    sites=st.integers(2, 200),
    sign=st.sampled_from([-1, 1]),
)
def test_no_sum_of_a_sound_plan_wraps(bits, bound, sites, sign):
    """The worst that so many hospitals can send, all at the bound, still decodes to the bound."""
    plan = amend(PLAN, aggregation={"bits": bits, "bound": bound}, cohort={"max_sites": sites})
    encoding = masking.encoding_of(plan)
    assert not plan.could_wrap(plan.fraction_bits)
    assert plan.could_wrap(plan.fraction_bits + 1)
    one, _ = encoding.encode(np.full(3, sign * encoding.bound, np.float32), 1 / sites, NONE)
    total = (one.astype(np.uint64) * sites % 2**32).astype(np.uint32)
    found = encoding.decode(total & np.uint32(2**bits - 1), 1.0, sites)
    rounding = sites / 2 * 2.0**-plan.fraction_bits + 1e-6 * encoding.bound
    assert found == pytest.approx(sign * encoding.bound, abs=rounding)


def test_values_are_clipped_and_counted():
    values = np.array([0.5, -0.5, 3.0, -9.0, 2.0], np.float32)
    ring, clipped = Encoding(32, 2.0, 20).encode(values, 1.0, NONE)
    assert clipped == 2
    assert Encoding(32, 2.0, 20).decode(ring, 1.0, 1).tolist() == [0.5, -0.5, 2.0, -2.0, 2.0]


def test_encoding_works_in_place():
    values = np.ones(BLOCK + 3, np.float32)
    ring, _ = Encoding(32, 2.0, 20).encode(values, 1.0, NONE)
    assert np.shares_memory(ring, values)


def test_a_sum_outside_the_bounds_is_not_decoded():
    with pytest.raises(ReplyRejected, match="no sum of the plan's bounds"):
        Encoding(32, 1.0, 20).decode(np.array([0, 1 << 22], np.uint32), 1.0, 3)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_narrow_formats_add_up_like_wide_ones(bits):
    encoding, sites = Encoding(bits, 1.0, bits - 2), 5
    rows = updates(sites, 2 * BLOCK + 17, 0.2)
    total = np.zeros(rows.shape[1], np.uint32)
    for row in rows:
        ring, _ = encoding.encode(row.copy(), 1 / sites, NONE)
        packed = encoding.pack(ring)
        assert packed.nbytes == rows.shape[1] * bits // 8
        encoding.add_packed(total, packed)
    error = np.abs(encoding.decode(total, 1.0, sites) - rows.clip(-1, 1).mean(axis=0)).max()
    assert error <= 0.5 * sites * 2.0 ** -(bits - 2) + 1e-7


@given(st.lists(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2), min_size=1, max_size=200))
def test_limbs_hold_large_counts_and_small_fractions(rows):
    total = np.zeros(6, np.uint32)
    for row in rows:
        total += masking.to_limbs(np.array(row))
    exact = [sum(round(row[k] * 2**24) for row in rows) / 2**24 for k in range(2)]
    assert masking.from_limbs(total, len(rows)).tolist() == exact


@pytest.mark.parametrize(
    ("values", "norm"),
    [([], 0), ([3, -4], 5), ([3e30, 4e30], 5e30), ([np.nan, 1], np.nan), ([np.inf], np.inf), ([1] * (BLOCK + 1), 512)],
)
def test_norms(values, norm):
    assert masking.norm(np.array(values, np.float32)) == pytest.approx(norm, rel=1e-5, nan_ok=True)


# --- masks -------------------------------------------------------------------------------------------------
def naive_mask(seed: bytes, size: int) -> list[int]:
    """Another implementation: AES-CTR by the definition of SP 800-38A, a block and a word at a time."""
    aes = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    stream = b"".join(aes.update(counter.to_bytes(16, "big")) for counter in range(-(-size // 4)))
    return [int.from_bytes(stream[4 * k : 4 * k + 4], "little") for k in range(size)]


@given(seeds=st.lists(st.tuples(SEEDS, st.sampled_from([-1, 1])), max_size=4), sizes=st.lists(st.integers(1, 9)))
def test_masks_are_those_of_the_naive_implementation(seeds, sizes):
    masks, read = Masks(seeds), list[int]()
    for size in sizes:  # from array to array, as update, control and tally are read
        ring = np.zeros(size, np.uint32)
        masks.add_to(ring)
        read += ring.tolist()
    naive = [naive_mask(seed, sum(sizes)) for seed, _ in seeds]
    assert read == [
        sum(sign * mask[k] for (_, sign), mask in zip(seeds, naive, strict=True)) % 2**32 for k in range(sum(sizes))
    ]


@given(seed=SEEDS, start=st.integers(0, 200), size=st.integers(1, 50))
def test_masks_that_begin_later_are_the_rest_of_the_same(seed, start, size):
    whole, rest = np.zeros(start + size, np.uint32), np.zeros(size, np.uint32)
    Masks([(seed, 1)]).add_to(whole)
    Masks([(seed, 1)], 4 * start).add_to(rest)
    assert (rest == whole[start:]).all()


@given(seed=SEEDS, size=st.integers(1, 3 * BLOCK))
@settings(max_examples=10)
def test_a_pairs_masks_cancel_across_blocks(seed, size):
    ring = np.arange(size, dtype=np.uint32)
    Masks([(seed, 1)]).add_to(ring)
    Masks([(seed, -1)]).add_to(ring)
    assert (ring == np.arange(size)).all()


def test_a_masked_vector_looks_uniform():
    ring = np.zeros(1 << 18, np.uint32)
    Masks([(bytes(32), 1)]).add_to(ring)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(ring >> shift & 255, minlength=256)
        chi_square = float(((counts - 1024) ** 2 / 1024).sum())
        assert 150 < chi_square < 400  # 255 degrees of freedom; 1e-6 either side


# --- seeds -------------------------------------------------------------------------------------------------
def test_two_sites_find_the_same_chain_and_nobody_else_does():
    (a, a_public), (b, b_public), (c, _) = (masking.new_key() for _ in range(3))
    context = ["run", "plan"]
    assert masking.first_chain(a, b_public, context) == masking.first_chain(b, a_public, context)
    assert masking.first_chain(a, b_public, context) != masking.first_chain(c, a_public, context)
    assert masking.first_chain(a, b_public, context) != masking.first_chain(a, b_public, ["run", "other"])
    assert masking.first_chain(a, b_public, ["ab", "c"]) != masking.first_chain(a, b_public, ["a", "bc"])


@pytest.mark.parametrize("key", ["00" * 32, "01" + "00" * 31])
def test_a_key_of_small_order_is_refused(key):
    with pytest.raises(ReplyRejected, match="no point of X25519"):
        masking.first_chain(masking.new_key()[0], key, [])


def test_seeds_differ_by_round_transcript_and_purpose():
    chain = bytes(32)
    found = [
        masking.round_seed(link, transcript, purpose)
        for link in (chain, masking.next_chain(chain))
        for transcript in ("a", "b")
        for purpose in ("mask", "polynomials")
    ]
    found += masking.seal_keys(chain, "a", "x", "y", 3) + masking.seal_keys(chain, "a", "y", "x", 3)
    assert len(set(found)) == len(found)


# --- shares ------------------------------------------------------------------------------------------------
def test_the_prime_is_prime_and_the_first_above_all_seeds():
    def probably_prime(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            x = pow(base, odd, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert PRIME > 2**256
    assert probably_prime(PRIME)
    assert not any(probably_prime(n) for n in range(2**256 + 1, PRIME, 2))


@given(data=st.data(), sites=st.integers(2, 50), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_shares_opens_every_secret(data, sites, seed):
    secrets = data.draw(st.lists(SEEDS, min_size=1, max_size=3))
    need = threshold(sites)
    rows = deal(secrets, need, sites, seed)
    holders = data.draw(st.permutations(range(sites)))[:need]
    for slot, secret in enumerate(secrets):
        assert combine({k: rows[k][slot] for k in holders}) == secret


@given(sites=st.integers(3, 12), seed=SEEDS, secret=SEEDS, guess=SEEDS)
def test_one_share_less_says_nothing(sites, seed, secret, guess):
    """With any other secret there is a last share that fits: so the shares at hand rule none out."""
    need = threshold(sites)
    few = {k: row[0] for k, row in enumerate(deal([secret], need, sites, seed)[: need - 1])}
    # p(need) is linear in p(0): solve for the share with which the guess comes out.
    last, weights = need - 1, masking._lagrange(tuple(range(need)))
    rest = sum(weights[k] * share for k, share in few.items())
    fitting = (int.from_bytes(guess) - rest) * pow(weights[last], -1, PRIME) % PRIME
    assert combine({**few, last: fitting}) == guess


def test_dealing_again_deals_the_same():
    assert deal([bytes(32)], 3, 4, b"s" * 32) == deal([bytes(32)], 3, 4, b"s" * 32)
    assert deal([bytes(32)], 3, 4, b"s" * 32) != deal([bytes(32)], 3, 4, b"t" * 32)


@pytest.mark.parametrize("sites", range(2, 201))
def test_no_two_answers_reach_the_threshold(sites):
    """Honest sites give one answer each; with fewer than a third hostile, 2t > n + f."""
    hostile = -(-sites // 3) - 1
    assert 2 * threshold(sites) > sites + hostile
    assert sites / 2 < threshold(sites) <= sites


def test_a_wrong_key_opens_no_share():
    sealed = masking.seal(12345, b"k" * 32)
    assert len(sealed) == masking.SEALED
    assert masking.unseal(sealed, b"k" * 32) == 12345
    with pytest.raises(ReplyRejected, match="does not open"):
        masking.unseal(sealed, b"x" * 32)
    with pytest.raises(ReplyRejected, match="does not open"):
        masking.unseal(sealed[:-1] + b"!", b"k" * 32)


def test_shares_of_no_seed_are_refused():
    rows = deal([bytes(32)], 2, 3, b"s" * 32)
    # 2^256 < p(0) < PRIME: a number in the field that no dealer's seed can be
    above = (rows[0][0] + (PRIME - 1) * pow(masking._lagrange((0, 1))[0], -1, PRIME)) % PRIME
    with pytest.raises(ReplyRejected, match="no seed"):
        combine({0: above, 1: rows[1][0]})


def test_a_fingerprint_is_for_one_slot_of_one_dealer_in_one_round():
    prints = {
        masking.fingerprint(secret, transcript, dealer, slot)
        for secret in (bytes(32), b"x" * 32)
        for transcript in "ab"
        for dealer in "cd"
        for slot in range(2)
    }
    assert len(prints) == 16


# --- the tally ---------------------------------------------------------------------------------------------
def test_a_metric_is_the_mean_over_those_who_can_say():
    said = [{"loss": 1.0, "auroc": 0.5, "clipped": 0.0}, {"loss": 3.0, "auroc": None, "clipped": 0.5}, {}]
    vectors = [tally.to_vector(PLAN, 1, one) for one in said]
    found = tally.from_sums(PLAN, 1, np.sum(vectors, axis=0))
    assert found == {"sites": 3.0, "clipped": 0.5, "loss": 2.0, "auroc": 0.5}


def test_a_reply_cannot_choose_what_to_say():
    assert tally.to_vector(PLAN, 1, {"name": 1.0, "sites": 9.0}).tolist() == [1, 0, 0, 0, 0, 0]
    assert json.dumps(tally.names(PLAN, 0)) == '["sites"]'
    assert "rows" not in tally.names(PLAN, 1)
    assert "rows" in tally.names(amend(PLAN, aggregation={"weights": "rows"}, cohort={"max_rows": 50_000}), 1)


def test_a_feature_may_be_called_known():
    features = [{"name": name, "kind": "number", "range": (0, 100)} for name in ("age", "age known")]
    plan = amend(PLAN, table={"features": features}, normalisation={"method": "federated"})
    said = {name: float(k) for k, name in enumerate(tally.statistics(plan))}
    assert tally.from_sums(plan, 0, tally.to_vector(plan, 0, said)) == {"sites": 1.0, **said}
