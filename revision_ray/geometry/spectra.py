"""Checks of rows, covariances and their spectra, and the projection onto two leading directions.

arXiv 2602.07026 sec. 6 and app. D-G; AnisoAlign, arXiv 2605.07825. Eigenvalues come in descending order, in
squared units of the embedding (dimensionless for unit rows).

Shapes: N rows, D embedding dim, Q leading directions.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from revision_ray.core.errors import ConfigError, DataError

# Rounding to float16 changes a row's length by a factor of up to 2^-11 = 4.9e-4.
UNIT_TOLERANCE = 1e-3
# A shorter row has no direction; the same limit as in align/maps.py.
SMALLEST_NORM = 1e-8


def id_keys(ids: Sequence[str], key: bytes = b"") -> np.ndarray:
    """Return a 64-bit hash (N,) of each id; another key gives other hashes."""
    digests = (hashlib.blake2b(row_id.encode(), digest_size=8, key=key).digest() for row_id in ids)
    return np.frombuffer(b"".join(digests), "<u8")


def finite_rows(rows_ND: np.ndarray, what: str = "the sample", minimum: int = 1) -> np.ndarray:
    """Return the rows in float64 (without a copy if they are) after checking that they are finite.

    Raises:
        DataError: not a matrix, fewer than `minimum` rows, no columns, or a row is NaN or infinite.
    """
    rows_ND = np.asarray(rows_ND)
    if rows_ND.ndim != 2 or not rows_ND.shape[1]:
        raise DataError(f"{what} has shape {rows_ND.shape}; expected rows by embedding dimensions")
    if len(rows_ND) < minimum:
        raise DataError(f"{what} has {len(rows_ND)} rows; at least {minimum} are needed for this figure")
    rows_ND = rows_ND.astype(np.float64, copy=False)
    finite_N = np.isfinite(rows_ND).all(axis=1)
    if not finite_N.all():
        raise DataError(
            f"{what}: row {int(np.argmin(finite_N))} is NaN or infinite, as are "
            f"{int((~finite_N).sum()) - 1} others; leave such rows out before measuring"
        )
    return rows_ND


def directions(rows_ND: np.ndarray, what: str = "the sample", minimum: int = 1) -> np.ndarray:
    """Return the rows scaled to unit length, in float64.

    Raises:
        DataError: as `finite_rows`, or a row is zero.
    """
    rows_ND = finite_rows(rows_ND, what, minimum)
    norms_N = np.linalg.norm(rows_ND, axis=1)
    if norms_N.min() < SMALLEST_NORM:
        raise DataError(
            f"{what}: row {int(np.argmin(norms_N))} has length {norms_N.min():.1e}, so it has no direction; "
            "leave such rows out before measuring"
        )
    return rows_ND / norms_N[:, None]


def unit_rows(rows_ND: np.ndarray, what: str = "the sample", minimum: int = 1) -> np.ndarray:
    """Return the rows in float64 after checking that they have unit length within the rounding of float16.

    Raises:
        DataError: as `finite_rows`, or a row is not of unit length.
    """
    rows_ND = finite_rows(rows_ND, what, minimum)
    error_N = np.abs(np.linalg.norm(rows_ND, axis=1) - 1)
    if error_N.max() > UNIT_TOLERANCE:
        worst = int(np.argmax(error_N))
        raise DataError(
            f"{what}: row {worst} has length {np.linalg.norm(rows_ND[worst]):.4g}; the theory is about "
            "embeddings of unit length: normalise them first"
        )
    return rows_ND


def same_shape(one_ND: np.ndarray, other_ND: np.ndarray, what: str = "the two samples") -> None:
    """Check that row i of one can belong to row i of the other.

    Raises:
        DataError: the shapes differ.
    """
    if np.shape(one_ND) != np.shape(other_ND):
        raise DataError(
            f"{what} have shapes {np.shape(one_ND)} and {np.shape(other_ND)}; "
            "row i of one must belong to row i of the other"
        )


def same_dim(one_ND: np.ndarray, other_ND: np.ndarray, what: str = "the two samples") -> None:
    """Check that both have the same embedding dimension.

    Raises:
        DataError: the embedding dimensions differ.
    """
    if np.shape(one_ND)[-1] != np.shape(other_ND)[-1]:
        raise DataError(
            f"{what} have dimensions {np.shape(one_ND)[-1]} and {np.shape(other_ND)[-1]}; "
            "they must come from one encoder"
        )


# A covariance computed by subtraction has negative eigenvalues of at most this share of the largest.
_NEGATIVE_BY_ROUNDING = 1e-8
# Rows that differ by less than this share of their length are constant; float32 cannot resolve that.
_CONSTANT = 1e-13


def covariance(rows_ND: np.ndarray) -> np.ndarray:
    """Return the centred covariance E[(e - mu)(e - mu)'], float64 (D, D), divided by N.

    Zero if the rows differ from their mean by rounding alone.

    Raises:
        DataError: fewer than two rows, or NaN or infinite ones.
    """
    rows_ND = finite_rows(rows_ND, minimum=2)
    centred_ND = rows_ND - rows_ND.mean(axis=0)
    if np.linalg.norm(centred_ND) <= _CONSTANT * np.linalg.norm(rows_ND):
        return np.zeros((rows_ND.shape[1],) * 2)
    return centred_ND.T @ centred_ND / len(rows_ND)


def eigenvalues_of(covariance_DD: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of a covariance, descending, float64 (D,); tiny negative ones become 0.

    Raises:
        DataError: the matrix is not square, not finite, not symmetric, or has a truly negative eigenvalue.
    """
    values_D = scipy.linalg.eigvalsh(_covariance(covariance_DD))[::-1]
    if values_D[-1] < -_NEGATIVE_BY_ROUNDING * max(values_D[0], 0.0):
        raise DataError(f"the smallest eigenvalue is {values_D[-1]:.2e}: this is not a covariance")
    return np.maximum(values_D, 0.0)


def leading_directions(covariance_DD: np.ndarray, num_directions: int) -> np.ndarray:
    """Return the eigenvectors (D, Q) of the `num_directions` largest eigenvalues, the largest first.

    Raises:
        ConfigError: `num_directions` is not between 1 and D.
        DataError: as `eigenvalues_of`, or these eigenvalues are not all positive, which leaves the
            directions undetermined.
    """
    dim = len(covariance_DD)
    if not 1 <= num_directions <= dim:
        raise ConfigError(f"{num_directions} leading directions of {dim}; expected 1 to {dim}")
    values_Q, vectors_DQ = scipy.linalg.eigh(
        _covariance(covariance_DD), subset_by_index=[dim - num_directions, dim - 1]
    )
    if values_Q[0] <= _rounding(values_Q[-1], dim):
        raise DataError(
            f"the covariance has fewer than {num_directions} directions of positive variance; take more rows "
            "than that, or fewer directions"
        )
    return vectors_DQ[:, ::-1]


def numerical_rank(eigenvalues_D: np.ndarray) -> int:
    """Count the eigenvalues that are positive beyond rounding: above D eps times the largest."""
    values_D = _spectrum(eigenvalues_D)
    return int(np.sum(values_D > _rounding(values_D[0], len(values_D))))


def spectrum_exponent(eigenvalues_D: np.ndarray, first: int = 10, last: int | None = None) -> float:
    """Return alpha, minus the slope of log eigenvalue on log rank over ranks `first` to `last` (from 1).

    A least-squares fit. `last` is min(256, D - 1) by default. Normalising the trace changes nothing, for it
    adds a constant to every logarithm.

    Raises:
        ConfigError: the ranks are not 1 <= first < last <= D.
        DataError: an eigenvalue of these ranks is zero.
    """
    values_D = _spectrum(eigenvalues_D)
    last = min(256, len(values_D) - 1) if last is None else last
    if not 1 <= first < last <= len(values_D):
        raise ConfigError(f"ranks {first} to {last} of {len(values_D)} eigenvalues; at least two are needed")
    logarithms = _logarithms(values_D, last)[first - 1 :]
    log_ranks = np.log(np.arange(first, last + 1))
    log_ranks -= log_ranks.mean()
    return -float(log_ranks @ logarithms / (log_ranks @ log_ranks))


def condition_number(eigenvalues_D: np.ndarray, floor: float | None = None) -> float:
    """Return the largest over the smallest eigenvalue; infinite if the smallest is zero within rounding.

    With `floor`, eigenvalues below that share of the largest are left out: the result is at most 1/floor and
    has to be quoted with it.

    Raises:
        ConfigError: `floor` is not between 0 and 1.
    """
    values_D = _spectrum(eigenvalues_D)
    if floor is None:
        singular = values_D[-1] <= _rounding(values_D[0], len(values_D))
        return math.inf if singular else float(values_D[0] / values_D[-1])
    if not 0 < floor <= 1:
        raise ConfigError(
            f"floor is {floor}; expected a share of the largest eigenvalue, above 0 and up to 1"
        )
    return float(values_D[0] / values_D[values_D >= floor * values_D[0]][-1])


def effective_condition_number(eigenvalues_D: np.ndarray, energy: float) -> tuple[float, int]:
    """Return (kappa_eff, rank): largest over smallest of the leading eigenvalues that hold `energy`.

    `rank` is the smallest that reaches that share of the trace. Quote the share with the figure.

    Raises:
        ConfigError: `energy` is not between 0 and 1.
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}; expected a share of the trace, above 0 and up to 1")
    values_D = _spectrum(eigenvalues_D)
    # The sum rounds, so a share of exactly `energy` may come out an ulp below it; nor may zeros be reached.
    reached = int(np.searchsorted(cumulative_energy(values_D), energy - 1e-12)) + 1
    rank = min(reached, numerical_rank(values_D))
    return float(values_D[0] / values_D[rank - 1]), rank


def effective_rank(eigenvalues_D: np.ndarray) -> float:
    """Return exp(entropy of the eigenvalue shares): D for a flat spectrum, 1 for a single direction."""
    values_D = _spectrum(eigenvalues_D)
    share_D = values_D / values_D.sum()
    share_D = share_D[share_D > 0]
    return float(np.exp(-np.sum(share_D * np.log(share_D))))


def spectral_correlation(eigenvalues_x_D: np.ndarray, eigenvalues_y_D: np.ndarray) -> float:
    """Return C_lambda, the correlation of the log spectra of Sigma_x and Sigma_y.

    Raises:
        DataError: the spectra differ in length, hold a zero, or are flat.
    """
    same_shape(eigenvalues_x_D, eigenvalues_y_D, "the two spectra")
    dim = len(eigenvalues_x_D)
    return pearson(
        _logarithms(_spectrum(eigenvalues_x_D), dim),
        _logarithms(_spectrum(eigenvalues_y_D), dim),
        "log spectra",
    )


def subspace_overlap(
    covariance_x_DD: np.ndarray, covariance_y_DD: np.ndarray, num_directions: int
) -> tuple[float, float]:
    """Return (O_q, q/D): O_q = (1/q) ||U_x,q' U_y,q||_F^2 of the q leading directions of each side.

    q/D is the mean for two random subspaces. If eigenvalues q and q + 1 are equal, the subspace and so the
    figure are not determined.

    Raises:
        ConfigError: q is not between 1 and D.
        DataError: the dimensions differ, or a side has fewer than q directions of positive variance.
    """
    same_shape(covariance_x_DD, covariance_y_DD, "the two covariances")
    shared_QQ = leading_directions(covariance_x_DD, num_directions).T @ leading_directions(
        covariance_y_DD, num_directions
    )
    return float(np.sum(shared_QQ**2) / num_directions), num_directions / len(covariance_x_DD)


def cumulative_energy(eigenvalues_D: np.ndarray) -> np.ndarray:
    """Return E(K) for K = 1..D, the share of the trace that the K largest eigenvalues hold, float64 (D,)."""
    total_D = np.cumsum(_spectrum(eigenvalues_D))
    return total_D / total_D[-1]


def residual_anisotropy(eigenvalues_D: np.ndarray) -> float:
    """Return A_r = lambda_max / (tr/D): 1 if isotropic, D for a single direction."""
    values_D = _spectrum(eigenvalues_D)
    return float(values_D[0] / values_D.mean())


def effective_dimension(eigenvalues_D: np.ndarray) -> float:
    """Return d_eff = tr(Sigma)^2 / tr(Sigma^2), between 1 and D; tables show d_eff / D."""
    values_D = _spectrum(eigenvalues_D)
    values_D = values_D / values_D[0]  # squares of small numbers underflow
    return float(values_D.sum() ** 2 / np.sum(values_D**2))


def covariance_gap(covariance_x_DD: np.ndarray, covariance_y_DD: np.ndarray) -> float:
    """Return G_Sigma = ||Sigma_x - Sigma_y||_F / ||Sigma_x||_F, where x is the image side.

    Raises:
        DataError: the dimensions differ, or the image side does not vary.
    """
    same_shape(covariance_x_DD, covariance_y_DD, "the two covariances")
    x_DD, y_DD = _covariance(covariance_x_DD), _covariance(covariance_y_DD)
    size = np.linalg.norm(x_DD)
    if not size:
        raise DataError("the image covariance is zero: the image embeddings do not vary")
    return float(np.linalg.norm(x_DD - y_DD) / size)


def pearson(one: np.ndarray, other: np.ndarray, what: str) -> float:
    """Return the Pearson correlation of two sequences of equal length.

    Raises:
        DataError: fewer than two values, or a sequence is constant within rounding.
    """
    centred = []
    for values in (np.asarray(one, np.float64), np.asarray(other, np.float64)):
        if len(values) < 2:
            raise DataError(f"{what}: {len(values)} values have no correlation; at least two are needed")
        deviation = values - values.mean()
        spread = np.linalg.norm(deviation)
        if spread <= 1e-12 * np.linalg.norm(values):
            raise DataError(
                f"{what}: all values of one side are {values[0]:.4g}, so they have no correlation"
            )
        centred.append(deviation / spread)
    return float(np.clip(centred[0] @ centred[1], -1.0, 1.0))


def _rounding(largest: float, dim: int) -> float:
    """Return the largest value that rounding gives an eigenvalue of zero."""
    return float(largest) * dim * np.finfo(np.float64).eps


def _logarithms(values_D: np.ndarray, count: int) -> np.ndarray:
    """Return the logarithms of the first `count` eigenvalues."""
    rank = numerical_rank(values_D)
    if rank < count:
        raise DataError(
            f"only {rank} of the first {count} eigenvalues are positive, and zero has no logarithm; take "
            "more rows than dimensions, or look at fewer ranks"
        )
    return np.log(values_D[:count])


def _spectrum(eigenvalues_D: np.ndarray) -> np.ndarray:
    values_D = np.asarray(eigenvalues_D, np.float64)
    if values_D.ndim != 1 or not len(values_D) or not np.isfinite(values_D).all() or values_D.min() < 0:
        raise DataError("a spectrum is a sequence of finite eigenvalues, none negative; see eigenvalues_of")
    if not values_D.max():
        raise DataError("every eigenvalue is zero: these embeddings do not vary")
    assert (np.diff(values_D) <= 0).all(), "eigenvalues come in descending order"
    return values_D


def _covariance(covariance_DD: np.ndarray) -> np.ndarray:
    matrix_DD = np.asarray(covariance_DD, np.float64)
    if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1] or not len(matrix_DD):
        raise DataError(f"a covariance is a square matrix; this has shape {matrix_DD.shape}")
    if not np.isfinite(matrix_DD).all():
        raise DataError("the covariance holds NaN or infinity")
    if np.abs(matrix_DD - matrix_DD.T).max() > _NEGATIVE_BY_ROUNDING * np.abs(matrix_DD).max():
        raise DataError("the matrix is not symmetric: this is not a covariance")
    return matrix_DD


# Points of each cloud in a figure; more would hide each other.
NUM_POINTS = 250


@dataclass(frozen=True, kw_only=True)
class Plane:
    """An origin and two orthonormal directions, with the share of the variance along each."""

    origin_D: np.ndarray
    axes_D2: np.ndarray
    shares: list[float]

    def points(self, rows_ND: np.ndarray, seed: int) -> list[list[float]]:
        """Return the coordinates of up to `NUM_POINTS` rows, drawn uniformly."""
        chosen = np.random.default_rng(seed).permutation(len(rows_ND))[:NUM_POINTS]
        return np.round((rows_ND[np.sort(chosen)] - self.origin_D) @ self.axes_D2, 5).tolist()


def plane(image_ND: np.ndarray, text_ND: np.ndarray) -> Plane:
    """Return the first two principal components of both clouds together, with equal weights.

    The largest component of each direction is positive.
    """
    centres = [rows.mean(axis=0) for rows in (image_ND, text_ND)]
    origin_D = (centres[0] + centres[1]) / 2
    both_DD = np.zeros((image_ND.shape[1],) * 2)
    for rows_ND in (image_ND, text_ND):
        centred_ND = rows_ND - origin_D
        both_DD += centred_ND.T @ centred_ND / (2 * len(rows_ND))
    values_D, vectors_DD = scipy.linalg.eigh(both_DD)
    axes_D2 = vectors_DD[:, ::-1][:, :2]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.argmax(np.abs(axes_D2), axis=0), [0, 1]])
    return Plane(
        origin_D=origin_D, axes_D2=axes_D2, shares=(values_D[::-1][:2] / max(values_D.sum(), 1e-300)).tolist()
    )
