"""Sums merge exactly, moments are those of two-pass NumPy, standard errors are the spread of draws."""

import math
from fractions import Fraction

import numpy as np
import pytest
from embedding_stores import cloud, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from revision_ray.align import moments
from revision_ray.align.maps import Affine
from revision_ray.align.moments import (
    NUM_BUCKETS,
    ExactSum,
    Moments,
    RowSums,
    gap_standard_error,
    jackknife_standard_error,
    merged,
    of_block,
)
from revision_ray.core.cluster import one_thread
from revision_ray.core.errors import AlignmentError

GRID = Fraction(1, 2**52)
numbers = st.one_of(
    st.floats(-1e15, 1e15),
    st.floats(-1, 1),
    st.floats(-1e-13, 1e-13),
    st.sampled_from([0.0, -0.0, 1e-300, -1e-300, 5e-324, 2.0**-52, -(2.0**-53), 0.1, -0.1, 2.0**53 + 2]),
)


def on_grid(value: float) -> Fraction:
    """The nearest multiple of 2^-52, ties to even."""
    return round(Fraction(value) / GRID) * GRID


def exact(total: ExactSum) -> list[Fraction]:
    return [int(h) + int(low) * GRID for h, low in zip(total.high.ravel(), total.low.ravel(), strict=True)]


def same_bits(one: Moments, other: Moments) -> bool:
    return one.to_bytes() == other.to_bytes()


# --- exact sums -------------------------------------------------------------------------------------------


@given(st.lists(numbers, min_size=1, max_size=30), st.randoms())
def test_a_sum_is_that_of_its_rounded_terms_in_any_order_and_grouping(values, random):
    whole = sum(map(on_grid, values))
    random.shuffle(values)
    parts = [ExactSum.zeros((1,))]
    for value in values:
        if random.random() < 0.3:
            parts.append(ExactSum.zeros((1,)))
        parts[-1].add(np.array([value]))
    while len(parts) > 1:
        random.shuffle(parts)
        parts[-2].merge(parts.pop())
    assert exact(parts[0]) == [whole]
    assert 0 <= parts[0].low[0] < 2**52
    # Two roundings to float64: one of the whole part, one of the sum.
    assert abs(Fraction(float(parts[0].value()[0])) - whole) <= 2 * GRID * max(1, abs(whole))


def test_cancellation_leaves_no_error():
    total = ExactSum.zeros((1,))
    for value in (1e15, 0.25, -1e15, 2.0**-50):
        total.add(np.array([value]))
    assert total.value()[0] == 0.25 + 2.0**-50


def test_a_sum_over_the_first_axis_is_exact():
    total = ExactSum.zeros((3, 2))
    values = np.array([[0.1, -0.7], [1e9 + 0.3, 1e-9], [-1e9, 0.7]])
    total.add(values)
    assert exact(total.total()) == [sum(on_grid(v) for v in column) for column in values.T]


