"""Phantom Drift: normalising rows moves their mean direction (arXiv 2602.07026 sec. 3.4, thm B.14).

For z = mu + eps, Delta_pi = E[z / ||z||] - mu / ||mu||.

Shapes: N rows before normalisation, D embedding dim.
"""

from dataclasses import dataclass

import numpy as np

from revision_ray.errors import DataError
from revision_ray.geometry.rows import SMALLEST_NORM, directions, finite_rows, same_dim
from revision_ray.geometry.spectra import covariance


@dataclass(frozen=True)
class PhantomDrift:
    """The drift of a sample beside its second-order prediction from the same sample's mean and covariance.

    Both are of the sample's own distribution, so what is between them is the orders left out, not noise.
    `cosine` is NaN where one of them is zero; `relative_error` is ||measured - predicted|| / ||measured||.
    """

    measured_D: np.ndarray
    predicted_D: np.ndarray
    measured_norm: float
    predicted_norm: float
    cosine: float
    relative_error: float


def second_order(mean_D: np.ndarray, covariance_DD: np.ndarray) -> np.ndarray:
    """Delta_pi to second order in eps, float64 (D,): with r = ||mu|| and a = mu / r,

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
    """Delta_pi of a sample of rows before normalisation, float64 (D,).

    Raises:
        DataError: rows are not finite or have no direction, or their mean is zero.
    """
    unit_ND = directions(rows_ND, "rows before normalisation")
    mean_D = finite_rows(rows_ND).mean(axis=0)
    return unit_ND.mean(axis=0) - mean_D / _length(mean_D)


def compare(rows_ND: np.ndarray) -> PhantomDrift:
    """The drift of a sample of rows before normalisation, measured and predicted.

    Raises:
        DataError: as `measured`, or fewer than two rows.
    """
    rows_ND = finite_rows(rows_ND, "rows before normalisation", minimum=2)
    measured_D = measured(rows_ND)
    predicted_D = second_order(rows_ND.mean(axis=0), covariance(rows_ND))
    lengths = float(np.linalg.norm(measured_D)), float(np.linalg.norm(predicted_D))
    both = lengths[0] * lengths[1]
    error = float(np.linalg.norm(measured_D - predicted_D))
    return PhantomDrift(
        measured_D=measured_D,
        predicted_D=predicted_D,
        measured_norm=lengths[0],
        predicted_norm=lengths[1],
        cosine=float(np.clip(measured_D @ predicted_D / both, -1, 1)) if both else float("nan"),
        relative_error=error / lengths[0] if lengths[0] else float("nan"),
    )


def _length(mean_D: np.ndarray) -> float:
    length = float(np.linalg.norm(mean_D))
    if not length >= SMALLEST_NORM:  # false for NaN, too
        raise DataError(f"the mean has length {length:.1e}: it has no direction that could drift")
    return length
