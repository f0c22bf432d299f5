"""One figure of the report: its value with n and an interval, or the reason why there is none.

Shapes: N rows, D embedding dim, B bootstrap resamples, H histogram bins.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from revision_ray.errors import RevisionError
from revision_ray.geometry.angles import js_divergence
from revision_ray.geometry.bootstrap import mean_interval, resampled_means

LEVEL = 0.95
_QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
NEEDS_PAIRS = "needs paired rows"

Cell = dict[str, Any]


def cell(
    value: float | None,
    *,
    n: int | None = None,
    bounds: tuple[float, float] | None = None,
    note: str = "",
    **stated: Any,
) -> Cell:
    """The figure as report.json holds it. `n`: rows it was measured on; `stated`: numbers such as k.

    JSON has no infinity: an infinite value is None with a note.
    """
    found: Cell = {"value": value} if n is None else {"value": value, "n": n}
    found |= stated
    if value is not None and not math.isfinite(value):
        found |= {"value": None, "note": "infinite" if math.isinf(value) else "undefined"}
    if bounds is not None:
        found |= {"low": bounds[0], "high": bounds[1]}
    if note:
        found["note"] = note
    return found


def possible(measure: Callable[[], float], *, n: int | None = None, **stated: Any) -> Cell:
    """The figure that `measure` gives, or why these rows do not allow it."""
    try:
        return cell(float(measure()), n=n, **stated)
    except RevisionError as error:
        return cell(None, n=n, note=str(error), **stated)


def mean_cell(values_N: np.ndarray, num: int, seed: int, **stated: Any) -> Cell:
    """The mean over rows with its bootstrap interval (`num` resamples; none where 0)."""
    n = len(values_N)
    if not num:
        return cell(float(values_N.mean()), n=n, **stated)
    found = mean_interval(values_N, num=num, seed=seed, level=LEVEL, bounds=(float(values_N.min()), math.inf))
    return cell(found.value, n=n, bounds=(found.low, found.high), **stated)


def gap_bounds(
    image_ND: np.ndarray,
    text_ND: np.ndarray,
    gap_D: np.ndarray,
    shares: tuple[float, float],
    num: int,
    seed: int,
) -> tuple[float, float] | None:
    """Percentile interval of the norm of `gap_D` = mu_x - mu_y, which was measured on more rows than these.

    Deviations of resampled means of these rows shrink by the square root of `shares`: rows here over rows
    there, for images and texts. A norm cannot be negative, so near zero the interval lies above the value:
    it says what other rows of the same number would show.
    """
    if not num:
        return None
    moved_BD = gap_D[None]
    # Two samples drawn apart: two seeds.
    for place, (sign, rows_ND, share) in enumerate(((1, image_ND, shares[0]), (-1, text_ND, shares[1]))):
        deviations_BD = resampled_means(rows_ND, num, 2 * seed + place) - rows_ND.mean(axis=0)
        moved_BD = moved_BD + sign * math.sqrt(min(share, 1.0)) * deviations_BD
    low, high = np.quantile(np.linalg.norm(moved_BD, axis=1), _QUANTILES)
    return float(low), float(high)


def divergence_cell(p_H: np.ndarray, q_H: np.ndarray, num: int, seed: int, **stated: Any) -> Cell:
    """JS divergence of two histograms of cosines; its interval from resampled cosines.

    Cosines that share a row are not independent, so the interval is a little too narrow.
    """
    value = js_divergence(p_H, q_H)
    if not num:
        return cell(value, **stated)
    generator = np.random.default_rng(seed)
    drawn = [generator.multinomial(h_H.sum(), h_H / h_H.sum(), size=num) for h_H in (p_H, q_H)]
    low, high = np.quantile([js_divergence(p, q) for p, q in zip(*drawn, strict=True)], _QUANTILES)
    return cell(value, bounds=(float(low), float(high)), **stated)