# --- moments against NumPy --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_moments_are_those_of_two_pass_numpy(dtype):
    block_ND = cloud(5000, 24, "text").astype(dtype) * dtype(3)  # not of unit length: scaled by of_block
    found, invalid = of_block(block_ND, second=True)
    unit_ND = unit(block_ND)
    centred_ND = unit_ND - unit_ND.mean(0)
    assert (invalid, found.count) == ([], 5000)
    # Two roundings to 2^-53 a row, averaged: far below the 1e-12 that is asked for.
    np.testing.assert_allclose(found.centroid, unit_ND.mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.trace, np.mean(np.sum(centred_ND**2, axis=1)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.covariance, centred_ND.T @ centred_ND / 5000, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.trace, np.trace(found.covariance), rtol=0, atol=1e-13)


def test_equal_values_give_equal_bits_whatever_holds_them():
    block_ND = cloud(500, 24, "image")
    with one_thread():
        expected, _ = of_block(block_ND, second=True)
        wide = np.asfortranarray(block_ND.astype(np.float32))
        buffer = np.zeros(block_ND.nbytes + 2, np.uint8)[2:]  # no longer aligned to a cache line
        moved = buffer.view(np.float16).reshape(block_ND.shape)
        moved[:] = block_ND
        for other in (wide, moved, block_ND.astype(">f2"), np.repeat(block_ND, 2, axis=0)[::2]):
            assert same_bits(of_block(other, second=True)[0], expected)


@settings(deadline=None, max_examples=40)
@given(st.randoms())
def test_moments_ignore_partition_and_order(random):
    parts = [
        of_block(cloud(100 + 7 * number, 6, "text", seed=number), second=True, offset=number)[0]
        for number in range(9)
    ]
    whole = merged(parts, 6, second=True)
    random.shuffle(parts)
    cuts = sorted(random.sample(range(1, 9), random.randint(0, 4)))
    groups = [parts[a:b] for a, b in zip([0, *cuts], [*cuts, 9], strict=True)]
    assert same_bits(merged((merged(group, 6, second=True) for group in groups), 6, second=True), whole)


def test_blocks_that_take_turns_with_the_memory_give_the_bits_of_blocks_apart():
    """Long and short blocks, of more rows than a product takes, of none that has a direction, of one row."""
    blocks = [cloud(size, 9, "text", seed=size) for size in (5000, 70, 2048, 1, 2049, 64)]
    blocks[0][[3, 2047, 2048, 4999]] = 0
    blocks.insert(3, np.zeros((70, 9), np.float16))
    for affine in (None, Affine(offset=np.full(9, 0.1), scale=0.9)):
        with one_thread():
            sums = RowSums(9, affine, second=True)
            invalid = [sums.add(block, offset=number) for number, block in enumerate(blocks)]
            parts = [
                of_block(block, affine=affine, second=True, offset=number)
                for number, block in enumerate(blocks)
            ]
        assert invalid == [left_out for _, left_out in parts]
        assert [len(left_out) for left_out in invalid] == [4, 0, 0, 70, 0, 0, 0]
        found = sums.moments()
        assert same_bits(found, merged((part for part, _ in parts), 9, second=True))
        assert found.second is not None
        for part in (found.second.high, found.second.low):
            assert (part == part.T).all()


def test_a_symmetric_matrix_is_added_by_its_lower_half():
    values_DD = np.random.default_rng(0).standard_normal((50, 50))  # not a multiple of a tile
    values_DD += values_DD.T
    half, whole = ExactSum.zeros((50, 50)), ExactSum.zeros((50, 50))
    for _ in range(2):
        half.add_lower(values_DD)
        whole.add(values_DD)
    half.mirror_lower()
    assert (half.high == whole.high).all()
    assert (half.low == whole.low).all()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).standard_normal((40, 3))
    means = (values.sum(0) - values) / 39
    expected = values.std(axis=0, ddof=1) / math.sqrt(40)
    np.testing.assert_allclose(jackknife_standard_error(means), expected, rtol=1e-12)
    assert np.isnan(jackknife_standard_error(means[:1])).all()


def test_float32_accumulation_is_worse_by_orders_of_magnitude():
    """Paper, app. E.2: an error floor near 1e-7 in float32."""
    block_ND = cloud(100_000, 8, "text")
    unit_ND = unit(block_ND)
    reference = np.array([math.fsum(column) / len(unit_ND) for column in unit_ND.T])
    ours = np.linalg.norm(of_block(block_ND)[0].centroid - reference)
    float32 = np.cumsum(unit_ND.astype(np.float32), axis=0, dtype=np.float32)[-1] / np.float32(len(unit_ND))
    assert ours < 1e-15
    assert np.linalg.norm(float32 - reference) > 1e-8


def test_rows_without_a_direction_are_left_out_and_named():
    block_ND = cloud(300, 24, "text").astype(np.float32)
    bad = {3: np.nan, 64: np.inf, 65: -np.inf, 200: 0.0, 299: 1e-12}
    for row, value in bad.items():
        block_ND[row] = value
    good_ND = np.delete(block_ND, list(bad), axis=0)
    found, invalid = of_block(block_ND, second=True)
    assert invalid == list(bad)
    assert found.count == 295
    np.testing.assert_allclose(found.centroid, unit(good_ND).mean(0), rtol=0, atol=1e-15)


def test_a_block_of_nothing_but_bad_rows_is_no_error_until_the_centroid_is_asked_for():
    found, invalid = of_block(np.full((70, 4), np.nan, np.float16), second=True)
    assert (found.count, invalid) == (0, list(range(70)))
    with pytest.raises(AlignmentError, match="no rows were counted"):
        _ = found.centroid


# --- merging and saving -----------------------------------------------------------------------------------


