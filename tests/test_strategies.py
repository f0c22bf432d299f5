"""Every strategy is its formula, keeps the paper's laws, and treats a row alike in any company."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
from embedding_stores import cloud, unit

from revision_ray.align.maps import Affine, noise_rows
from revision_ray.align.moments import ExactSum, Moments, of_block
from revision_ray.align.strategies import (
    StrategyConfig,
    centroid_steps,
    fit_map,
    fixed_frame,
    inverse_root,
    of_symmetric,
    shrunk,
)
from revision_ray.core.errors import AlignmentError, ConfigError

TEXT_ND, IMAGE_ND = cloud(4000, 16, "text"), cloud(3000, 16, "image")
IDS = [f"row {number}" for number in range(len(TEXT_ND))]
U_ND = unit(TEXT_ND)
TEXT, IMAGE = of_block(TEXT_ND, second=True)[0], of_block(IMAGE_ND, second=True)[0]
MU_Y, MU_X = U_ND.mean(0), unit(IMAGE_ND).mean(0)
COV_Y, COV_X = np.cov(U_ND.T, bias=True), np.cov(unit(IMAGE_ND).T, bias=True)
T_Y, T_X = np.trace(COV_Y), np.trace(COV_X)
S = np.sqrt(T_X / (T_Y + 1e-10))

ALL_STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "none"},
    {"strategy": "mean_shift"},
    {"strategy": "c3", "noise": 0.05, "seed": 3},
    {"strategy": "anchor"},
    {"strategy": "anchor_trace"},
    {"strategy": "realign"},
    {"strategy": "realign", "centroid_steps": 3},
    {"strategy": "blockwise", "shrinkage": 0.2, "frame_energy": 0.7},
    {"strategy": "gaussian_ot"},
    {"strategy": "gaussian_ot", "noise": 0.2, "seed": 1, "centroid_steps": 2},
]


def fitted(settings: dict[str, Any], text: Moments = TEXT, image: Moments = IMAGE) -> Affine:
    """The map with its centroid steps, mu' taken from TEXT_ND."""
    config = StrategyConfig(**settings)
    affine = fit_map(text, image, config)
    return centroid_steps(
        affine, image, config, lambda _, affine: of_block(TEXT_ND, affine=affine, ids=IDS)[0]
    )[0]


def by_hand(settings: dict[str, Any]) -> np.ndarray:
    """float64 rows of the same strategy, from its formula in method and paper, on all rows at once."""
    config = StrategyConfig(**settings)
    noise = noise_rows(IDS, 16, config.seed)
    shift_ND = U_ND - MU_Y
    if config.strategy == "none":
        return U_ND
    if config.strategy == "mean_shift":
        return shift_ND
    if config.strategy == "anchor":
        return unit(shift_ND + MU_X)
    if config.strategy == "c3":
        return unit(shift_ND + MU_X + config.noise * noise)
    if config.strategy == "anchor_trace":
        return unit(MU_X + S * shift_ND)
    if config.strategy == "realign":
        mapped_ND = MU_X + S * shift_ND
    elif config.strategy == "blockwise":
        mapped_ND = MU_X + shift_ND @ whiten_colour(config.shrinkage, config.frame_energy).T
    else:
        sy, sx = (shrink(cov, config.shrinkage) for cov in (COV_Y, COV_X))
        root = scipy.linalg.sqrtm(sy)
        inverse = np.linalg.inv(root)
        matrix = inverse @ scipy.linalg.sqrtm(root @ sx @ root) @ inverse
        mapped_ND = MU_X + shift_ND @ matrix + (config.noise or 0) * noise / 4  # sqrt(16) = 4
    rows_ND = unit(mapped_ND)
    for _ in range(config.centroid_steps):
        rows_ND = unit(rows_ND - rows_ND.mean(0) + MU_X)
    return rows_ND


def shrink(covariance_DD: np.ndarray, share: float) -> np.ndarray:
    dim = len(covariance_DD)
    return (1 - share) * covariance_DD + share * np.trace(covariance_DD) / dim * np.eye(dim)


