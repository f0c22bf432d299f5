"""The gap decomposed in a fixed frame, and Phantom Drift.

Fixed frame: Delta = beta + gamma + delta + zeta (arXiv 2602.07026 sec. 3, app. A-C). U is the principal
subspace of a reference covariance, V its orthogonal complement, P_U and P_V their projectors, frozen from
the reference time on. Phantom Drift (sec. 3.4, thm B.14): for z = mu + eps, Delta_pi = E[z / ||z||] - mu /
||mu||.

Shapes: N pairs or rows, D embedding dim, R dimensions of U, S = D - R dimensions of V.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special

from revision_ray.align.strategies import fixed_frame
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry.spectra import (
    SMALLEST_NORM,
    covariance,
    directions,
    finite_rows,
    leading_directions,
    pearson,
    same_dim,
    same_shape,
    unit_rows,
)

# Below this a mean gap or a residual of unit rows is rounding.
EPSILON = 1e-12


@dataclass(frozen=True)
class FixedFrame:
    """Orthonormal bases of U and V, estimated from `num_rows` rows of the smaller side."""

    u_DR: np.ndarray
    v_DS: np.ndarray
    energy: float
    num_rows: int

    @property
    def rank(self) -> int:
        return self.u_DR.shape[1]


@dataclass(frozen=True)
class Decomposition:
    """Delta = e_x - e_y of N pairs and its four parts, all in the coordinates of the embedding, float64.

    beta: principal mean bias (PMB); gamma: passive orthogonal bias (POB); delta, zeta: the residual of each
    pair in U and in V.
    """

    gap_ND: np.ndarray
    mean_D: np.ndarray
    beta_D: np.ndarray
    gamma_D: np.ndarray
    delta_ND: np.ndarray
    zeta_ND: np.ndarray


@dataclass(frozen=True)
class Coupling:
    """Ridge regression of the residual in V on that in U."""

    spectral_norm: float
    explained_variance: float
    """R^2(zeta <- delta), in sample."""
    chance_explained_variance: float
    """R / (N - 1): the mean for R unrelated predictors of N samples, without ridge."""


def reference_frame(image_ND: np.ndarray, text_ND: np.ndarray, energy: float) -> FixedFrame:
    """Return the frame of Cov(e_x) + Cov(e_y): the fewest eigenvectors that hold the share `energy` span U.

    The sides need not be paired. With fewer rows than dimensions V contains directions in which these rows
    do not vary; compare `num_rows`.

    Raises:
        ConfigError: as `frame_of`.
        DataError: fewer than two rows a side, rows not of unit length, other dimensions, or no variance.
    """
    same_dim(image_ND, text_ND, "images and texts")
    reference_DD = covariance(unit_rows(image_ND, "images")) + covariance(unit_rows(text_ND, "texts"))
    return frame_of(reference_DD, energy, min(len(image_ND), len(text_ND)))


def frame_of(reference_DD: np.ndarray, energy: float, num_rows: int) -> FixedFrame:
    """Return the frame of a reference covariance, such as that of the moments of whole stores.

    Raises:
        ConfigError: `energy` is not between 0 and 1, or so large that nothing is left for V.
        DataError: the covariance is zero.
    """
    if not 0 < energy < 1:
        raise ConfigError(f"energy is {energy}; expected a share of the trace between 0 and 1")
    if not np.trace(reference_DD) > 0:
        raise DataError("the reference covariance is zero: these embeddings do not vary, and span no frame")
    u_DR, v_DS = fixed_frame(reference_DD, energy)
    if not v_DS.shape[1]:
        raise ConfigError(
            f"all {len(u_DR)} dimensions are needed for the share {energy}, so V is empty; lower energy"
        )
    return FixedFrame(u_DR, v_DS, energy, num_rows)


def decompose(image_ND: np.ndarray, text_ND: np.ndarray, frame: FixedFrame) -> Decomposition:
    """Return the gap of each pair (row i of both sides) and its parts in the frame.

    Rows need not be of unit length; the identities hold for any.

    Raises:
        DataError: the sides differ in shape, lie in another dimension than the frame, or are not finite.
    """
    same_shape(image_ND, text_ND, "images and their texts")
    same_dim(image_ND, frame.u_DR.T, "embeddings and frame")
    gap_ND = finite_rows(image_ND, "images") - finite_rows(text_ND, "texts")
    mean_D = gap_ND.mean(axis=0)
    residual_ND = gap_ND - mean_D
    return Decomposition(
        gap_ND=gap_ND,
        mean_D=mean_D,
        beta_D=frame.u_DR @ (frame.u_DR.T @ mean_D),
        gamma_D=frame.v_DS @ (frame.v_DS.T @ mean_D),
        delta_ND=(residual_ND @ frame.u_DR) @ frame.u_DR.T,
        zeta_ND=(residual_ND @ frame.v_DS) @ frame.v_DS.T,
    )


def identities(parts: Decomposition) -> dict[str, float]:
    """Return the error of each identity of the decomposition; all are rounding errors, at most 1e-10."""
    whole_ND = parts.beta_D + parts.gamma_D + parts.delta_ND + parts.zeta_ND
    energy = np.mean(np.sum(parts.gap_ND**2, axis=1))
    split = parts.mean_D @ parts.mean_D + parts.delta_ND.var(axis=0).sum() + parts.zeta_ND.var(axis=0).sum()
    return {
        "Delta = beta + gamma + delta + zeta": float(np.abs(parts.gap_ND - whole_ND).max()),
        "beta + gamma = m": float(np.linalg.norm(parts.beta_D + parts.gamma_D - parts.mean_D)),
        "E delta = 0": float(np.linalg.norm(parts.delta_ND.mean(axis=0))),
        "E zeta = 0": float(np.linalg.norm(parts.zeta_ND.mean(axis=0))),
        "<delta, zeta> = 0": float(np.abs(np.vecdot(parts.delta_ND, parts.zeta_ND)).max()),
        "E||Delta||^2 = ||m||^2 + tr Cov(delta) + tr Cov(zeta)": float(abs(energy - split)),
    }


def block_covariances(parts: Decomposition, frame: FixedFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return Cov(delta) (R, R) in the basis of U and Cov(zeta) (S, S) in that of V."""
    return covariance(parts.delta_ND @ frame.u_DR), covariance(parts.zeta_ND @ frame.v_DS)


