"""What normalising does to a mean: the second-order formula against closed forms, quadrature and samples."""

import math

import numpy as np
import pytest
import scipy.special
from gaussians import gaussian, rotation, white

from revision_ray.core.errors import DataError
from revision_ray.geometry import fixed_frame


def along(dim: int, length: float = 1.0) -> np.ndarray:
    return length * rotation(dim, 9)[:, 0]


def exact_isotropic(mean_D: np.ndarray, sigma: float) -> np.ndarray:
    """E[z/||z||] - a for z ~ N(mu, sigma^2 I): a mean of a projected normal, by Kummer's function."""
    dim, r = len(mean_D), np.linalg.norm(mean_D)
    shrunk = (
        r / (sigma * math.sqrt(2))
        * math.exp(scipy.special.gammaln((dim + 1) / 2) - scipy.special.gammaln(dim / 2 + 1))
        * scipy.special.hyp1f1(0.5, dim / 2 + 1, -(r**2) / (2 * sigma**2))
    )  # fmt: skip
    return (shrunk - 1) * mean_D / r


def exact_in_the_plane(mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """E[z/||z||] - a for z = mu + root n in two dimensions, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    n = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2 * math.pi)
    z = mean + n @ root.T
    return weight @ (z / np.linalg.norm(z, axis=1, keepdims=True)) - mean / np.linalg.norm(mean)


@pytest.mark.parametrize(("dim", "length"), [(2, 1.0), (8, 0.5), (100, 3.0)])
def test_isotropic_noise_shortens_the_mean_direction(dim, length):
    """The formula comes to -(D - 1) sigma^2 / (2 r^2) a."""
    mean_D = along(dim, length)
    found = fixed_frame.second_order(mean_D, 0.01 * np.eye(dim))
    np.testing.assert_allclose(found, -(dim - 1) * 0.01 / (2 * length**2) * mean_D / length, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 5, 40])
def test_against_isotropic_noise_the_error_is_of_fourth_order(dim):
    mean_D = along(dim, 2.0)
    errors = []
    for sigma in (0.04, 0.02):
        second_D = fixed_frame.second_order(mean_D, sigma**2 * np.eye(dim))
        errors.append(np.linalg.norm(exact_isotropic(mean_D, sigma) - second_D))
    # 16 as sigma goes to 0; what is left are orders of sigma^2 D / r^2.
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)


def test_against_anisotropic_noise_the_error_is_of_fourth_order():
    mean, root = np.array([0.6, 0.8]), np.array([[1.0, 0.3], [-0.4, 0.5]])
    errors = []
    for sigma in (0.04, 0.02):
        exact = exact_in_the_plane(mean, sigma * root)
        second = fixed_frame.second_order(mean, sigma**2 * root @ root.T)
        errors.append(np.linalg.norm(exact - second))
        assert errors[-1] < 0.05 * np.linalg.norm(exact)
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)


def test_noise_along_the_mean_does_not_move_it_and_noise_across_does():
    mean_D = along(6)
    along_DD = 0.01 * np.outer(mean_D, mean_D)
    np.testing.assert_allclose(fixed_frame.second_order(mean_D, along_DD), 0, atol=1e-15)
    across_D = rotation(6, 9)[:, 1]
    across_DD = 0.01 * np.outer(across_D, across_D)
    np.testing.assert_allclose(fixed_frame.second_order(mean_D, across_DD), -0.005 * mean_D, atol=1e-15)
    # Noise that is correlated between both turns the direction.
    both = mean_D + across_D
    turned_D = fixed_frame.second_order(mean_D, 0.01 * np.outer(both, both))
    np.testing.assert_allclose(turned_D, -0.005 * mean_D - 0.01 * across_D, atol=1e-15)


@pytest.mark.parametrize(("mirrored", "order"), [(False, 3), (True, 4)])
def test_the_drift_of_a_sample_nears_its_prediction_at_the_right_order(mirrored, order):
    """A sample has third moments, and the error is of third order; with its mirror image it has none."""
    dim = 7
    noise_ND = white(40, dim)
    noise_ND = np.concatenate([noise_ND, -noise_ND]) if mirrored else noise_ND
    root_DD = rotation(dim, 1) * np.linspace(1, 0.2, dim)
    errors = []
    for sigma in (0.004, 0.002):
        found = fixed_frame.compare(along(dim) + sigma * noise_ND @ root_DD.T)
        errors.append(np.linalg.norm(found.measured_D - found.predicted_D))
        assert found.relative_error == pytest.approx(errors[-1] / found.measured_norm)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_a_large_sample_of_isotropic_noise_drifts_as_the_closed_form_says():
    dim, sigma, num_rows = 16, 0.1, 40_000
    rows_ND = gaussian(num_rows, along(dim), sigma**2 * np.eye(dim))
    expected_D = exact_isotropic(along(dim), sigma)
    found = fixed_frame.compare(rows_ND)
    # The mean of normalised rows, with the sample's own mean made exact, varies in second order only.
    spread = math.sqrt(2 * dim) * sigma**2 / math.sqrt(num_rows)
    assert np.linalg.norm(found.measured_D - expected_D) < 5 * spread
    assert found.predicted_norm == pytest.approx((dim - 1) * sigma**2 / 2)
    assert found.measured_norm == pytest.approx(np.linalg.norm(expected_D), rel=0.01)
    assert found.cosine > 0.999


def test_drift_turns_with_the_rows_and_ignores_their_scale():
    rows_ND = gaussian(50, along(5), 0.02 * np.diag([3.0, 2, 1, 1, 0.5]))
    one, other = fixed_frame.compare(rows_ND), fixed_frame.compare(9 * rows_ND @ rotation(5, 4))
    for before_D, after_D in ((one.measured_D, other.measured_D), (one.predicted_D, other.predicted_D)):
        np.testing.assert_allclose(before_D @ rotation(5, 4), after_D, atol=1e-14)


def test_rows_without_noise_do_not_drift():
    found = fixed_frame.compare(np.tile([3.0, 4.0], (8, 1)))
    assert (found.measured_norm, found.predicted_norm) == (pytest.approx(0, abs=1e-15), 0)
    assert math.isnan(found.cosine)
    assert math.isnan(found.relative_error)


def test_rows_and_means_without_a_direction_are_refused():
    rows_ND = white(20, 4)
    with pytest.raises(DataError, match="mean has length"):
        fixed_frame.compare(rows_ND)
    with pytest.raises(DataError, match="mean has length nan"):
        fixed_frame.second_order(np.full(4, np.nan), np.eye(4))
    with pytest.raises(DataError, match="row 2 has length"):
        fixed_frame.measured(np.where(np.arange(20)[:, None] == 2, 0, rows_ND + 1))
    with pytest.raises(DataError, match="row 2 is NaN"):
        fixed_frame.compare(np.where(np.arange(20)[:, None] == 2, np.nan, rows_ND + 1))
    with pytest.raises(DataError, match="1 rows"):
        fixed_frame.compare(np.ones((1, 4)))
    with pytest.raises(DataError, match="dimensions 4 and 5"):
        fixed_frame.second_order(np.ones(4), np.eye(5))
