"""Anchor and Trace, the closed-form part of ReAlign (arXiv 2602.07026 sec. 4.1-4.2).

The centroid step (sec. 4.3) needs a second pass over the texts; `Affine.with_centroid_step` adds it.
"""

import math

from revision_ray.align.affine import Affine
from revision_ray.align.moments import Moments
from revision_ray.errors import AlignmentError


def fit_anchor(text: Moments, image: Moments) -> Affine:
    """Carry the text centroid onto the image centroid, spread unchanged: u - mu_y + mu_x (sec. 4.1)."""
    return Affine(scale=1.0, offset=image.centroid - text.centroid)


def fit_anchor_trace(text: Moments, image: Moments) -> Affine:
    """Carry text centroid and trace onto the image's: mu_x + s (u - mu_y), s = sqrt(T_x / T_y) (sec. 4.2).

    Raises:
        AlignmentError: a side is empty, or the texts do not vary.
    """
    scale = trace_scale(text, image)
    return Affine(scale=scale, offset=image.centroid - scale * text.centroid)


def trace_scale(text: Moments, image: Moments) -> float:
    """s = sqrt(T_x / (T_y + 1e-10)); the constant is the reference's.

    Raises:
        AlignmentError: the trace of a side is zero within rounding, so there is nothing to scale.
    """
    for side, moments in (("text", text), ("image", image)):
        if moments.trace < 1e-12:
            raise AlignmentError(
                f"all {moments.count} {side} embeddings are equal (trace {moments.trace:.1e}); "
                "a fit needs rows that vary"
            )
    return math.sqrt(image.trace / (text.trace + 1e-10))
