"""The gap in a fixed frame: its identities to 1e-10, closed forms of every figure, refusals."""

import dataclasses
import math

import numpy as np
import pytest
from gaussians import gaussian, rotation, unit_clouds, white

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import fixed_frame, spectra

# Of the method: what each identity may fail by.
EXACT = 1e-10


def axes(dim: int = 8, rank: int = 3, seed: int | None = None) -> fixed_frame.FixedFrame:
    """The frame whose U is spanned by the first axes, turned at random where a seed is given."""
    q_DD = np.eye(dim) if seed is None else rotation(dim, seed)
    return fixed_frame.FixedFrame(q_DD[:, :rank], q_DD[:, rank:], energy=0.9, num_rows=100)


# --- the frame --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "rank"), [(0.3, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3)])
def test_u_is_the_fewest_directions_that_hold_the_share(energy, rank):
    q_DD = rotation(4)
    frame = fixed_frame.frame_of((q_DD * [4.0, 3, 2, 1]) @ q_DD.T, energy, num_rows=50)
    assert (frame.rank, frame.energy, frame.num_rows) == (rank, energy, 50)
    np.testing.assert_allclose(frame.u_DR @ frame.u_DR.T, q_DD[:, :rank] @ q_DD[:, :rank].T, atol=EXACT)
    whole_DD = np.concatenate([frame.u_DR, frame.v_DS], axis=1)
    np.testing.assert_allclose(whole_DD.T @ whole_DD, np.eye(4), atol=EXACT)


def test_the_reference_is_the_sum_of_both_covariances_of_unpaired_rows():
    image_ND, text_ND = unit_clouds(300, 10)
    frame = fixed_frame.reference_frame(image_ND, text_ND[:200], 0.8)
    reference_DD = spectra.covariance(image_ND) + spectra.covariance(text_ND[:200])
    expected = fixed_frame.frame_of(reference_DD, 0.8, 200)
    np.testing.assert_array_equal(frame.u_DR, expected.u_DR)
    assert frame.num_rows == 200
    held = np.trace(frame.u_DR.T @ reference_DD @ frame.u_DR) / np.trace(reference_DD)
    without_last = frame.u_DR[:, :-1]
    assert held >= 0.8 > np.trace(without_last.T @ reference_DD @ without_last) / np.trace(reference_DD)


def test_frames_that_cannot_be_are_refused():
    image_ND, text_ND = unit_clouds(30, 6)
    with pytest.raises(DataError, match="unit length"):
        fixed_frame.reference_frame(image_ND * 1.01, text_ND, 0.9)
    with pytest.raises(DataError, match="row 3 is NaN"):
        fixed_frame.reference_frame(image_ND, np.where(np.arange(30)[:, None] == 3, np.nan, text_ND), 0.9)
    with pytest.raises(DataError, match="1 rows"):
        fixed_frame.reference_frame(image_ND[:1], text_ND, 0.9)
    with pytest.raises(DataError, match="dimensions 6 and 5"):
        fixed_frame.reference_frame(image_ND, unit_clouds(30, 5)[1], 0.9)
    with pytest.raises(DataError, match="do not vary"):
        fixed_frame.reference_frame(image_ND[[0] * 7], text_ND[[0] * 7], 0.9)
    for energy in (0.0, 1.0, 1.2):
        with pytest.raises(ConfigError, match="energy"):
            fixed_frame.reference_frame(image_ND, text_ND, energy)
    with pytest.raises(ConfigError, match="V is empty"):
        fixed_frame.frame_of(np.eye(4), 0.9, 30)


def test_rows_stored_in_half_precision_count_as_unit_rows():
    image_ND, text_ND = (rows_ND.astype(np.float16) for rows_ND in unit_clouds(200, 64))
    assert fixed_frame.reference_frame(image_ND, text_ND, 0.9).rank > 1


