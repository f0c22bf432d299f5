"""The map of least displacement that carries the text covariance onto the image's."""

import math

import numpy as np

from revision_ray.align.affine import Affine
from revision_ray.align.frame import inverse_root, of_symmetric, shrunk
from revision_ray.align.moments import Moments
from revision_ray.align.realign import trace_scale


def fit_gaussian_ot(text: Moments, image: Moments, *, shrinkage: float, noise: float) -> Affine:
    """mu_x + A (u - mu_y) + sigma n, with A the Bures-Wasserstein map between the shrunk covariances.

    A = Sy^-1/2 (Sy^1/2 Sx Sy^1/2)^1/2 Sy^-1/2 is symmetric positive definite; n ~ N(0, I/D). Not in the
    paper; see the README. With Sx = c Sy, or with shrinkage 1, A is ReAlign's scale times the identity.
    """
    trace_scale(text, image)  # refuses a side that does not vary
    text_DD = shrunk(text.covariance, shrinkage)
    root_DD = of_symmetric(text_DD, np.sqrt)
    inverse_root_DD = of_symmetric(text_DD, inverse_root)
    middle_DD = of_symmetric(root_DD @ shrunk(image.covariance, shrinkage) @ root_DD, np.sqrt)
    matrix_DD = inverse_root_DD @ middle_DD @ inverse_root_DD
    matrix_DD = (matrix_DD + matrix_DD.T) / 2
    return Affine(
        matrix=matrix_DD,
        offset=image.centroid - matrix_DD @ text.centroid,
        noise=noise / math.sqrt(len(matrix_DD)),
    )
