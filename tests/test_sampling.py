"""Sampling: a true permutation without structure, exact repeats, and batches that depend on nothing else."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clis.data.sampling import (
    BlockSampler,
    JointSampler,
    PartSampler,
    RepeatSampler,
    UniformSampler,
    class_balanced_factors,
    mix,
    permuted,
    repeat_factors,
)


def epoch(sampler, number):
    """Times that each image is drawn in one epoch."""
    length = len(sampler)
    return Counter(sampler.draw(k) for k in range(number * length, (number + 1) * length))


# --- permuted ---


@settings(max_examples=60)
@given(n=st.integers(1, 3000), key=st.integers(-(2**70), 2**70))
def test_permuted_visits_every_position_exactly_once(n, key):
    assert sorted(permuted(position, n, key) for position in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 16, 17, 255, 256, 257, 10_007])
def test_permuted_is_exact_at_awkward_sizes(n):
    for key in (0, 1, 2**63):
        assert len({permuted(position, n, key) for position in range(n)}) == n


@settings(max_examples=50)
@given(n=st.integers(2**40, 2**62), key=st.integers(0, 2**64), data=st.data())
def test_permuted_addresses_huge_ranges(n, key, data):
    positions = data.draw(st.sets(st.integers(0, n - 1), min_size=2, max_size=20))
    entries = {permuted(position, n, key) for position in positions}
    assert len(entries) == len(positions)
    assert all(0 <= entry < n for entry in entries)


@pytest.mark.parametrize(("position", "n"), [(0, 0), (-1, 5), (5, 5), (0, 2**62 + 1)])
def test_permuted_refuses_what_is_out_of_range(position, n):
    with pytest.raises(ValueError, match="permuted"):
        permuted(position, n, 0)


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def test_every_permutation_of_four_is_equally_likely():
    counts = Counter(tuple(permuted(p, 4, key) for p in range(4)) for key in range(12_000))
    observed = np.array(list(counts.values()))
    assert len(observed) == 24  # 4!
    assert chi_square(observed, np.full(24, 500.0)) < 58  # the 1 - 1e-4 quantile of chi-square, 23 degrees


N, CLASSES, WINDOW = 10_000, 50, 16


def affine(position, n, key):
    """The failing control: a valid permutation, but neighbors keep one distance throughout."""
    a = 2 * (mix(key) % n) + 1  # odd; and n = 10,000 = 2^4 * 5^4, so step off the multiples of 5
    a += 2 * (a % 5 == 0)
    return (a * position + mix(key, 1)) % n


def equal_class_pairs(draw, keys=1500):
    """For one window of 16 consecutive draws a key: the histogram (0..7, more) of its pairs of one class.

    Images are sorted by class, 200 a class, which is how folders of classes come.
    """
    histogram = np.zeros(9)
    for key in range(keys):
        start = mix(key, 2) % (N - WINDOW)
        window = [draw(start + i, N, key) * CLASSES // N for i in range(WINDOW)]
        pairs = sum(count * (count - 1) // 2 for count in Counter(window).values())
        histogram[min(pairs, 8)] += 1
    return histogram


def neighbor_distances(draw, keys=300):
    """Chi-square a key of the distances of consecutive draws (modulo n, in 10 bins); mean over the keys."""
    total = 0.0
    for key in range(keys):
        entries = np.array([draw(position, N, key) for position in range(100)])
        bins = np.diff(entries) % N * 10 // N
        total += chi_square(np.bincount(bins, minlength=10), np.full(10, 9.9))
    return total / keys


def test_class_mix_of_consecutive_draws_is_that_of_a_random_permutation():
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(N), (30, 1)), axis=1)
    reference = equal_class_pairs(lambda position, n, key: int(order[key % 30, position]), keys=30_000)
    expected = reference / reference.sum() * 1500
    limit = 40  # chi-square with 8 degrees exceeds 32 once in 10,000; the reference is itself a sample
    assert chi_square(equal_class_pairs(permuted), expected) < limit
    assert chi_square(equal_class_pairs(affine), expected) > 10 * limit


def test_distances_of_consecutive_draws_are_spread():
    # A chi-square with 9 degrees has mean 9; all 99 distances in one bin give 99^2 / 9.9 - 99 = 891.
    assert neighbor_distances(permuted) == pytest.approx(9, abs=1)
    assert neighbor_distances(affine) > 400


def test_consecutive_keys_give_unrelated_orders():
    distances = np.array([permuted(7, N, key + 1) - permuted(7, N, key) for key in range(5000)]) % N
    observed = np.bincount(distances * 10 // N, minlength=10)
    assert chi_square(observed, np.full(10, 500.0)) < 34  # 9 degrees, 1e-4


# --- blocks ---


@settings(max_examples=80)
@given(n=st.integers(1, 400), block=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_blocks_hold_every_image_once_an_epoch_and_are_drawn_one_after_another(n, block, seed):
    """Also where the last block is short: it has a place among the others, not always the last."""
    sampler = BlockSampler(n, block, seed)
    for number in (0, 3):
        drawn = [sampler.draw(k) for k in range(number * n, (number + 1) * n)]
        assert sorted(drawn) == list(range(n))
        blocks = [image // block for image in drawn]
        changes = sum(a != b for a, b in zip(blocks, blocks[1:]))
        assert changes == -(-n // block) - 1  # each block is begun and ended once


def test_blocks_and_places_within_them_are_spread():
    """103 images in blocks of 10: in each of 4000 epochs, the first draw's block and its place there."""
    sampler = BlockSampler(103, 10, 7)
    firsts = np.array([sampler.draw(103 * number) for number in range(4000)])
    # the short block (of 3) begins 1 epoch in 11, each of the others as often
    assert (
        chi_square(np.bincount(firsts // 10, minlength=11), np.full(11, 4000 / 11)) < 36
    )  # 10 degrees, 1e-4
    full = firsts[firsts < 100]
    assert chi_square(np.bincount(full % 10, minlength=10), np.full(10, len(full) / 10)) < 34
    orders = {tuple(sampler.draw(103 * number + k) % 10 for k in range(3)) for number in range(200)}
    assert len(orders) > 120  # not one order for all blocks and epochs


def test_blocks_are_addressable_at_any_position():
    sampler = BlockSampler(10**9, 4096, 0)
    assert len({sampler.draw(5 * 10**9 + k) for k in range(10_000)}) == 10_000
    assert BlockSampler(5, 100, 0).draw(0) in range(5)
    for n, block in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1 image and blocks of at least 1"):
            BlockSampler(n, block, 0)


# --- repeat factors ---


def test_repeat_factors_of_a_hand_computed_example():
    # Four images: {0, 0, 1}, {0}, {}, {0, 2}. f(0) = 3/4 (twice in one image counts once), f(1) = f(2) = 1/4.
    # Threshold 1/2: r(0) = max(1, sqrt(2/3)) = 1, r(1) = r(2) = sqrt(2). Class 3 is nowhere.
    offsets = np.array([0, 3, 4, 4, 6])
    labels = np.array([0, 0, 1, 0, 0, 2])
    factors = repeat_factors(offsets, labels, num_classes=4, threshold=0.5)
    np.testing.assert_allclose(factors, [2**0.5, 1, 1, 2**0.5])


def test_lvis_extreme_one_image_in_a_hundred_thousand_is_repeated_ten_times():
    offsets = np.concatenate([[0, 1], np.ones(99_999, dtype=np.int64)])
    factors = repeat_factors(offsets, np.array([0]), num_classes=1, threshold=1e-3)
    assert factors[0] == pytest.approx(10)  # sqrt(1e-3 / 1e-5)
    assert (factors[1:] == 1).all()


def test_repeat_factors_without_boxes_are_one():
    assert (
        repeat_factors(np.zeros(4, dtype=np.int64), np.zeros(0, dtype=np.int64), 3, 1e-3).tolist() == [1] * 3
    )


@pytest.mark.parametrize(("offsets", "labels"), [([0, 2], [0, 3]), ([0, 2], [-1, 0]), ([0, 1], [0, 0])])
def test_repeat_factors_refuse_labels_that_do_not_fit(offsets, labels):
    with pytest.raises(ValueError, match="repeat_factors"):
        repeat_factors(np.array(offsets), np.array(labels), num_classes=3, threshold=1e-3)


# --- samplers ---


def test_class_balanced_factors_of_a_hand_computed_example():
    """4 images, 2 of 3 classes: class 0 in three images (twice in the first), class 2 in one of them."""
    offsets, labels = np.array([0, 2, 3, 5, 5]), np.array([0, 0, 0, 0, 2])
    factors = class_balanced_factors(offsets, labels, num_classes=3)
    np.testing.assert_allclose(factors, [2 / 3, 2 / 3, 2 / 3 + 2, 0])
    sampler = RepeatSampler(np.tile(factors, 100), "stochastic", seed=1)
    draws = Counter(sampler.draw(k) % 4 for k in range(4000))
    assert draws[2] / 4000 == pytest.approx((2 / 3 + 2) / 4, abs=0.01)
    assert draws[3] == 0


def test_ceil_draws_every_image_exactly_ceil_times():
    sampler = RepeatSampler(np.array([1.0, 1.2, 2.0, 9.01]), "ceil", seed=3)
    assert len(sampler) == 1 + 2 + 2 + 10
    for number in (0, 1, 7):
        assert epoch(sampler, number) == {0: 1, 1: 2, 2: 2, 3: 10}


def test_none_draws_every_image_once():
    assert epoch(RepeatSampler(np.array([1.0, 5.5, 2.0]), "none", seed=0), 2) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(("rounding", "expected"), [("ceil", {1: 1, 3: 3}), ("none", {1: 1, 3: 1})])
def test_factor_zero_leaves_an_image_out(rounding, expected):
    assert epoch(RepeatSampler(np.array([0, 1, 0, 2.5, 0]), rounding, seed=0), 0) == expected


@settings(max_examples=60)
@given(factors=st.lists(st.floats(0, 10), min_size=1, max_size=60), seed=st.integers(0, 2**40))
def test_stochastic_draws_floor_or_ceil_times_in_epochs_of_one_length(factors, seed):
    factors = np.array(factors)
    if factors.sum() < 1 + 1e-9:
        return
    sampler = RepeatSampler(factors, "stochastic", seed)
    assert abs(len(sampler) - factors.sum()) < 1 + 1e-9
    for number in (0, 5):
        counts = epoch(sampler, number)
        drawn = np.array([counts[image] for image in range(len(factors))])
        assert (drawn >= np.floor(factors)).all()
        assert (drawn <= np.ceil(factors)).all()


def test_stochastic_draws_the_repeat_factor_on_average():
    factors = np.array([1.0, 1.25, 1.5, 2.9, 1.35, 7.0])  # the sum is 15: nothing is trimmed
    sampler = RepeatSampler(factors, "stochastic", seed=11)
    epochs = 4000
    total = sum((epoch(sampler, number) for number in range(epochs)), Counter())
    means = np.array([total[image] / epochs for image in range(len(factors))])
    # A count is floor or ceil, so the deviation of a mean is at most 0.5 / sqrt(4000) = 0.008.
    np.testing.assert_allclose(means, factors, atol=0.03)
    assert means[0] == 1
    assert means[5] == 7


def test_epochs_differ_and_seeds_differ():
    def order(seed, number):
        sampler = UniformSampler(100, seed)
        return [sampler.draw(number * 100 + k) for k in range(100)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(sorted(entries) == list(range(100)) for entries in orders)
    # Random orders of 100 agree in 1 place on average.
    assert all(sum(x == y for x, y in zip(a, b)) < 8 for i, a in enumerate(orders) for b in orders[:i])


@settings(deadline=None)
@given(n=st.integers(1, 60), share=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_a_part_is_the_same_in_all_epochs_and_holds_the_smaller_ones(n, share, seed):
    sampler = PartSampler(n, share, seed)
    size = max(1, round(share * n))
    assert len(sampler) == size
    epochs = [[sampler.draw(k) for k in range(e * size, (e + 1) * size)] for e in range(2)]
    assert len(set(epochs[0])) == size
    assert set(epochs[0]) == set(epochs[1]) <= set(range(n))
    half = PartSampler(n, share / 2, seed)
    assert {half.draw(k) for k in range(len(half))} <= set(epochs[0])


def test_parts_of_other_seeds_are_other_images():
    """Of 1000 images two random tenths share ten or so."""
    parts = [{PartSampler(1000, 0.1, seed).draw(k) for k in range(100)} for seed in range(2)]
    assert 1 <= len(parts[0] & parts[1]) <= 25


def test_uniform_sampler_of_a_billion_images_needs_no_memory():
    sampler = UniformSampler(10**9, seed=5)
    draws = [sampler.draw(k) for k in range(2000)]
    assert len(set(draws)) == 2000
    assert np.mean(draws) == pytest.approx(5e8, rel=0.1)


@pytest.mark.parametrize("factors", [[], [0.0, 0.0], [1.0, -1.0], [np.nan], [np.inf]])
def test_repeat_sampler_refuses_bad_factors(factors):
    with pytest.raises(ValueError, match="repeat factors"):
        RepeatSampler(np.array(factors), "ceil", seed=0)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="no image"):
        RepeatSampler(np.array([0.2, 0.3]), "stochastic", seed=0)
    with pytest.raises(ValueError, match="'stochastic'"):
        RepeatSampler(np.ones(3), "round", seed=0)
    with pytest.raises(ValueError, match="no image"):
        UniformSampler(0, seed=0)


# --- the joint sampler ---


def joint(seed=0, images_per_step=6, s=4):
    instance = RepeatSampler(np.array([1.0, 2.5, 1.0, 3.0, 1.1]), "stochastic", seed)
    return JointSampler(instance, UniformSampler(37, seed), images_per_step, s, seed)


def test_batches_do_not_depend_on_the_order_in_which_steps_are_asked_for():
    forward, backward = joint(), joint()
    steps = range(40)
    expected = {step: forward.items(step) for step in steps}
    assert {step: backward.items(step) for step in reversed(steps)} == expected


def test_items_walk_both_streams_without_gap_or_overlap():
    sampler = joint()
    items = [item for step in range(30) for item in sampler.items(step)]
    assert all(len(item.image_level) == 4 for item in items)
    images = [image for item in items for image in item.image_level]
    for start in range(0, 37 * (len(images) // 37), 37):
        assert sorted(images[start : start + 37]) == list(range(37))


def test_a_larger_batch_is_the_same_run_cut_differently():
    small, large = joint(images_per_step=3), joint(images_per_step=6)
    assert small.items(4) + small.items(5) == large.items(2)


def test_item_seeds_are_distinct_and_63_bits():
    seeds = {item.seed for run in (0, 1) for step in range(200) for item in joint(run).items(step)}
    assert len(seeds) == 2 * 200 * 6
    assert 2**62 < max(seeds) < 2**63


def test_without_image_level_images():
    sampler = JointSampler(UniformSampler(5, 0), None, images_per_step=2, s=0, seed=0)
    assert [item.image_level for item in sampler.items(3)] == [(), ()]
