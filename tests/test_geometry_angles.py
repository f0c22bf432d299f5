"""Cosines and their histograms: closed forms, laws, refusals."""

import math

import numpy as np
import pytest
import scipy.stats
from gaussians import rotation, unit_clouds
from hypothesis import given
from hypothesis import strategies as st

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import angles

histograms = st.integers(1, 30).flatmap(
    lambda bins: st.tuples(
        *[st.lists(st.integers(0, 50), min_size=bins, max_size=bins).filter(any) for _ in range(2)]
    )
)


def isotropic(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, dim))


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


# --- pairs of rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "num_pairs"), [(2, 1), (5, 3), (50, 600), (50, 700), (200, 1000), (9000, 500)]
)
def test_pairs_are_different_and_of_different_rows(num_rows, num_pairs):
    first_P, second_P = angles.row_pairs(num_rows, num_pairs, seed=3)
    assert len(first_P) == num_pairs
    assert (first_P < second_P).all()
    assert first_P.min() >= 0
    assert second_P.max() < num_rows
    assert len(set(zip(first_P.tolist(), second_P.tolist(), strict=True))) == num_pairs


@pytest.mark.parametrize("num_pairs", [45, 46, 10**6])
def test_all_pairs_are_taken_where_there_are_no_more(num_pairs):
    first_P, second_P = angles.row_pairs(10, num_pairs, seed=0)
    assert sorted(zip(first_P.tolist(), second_P.tolist(), strict=True)) == [
        (i, j) for i in range(10) for j in range(i + 1, 10)
    ]


