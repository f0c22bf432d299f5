"""Rows as the figures of this folder need them: float64, finite, enough of them, with a direction.

Shapes: N rows, D embedding dim.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from revision_ray.errors import DataError

# Rounding to float16 changes a row's length by a factor of up to 2^-11 = 4.9e-4.
UNIT_TOLERANCE = 1e-3
# What is shorter has no direction, as in align/rows.py.
SMALLEST_NORM = 1e-8


def id_keys(ids: Sequence[str], key: bytes = b"") -> np.ndarray:
    """uint64 (N,): a hash of every id, another one under another key."""
    digests = (hashlib.blake2b(row_id.encode(), digest_size=8, key=key).digest() for row_id in ids)
    return np.frombuffer(b"".join(digests), "<u8")


def finite_rows(rows_ND: np.ndarray, what: str = "the sample", minimum: int = 1) -> np.ndarray:
    """The rows in float64 (not a copy where they are), all finite.

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
    """The rows scaled to unit length, in float64.

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
    """The rows in float64 as they are, of unit length within the rounding of float16.

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
    """Row i of one belongs to row i of the other.

    Raises:
        DataError: the shapes differ.
    """
    if np.shape(one_ND) != np.shape(other_ND):
        raise DataError(
            f"{what} have shapes {np.shape(one_ND)} and {np.shape(other_ND)}; "
            "row i of one must belong to row i of the other"
        )


def same_dim(one_ND: np.ndarray, other_ND: np.ndarray, what: str = "the two samples") -> None:
    """Both lie in one space.

    Raises:
        DataError: the embedding dimensions differ.
    """
    if np.shape(one_ND)[-1] != np.shape(other_ND)[-1]:
        raise DataError(
            f"{what} have dimensions {np.shape(one_ND)[-1]} and {np.shape(other_ND)[-1]}; "
            "they must come from one encoder"
        )