# --- the decomposition ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "dim"), [(500, 12), (40, 96), (2, 5), (1000, 128)])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_the_identities_hold(num_rows, dim, scale):
    """On and off the sphere, with fewer pairs than dimensions, in any frame."""
    image_ND, text_ND = unit_clouds(num_rows, dim)
    frame = fixed_frame.reference_frame(*unit_clouds(200, dim, seed=1), 0.8)
    parts = fixed_frame.decompose(image_ND, scale * text_ND - 0.1, frame)
    failed_by = fixed_frame.identities(parts)
    assert len(failed_by) == 6
    assert max(failed_by.values()) <= EXACT, failed_by
    np.testing.assert_array_equal(parts.gap_ND, image_ND - (scale * text_ND - 0.1))


@pytest.mark.parametrize(
    ("part", "fails"),
    [
        ("beta_D", {"Delta = beta + gamma + delta + zeta", "beta + gamma = m"}),
        ("delta_ND", {"Delta = beta + gamma + delta + zeta", "E delta = 0", "<delta, zeta> = 0"}),
        ("zeta_ND", {"Delta = beta + gamma + delta + zeta", "E zeta = 0", "<delta, zeta> = 0"}),
        ("gap_ND", {"Delta = beta + gamma + delta + zeta"}),
    ],
)
def test_an_identity_that_does_not_hold_is_seen(part, fails):
    frame = axes(seed=0)
    parts = fixed_frame.decompose(*unit_clouds(50, 8), frame)
    wrong = dataclasses.replace(parts, **{part: getattr(parts, part) + 1e-6})
    failed = {name for name, error in fixed_frame.identities(wrong).items() if error > EXACT}
    assert fails <= failed
    stretched = dataclasses.replace(parts, delta_ND=parts.delta_ND * (1 + 1e-6))
    assert list(fixed_frame.identities(stretched).values())[-1] > EXACT


def test_parts_of_a_gap_along_known_axes():
    mean_D = np.array([1.0, 2, 0, 3, 0, 0, 0, 4])
    variances_D = np.array([9.0, 8, 7, 0.6, 0.5, 0.4, 0.3, 0.2])
    text_ND = white(60, 8, seed=1)
    image_ND = text_ND + gaussian(60, mean_D, np.diag(variances_D))
    parts = fixed_frame.decompose(image_ND, text_ND, axes())
    np.testing.assert_allclose(parts.mean_D, mean_D, atol=EXACT)
    np.testing.assert_allclose(parts.beta_D, [1, 2, 0, 0, 0, 0, 0, 0], atol=EXACT)
    np.testing.assert_allclose(parts.gamma_D, [0, 0, 0, 3, 0, 0, 0, 4], atol=EXACT)
    np.testing.assert_allclose(parts.delta_ND[:, :3], (image_ND - text_ND - mean_D)[:, :3], atol=EXACT)
    assert np.abs(parts.delta_ND[:, 3:]).max() < EXACT
    assert np.abs(parts.zeta_ND[:, :3]).max() < EXACT
    delta_RR, zeta_SS = fixed_frame.block_covariances(parts, axes())
    np.testing.assert_allclose(delta_RR, np.diag(variances_D[:3]), atol=EXACT)
    np.testing.assert_allclose(zeta_SS, np.diag(variances_D[3:]), atol=EXACT)
    assert spectra.effective_condition_number(spectra.eigenvalues_of(delta_RR), 1.0)[0] == pytest.approx(
        9 / 7
    )
    assert spectra.effective_condition_number(spectra.eigenvalues_of(zeta_SS), 0.8)[0] == pytest.approx(2)


def test_pairs_that_do_not_fit_are_refused():
    image_ND, text_ND = unit_clouds(20, 8)
    with pytest.raises(DataError, match="shapes"):
        fixed_frame.decompose(image_ND, text_ND[:19], axes())
    with pytest.raises(DataError, match="embeddings and frame have dimensions 8 and 9"):
        fixed_frame.decompose(image_ND, text_ND, axes(dim=9))
    with pytest.raises(DataError, match="0 rows"):
        fixed_frame.decompose(image_ND[:0], text_ND[:0], axes())
    image_ND[7] = np.inf
    with pytest.raises(DataError, match="row 7 is NaN or infinite"):
        fixed_frame.decompose(image_ND, text_ND, axes())


# --- angles and leakage -----------------------------------------------------------------------------------


