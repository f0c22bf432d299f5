"""Rows seen along the two leading directions of images and texts together.

Shapes: N rows, D embedding dim.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg

# Points of each cloud in a figure: more would hide one another.
NUM_POINTS = 250


@dataclass(frozen=True, kw_only=True)
class Plane:
    """An origin and two orthonormal directions; `shares` of the variance that each of them carries."""

    origin_D: np.ndarray
    axes_D2: np.ndarray
    shares: list[float]

    def points(self, rows_ND: np.ndarray, seed: int) -> list[list[float]]:
        """Coordinates of up to `NUM_POINTS` rows, drawn uniformly."""
        chosen = np.random.default_rng(seed).permutation(len(rows_ND))[:NUM_POINTS]
        return np.round((rows_ND[np.sort(chosen)] - self.origin_D) @ self.axes_D2, 5).tolist()


def plane(image_ND: np.ndarray, text_ND: np.ndarray) -> Plane:
    """The first two principal components of both clouds together, each weighing the same.

    The sign of each direction is fixed by its largest component.
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
