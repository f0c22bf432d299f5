"""The maps that ReAlign is compared with (method table: No Align, Unicorn, C3, block-wise whitening)."""

import numpy as np

from revision_ray.align.affine import Affine
from revision_ray.align.frame import fixed_frame, inverse_root, of_symmetric, shrunk
from revision_ray.align.moments import Moments
from revision_ray.align.realign import fit_anchor, trace_scale


def fit_none(text: Moments) -> Affine:
    """Unit text rows as they are."""
    return Affine(scale=1.0, offset=np.zeros(text.embedding_dim), unit_output=False)


def fit_mean_shift(text: Moments) -> Affine:
    """u - mu_y, not scaled back to unit length (Unicorn, arXiv 2503.22655)."""
    return Affine(scale=1.0, offset=-text.centroid, unit_output=False)


def fit_c3(text: Moments, image: Moments, *, noise: float) -> Affine:
    """normalise(u - mu_y + mu_x + sigma n), n ~ N(0, I) (C3, arXiv 2401.08567, as ReVision uses it)."""
    anchor = fit_anchor(text, image)
    return Affine(scale=1.0, offset=anchor.offset, noise=noise)


def fit_blockwise(text: Moments, image: Moments, *, shrinkage: float, energy: float) -> Affine:
    """Anchor, then whiten and colour within the fixed-frame blocks U and V (paper, app. F: a known failure).

    The frame is of Sigma_x + Sigma_y; within each block A = Sx^1/2 Sy^-1/2 of covariances shrunk towards
    isotropic.
    """
    trace_scale(text, image)  # refuses a side that does not vary
    text_DD, image_DD = text.covariance, image.covariance
    matrix_DD = np.zeros_like(text_DD)
    for basis_DR in fixed_frame(text_DD + image_DD, energy):
        whiten_RR = of_symmetric(shrunk(basis_DR.T @ text_DD @ basis_DR, shrinkage), inverse_root)
        colour_RR = of_symmetric(shrunk(basis_DR.T @ image_DD @ basis_DR, shrinkage), np.sqrt)
        matrix_DD += basis_DR @ colour_RR @ whiten_RR @ basis_DR.T
    return Affine(matrix=matrix_DD, offset=image.centroid - matrix_DD @ text.centroid)