def principal_angles(a_DR: np.ndarray, b_DS: np.ndarray) -> np.ndarray:
    """Return the principal angles between two subspaces, ascending, in radians.

    Raises:
        DataError: the dimensions differ, or a basis is empty.
    """
    same_dim(a_DR.T, b_DS.T, "the two subspaces")
    if not a_DR.shape[1] or not b_DS.shape[1]:
        raise DataError("a subspace without vectors has no angles")
    return scipy.linalg.subspace_angles(a_DR, b_DS)[::-1]


def sin_theta(a_DR: np.ndarray, b_DS: np.ndarray) -> float:
    """Return the sine of the largest principal angle; for U and U_t it is the baseline of `leak_ref`."""
    return float(np.sin(principal_angles(a_DR, b_DS)[-1]))


def leak_ref(second_DD: np.ndarray, frame: FixedFrame) -> float:
    """Return the share of the gradients' RMS in V, sqrt(E||P_V g||^2 / E||g||^2), from their moment E[g g'].

    A ratio of lengths, not of energies: for gradients within U_t it is at most sin(theta) of U and U_t, its
    baseline. NaN if the gradients are zero or not finite.

    Raises:
        DataError: the gradients have another dimension than the frame.
    """
    same_dim(second_DD, frame.u_DR.T, "gradients and frame")
    total = float(np.trace(second_DD))
    in_v = float(np.einsum("ds,de,es->", frame.v_DS, second_DD, frame.v_DS, optimize=True))
    return math.sqrt(max(in_v, 0.0) / total) if total > 0 else math.nan


