"""Figures of spectra against closed forms on Gaussians of known covariance, their laws, their refusals."""

import math

import numpy as np
import pytest
from gaussians import gaussian, rotation
from hypothesis import given
from hypothesis import strategies as st

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import spectra

# float64 sums of some hundred terms, and eigenvalues of matrices of that size.
ROUNDING = 1e-10
spectrum = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40).map(lambda values: np.sort(values)[::-1])


def known(values_D: np.ndarray, seed: int = 0) -> np.ndarray:
    """A covariance with these eigenvalues, along no axis."""
    q_DD = rotation(len(values_D), seed)
    return (q_DD * values_D) @ q_DD.T


def spectrum_of_a_sample(values_D: np.ndarray) -> np.ndarray:
    """What the code sees of a Gaussian with this spectrum: rows, their covariance, its eigenvalues."""
    rows_ND = gaussian(3 * len(values_D), np.ones(len(values_D)), known(values_D))
    return spectra.eigenvalues_of(spectra.covariance(rows_ND))


# --- covariance and eigenvalues ---------------------------------------------------------------------------


def test_a_covariance_is_centred_and_divided_by_the_number_of_rows():
    cov_DD = known(np.array([4.0, 2.0, 1.0, 0.5]))
    rows_ND = gaussian(50, np.array([3.0, -1, 2, 0]), cov_DD)
    np.testing.assert_allclose(spectra.covariance(rows_ND), cov_DD, atol=ROUNDING)
    np.testing.assert_allclose(
        spectra.covariance(rows_ND), np.cov(rows_ND, rowvar=False, bias=True), atol=ROUNDING
    )


def test_eigenvalues_come_largest_first_and_never_negative():
    values_D = np.array([5.0, 3.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(spectra.eigenvalues_of(known(values_D)), values_D, atol=ROUNDING)
    assert spectra.eigenvalues_of(known(values_D)).min() >= 0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "NaN"),
        (np.diag([1.0, -0.1]), "smallest eigenvalue"),
        (np.empty((0, 0)), "square"),
    ],
)
def test_what_is_no_covariance_is_refused(matrix, message):
    with pytest.raises(DataError, match=message):
        spectra.eigenvalues_of(matrix)


def test_leading_directions_are_the_eigenvectors_largest_first():
    q_DD = rotation(6)
    cov_DD = (q_DD * [6, 5, 4, 3, 2, 1]) @ q_DD.T
    np.testing.assert_allclose(
        np.abs(spectra.leading_directions(cov_DD, 3).T @ q_DD[:, :3]), np.eye(3), atol=1e-9
    )


# --- the exponent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.33, 2.4])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_exponent_of_a_power_law_is_its_own(alpha, scale):
    values_D = scale * np.arange(1, 65) ** -alpha
    assert spectra.spectrum_exponent(values_D) == pytest.approx(alpha, abs=ROUNDING)
    assert spectra.spectrum_exponent(spectrum_of_a_sample(values_D), 3, 40) == pytest.approx(alpha, abs=1e-8)


def test_the_exponent_looks_at_ranks_10_to_256_and_at_no_others():
    values_D = np.arange(1, 401) ** -1.2
    bent_D = values_D.copy()
    bent_D[:9] *= 50
    bent_D[256:] *= 1e-3
    assert spectra.spectrum_exponent(bent_D) == pytest.approx(1.2, abs=ROUNDING)
    for rank in (10, 255):
        bent_D = values_D.copy()
        bent_D[:rank] *= 50  # moves rank 10, or leaves rank 256 behind
        assert spectra.spectrum_exponent(bent_D) > 1.21


def test_the_exponent_of_few_dimensions_leaves_the_last_out():
    values_D = np.arange(1, 31) ** -1.0
    values_D[-1] = 1e-9
    assert spectra.spectrum_exponent(values_D) == pytest.approx(1.0, abs=ROUNDING)


@pytest.mark.parametrize(("first", "last"), [(0, 5), (5, 5), (3, 21), (10, None)])
def test_ranks_that_do_not_exist_are_refused(first, last):
    dim = 20 if last else 8
    with pytest.raises(ConfigError, match="ranks"):
        spectra.spectrum_exponent(np.ones(dim), first, last)


# --- condition numbers ------------------------------------------------------------------------------------


def test_the_condition_number_is_largest_over_smallest():
    assert spectra.condition_number(np.array([8.0, 4.0, 0.5])) == 16
    assert spectra.condition_number(spectrum_of_a_sample(np.geomspace(1, 1e-4, 20))) == pytest.approx(1e4)


