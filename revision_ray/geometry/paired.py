"""Figures of rows that belong together: residuals, and the gap in a fixed frame (arXiv 2602.07026 sec. 3).

Shapes: N pairs, D embedding dim, R and S dimensions of U and V.
"""

from typing import Any

import numpy as np
from scipy.stats import bootstrap

from revision_ray.errors import DataError
from revision_ray.geometry.cells import NEEDS_PAIRS, Cell, cell, mean_cell, possible
from revision_ray.geometry.fixed_frame import (
    Frame,
    angle_by_chance_degrees,
    block_covariances,
    coupling,
    decompose,
    identities,
    leading_angle_degrees,
)
from revision_ray.geometry.paper import METRICS
from revision_ray.geometry.spectra import (
    covariance,
    cumulative_energy,
    effective_condition_number,
    effective_dimension,
    eigenvalues_of,
    residual_anisotropy,
)

PAIRED = tuple(key for key, metric in METRICS.items() if metric.paired)
# Of the coupling, as a share of the mean eigenvalue of D D': it settles directions of little variance.
RIDGE = 1e-3


def without_pairs(reason: str = NEEDS_PAIRS) -> dict[str, Cell]:
    """Every paired figure, with the reason why it is not there."""
    return {key: cell(None, note=reason) for key in PAIRED}


def pair_figures(
    image_ND: np.ndarray, text_ND: np.ndarray, frame: Frame, residual_energy: float, num: int, seed: int
) -> tuple[dict[str, Cell], list[float]]:
    """Every paired figure of unit images and their aligned texts, and E(K) of the residual for K = 1..D."""
    difference_ND = image_ND - text_ND
    residual_ND = difference_ND - difference_ND.mean(axis=0)
    values_D = eigenvalues_of(covariance(residual_ND))
    n, dim = image_ND.shape
    text_norms_N = np.linalg.norm(text_ND, axis=1)
    cosines_N = np.vecdot(image_ND, text_ND) / np.where(text_norms_N > 0, text_norms_N, 1)
    energy_D = cumulative_energy(values_D) if values_D[0] else np.ones(dim)
    return {
        "pair_cosine": mean_cell(cosines_N, num, seed),
        "residual_ratio": _ratio(residual_ND, difference_ND, num, seed),
        "residual_anisotropy": possible(lambda: residual_anisotropy(values_D), n=n),
        "effective_dimension": possible(lambda: effective_dimension(values_D) / dim, n=n),
        "directions_for_90": cell(int(np.searchsorted(energy_D, 0.9 - 1e-12)) + 1, n=n),
        **_in_frame(image_ND, text_ND, frame, residual_energy, num, seed),
    }, energy_D.tolist()


def _ratio(residual_ND: np.ndarray, difference_ND: np.ndarray, num: int, seed: int) -> Cell:
    """Mean distance after over before; resampled with the mean difference of all pairs."""
    after_N, before_N = (np.linalg.norm(rows, axis=1) for rows in (residual_ND, difference_ND))
    if not before_N.mean():
        return cell(None, n=len(before_N), note="every pair coincides")
    value = float(after_N.mean() / before_N.mean())
    if not num or len(before_N) < 2:  # one pair has no spread
        return cell(value, n=len(before_N))
    found = bootstrap(
        (after_N, before_N),
        lambda after, before, axis=-1: after.mean(axis=axis) / before.mean(axis=axis),
        paired=True,
        n_resamples=num,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return cell(value, n=len(before_N), bounds=(float(found.low), float(found.high)))


def _in_frame(
    image_ND: np.ndarray, text_ND: np.ndarray, frame: Frame, energy: float, num: int, seed: int
) -> dict[str, Cell]:
    parts = decompose(image_ND, text_ND, frame)
    n = len(image_ND)
    squared_N = np.sum((image_ND - text_ND) ** 2, axis=1)
    found: dict[str, Any] = {
        "delta_trace": mean_cell(np.sum(parts.delta_ND**2, axis=1), num, seed),
        "zeta_trace": mean_cell(np.sum(parts.zeta_ND**2, axis=1), num, seed),
        "squared_distance": mean_cell(squared_N, num, seed),
        "identity_error": cell(max(identities(parts).values()), n=n),
    }
    covariances = block_covariances(parts, frame)
    for key, block_RR in zip(("kappa_u", "kappa_v"), covariances, strict=True):
        found[key] = _kappa(block_RR, n, energy)
    found["gamma_angle"] = possible(
        lambda: leading_angle_degrees(frame.v_DS.T @ parts.gamma_D, covariances[1]),
        n=n,
        by_chance=angle_by_chance_degrees(frame.v_DS.shape[1]),
    )
    try:
        linked = coupling(parts.delta_ND, parts.zeta_ND, frame, RIDGE)
    except DataError as error:
        return found | {
            key: cell(None, n=n, note=str(error)) for key in ("coupling_norm", "coupling_explained")
        }
    found["coupling_norm"] = cell(linked.spectral_norm, n=n, ridge=RIDGE)
    found["coupling_explained"] = cell(
        linked.explained_variance, n=n, ridge=RIDGE, by_chance=linked.chance_explained_variance
    )
    return found


def _kappa(covariance_RR: np.ndarray, n: int, energy: float) -> Cell:
    values_R = eigenvalues_of(covariance_RR)
    if not values_R[0]:
        return cell(None, n=n, note="nothing varies in this block")
    kappa, rank = effective_condition_number(values_R, energy)
    return cell(kappa, n=n, energy=energy, rank=rank, of=len(values_R))
