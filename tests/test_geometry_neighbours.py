"""Exact neighbours against brute force, ties, block sizes; mixing, entropy and overlap in closed form."""

import math
import tracemalloc

import numpy as np
import pytest
from gaussians import rotation, unit_clouds

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import neighbours
from revision_ray.geometry.neighbours import nearest


def cloud(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, dim))


def brute_force(queries_QD, base_ND, k, exclude=None):
    """Every cosine as a sum in exact arithmetic order of its own, sorted; equal ones by index."""
    found = []
    for number, query_D in enumerate(queries_QD.astype(float)):
        cosines = [
            math.fsum(query_D * row_D) / math.sqrt(math.fsum(row_D**2)) for row_D in base_ND.astype(float)
        ]
        rows = [row for row in range(len(base_ND)) if exclude is None or row != exclude[number]]
        found.append(sorted(rows, key=lambda row: (-cosines[row], row))[:k])
    return np.array(found)


def on_a_circle(angles_N: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles_N), np.sin(angles_N)], axis=1)


# --- the search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [None, 1, 3, 7, 40, 64])
@pytest.mark.parametrize("k", [1, 5, 59])
def test_neighbours_are_those_of_brute_force_in_blocks_of_any_size(block_rows, k):
    queries_QD, base_ND = cloud(40, 6), cloud(60, 6, seed=1) * np.arange(1, 61)[:, None]
    expected = brute_force(queries_QD, base_ND, k)
    np.testing.assert_array_equal(nearest(queries_QD, base_ND, k, block_rows=block_rows), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("block_rows", [None, 9])
def test_a_row_is_not_its_own_neighbour(dtype, block_rows):
    rows_ND = unit_clouds(90, 16)[0].astype(dtype)
    itself = np.arange(90)
    found = nearest(rows_ND, rows_ND, 4, exclude=itself, block_rows=block_rows)
    np.testing.assert_array_equal(found, brute_force(rows_ND, rows_ND, 4, exclude=itself))
    assert (nearest(rows_ND, rows_ND, 1)[:, 0] == itself).all()


@pytest.mark.parametrize("block_rows", [None, 1, 11, 24])
def test_of_equal_cosines_the_lower_index_comes_first(block_rows):
    """Six copies of 24 rows: whole groups are tied, at and across the k-th place."""
    base_ND = np.tile(cloud(24, 5), (6, 1))
    expected = brute_force(base_ND, base_ND, 143, exclude=np.arange(144))
    for k in (1, 4, 6, 8, 143):
        found = nearest(base_ND, base_ND, k, exclude=np.arange(144), block_rows=block_rows)
        np.testing.assert_array_equal(found, expected[:, :k])


@pytest.mark.parametrize("num_rows", [7, 300])
def test_constant_rows_are_all_tied(num_rows):
    rows_ND = np.full((num_rows, 5), 0.1)
    found = nearest(rows_ND, rows_ND, 3, exclude=np.arange(num_rows))
    assert found.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], *[[0, 1, 2]] * (num_rows - 3)]


def test_candidates_of_float32_reach_as_far_as_its_rounding():
    """Cosines about 1e-9 apart, in an order that float32 products of 50 terms get wrong by some 1e-8."""
    near_ND = cloud(1, 50) + 1e-8 * cloud(60, 50, seed=1)
    base_ND = np.concatenate([near_ND, cloud(500, 50, seed=2)])
    queries_QD = cloud(1, 50) + 0.3 * cloud(20, 50, seed=3)
    np.testing.assert_array_equal(nearest(queries_QD, base_ND, 5), brute_force(queries_QD, near_ND, 5))


@pytest.mark.parametrize("num_far", [0, 500])
@pytest.mark.parametrize("block_rows", [None, 2])
def test_rows_that_float32_cannot_tell_apart_are_in_the_right_order(num_far, block_rows):
    """Cosines 5e-11 apart: a thousandth of float32's rounding, and 100,000 times that of float64.

    Without far rows every row is a candidate, which is the other way through the code.
    """
    order = np.random.default_rng(0).permutation(100)
    near_ND = on_a_circle(0.5 + 1e-10 * order)
    far_ND = on_a_circle(np.random.default_rng(1).uniform(2, 4, num_far))
    base_ND = np.concatenate([near_ND, far_ND]) @ rotation(2, 3)
    queries_QD = on_a_circle(np.array([0.0, 1.0, 0.1])) @ rotation(2, 3)
    found = nearest(queries_QD, base_ND, 30, block_rows=block_rows)
    ascending = np.argsort(order)
    np.testing.assert_array_equal(found, [ascending[:30], ascending[::-1][:30], ascending[:30]])