def test_saved_moments_come_back_to_the_bit():
    for second in (False, True):
        found, _ = of_block(cloud(300, 12, "text"), second=second)
        found.shard_hashes = frozenset({"ab" * 32, "cd" * 32})
        back = Moments.from_bytes(found.to_bytes())
        assert same_bits(back, found)
        assert back.shard_hashes == found.shard_hashes
        assert (back.centroid == found.centroid).all()
        assert (back.second is None) == (not second)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_what_is_not_saved_moments_is_refused(content):
    with pytest.raises(AlignmentError, match="not saved moments"):
        Moments.from_bytes(content)


def test_what_must_not_be_merged_is_refused():
    def of(dim=4, second=False, shards=()):
        found = of_block(np.eye(dim), second=second)[0]
        found.shard_hashes = frozenset(shards)
        return found

    with pytest.raises(AlignmentError, match=r"dimension 5 cannot join those of 4"):
        of().merge(of(dim=5))
    with pytest.raises(AlignmentError, match="second moments"):
        of().merge(of(second=True))
    with pytest.raises(AlignmentError, match=r"1 shards are already counted.*bb"):
        of(shards=["aa", "bb"]).merge(of(shards=["bb", "cc"]))
    with pytest.raises(AlignmentError, match="no second moments"):
        _ = of().covariance
    joined = of(shards=["aa"])
    joined.merge(of(shards=["bb"]))
    assert (joined.count, joined.shard_hashes) == (8, {"aa", "bb"})


# --- standard errors --------------------------------------------------------------------------------------


def draw(generator: np.random.Generator, num_rows: int, centre: np.ndarray) -> Moments:
    rows_ND = generator.standard_normal((num_rows, len(centre))) * [0.9, 0.5, 0.3, 0.3, 0.1] + centre
    return of_block(rows_ND)[0]


TEXT_CENTRE, IMAGE_CENTRE = np.array([1.0, 0.2, 0, 0, 0]), np.array([0.3, 1.0, 0.2, 0, 0])


def test_the_gap_standard_error_is_the_spread_over_repeated_draws():
    generator = np.random.default_rng(0)
    gaps, errors = [], []
    for _ in range(200):
        text, image = draw(generator, 1100, TEXT_CENTRE), draw(generator, 1024, IMAGE_CENTRE)
        gaps.append(np.linalg.norm(text.centroid - image.centroid))
        errors.append(gap_standard_error(text, image))
    # The spread of 200 draws is known to 1/sqrt(400) = 5 %; 20 % is four times that.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(gaps, ddof=1), rel=0.2)
    # One estimate has 15 degrees of freedom a side: within a factor of two of the truth nearly always.
    assert np.mean((np.array(errors) > np.std(gaps) / 2) & (np.array(errors) < np.std(gaps) * 2)) > 0.97


def test_the_centroid_standard_error_is_the_distance_to_the_population():
    generator = np.random.default_rng(1)
    population = draw(generator, 400_000, TEXT_CENTRE).centroid
    draws = [draw(generator, 500, TEXT_CENTRE) for _ in range(300)]
    squared = np.mean([np.sum((one.centroid - population) ** 2) for one in draws])
    stated = np.mean([one.centroid_standard_error**2 for one in draws])
    # The mean of 300 squared distances in a few dimensions is known to about 6 %; 25 % is four times that.
    assert stated == pytest.approx(squared, rel=0.25)


def test_standard_errors_that_cannot_be_told_say_so():
    one = of_block(np.eye(5)[:1])[0]
    assert one.centroid_standard_error == np.inf
    assert np.isnan(gap_standard_error(one, one))


def test_buckets_share_the_rows_out_and_leave_one_out_is_the_rest():
    block_ND = cloud(64 * 40, 6, "text")
    found, _ = of_block(block_ND, offset=moments.bucket_offset("0000000f" + "0" * 56, 3))
    assert found.counts.min() >= 128
    for bucket in range(NUM_BUCKETS):
        count, centroid = found.without_bucket(bucket)
        # The block starts at bucket 15 + 3 = 18, modulo 16 the third, and every chunk of 64 moves on by one.
        rest = [row for row in range(len(block_ND)) if (2 + row // 64) % NUM_BUCKETS != bucket]
        assert count == len(rest)
        np.testing.assert_allclose(centroid, unit(block_ND[rest]).mean(0), rtol=0, atol=1e-14)


def test_mapped_moments_need_the_ids_when_the_map_draws_noise():
    noisy = Affine(offset=np.ones(6), noise=0.1)
    with pytest.raises(AlignmentError, match="no ids were given"):
        of_block(cloud(10, 6, "text"), affine=noisy)
