"""Figures of a cloud's second moments beside the image cloud's, and of what normalisation does to its mean.

Shapes: N rows, D embedding dim.
"""

import numpy as np

from revision_ray.align.affine import Affine
from revision_ray.align.rows import noise_rows
from revision_ray.geometry import phantom_drift
from revision_ray.geometry.cells import Cell, cell, possible
from revision_ray.geometry.spectra import (
    condition_number,
    covariance_gap,
    effective_rank,
    eigenvalues_of,
    spectral_correlation,
    spectrum_exponent,
    subspace_overlap,
)


def cloud_figures(covariance_DD: np.ndarray, n: int) -> tuple[dict[str, Cell], np.ndarray]:
    """Trace, exponent, effective rank and condition number of a cloud of `n` rows; and its spectrum (D,)."""
    values_D = eigenvalues_of(covariance_DD)
    condition = possible(lambda: condition_number(values_D), n=n)
    if n <= len(values_D):
        # Rounding alone decides the smallest eigenvalues of a covariance that cannot have full rank.
        condition = cell(
            None, n=n, note=f"{n} rows in {len(values_D)} dimensions leave directions without variance"
        )
    return {
        "trace": cell(float(np.trace(covariance_DD)), n=n),
        "spectrum_exponent": possible(lambda: spectrum_exponent(values_D), n=n),
        "effective_rank": possible(lambda: effective_rank(values_D), n=n),
        "condition_number": condition,
    }, values_D


def beside_images(
    text_DD: np.ndarray, image_DD: np.ndarray, text_D: np.ndarray, image_D: np.ndarray, n: int, q: int
) -> dict[str, Cell]:
    """Covariances and spectra of `n` aligned texts compared with the images'."""
    return {
        "covariance_gap": possible(lambda: covariance_gap(image_DD, text_DD), n=n),
        "spectral_correlation": possible(lambda: spectral_correlation(image_D, text_D), n=n),
        "subspace_overlap": possible(
            lambda: subspace_overlap(image_DD, text_DD, q)[0], n=n, q=q, by_chance=q / len(image_D)
        ),
    }


def before_normalisation(affine: Affine, unit_ND: np.ndarray, ids: list[str]) -> np.ndarray:
    """The rows z that the map scales to length one: linear part, offset and noise, float64."""
    moved_ND = affine.scale * unit_ND if affine.matrix is None else unit_ND @ affine.matrix.T
    if affine.noise:
        moved_ND = moved_ND + affine.noise * noise_rows(ids, affine.embedding_dim, affine.seed)
    return moved_ND + affine.offset


def drift_figures(
    affine: Affine, unit_ND: np.ndarray, ids: list[str]
) -> tuple[dict[str, Cell], dict[str, list]]:
    """Phantom Drift (paper, sec. 3.4) of the map on these rows: measured, predicted, and both vectors."""
    names = ("drift_measured", "drift_predicted", "drift_cosine", "drift_error")
    if not affine.unit_output:
        return {name: cell(None, note="does not scale rows to length 1") for name in names}, {}
    drift = phantom_drift.compare(before_normalisation(affine, unit_ND, ids))
    found = (drift.measured_norm, drift.predicted_norm, drift.cosine, drift.relative_error)
    figures = {name: cell(value, n=len(unit_ND)) for name, value in zip(names, found, strict=True)}
    return figures, {"measured": drift.measured_D.tolist(), "predicted": drift.predicted_D.tolist()}