def test_a_singular_covariance_has_an_infinite_condition_number_unless_a_floor_is_set():
    rows_ND = np.random.default_rng(0).standard_normal((10, 30))
    values_D = spectra.eigenvalues_of(spectra.covariance(rows_ND))
    assert spectra.condition_number(values_D) == math.inf
    assert spectra.condition_number(np.array([8.0, 4.0, 2.0, 1e-9, 0.0]), floor=0.1) == 4
    assert spectra.condition_number(np.array([8.0, 4.0, 2.0]), floor=0.25) == 4
    for floor in (0.0, 1.5):
        with pytest.raises(ConfigError, match="floor"):
            spectra.condition_number(values_D, floor)


@pytest.mark.parametrize(
    ("energy", "expected"), [(0.01, (1, 1)), (0.4, (1, 1)), (0.7, (4 / 3, 2)), (0.71, (2, 3)), (1.0, (4, 4))]
)
def test_kappa_eff_is_over_the_fewest_eigenvalues_that_hold_the_share(energy, expected):
    kappa, rank = spectra.effective_condition_number(np.array([4.0, 3.0, 2.0, 1.0]), energy)
    assert (kappa, rank) == (pytest.approx(expected[0]), expected[1])


def test_kappa_eff_is_finite_where_the_covariance_is_singular():
    assert spectra.effective_condition_number(np.array([2.0, 1.0, 1e-20, 0.0]), 1.0) == (2.0, 2)
    for energy in (0.0, 1.1):
        with pytest.raises(ConfigError, match="energy"):
            spectra.effective_condition_number(np.array([2.0, 1.0]), energy)


# --- how many dimensions ----------------------------------------------------------------------------------


def test_the_effective_rank_of_a_flat_spectrum_is_its_dimension():
    assert spectra.effective_rank(spectrum_of_a_sample(np.full(24, 0.3))) == pytest.approx(24)
    assert spectra.effective_rank(np.array([3.0, 3.0, 3.0, 0.0, 0.0])) == pytest.approx(3)
    assert spectra.effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)