def whiten_colour(share: float, energy: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(COV_X + COV_Y)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(np.argmax(np.cumsum(values) >= energy * values.sum())) + 1
    matrix = np.zeros((16, 16))
    for basis in (vectors[:, :rank], vectors[:, rank:]):
        sy, sx = (shrink(basis.T @ cov @ basis, share) for cov in (COV_Y, COV_X))
        matrix += basis @ scipy.linalg.sqrtm(sx) @ np.linalg.inv(scipy.linalg.sqrtm(sy)) @ basis.T
    return matrix


# --- the maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ALL_STRATEGIES, ids=str)
def test_a_strategy_is_its_formula(settings):
    aligned_ND, invalid = fitted(settings).apply(TEXT_ND, IDS)
    assert invalid == []
    # Rows are rounded to float32 once: half a unit in the last place of numbers up to 1 is 6e-8.
    np.testing.assert_allclose(aligned_ND, by_hand(settings), rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", ALL_STRATEGIES, ids=str)
def test_the_mean_from_coefficients_is_the_mean_of_the_rows(settings):
    """mu' is measured without making an aligned row; that must be the mean of the rows all the same."""
    found = of_block(TEXT_ND, affine=fitted(settings), ids=IDS, second=True)[0]
    rows_ND = by_hand(settings)
    np.testing.assert_allclose(found.centroid, rows_ND.mean(0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.second.value() / 4000, rows_ND.T @ rows_ND / 4000, rtol=0, atol=1e-13)


@pytest.mark.parametrize("settings", ALL_STRATEGIES, ids=str)
def test_a_row_is_aligned_alike_alone_and_in_company(settings):
    affine = fitted(settings)
    together, _ = affine.apply(TEXT_ND, IDS)
    order = np.random.default_rng(0).permutation(len(TEXT_ND))[:200]
    elsewhere, _ = affine.apply(TEXT_ND[order], [IDS[row] for row in order])
    # The position within a chunk may change how a matrix product rounds: one unit in the last place.
    np.testing.assert_allclose(elsewhere, together[order], rtol=0, atol=1.2e-7)


def test_rows_without_a_direction_come_out_as_nan_and_named():
    block_ND = TEXT_ND[:100].copy()
    block_ND[7], block_ND[70, 3], block_ND[99] = 0, np.nan, np.inf
    aligned_ND, invalid = fitted({"strategy": "realign"}).apply(block_ND)
    assert invalid == [7, 70, 99]
    assert np.isnan(aligned_ND[invalid]).all()
    good = np.delete(np.arange(100), invalid)
    np.testing.assert_allclose(aligned_ND[good], by_hand({"strategy": "realign"})[good], rtol=0, atol=1e-7)


def test_another_dimension_or_missing_ids_are_refused():
    with pytest.raises(AlignmentError, match=r"shape \(3, 8\), the fit's dimension is 16"):
        fitted({"strategy": "realign"}).apply(np.ones((3, 8)))
    with pytest.raises(AlignmentError, match="no ids were given"):
        fitted({"strategy": "c3"}).apply(TEXT_ND)


# --- the paper's laws -------------------------------------------------------------------------------------


def test_anchor_moves_the_mean_onto_the_image_centroid_and_trace_the_trace_onto_the_images():
    """Sec. 4.1, 4.2: before the rows go back onto the sphere."""
    for name, trace in (("anchor", T_Y), ("anchor_trace", T_X)):
        affine = fit_map(TEXT, IMAGE, StrategyConfig(strategy=name))
        mapped_ND = affine.scale * U_ND + affine.offset
        np.testing.assert_allclose(mapped_ND.mean(0), MU_X, rtol=0, atol=1e-14)
        # 1e-10 in the reference's s; the rest is rounding.
        assert np.trace(np.cov(mapped_ND.T, bias=True)) == pytest.approx(trace, abs=2e-10)
    assert fit_map(TEXT, IMAGE, StrategyConfig(strategy="anchor")).scale == 1.0


def test_the_centroid_step_keeps_its_bound_and_repeating_it_lowers_the_error_further():
    """Prop. B.19: the final error is at most ||mu_x - mu'||."""
    anchor_trace = of_block(TEXT_ND, affine=fitted({"strategy": "anchor_trace"}))[0].centroid
    errors = [np.linalg.norm(anchor_trace - MU_X)]
    for steps in (1, 2, 3, 4):
        affine = fitted({"strategy": "realign", "centroid_steps": steps})
        errors.append(np.linalg.norm(of_block(TEXT_ND, affine=affine)[0].centroid - MU_X))
    assert errors[1] <= errors[0]
    assert (np.diff(errors) < 0).all()
    assert errors[4] < errors[1] / 2


def test_none_and_mean_shift_do_not_scale_rows_back():
    for name, expected in (("none", U_ND), ("mean_shift", U_ND - MU_Y)):
        aligned_ND, _ = fitted({"strategy": name}).apply(TEXT_ND)
        np.testing.assert_allclose(aligned_ND, expected, rtol=0, atol=6e-8)
    assert np.linalg.norm(aligned_ND, axis=1).std() > 0.01


# --- second moments ---------------------------------------------------------------------------------------


def moments_of(centroid_D: np.ndarray, covariance_DD: np.ndarray, num_rows: int = 4096) -> Moments:
    """Moments whose centroid and covariance are these, for laws between two given covariances."""
    found = Moments.zeros(len(centroid_D), second=True)
    found.counts[0] = num_rows
    found.sums.add(centroid_D * num_rows, 0)
    found.second = ExactSum.zeros(covariance_DD.shape)
    found.second.add((covariance_DD + np.outer(centroid_D, centroid_D)) * num_rows)
    return found


def proportional(share: float) -> tuple[Moments, Moments]:
    """Text and image moments with Sigma_x = `share` Sigma_y, both of unit rows: T = 1 - ||mu||^2."""
    trace = 0.4
    covariance_DD = COV_Y / T_Y * trace
    text = moments_of(MU_Y / np.linalg.norm(MU_Y) * np.sqrt(1 - trace), covariance_DD)
    return text, moments_of(MU_X / np.linalg.norm(MU_X) * np.sqrt(1 - share * trace), share * covariance_DD)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_gaussian_ot_is_realign_when_the_covariances_are_proportional(shrinkage):
    text, image = proportional(0.6)
    transport = fit_map(text, image, StrategyConfig(strategy="gaussian_ot", shrinkage=shrinkage))
    realign = fit_map(text, image, StrategyConfig())
    # The reference's 1e-10 in s makes s smaller by 1e-10 / (2 T_y) of itself.
    np.testing.assert_allclose(transport.matrix, realign.scale * np.eye(16), rtol=0, atol=1e-9)
    np.testing.assert_allclose(transport.offset, realign.offset, rtol=0, atol=1e-9)


def test_gaussian_ot_with_shrinkage_one_has_realigns_scale_for_any_covariances():
    transport = fit_map(TEXT, IMAGE, StrategyConfig(strategy="gaussian_ot", shrinkage=1.0))
    np.testing.assert_allclose(transport.matrix, S * np.eye(16), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.5])
def test_gaussian_ot_carries_one_covariance_to_the_other_by_a_positive_map(shrinkage):
    matrix = fit_map(TEXT, IMAGE, StrategyConfig(strategy="gaussian_ot", shrinkage=shrinkage)).matrix
    assert matrix is not None
    carried = matrix @ shrink(COV_Y, shrinkage) @ matrix.T
    np.testing.assert_allclose(carried, shrink(COV_X, shrinkage), rtol=0, atol=1e-12)
    assert (matrix == matrix.T).all()
    assert np.linalg.eigvalsh(matrix).min() > 0


def test_gaussian_ot_moves_rows_less_than_another_map_between_the_same_covariances():
    """Least displacement: Sx^1/2 Sy^-1/2 also carries Sy to Sx, and moves rows further."""
    transport = fit_map(TEXT, IMAGE, StrategyConfig(strategy="gaussian_ot", shrinkage=0.1)).matrix
    assert transport is not None
    sy, sx = shrink(COV_Y, 0.1), shrink(COV_X, 0.1)
    other = scipy.linalg.sqrtm(sx) @ np.linalg.inv(scipy.linalg.sqrtm(sy))

    def moved(matrix: np.ndarray) -> float:
        difference = matrix - np.eye(16)
        return float(np.trace(difference @ sy @ difference.T))

    assert moved(transport) < moved(other)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_blockwise_matches_the_covariance_of_both_blocks(energy):
    config = StrategyConfig(strategy="blockwise", shrinkage=0.1, frame_energy=energy)
    matrix = fit_map(TEXT, IMAGE, config).matrix
    assert matrix is not None
    bases = fixed_frame(COV_X + COV_Y, energy)
    assert bases[1].shape[1] == 0 if energy == 1 else bases[1].shape[1] > 0
    for basis in bases:
        carried = basis.T @ matrix @ basis @ shrunk(basis.T @ COV_Y @ basis, 0.1) @ basis.T @ matrix.T @ basis
        np.testing.assert_allclose(carried, shrunk(basis.T @ COV_X @ basis, 0.1), rtol=0, atol=1e-12)
    leak = bases[0].T @ matrix @ bases[1]
    np.testing.assert_allclose(leak, 0, atol=1e-12)


def test_directions_that_hold_nothing_are_not_blown_up():
    """Fewer rows than dimensions: the text covariance is singular, and no shrinkage lifts it."""
    values = of_symmetric(np.diag([2.0, 0.5, 0.0, 1e-18]), inverse_root)
    np.testing.assert_allclose(np.diag(values), [2**-0.5, 2**0.5, 0, 0], rtol=1e-12)
    few = of_block(TEXT_ND[:6], second=True)[0]
    affine = fit_map(few, IMAGE, StrategyConfig(strategy="gaussian_ot", shrinkage=0.0))
    assert affine.matrix is not None
    assert np.abs(affine.matrix).max() < 100


def test_the_frame_takes_the_smallest_rank_that_holds_the_energy():
    principal, rest = fixed_frame(np.diag([1.0, 6.0, 3.0]), 0.9)
    assert (principal.shape, rest.shape) == ((3, 2), (3, 1))
    np.testing.assert_allclose(np.abs(principal), [[0, 0], [1, 0], [0, 1]], atol=1e-15)
    assert fixed_frame(np.diag([1.0, 6.0, 3.0]), 0.91)[0].shape == (3, 3)


# --- noise ------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_id_and_the_seed_alone():
    noise = noise_rows(["a", "b", "c"], 32, seed=5)
    np.testing.assert_array_equal(noise_rows(["c"], 32, seed=5)[0], noise[2])
    np.testing.assert_array_equal(noise_rows(["c", "x", "a"], 32, seed=5)[[2, 0]], noise[[0, 2]])
    assert not np.isclose(noise_rows(["a"], 32, seed=6), noise[:1]).any()
    assert np.abs(np.corrcoef(noise)[0, 1]) < 0.6  # 32 numbers: 3.4 standard deviations


def test_noise_is_standard_normal():
    noise = noise_rows([str(number) for number in range(4000)], 25, seed=0)
    # 100,000 numbers: mean to 0.003, variance to 0.0045, kurtosis to 0.0155; four times each.
    assert abs(noise.mean()) < 0.013
    assert abs(noise.var() - 1) < 0.018
    assert abs((noise**4).mean() - 3) < 0.125
    assert np.abs(np.corrcoef(noise.T) - np.eye(25)).max() < 0.075  # 300 pairs, each to 0.016


def test_c3_adds_noise_of_the_size_it_names():
    affine = fit_map(TEXT, IMAGE, StrategyConfig(strategy="c3", noise=0.3))
    assert (affine.noise, fit_map(TEXT, IMAGE, StrategyConfig(strategy="c3")).noise) == (0.3, 0.01)
    transport = fit_map(TEXT, IMAGE, StrategyConfig(strategy="gaussian_ot", noise=0.2))
    assert transport.noise == pytest.approx(0.2 / 4)  # N(0, I/D), D = 16


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "anchor", "centroid_steps": 2},
        {"strategy": "none", "noise": 0.1},
        {"strategy": "realign", "noise": 0.0},
        {"strategy": "realign", "shrinkage": 0.5},
        {"strategy": "gaussian_ot", "frame_energy": 0.5},
        {"strategy": "c3", "centroid_steps": 2},
    ],
    ids=str,
)
def test_a_setting_without_effect_is_refused(settings):
    with pytest.raises(ConfigError, match="has no effect on"):
        StrategyConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centroid_steps": 0}, "centroid_steps is 0"),
        ({"strategy": "gaussian_ot", "shrinkage": 1.1}, "shrinkage is 1.1"),
        ({"strategy": "blockwise", "frame_energy": 0.0}, "frame_energy is 0"),
        ({"strategy": "c3", "noise": -0.1}, "noise is -0.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StrategyConfig(**settings)


@pytest.mark.parametrize("strategy", ["anchor_trace", "realign", "blockwise", "gaussian_ot"])
def test_rows_that_do_not_vary_are_refused(strategy):
    still = of_block(np.tile(TEXT_ND[:1], (50, 1)), second=True)[0]
    with pytest.raises(AlignmentError, match="all 50 text embeddings are equal"):
        fit_map(still, IMAGE, StrategyConfig(strategy=strategy))
    with pytest.raises(AlignmentError, match="all 50 image embeddings are equal"):
        fit_map(TEXT, still, StrategyConfig(strategy=strategy))


def test_a_row_that_falls_onto_the_origin_is_an_error_and_no_nan():
    affine = Affine(offset=-np.eye(4)[0])
    with pytest.raises(AlignmentError, match="onto the origin"):
        affine.apply(np.eye(4))
