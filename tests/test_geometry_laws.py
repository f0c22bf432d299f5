"""What holds for every figure: neither the orientation of the space nor the order of rows changes it."""

import math

import numpy as np
import pytest
from gaussians import rotation, unit_clouds

from revision_ray.geometry import angles, fixed_frame, neighbours, spectra


def of_one_side(rows_ND: np.ndarray) -> dict[str, float]:
    values_D = spectra.eigenvalues_of(spectra.covariance(rows_ND))
    drift = fixed_frame.compare(rows_ND)
    return {
        "alpha": spectra.spectrum_exponent(values_D, first=3),
        "condition number": spectra.condition_number(values_D),
        "kappa_eff": spectra.effective_condition_number(values_D, 0.9)[0],
        "effective rank": spectra.effective_rank(values_D),
        "d_eff": spectra.effective_dimension(values_D),
        "A_r": spectra.residual_anisotropy(values_D),
        "E(3)": spectra.cumulative_energy(values_D)[2],
        "Phantom Drift": drift.measured_norm,
        "its prediction": drift.predicted_norm,
        "their cosine": drift.cosine,
        "its error": drift.relative_error,
    }


def of_both(image_ND: np.ndarray, text_ND: np.ndarray) -> dict[str, float]:
    """Figures of unpaired sides. All pairs of rows, so that no sample depends on their order."""
    cov_x, cov_y = spectra.covariance(image_ND), spectra.covariance(text_ND)
    near = neighbours.nearest_others(np.concatenate([image_ND, text_ND]), 7), len(image_ND)
    entropy_N = neighbours.origin_entropies(*near)
    return {
        "C_lambda": spectra.spectral_correlation(
            spectra.eigenvalues_of(cov_x), spectra.eigenvalues_of(cov_y)
        ),
        "O_q": spectra.subspace_overlap(cov_x, cov_y, 4)[0],
        "G_Sigma": spectra.covariance_gap(cov_x, cov_y),
        "mixing rate": neighbours.cross_modal_shares(*near).mean(),
        "M_k^Z": entropy_N[len(image_ND) :].mean(),
        "M_k^X": entropy_N[: len(image_ND)].mean(),
    }


def overlap(before_ND: np.ndarray, after_ND: np.ndarray) -> float:
    nearest_NK = [neighbours.nearest_others(side, 7) for side in (before_ND, after_ND)]
    return neighbours.kept_shares(*nearest_NK).mean()


def of_pairs(image_ND: np.ndarray, text_ND: np.ndarray) -> dict[str, float]:
    frame = fixed_frame.reference_frame(image_ND, text_ND, 0.8)
    parts = fixed_frame.decompose(image_ND, text_ND, frame)
    coupling = fixed_frame.coupling(parts.delta_ND, parts.zeta_ND, frame)
    delta_RR, zeta_SS = fixed_frame.block_covariances(parts, frame)
    delta_R = spectra.eigenvalues_of(delta_RR)
    text_D4 = spectra.leading_directions(spectra.covariance(text_ND), 4)
    return {
        "Phi": angles.row_cosines(image_ND, text_ND).mean(),
        "Psi": angles.cosine_correlation(image_ND, text_ND),
        "Omega_k": overlap(image_ND, text_ND),
        "residual ratio": angles.residual_ratio(*angles.pair_distances(image_ND, text_ND)),
        "rank of U": frame.rank,
        "PMB": float(np.linalg.norm(parts.beta_D)),
        "POB": float(np.linalg.norm(parts.gamma_D)),
        "kappa_eff in U": spectra.effective_condition_number(delta_R, 0.9)[0],
        "kappa_eff in V": spectra.effective_condition_number(spectra.eigenvalues_of(zeta_SS), 0.9)[0],
        "angle": fixed_frame.leading_angle_degrees(parts.gamma_D, spectra.covariance(parts.zeta_ND)),
        "angle in V": fixed_frame.leading_angle_degrees(frame.v_DS.T @ parts.gamma_D, zeta_SS),
        "coupling": coupling.spectral_norm,
        "R^2": coupling.explained_variance,
        "leak_ref": fixed_frame.leak_ref(parts.gap_ND.T @ parts.gap_ND, frame),
        "rho_eig": fixed_frame.rho_eig(delta_R, np.arange(1, frame.rank + 1)),
        "sin theta": fixed_frame.sin_theta(frame.u_DR, text_D4),
        "drift": fixed_frame.pob_drift(image_ND[0], text_ND[0]),
        "stability": fixed_frame.pob_stability(image_ND[0], text_ND[0]),
    }


def every_figure(image_ND: np.ndarray, text_ND: np.ndarray) -> dict[str, float]:
    figures = of_one_side(image_ND) | of_both(image_ND, text_ND) | of_pairs(image_ND, text_ND)
    histograms = [angles.angle_histogram(side, bins=8) for side in (image_ND, text_ND)]
    return figures | {"JS divergence": angles.js_divergence(*histograms)}


@pytest.mark.parametrize("seed", range(3))
def test_no_figure_depends_on_the_orientation_of_the_space(seed):
    image_ND, text_ND = unit_clouds(120, 16, seed)
    q_DD = rotation(16, seed)
    plain = every_figure(image_ND, text_ND)
    assert all(math.isfinite(value) for value in plain.values())
    # Rounding of 1e-16 grows by condition numbers of up to 1e3 and by quotients of small differences.
    assert every_figure(image_ND @ q_DD, text_ND @ q_DD) == pytest.approx(plain, rel=1e-8)


def test_no_figure_depends_on_the_order_of_rows():
    image_ND, text_ND = unit_clouds(120, 16)
    plain = every_figure(image_ND, text_ND)
    order = np.append(0, 1 + np.random.default_rng(0).permutation(119))  # drift looks at row 0
    assert every_figure(image_ND[order], text_ND[order]) == pytest.approx(plain, rel=1e-8)
    # Figures of unpaired sides do not know which text belongs to which image.
    apart = of_both(image_ND, text_ND)
    assert of_both(image_ND, text_ND[order]) == pytest.approx(apart, rel=1e-8)


def test_figures_that_compare_two_sides_alike_are_symmetric():
    image_ND, text_ND = unit_clouds(120, 16)
    one, other = of_both(image_ND, text_ND), of_both(text_ND, image_ND)
    for name in ("C_lambda", "O_q", "mixing rate"):
        assert one[name] == pytest.approx(other[name])
    assert (one["M_k^Z"], one["M_k^X"]) == (other["M_k^X"], other["M_k^Z"])
    assert one["G_Sigma"] != pytest.approx(other["G_Sigma"])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_figures_of_directions_and_shares_ignore_the_scale_of_rows(scale):
    image_ND, text_ND = unit_clouds(120, 16)
    plain = of_one_side(image_ND) | of_both(image_ND, text_ND)
    scaled = of_one_side(scale * image_ND) | of_both(scale * image_ND, scale * text_ND)
    assert scaled == pytest.approx(plain, rel=1e-8)
    for figure in (angles.row_cosines, angles.cosine_correlation, overlap):
        assert figure(image_ND, scale * text_ND) == pytest.approx(figure(image_ND, text_ND), rel=1e-8)