def turned(angles_R: list[float], dim: int = 8) -> np.ndarray:
    """Axis i turned by the i-th angle towards axis R + i: a basis (D, R) at these angles to the axes."""
    rank = len(angles_R)
    basis_DR = np.zeros((dim, rank))
    for axis, angle in enumerate(angles_R):
        basis_DR[axis, axis], basis_DR[rank + axis, axis] = math.cos(angle), math.sin(angle)
    return basis_DR


@pytest.mark.parametrize("angles", [[0.3, 1.2, 0.7], [0.0, 0.0, math.pi / 2], [1e-9, 1e-7, 1e-3], [0.0] * 3])
def test_principal_angles_are_those_of_the_construction(angles):
    q_DD = rotation(8)
    found = fixed_frame.principal_angles(q_DD @ np.eye(8)[:, :3], q_DD @ turned(angles) @ rotation(3, 1))
    # Angles of 1e-9 are found too: by their sines, not by the arccos of their cosines.
    np.testing.assert_allclose(found, sorted(angles), atol=1e-14 * 8, rtol=1e-6)
    assert fixed_frame.sin_theta(np.eye(8)[:, :3], turned(angles)) == pytest.approx(math.sin(max(angles)))


def test_angles_of_subspaces_of_different_size():
    assert fixed_frame.principal_angles(np.eye(6)[:, :4], np.eye(6)[:, 1:3]).tolist() == pytest.approx([0, 0])
    with pytest.raises(DataError, match="dimensions 6 and 5"):
        fixed_frame.principal_angles(np.eye(6)[:, :2], np.eye(5)[:, :2])
    with pytest.raises(DataError, match="without vectors"):
        fixed_frame.principal_angles(np.eye(6)[:, :0], np.eye(6)[:, :2])


def leak(gradient_ND: np.ndarray, frame: fixed_frame.FixedFrame) -> float:
    return fixed_frame.leak_ref(gradient_ND.T @ gradient_ND / len(gradient_ND), frame)


@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e100])
def test_leakage_of_gradients_in_u_in_v_and_between(scale):
    frame = axes(seed=3)
    coordinates = np.random.default_rng(0).standard_normal((40, 3))
    in_u, in_v = coordinates @ frame.u_DR.T, coordinates @ frame.v_DS[:, :3].T
    # The root of a share of energy, which is known to about 1e-16.
    assert leak(scale * in_u, frame) == pytest.approx(0, abs=1e-7)
    assert leak(scale * in_v, frame) == pytest.approx(1)
    between = math.cos(0.2) * in_u + math.sin(0.2) * in_v
    assert leak(scale * between, frame) == pytest.approx(math.sin(0.2))


def test_leakage_is_a_share_of_rms_over_all_gradients_and_not_a_mean_of_shares():
    gradient_ND = np.zeros((2, 8))
    gradient_ND[0, 0], gradient_ND[1, 5] = 4.0, 3.0
    assert leak(gradient_ND, axes()) == pytest.approx(3 / 5)


def test_gradients_in_a_turned_subspace_leak_at_most_sin_theta():
    basis_DR = turned([0.1, 0.4, 0.9])
    baseline = fixed_frame.sin_theta(axes().u_DR, basis_DR)
    for seed in range(20):
        gradient_ND = np.random.default_rng(seed).standard_normal((6, 3)) @ basis_DR.T
        assert leak(gradient_ND, axes()) <= baseline * (1 + 1e-12)
    assert leak(basis_DR[:, 2:].T, axes()) == pytest.approx(baseline)


def test_gradients_without_a_direction_have_no_leakage():
    assert math.isnan(leak(np.zeros((4, 8)), axes()))
    assert math.isnan(leak(np.array([[1.0] * 8, [np.nan] * 8]), axes()))
    with pytest.raises(DataError, match="gradients and frame"):
        leak(np.ones((4, 7)), axes())


# --- the passive bias -------------------------------------------------------------------------------------


