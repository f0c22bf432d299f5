"""A fixed orthogonal frame from covariances, and functions of symmetric matrices (arXiv 2602.07026 sec. 3).

Shapes: D embedding dim, R rank of the principal subspace.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg


def fixed_frame(reference_DD: np.ndarray, energy: float) -> tuple[np.ndarray, np.ndarray]:
    """Bases of U (D, R) and of its orthogonal complement V (D, D - R).

    U is spanned by the top eigenvectors of `reference_DD`, R being the smallest rank whose eigenvalues
    reach the share `energy` of the trace. The sign of each vector is fixed by its largest component.
    """
    eigenvalues, vectors_DD = scipy.linalg.eigh(reference_DD)
    eigenvalues, vectors_DD = np.maximum(eigenvalues[::-1], 0.0), vectors_DD[:, ::-1]
    largest = np.argmax(np.abs(vectors_DD), axis=0)
    vectors_DD = vectors_DD * np.sign(vectors_DD[largest, np.arange(len(largest))])
    share = np.cumsum(eigenvalues) / eigenvalues.sum()
    rank = min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(eigenvalues))
    return vectors_DD[:, :rank], vectors_DD[:, rank:]


def of_symmetric(matrix_DD: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of a symmetric positive semi-definite matrix by its eigenvalues; negatives are rounding."""
    eigenvalues, vectors_DD = scipy.linalg.eigh(matrix_DD)
    return (vectors_DD * function(np.maximum(eigenvalues, 0.0))) @ vectors_DD.T


def shrunk(covariance_DD: np.ndarray, shrinkage: float) -> np.ndarray:
    """(1 - l) Sigma + l tr(Sigma)/D I: pulled towards isotropic, with the same trace."""
    dim = len(covariance_DD)
    if not dim:
        return covariance_DD
    return (1 - shrinkage) * covariance_DD + shrinkage * np.trace(covariance_DD) / dim * np.eye(dim)


def inverse_root(eigenvalues: np.ndarray) -> np.ndarray:
    """1 / sqrt, with 0 for directions that hold nothing (zero within rounding) instead of a blow-up."""
    cut = eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    filled = eigenvalues > cut
    return np.where(filled, 1.0 / np.sqrt(np.where(filled, eigenvalues, 1.0)), 0.0)
