"""Samples whose mean and covariance are exactly the given ones, so that closed forms hold to rounding."""

import numpy as np


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    """A random orthogonal matrix (D, D), uniform over all."""
    q_DD, r_DD = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return q_DD * np.sign(np.diag(r_DD))


def white(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Normal rows (N, D) with mean 0 and covariance I of the sample itself, N > D."""
    rows_ND = np.random.default_rng(seed).standard_normal((num_rows, dim))
    rows_ND -= rows_ND.mean(axis=0)
    root_DD = np.linalg.cholesky(rows_ND.T @ rows_ND / num_rows)
    return np.linalg.solve(root_DD, rows_ND.T).T


def gaussian(num_rows: int, mean_D: np.ndarray, covariance_DD: np.ndarray, seed: int = 0) -> np.ndarray:
    """Normal rows (N, D) whose own mean and covariance are the given ones."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root_DD = vectors_DD * np.sqrt(np.maximum(values_D, 0))
    return mean_D + white(num_rows, len(mean_D), seed) @ root_DD.T


def unit_clouds(num_rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Paired unit rows of two anisotropic clouds with a gap between them: images and texts."""
    generator = np.random.default_rng(seed)
    shared_ND = generator.standard_normal((num_rows, dim))
    sides = []
    for side, slope in ((0, -0.7), (1, -0.5)):
        own_ND = generator.standard_normal((num_rows, dim))
        rows_ND = (shared_ND + 0.7 * own_ND) * np.arange(1, dim + 1) ** slope
        rows_ND += 1.5 * np.eye(dim)[side] + 0.5 * np.eye(dim)[-1 - side]
        sides.append(rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True))
    return sides[0], sides[1]