def test_the_effective_rank_of_two_directions():
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert spectra.effective_rank(np.array([4.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_the_effective_dimension_and_anisotropy_of_known_spectra():
    assert spectra.effective_dimension(spectrum_of_a_sample(np.full(24, 0.3))) == pytest.approx(24)
    assert spectra.effective_dimension(np.array([2.0, 1.0, 1.0])) == pytest.approx(16 / 6)
    assert spectra.residual_anisotropy(spectrum_of_a_sample(np.full(24, 0.3))) == pytest.approx(1)
    assert spectra.residual_anisotropy(np.array([2.0, 1.0, 1.0])) == pytest.approx(1.5)
    assert spectra.residual_anisotropy(np.array([1e-200, 0.0, 0.0, 0.0])) == pytest.approx(4)
    assert spectra.effective_dimension(np.array([1e-200, 0.0, 0.0, 0.0])) == pytest.approx(1)


@given(spectrum)
def test_dimensions_counted_by_squares_are_fewer_than_by_entropy(values_D):
    """Renyi's entropy of order 2 is never above Shannon's, and neither above that of D equal parts."""
    squares, entropy = spectra.effective_dimension(values_D), spectra.effective_rank(values_D)
    assert 1 - ROUNDING <= squares <= entropy * (1 + ROUNDING) <= len(values_D) * (1 + 2 * ROUNDING)
    # d_eff is 1 / sum p^2, and the largest share is at most the root of that sum and at least the sum.
    largest = spectra.residual_anisotropy(values_D) / len(values_D)
    assert 1 / squares <= largest * (1 + ROUNDING) <= math.sqrt(1 / squares) * (1 + 2 * ROUNDING)


def test_cumulative_energy():
    np.testing.assert_allclose(
        spectra.cumulative_energy(np.array([4.0, 3.0, 2.0, 1.0])), [0.4, 0.7, 0.9, 1.0]
    )


def test_the_numerical_rank_of_few_rows_is_one_less_than_their_number():
    rows_ND = np.random.default_rng(0).standard_normal((10, 30))
    assert spectra.numerical_rank(spectra.eigenvalues_of(spectra.covariance(rows_ND))) == 9


# --- two covariances --------------------------------------------------------------------------------------


def test_c_lambda_is_one_between_power_laws_and_pearson_of_logarithms_otherwise():
    ranks = np.arange(1, 33)
    assert spectra.spectral_correlation(ranks**-1.0, 7 * ranks**-2.5) == pytest.approx(1)
    one, other = spectrum_of_a_sample(np.exp(-ranks / 3)), ranks**-1.5
    expected = np.corrcoef(-ranks / 3, np.log(other))[0, 1]
    assert expected < 0.95
    assert spectra.spectral_correlation(one, other) == pytest.approx(expected, abs=1e-8)


def test_a_flat_spectrum_has_no_correlation():
    with pytest.raises(DataError, match="no correlation"):
        spectra.spectral_correlation(np.full(8, 0.1), np.arange(8, 0, -1.0))


def test_subspaces_overlap_from_equal_to_orthogonal():
    values_D = np.arange(12, 0, -1.0)
    x_DD, opposite_DD = known(values_D), known(values_D[::-1])
    assert spectra.subspace_overlap(x_DD, 3 * x_DD, 5) == (pytest.approx(1), 5 / 12)
    assert spectra.subspace_overlap(x_DD, opposite_DD, 5) == (pytest.approx(0, abs=ROUNDING), 5 / 12)
    # 8 of 12 dimensions from both ends share the 4 in the middle.
    assert spectra.subspace_overlap(x_DD, opposite_DD, 8)[0] == pytest.approx(4 / 8)
    assert spectra.subspace_overlap(x_DD, opposite_DD, 12) == (pytest.approx(1), 1)


def test_turning_one_direction_out_of_the_subspace_costs_the_square_of_the_sine():
    angle = 0.4
    turn_DD = np.eye(6)
    turn_DD[np.ix_([0, 5], [0, 5])] = [
        [math.cos(angle), -math.sin(angle)],
        [math.sin(angle), math.cos(angle)],
    ]
    x_DD = np.diag([6.0, 5, 4, 3, 2, 1])
    overlap, _ = spectra.subspace_overlap(x_DD, turn_DD @ x_DD @ turn_DD.T, 3)
    assert overlap == pytest.approx((2 + math.cos(angle) ** 2) / 3)


def test_random_subspaces_overlap_by_their_baseline_on_average():
    values_D = np.arange(20, 0, -1.0)
    drawn = [spectra.subspace_overlap(known(values_D), known(values_D, seed), 5) for seed in range(1, 101)]
    overlaps = np.array([overlap for overlap, _ in drawn])
    assert drawn[0][1] == 5 / 20
    # Five standard errors of the mean of a hundred draws.
    assert abs(overlaps.mean() - 5 / 20) < 5 * overlaps.std() / 10


def test_the_covariance_gap_of_a_scaled_covariance():
    x_DD = known(np.arange(8, 0, -1.0))
    assert spectra.covariance_gap(x_DD, x_DD) == 0
    assert spectra.covariance_gap(x_DD, 0.7 * x_DD) == pytest.approx(0.3)
    assert spectra.covariance_gap(np.diag([3.0, 4.0]), np.diag([3.0, 1.0])) == pytest.approx(3 / 5)


# --- refusals ---------------------------------------------------------------------------------------------

FIGURES = [
    spectra.spectrum_exponent,
    spectra.condition_number,
    spectra.effective_rank,
    spectra.residual_anisotropy,
    spectra.effective_dimension,
    spectra.cumulative_energy,
    spectra.numerical_rank,
    lambda values_D: spectra.effective_condition_number(values_D, 0.9),
    lambda values_D: spectra.spectral_correlation(values_D, values_D),
]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_rows_that_do_not_vary_have_no_spectrum(figure, value):
    """0.1 is not its own mean after rounding."""
    constant_ND = np.full((41, 20), value)
    with pytest.raises(DataError, match="do not vary"):
        figure(spectra.eigenvalues_of(spectra.covariance(constant_ND)))


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("values", [[], [1.0, np.nan], [1.0, -0.1], [[1.0]]])
def test_what_is_no_spectrum_is_refused(figure, values):
    with pytest.raises(DataError, match="spectrum"):
        figure(np.array(values))


def test_fewer_rows_than_dimensions_are_refused_where_logarithms_need_them():
    rows_ND = np.random.default_rng(0).standard_normal((15, 40))
    cov_DD = spectra.covariance(rows_ND)
    values_D = spectra.eigenvalues_of(cov_DD)
    with pytest.raises(DataError, match="only 14 of the first 39 eigenvalues"):
        spectra.spectrum_exponent(values_D)
    with pytest.raises(DataError, match="only 14 of the first 40"):
        spectra.spectral_correlation(values_D, values_D)
    with pytest.raises(DataError, match="fewer than 15 directions"):
        spectra.subspace_overlap(cov_DD, cov_DD, 15)
    assert spectra.spectrum_exponent(values_D, 2, 14) > 0
    assert spectra.subspace_overlap(cov_DD, cov_DD, 14)[0] == pytest.approx(1)


def test_two_sides_of_other_dimensions_are_refused():
    for figure in (spectra.covariance_gap, lambda x, y: spectra.subspace_overlap(x, y, 1)):
        with pytest.raises(DataError, match="shapes"):
            figure(np.eye(3), np.eye(4))
    with pytest.raises(DataError, match="shapes"):
        spectra.spectral_correlation(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match="do not vary"):
        spectra.covariance_gap(np.zeros((3, 3)), np.eye(3))
    for num_directions in (0, 4):
        with pytest.raises(ConfigError, match="leading directions"):
            spectra.subspace_overlap(np.eye(3), np.eye(3), num_directions)