def test_pairs_depend_on_the_seed_alone():
    one, same, other = (angles.row_pairs(500, 300, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("num_pairs", [500, 2500])
def test_every_pair_is_drawn_equally_often(num_pairs):
    """Below and above half of all 3160 pairs, which are two ways to draw; chi-squared over the pairs."""
    counts = np.zeros((80, 80))
    for seed in range(200):
        counts[angles.row_pairs(80, num_pairs, seed)] += 1
    counts = counts[np.triu_indices(80, 1)]
    share = num_pairs / len(counts)
    chi_squared = np.sum((counts - 200 * share) ** 2) / (200 * share * (1 - share))
    # A sum of 3160 squares of nearly normal counts, five standard deviations about its mean.
    assert abs(chi_squared - len(counts)) < 5 * math.sqrt(2 * len(counts))


# --- cosines ----------------------------------------------------------------------------------------------


def test_cosines_of_a_regular_simplex_are_all_equal():
    corners = np.eye(6) - 1 / 6
    np.testing.assert_allclose(angles.pair_cosines(corners * 3), np.full(15, -1 / 5), atol=1e-12)


def test_the_mean_of_all_cosines_follows_from_the_centroid():
    """sum over pairs of u_i.u_j = (||sum u||^2 - N) / 2."""
    image_ND, _ = unit_clouds(60, 12)
    expected = (np.sum(image_ND.sum(axis=0) ** 2) - 60) / (60 * 59)
    assert angles.pair_cosines(image_ND).mean() == pytest.approx(expected, abs=1e-12)


def test_cosines_of_an_isotropic_cloud_have_variance_one_over_its_dimension():
    cosines = angles.pair_cosines(isotropic(2000, 32), 100_000)
    # Five standard errors, as if pairs were independent: their cosines are uncorrelated.
    assert abs(cosines.mean()) < 5 / math.sqrt(32 * 100_000)
    assert cosines.var() == pytest.approx(1 / 32, rel=5 * math.sqrt(2 / 100_000))


def test_gathering_in_parts_changes_nothing(monkeypatch):
    rows_ND = isotropic(50, 8)
    whole = angles.pair_cosines(rows_ND, 333, seed=5)
    monkeypatch.setattr(angles, "_GATHERED_BYTES", 1000)
    np.testing.assert_array_equal(angles.pair_cosines(rows_ND, 333, seed=5), whole)


def test_equal_and_opposite_rows_have_cosines_of_exactly_one():
    row = np.random.default_rng(0).standard_normal(33)
    assert angles.pair_cosines(np.stack([row, 3 * row, -row])).tolist() == pytest.approx(
        [1, -1, -1], abs=1e-15
    )
    assert np.abs(angles.pair_cosines(np.tile(isotropic(40, 7), (2, 1)))).max() <= 1


# --- histograms -------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_cosine_in_its_bin():
    cosines = np.array([-1.0, -0.999, -0.5, -0.01, 0.0, 0.01, 0.49, 0.5, 1.0, 1.0])
    assert angles.cosine_histogram(cosines, bins=4).tolist() == [2, 2, 3, 3]
    assert angles.cosine_histogram(np.empty(0), bins=3).tolist() == [0, 0, 0]
    np.testing.assert_array_equal(
        angles.cosine_histogram(np.linspace(-1, 1, 777), bins=13),
        np.histogram(np.linspace(-1, 1, 777), bins=13, range=(-1, 1))[0],
    )


@pytest.mark.parametrize("wrong", [np.nan, 1.1, -2.0])
def test_what_is_no_cosine_is_refused(wrong):
    with pytest.raises(DataError, match="between -1 and 1"):
        angles.cosine_histogram(np.array([0.0, wrong]))


@given(histograms)
def test_js_divergence_is_symmetric_and_between_0_and_ln_2(pair):
    p, q = (np.array(counts) for counts in pair)
    divergence = angles.js_divergence(p, q)
    assert divergence == pytest.approx(angles.js_divergence(q, p), abs=1e-12)
    assert 0 <= divergence <= math.log(2) + 1e-12
    assert angles.js_divergence(p, 7 * p) == pytest.approx(0, abs=1e-12)
    assert angles.js_divergence(np.append(p, 0 * q), np.append(0 * p, q)) == pytest.approx(math.log(2))


def test_js_divergence_of_a_certain_and_a_fair_coin():
    expected = (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert angles.js_divergence(np.array([1, 0]), np.array([20, 20])) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [[0, 0], [1, -1], [1, np.nan]])
def test_what_is_no_histogram_is_refused(wrong):
    with pytest.raises(DataError, match="histogram"):
        angles.js_divergence(np.array(wrong), np.array([1, 2]))
    with pytest.raises(DataError, match="shapes"):
        angles.js_divergence(np.array([1, 2, 3]), np.array([1, 2]))


def divergence(one_ND: np.ndarray, other_ND: np.ndarray, **settings) -> float:
    return angles.js_divergence(*(angles.angle_histogram(side, **settings) for side in (one_ND, other_ND)))


def test_angular_divergence_from_equal_to_disjoint():
    cloud_ND = isotropic(300, 40)
    narrow_ND = np.eye(40)[0] + 0.01 * cloud_ND
    assert divergence(cloud_ND, cloud_ND) == 0
    assert divergence(cloud_ND, 5 * cloud_ND @ rotation(40)) == pytest.approx(0, abs=1e-4)
    assert divergence(cloud_ND, narrow_ND) == pytest.approx(math.log(2))


def test_angular_divergence_of_isotropic_clouds_of_different_dimension():
    """(1 + cos) / 2 of two directions in D dimensions is Beta((D - 1) / 2, (D - 1) / 2)."""
    edges = np.linspace(0, 1, 51)
    expected = angles.js_divergence(
        *[np.diff(scipy.stats.beta((dim - 1) / 2, (dim - 1) / 2).cdf(edges)) for dim in (6, 24)]
    )
    flat_ND = np.concatenate([isotropic(2000, 6), np.zeros((2000, 18))], axis=1)
    found = divergence(flat_ND, isotropic(2000, 24, seed=1), num_pairs=100_000, bins=50)
    assert expected > 0.05
    # Bias (bins - 1) / 4P = 1.2e-4, and a spread of the order sqrt(JS / P) = 1e-3.
    assert found == pytest.approx(expected, abs=4e-3)


def test_two_samples_of_one_distribution_differ_by_the_bias_that_the_docstring_names():
    found = [
        divergence(isotropic(1500, 3, seed), isotropic(1500, 3, seed + 100), num_pairs=20_000, bins=100)
        for seed in range(10)
    ]  # in 3 dimensions cosines are uniform, so all 100 bins are filled
    assert np.mean(found) == pytest.approx(99 / 80_000, rel=0.3)


# --- before and after -------------------------------------------------------------------------------------


def test_phi_of_rows_turned_by_an_angle_is_its_cosine():
    angle = 0.3
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    rows_ND = unit(isotropic(50, 6))
    turned_ND = rows_ND @ np.kron(np.eye(3), turn)
    assert angles.row_cosines(rows_ND, 4 * turned_ND) == pytest.approx(math.cos(angle))
    assert angles.row_cosines(rows_ND, -rows_ND) == pytest.approx(-1)


def test_psi_is_the_correlation_over_the_same_pairs():
    before_ND, after_ND = unit_clouds(40, 10)
    upper = np.triu_indices(40, 1)
    expected = np.corrcoef((before_ND @ before_ND.T)[upper], (after_ND @ after_ND.T)[upper])[0, 1]
    assert angles.cosine_correlation(before_ND, after_ND) == pytest.approx(expected, abs=1e-12)
    assert angles.cosine_correlation(before_ND, before_ND @ rotation(10), 300, seed=4) == pytest.approx(1)


def test_psi_where_half_of_the_dimensions_are_lost():
    """Cosines are sums over dimensions of equal variance; half of the terms have sqrt(1/2) with all."""
    rows_ND = isotropic(1500, 256)
    lost_ND = rows_ND * (np.arange(256) < 128)
    # Norms vary by 1 / sqrt(2 D) = 4 %, and 200,000 pairs leave 2e-3.
    assert angles.cosine_correlation(rows_ND, lost_ND) == pytest.approx(math.sqrt(0.5), abs=0.01)


def residual_ratio(image_ND: np.ndarray, text_ND: np.ndarray) -> float:
    return angles.residual_ratio(*angles.pair_distances(image_ND, text_ND))


def test_the_residual_ratio_of_residuals_across_the_mean_gap():
    text_ND = isotropic(200, 5)
    residual_ND = np.zeros((200, 5))
    residual_ND[:, 1] = np.tile([1.0, -1.0], 100)
    gap_D = np.array([0.75, 0, 0, 0, 0])
    assert residual_ratio(text_ND + gap_D + residual_ND, text_ND) == pytest.approx(1 / 1.25)
    assert residual_ratio(text_ND + residual_ND, text_ND) == pytest.approx(1)
    assert residual_ratio(text_ND + gap_D, text_ND) == pytest.approx(0, abs=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------

PAIRED = [angles.row_cosines, angles.cosine_correlation, angles.pair_distances]


@pytest.mark.parametrize("figure", PAIRED)
def test_rows_that_do_not_pair_are_refused(figure):
    with pytest.raises(DataError, match="shapes"):
        figure(isotropic(5, 4), isotropic(6, 4))


@pytest.mark.parametrize("figure", [*PAIRED, divergence])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_refused(figure, value, side):
    sides = [unit(isotropic(5, 4)), unit(isotropic(5, 4, seed=1))]
    sides[side][3, 2] = value
    with pytest.raises(DataError, match="row 3 is NaN or infinite"):
        figure(*sides)


@pytest.mark.parametrize("figure", [angles.row_cosines, angles.cosine_correlation, divergence])
def test_rows_without_a_direction_are_refused(figure):
    rows_ND = isotropic(5, 4)
    rows_ND[2] = 0
    with pytest.raises(DataError, match="row 2 has length"):
        figure(unit(isotropic(5, 4)), rows_ND)


def test_too_few_rows_and_impossible_settings_are_refused():
    with pytest.raises(DataError, match="1 rows"):
        angles.pair_cosines(isotropic(1, 4))
    with pytest.raises(DataError, match="0 rows"):
        angles.row_cosines(np.empty((0, 4)), np.empty((0, 4)))
    with pytest.raises(DataError, match="2 rows"):
        angles.cosine_correlation(isotropic(2, 4), isotropic(2, 4))
    with pytest.raises(DataError, match="row 0 has length 2"):
        angles.row_cosines(2 * unit(isotropic(5, 4)), isotropic(5, 4))
    with pytest.raises(ConfigError, match="0 pairs"):
        angles.pair_cosines(isotropic(5, 4), 0)
    with pytest.raises(ConfigError, match="0 bins"):
        angles.cosine_histogram(np.zeros(3), 0)


def test_constant_rows_have_no_correlation_of_cosines_and_equal_pairs_no_residual():
    constant_ND = np.ones((5, 4))
    with pytest.raises(DataError, match="no correlation"):
        angles.cosine_correlation(isotropic(5, 4), constant_ND)
    with pytest.raises(DataError, match="every pair coincides"):
        angles.pair_distances(constant_ND, constant_ND)