def pob_drift(gamma_D: np.ndarray, gamma_0_D: np.ndarray) -> float:
    """Return ||gamma(t) - gamma(t0)|| / max(||gamma(t0)||, eps)."""
    same_shape(gamma_D, gamma_0_D, "gamma(t) and gamma(t0)")
    return float(np.linalg.norm(gamma_D - gamma_0_D) / max(np.linalg.norm(gamma_0_D), EPSILON))


def pob_stability(gamma_D: np.ndarray, gamma_previous_D: np.ndarray) -> float:
    """Return cos(gamma(t), gamma(t-1)).

    Raises:
        DataError: one of them is zero.
    """
    same_shape(gamma_D, gamma_previous_D, "gamma(t) and gamma(t-1)")
    lengths = np.linalg.norm(gamma_D), np.linalg.norm(gamma_previous_D)
    if min(lengths) < EPSILON:
        raise DataError("gamma is zero: the mean gap has no part in V, so its direction cannot be compared")
    return float(np.clip(gamma_D @ gamma_previous_D / (lengths[0] * lengths[1]), -1.0, 1.0))


def rho_eig(delta_eigenvalues_R: np.ndarray, gradient_eigenvalues_R: np.ndarray) -> float:
    """Return the correlation of the sorted eigenvalues of Cov(delta) and the gradient covariance in U.

    Raises:
        DataError: their numbers differ, there is only one, or all of a side are equal.
    """
    same_shape(delta_eigenvalues_R, gradient_eigenvalues_R, "the two spectra")
    return pearson(np.sort(delta_eigenvalues_R), np.sort(gradient_eigenvalues_R), "eigenvalues in U")


def leading_angle_degrees(gamma: np.ndarray, zeta_covariance: np.ndarray) -> float:
    """Return the angle between gamma and the first eigenvector of Cov(zeta): 0 to 90 degrees.

    Both are in the coordinates of the embedding, (D,) and (D, D), or in the basis of V, (S,) and (S, S). In
    many dimensions any vector shows nearly 90 degrees: compare `angle_by_chance_degrees`.

    Raises:
        DataError: gamma is zero, zeta does not vary, or the dimensions differ.
    """
    same_dim(gamma, zeta_covariance, "gamma and Cov(zeta)")
    length = np.linalg.norm(gamma)
    if length < EPSILON:
        raise DataError("gamma is zero: the mean gap has no part in V, so it has no direction")
    first = leading_directions(zeta_covariance, 1)[:, 0]
    across = np.linalg.norm(gamma - first * (first @ gamma))
    return math.degrees(math.atan2(across, abs(float(first @ gamma))))


def angle_by_chance_degrees(num_dims: int) -> float:
    """Return arccos of the mean |cosine| of a random direction and a fixed line in `num_dims` dimensions."""
    log_mean = scipy.special.gammaln(num_dims / 2) - scipy.special.gammaln((num_dims + 1) / 2)
    return math.degrees(math.acos(min(math.exp(log_mean) / math.sqrt(math.pi), 1.0)))


def coupling(delta_ND: np.ndarray, zeta_ND: np.ndarray, frame: FixedFrame, ridge: float = 1e-3) -> Coupling:
    """Fit the ridge regression of the residual in V on that in U: L = Z D' (D D' + lambda I)^-1 (app. C).

    D and Z are the residuals in the bases of U and V, one column a sample. lambda = `ridge` tr(D D') / R, so
    that a ridge means the same for any number and scale of samples.

    Raises:
        ConfigError: `ridge` is negative.
        DataError: not more samples than dimensions of U, other shapes, or a side that does not vary.
    """
    if ridge < 0:
        raise ConfigError(f"ridge is {ridge}; expected 0 or more")
    same_shape(delta_ND, zeta_ND, "residuals in U and in V")
    same_dim(delta_ND, frame.u_DR.T, "residuals and frame")
    if len(delta_ND) <= frame.rank + 1:
        raise DataError(
            f"{len(delta_ND)} samples fit any relation to {frame.rank} dimensions of U; take more samples "
            "or a frame of less energy"
        )
    d_NR = finite_rows(delta_ND, "residuals in U") @ frame.u_DR
    z_NS = finite_rows(zeta_ND, "residuals in V") @ frame.v_DS
    gram_RR, cross_RS = d_NR.T @ d_NR, d_NR.T @ z_NS
    variance = float(np.sum(z_NS**2))
    if min(variance, np.trace(gram_RR)) <= EPSILON**2 * len(delta_ND):
        raise DataError("the residual in U or in V is zero, so one cannot predict the other")
    penalty = ridge * np.trace(gram_RR) / frame.rank
    # Least squares of least norm where the residual in U does not fill U and there is no ridge.
    map_RS = np.linalg.pinv(gram_RR + penalty * np.eye(frame.rank), hermitian=True) @ cross_RS
    explained = 2 * np.sum(map_RS * cross_RS) - np.sum(map_RS * (gram_RR @ map_RS))
    return Coupling(
        spectral_norm=float(np.linalg.norm(map_RS, 2)),
        explained_variance=float(explained / variance),
        chance_explained_variance=frame.rank / (len(delta_ND) - 1),
    )