def test_neighbours_of_a_block_are_those_of_the_whole():
    """What lets tasks share out the queries."""
    image_ND, text_ND = unit_clouds(70, 12)
    union_ND = np.concatenate([image_ND, text_ND])
    parts = [neighbours.nearest_others(union_ND, 9, start, start + 33) for start in range(0, 140, 33)]
    np.testing.assert_array_equal(np.concatenate(parts), neighbours.nearest_others(union_ND, 9))


def test_memory_does_not_grow_with_queries_times_rows():
    queries_QD, base_ND = cloud(8000, 3), cloud(4000, 3, seed=1)
    tracemalloc.start()
    nearest(queries_QD, base_ND, 5, block_rows=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All cosines in float32 would be 128 MB; a block of 100 has 1.6 MB, with copies 5.
    assert peak < 16e6


def test_searches_that_cannot_be_made_are_refused():
    rows_ND = cloud(10, 4)
    assert nearest(rows_ND, rows_ND, 10).shape == (10, 10)
    assert nearest(rows_ND[:0], rows_ND, 3).shape == (0, 3)
    with pytest.raises(ConfigError, match="k is 0"):
        nearest(rows_ND, rows_ND, 0)
    with pytest.raises(DataError, match="11 neighbours among 10 rows"):
        nearest(rows_ND, rows_ND, 11)
    with pytest.raises(DataError, match="10 neighbours among 9 rows"):
        nearest(rows_ND, rows_ND, 10, exclude=np.arange(10))
    with pytest.raises(DataError, match="dimensions 4 and 5"):
        nearest(rows_ND, cloud(10, 5), 3)
    with pytest.raises(DataError, match="0 rows"):
        nearest(rows_ND, rows_ND[:0], 3)
    with pytest.raises(DataError, match="9 rows to leave out"):
        nearest(rows_ND, rows_ND, 3, exclude=np.arange(9))
    for value, message in ((np.nan, "row 4 is NaN"), (np.inf, "row 4 is NaN"), (0.0, "row 4 has length")):
        wrong_ND = rows_ND.copy()
        wrong_ND[4] = value
        for sides in ((wrong_ND, rows_ND), (rows_ND, wrong_ND)):
            with pytest.raises(DataError, match=message):
                nearest(*sides, 3)


# --- mixing and origin ------------------------------------------------------------------------------------


def among_both(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> tuple[np.ndarray, int]:
    """Neighbours of every row of both clouds, images first, and the number of images."""
    return neighbours.nearest_others(np.concatenate([image_ND, text_ND]), k), len(image_ND)


def mixing_shares(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> np.ndarray:
    return neighbours.cross_modal_shares(*among_both(image_ND, text_ND, k))


def mixing_rate(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> float:
    return mixing_shares(image_ND, text_ND, k).mean()


def origin_entropy(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> tuple[float, float]:
    """(M_k^Z, M_k^X): of the texts and of the images."""
    entropy_N = neighbours.origin_entropies(*among_both(image_ND, text_ND, k))
    return entropy_N[len(image_ND) :].mean(), entropy_N[: len(image_ND)].mean()


@pytest.mark.parametrize(("num_images", "num_texts"), [(30, 30), (45, 15)])
def test_with_all_rows_as_neighbours_mixing_and_entropy_are_those_of_chance(num_images, num_texts):
    total = num_images + num_texts
    image_ND, text_ND = cloud(num_images, 5), cloud(num_texts, 5, seed=1)
    found = mixing_rate(image_ND, text_ND, k=total - 1)
    assert found == pytest.approx(neighbours.mixing_rate_by_chance(num_images, num_texts))
    assert found == pytest.approx(2 * num_images * num_texts / total / (total - 1))

    def entropy(share):
        return -(share * math.log2(share) + (1 - share) * math.log2(1 - share))

    assert origin_entropy(image_ND, text_ND, k=total - 1) == (
        pytest.approx(entropy(num_images / (total - 1))),
        pytest.approx(entropy(num_texts / (total - 1))),
    )


def test_two_samples_of_one_distribution_mix_by_chance_and_far_clouds_not_at_all():
    image_ND, text_ND = cloud(500, 8), cloud(500, 8, seed=1)
    shares = mixing_shares(image_ND, text_ND)
    # Neighbourhoods of 20 overlap, so a mean of 1000 shares has up to 20 times the variance of that many.
    spread = math.sqrt(20 * shares.var() / 1000)
    assert mixing_rate(image_ND, text_ND) == pytest.approx(0.5, abs=5 * spread)
    assert neighbours.mixing_rate_by_chance(500, 500) == pytest.approx(0.5, abs=1e-3)
    far_D = 100 * np.eye(8)[0]
    assert mixing_rate(image_ND + far_D, text_ND - far_D) == 0
    assert origin_entropy(image_ND + far_D, text_ND - far_D) == (0, 0)


def test_alternating_points_of_a_circle():
    """A point's two nearest are of the other modality, the two after them of its own."""
    step = 2 * math.pi / 40
    image_ND, text_ND = on_a_circle(step * np.arange(0, 40, 2)), on_a_circle(step * np.arange(1, 40, 2))
    assert mixing_rate(image_ND, text_ND, k=2) == 1
    assert origin_entropy(image_ND, text_ND, k=2) == (0, 0)
    assert mixing_rate(image_ND, text_ND, k=4) == 0.5
    assert origin_entropy(image_ND, text_ND, k=4) == (1, 1)


def test_entropy_tells_the_sides_apart():
    """One image amid texts: its two neighbours are texts, and it is one of the two neighbours of each."""
    text_ND, image_ND = (
        on_a_circle(np.array([0.0, 0.1, 0.3, 0.4])),
        on_a_circle(np.array([0.2, 3.0, 3.01, 3.02])),
    )
    text_side, image_side = origin_entropy(image_ND, text_ND, k=2)
    # Texts at 0 and 0.4: neighbours 0.1, 0.2 and 0.3, 0.2; at 0.1 and 0.3: 0 (or 0.4), 0.2. All half images.
    assert text_side == 1
    # The images at 3.0, 3.01, 3.02 have each other; that at 0.2 has two texts.
    assert image_side == 0


def test_entropy_of_counted_neighbours():
    # Rows 0 and 1 are images; of the rows' four neighbours 1, 2, 0 and 4 are.
    found = neighbours.origin_entropies(np.array([[1, 2, 3, 2], [0, 0, 2, 3], [3, 3, 2, 3], [0, 1, 0, 1]]), 2)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert found.tolist() == pytest.approx([quarter, 1, 0, 0])


def test_neighbours_of_a_part_of_the_union_are_refused():
    image_ND, text_ND = unit_clouds(20, 4)
    part_NK = neighbours.nearest_others(np.concatenate([image_ND, text_ND]), 5, last=30)
    with pytest.raises(DataError, match="30 rows"):
        neighbours.cross_modal_shares(part_NK, 20)


# --- overlap ----------------------------------------------------------------------------------------------


def overlap(before_ND: np.ndarray, after_ND: np.ndarray, k: int = 10) -> float:
    nearest_NK = [neighbours.nearest_others(side, k) for side in (before_ND, after_ND)]
    return neighbours.kept_shares(*nearest_NK).mean()


def test_overlap_from_equal_to_chance():
    before_ND = cloud(400, 8)
    assert overlap(before_ND, 3 * before_ND @ rotation(8)) == 1
    found = overlap(before_ND, cloud(400, 8, seed=1))
    # Each of 400 shares of 10 has variance of about p / 10.
    assert found == pytest.approx(10 / 399, abs=5 * math.sqrt(10 / 399 / 10 / 400))


def test_overlap_of_points_that_change_places_on_a_circle():
    """Of 21 points, doubling every angle sends i to place 2i: i + 1 and i - 1 stay among the 4 nearest of i,
    two places away now, and i + 2 and i - 2 do not."""
    angles_N = 2 * math.pi / 21 * np.arange(21)
    found = overlap(on_a_circle(angles_N), on_a_circle(2 * angles_N), k=4)
    assert found == 0.5


def test_overlap_needs_the_same_texts_and_more_than_k():
    with pytest.raises(DataError, match="shapes"):
        overlap(cloud(20, 4), cloud(21, 4))
    with pytest.raises(DataError, match="10 neighbours among 9 rows"):
        overlap(cloud(10, 4), cloud(10, 4))
    with pytest.raises(DataError, match="20 neighbours among 9 rows"):
        mixing_rate(cloud(5, 4), cloud(5, 4))