def test_drift_and_stability_of_gamma():
    gamma_D = np.array([3.0, 4.0, 0.0])
    assert fixed_frame.pob_drift(gamma_D, gamma_D) == 0
    assert fixed_frame.pob_drift(3 * gamma_D, gamma_D) == pytest.approx(2)
    assert fixed_frame.pob_drift(np.array([4.0, -3.0, 0]), gamma_D) == pytest.approx(math.sqrt(2))
    assert fixed_frame.pob_drift(gamma_D, 0 * gamma_D) == pytest.approx(5 / fixed_frame.EPSILON)
    assert fixed_frame.pob_stability(7 * gamma_D, gamma_D) == pytest.approx(1)
    assert fixed_frame.pob_stability(-gamma_D, gamma_D) == pytest.approx(-1)
    assert fixed_frame.pob_stability(np.array([4.0, -3.0, 9]), gamma_D) == pytest.approx(0)
    with pytest.raises(DataError, match="gamma is zero"):
        fixed_frame.pob_stability(0 * gamma_D, gamma_D)
    with pytest.raises(DataError, match="shapes"):
        fixed_frame.pob_drift(gamma_D, gamma_D[:2])


def test_rho_eig_is_pearson_of_sorted_eigenvalues():
    one = np.array([5.0, 1.0, 3.0, 2.0])
    assert fixed_frame.rho_eig(one, 7 * np.sort(one) + 2) == pytest.approx(1)
    other = np.array([1.0, 16.0, 9.0, 4.0])
    assert fixed_frame.rho_eig(one, other) == pytest.approx(np.corrcoef([1, 2, 3, 5], [1, 4, 9, 16])[0, 1])
    with pytest.raises(DataError, match="no correlation"):
        fixed_frame.rho_eig(one, np.ones(4))
    with pytest.raises(DataError, match="shapes"):
        fixed_frame.rho_eig(one, one[:3])


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 30.0, 45.0, 90.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_angle_of_gamma_to_the_leading_direction_of_zeta(degrees, sign):
    frame = axes(seed=5)
    first, second = frame.v_DS[:, 1], frame.v_DS[:, 4]
    variances_S = np.array([0.3, 2.0, 0.5, 0.1, 0.4])
    zeta_DD = (frame.v_DS * variances_S) @ frame.v_DS.T
    gamma_D = (
        sign * 0.2 * (math.cos(math.radians(degrees)) * first + math.sin(math.radians(degrees)) * second)
    )
    assert fixed_frame.leading_angle_degrees(gamma_D, zeta_DD) == pytest.approx(degrees, abs=1e-9)
    assert fixed_frame.leading_angle_degrees(frame.v_DS.T @ gamma_D, np.diag(variances_S)) == pytest.approx(
        degrees, abs=1e-9
    )


def test_the_angle_by_chance():
    """Mean |cosine| on a circle is 2 / pi, on a sphere 1/2; in many dimensions sqrt(2 / (pi D))."""
    assert fixed_frame.angle_by_chance_degrees(1) == 0
    assert fixed_frame.angle_by_chance_degrees(2) == pytest.approx(math.degrees(math.acos(2 / math.pi)))
    assert fixed_frame.angle_by_chance_degrees(3) == pytest.approx(60)
    large = math.degrees(math.acos(math.sqrt(2 / math.pi / 1000)))
    assert fixed_frame.angle_by_chance_degrees(1000) == pytest.approx(large, abs=1e-3)


def test_angles_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match="gamma is zero"):
        fixed_frame.leading_angle_degrees(np.zeros(4), np.eye(4))
    with pytest.raises(DataError, match="fewer than 1 directions"):
        fixed_frame.leading_angle_degrees(np.ones(4), np.zeros((4, 4)))
    with pytest.raises(DataError, match="dimensions 3 and 4"):
        fixed_frame.leading_angle_degrees(np.ones(3), np.eye(4))


# --- coupling ---------------------------------------------------------------------------------------------


SPREAD = [300.0, 2.0, 0.01]


def coupled(noise: float):
    """Residuals with zeta = A delta + noise, Cov(delta) = diag(SPREAD), noise exactly uncorrelated."""
    frame = axes(seed=2)
    sample_ND = white(300, 8, seed=4)
    d_NR = sample_ND[:, :3] * np.sqrt(SPREAD)
    a_SR = np.random.default_rng(6).standard_normal((5, 3))
    z_NS = d_NR @ a_SR.T + noise * sample_ND[:, 3:]
    return d_NR @ frame.u_DR.T, z_NS @ frame.v_DS.T, a_SR, frame