# A shorter drift is a rounding error: the difference of two directions.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class PhantomDrift:
    """The drift of a sample, and its second-order prediction from the same sample's mean and covariance.

    Both belong to the sample's own distribution, so they differ by the higher orders, not by noise.
    `relative_error` is ||measured - predicted|| / ||measured||. It and `cosine` are NaN if a drift is zero
    within rounding.
    """

    measured_D: np.ndarray
    predicted_D: np.ndarray
    measured_norm: float
    predicted_norm: float
    cosine: float
    relative_error: float


def second_order(mean_D: np.ndarray, covariance_DD: np.ndarray) -> np.ndarray:
    """Return Delta_pi to second order in eps, float64 (D,). With r = ||mu|| and a = mu / r it is

    -(1/r^2) Sigma a - (1/(2 r^2)) a tr(Sigma) + (3/(2 r^2)) a (a' Sigma a).

    Raises:
        DataError: the mean is zero, or the dimensions differ.
    """
    same_dim(mean_D, covariance_DD, "mean and covariance")
    r = _length(mean_D)
    a_D = mean_D / r
    spread_D = covariance_DD @ a_D
    return (-spread_D - a_D * np.trace(covariance_DD) / 2 + 1.5 * a_D * (a_D @ spread_D)) / r**2


def measured(rows_ND: np.ndarray) -> np.ndarray:
    """Return Delta_pi of a sample of rows before normalisation, float64 (D,).

    Raises:
        DataError: rows are not finite or have no direction, or their mean is zero.
    """
    unit_ND = directions(rows_ND, "rows before normalisation")
    mean_D = finite_rows(rows_ND).mean(axis=0)
    return unit_ND.mean(axis=0) - mean_D / _length(mean_D)


def compare(rows_ND: np.ndarray) -> PhantomDrift:
    """Measure and predict the drift of a sample of rows before normalisation.

    Raises:
        DataError: as `measured`, or fewer than two rows.
    """
    rows_ND = finite_rows(rows_ND, "rows before normalisation", minimum=2)
    measured_D = measured(rows_ND)
    predicted_D = second_order(rows_ND.mean(axis=0), covariance(rows_ND))
    lengths = float(np.linalg.norm(measured_D)), float(np.linalg.norm(predicted_D))
    moved = min(lengths) > _ROUNDING
    error = float(np.linalg.norm(measured_D - predicted_D))
    return PhantomDrift(
        measured_D=measured_D,
        predicted_D=predicted_D,
        measured_norm=lengths[0],
        predicted_norm=lengths[1],
        cosine=float(np.clip(measured_D @ predicted_D / math.prod(lengths), -1, 1)) if moved else math.nan,
        relative_error=error / lengths[0] if moved else math.nan,
    )


def _length(mean_D: np.ndarray) -> float:
    length = float(np.linalg.norm(mean_D))
    if not length >= SMALLEST_NORM:  # false for NaN, too
        raise DataError(f"the mean has length {length:.1e}: it has no direction that could drift")
    return length