def test_an_exact_linear_relation_is_found_whole():
    delta_ND, zeta_ND, a_SR, frame = coupled(noise=0)
    found = fixed_frame.coupling(delta_ND, zeta_ND, frame, ridge=0)
    assert found.spectral_norm == pytest.approx(np.linalg.norm(a_SR, 2))
    assert found.explained_variance == pytest.approx(1)
    assert found.chance_explained_variance == 3 / 299


def test_noise_lowers_the_explained_variance_by_its_own_share():
    delta_ND, zeta_ND, a_SR, frame = coupled(noise=0.7)
    found = fixed_frame.coupling(delta_ND, zeta_ND, frame, ridge=0)
    signal = np.trace((a_SR * SPREAD) @ a_SR.T)
    assert found.explained_variance == pytest.approx(signal / (signal + 5 * 0.49))
    assert found.spectral_norm == pytest.approx(np.linalg.norm(a_SR, 2))


@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_rows", [50, 500])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_ridge_shrinks_alike_for_any_number_of_samples_and_any_scale(ridge, num_rows, scale):
    """Where D D' is isotropic, L = A / (1 + ridge) and 1 - R^2 = (ridge / (1 + ridge))^2."""
    frame = axes()
    d_NR = scale * white(num_rows, 3)
    a_SR = np.random.default_rng(6).standard_normal((5, 3))
    found = fixed_frame.coupling(d_NR @ frame.u_DR.T, d_NR @ a_SR.T @ frame.v_DS.T, frame, ridge)
    assert found.spectral_norm == pytest.approx(np.linalg.norm(a_SR, 2) / (1 + ridge))
    assert found.explained_variance == pytest.approx(1 - (ridge / (1 + ridge)) ** 2)


def test_independent_residuals_explain_each_other_by_chance_alone():
    frame = axes(dim=24, rank=8)
    found = []
    for seed in range(30):
        parts_ND = np.random.default_rng(seed).standard_normal((100, 24))
        parts_ND -= parts_ND.mean(axis=0)
        u_ND, v_ND = parts_ND * (np.arange(24) < 8), parts_ND * (np.arange(24) >= 8)
        found.append(fixed_frame.coupling(u_ND, v_ND, frame, ridge=0))
    explained = np.array([one.explained_variance for one in found])
    assert found[0].chance_explained_variance == 8 / 99
    # Five standard errors of the mean of thirty.
    assert abs(explained.mean() - 8 / 99) < 5 * explained.std() / math.sqrt(30)


def test_a_residual_that_does_not_fill_u_has_the_smallest_map():
    frame = axes(dim=6, rank=3)
    d_ND = np.zeros((50, 6))
    d_ND[:, 0] = white(50, 1)[:, 0]
    z_ND = np.zeros((50, 6))
    z_ND[:, 4] = 2 * d_ND[:, 0]
    found = fixed_frame.coupling(d_ND, z_ND, frame, ridge=0)
    assert (found.spectral_norm, found.explained_variance) == (pytest.approx(2), pytest.approx(1))


def test_couplings_that_mean_nothing_are_refused():
    delta_ND, zeta_ND, _, frame = coupled(noise=1)
    with pytest.raises(DataError, match="4 samples fit any relation to 3"):
        fixed_frame.coupling(delta_ND[:4], zeta_ND[:4], frame)
    with pytest.raises(DataError, match="zero"):
        fixed_frame.coupling(delta_ND, 0 * zeta_ND, frame)
    with pytest.raises(DataError, match="zero"):
        fixed_frame.coupling(0 * delta_ND, zeta_ND, frame)
    with pytest.raises(DataError, match="shapes"):
        fixed_frame.coupling(delta_ND[:50], zeta_ND, frame)
    with pytest.raises(ConfigError, match="ridge"):
        fixed_frame.coupling(delta_ND, zeta_ND, frame, ridge=-1)
