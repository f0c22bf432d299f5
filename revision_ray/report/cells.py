"""Cells of report.json (a value with its interval, or why there is none), and the figures made into cells.

Shapes: N rows, D embedding dim, B bootstrap resamples, H histogram bins.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from revision_ray.align.maps import Affine, noise_rows
from revision_ray.core.errors import RevisionError
from revision_ray.geometry import fixed_frame
from revision_ray.geometry.angles import js_divergence
from revision_ray.geometry.bootstrap import mean_interval, resampled_means
from revision_ray.geometry.spectra import (
    condition_number,
    covariance_gap,
    effective_rank,
    eigenvalues_of,
    spectral_correlation,
    spectrum_exponent,
    subspace_overlap,
)

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
    """Return a figure as report.json holds it. `n`: rows it was measured on; `stated`: conditions such as k.

    JSON has no infinity: an infinite value becomes None with a note.
    """
    entry: Cell = {"value": value} if n is None else {"value": value, "n": n}
    entry |= stated
    if value is not None and not math.isfinite(value):
        entry |= {"value": None, "note": "infinite" if math.isinf(value) else "undefined"}
    if bounds is not None:
        entry |= {"low": bounds[0], "high": bounds[1]}
    if note:
        entry["note"] = note
    return entry


def possible(measure: Callable[[], float], *, n: int | None = None, **stated: Any) -> Cell:
    """Return the cell of the value of `measure`, or of the reason why these rows do not allow it."""
    try:
        return cell(float(measure()), n=n, **stated)
    except RevisionError as error:
        return cell(None, n=n, note=str(error), **stated)


def mean_cell(values_N: np.ndarray, num: int, seed: int, **stated: Any) -> Cell:
    """Return the cell of the mean over rows, with a bootstrap interval of `num` resamples (none if 0)."""
    n = len(values_N)
    if not num:
        return cell(float(values_N.mean()), n=n, **stated)
    mean = mean_interval(values_N, num=num, seed=seed, level=LEVEL, bounds=(float(values_N.min()), math.inf))
    return cell(mean.value, n=n, bounds=(mean.low, mean.high), **stated)


def gap_bounds(
    image_ND: np.ndarray,
    text_ND: np.ndarray,
    gap_D: np.ndarray,
    shares: tuple[float, float],
    num: int,
    seed: int,
) -> tuple[float, float] | None:
    """Return the percentile interval of the norm of `gap_D` = mu_x - mu_y; None without resamples.

    The gap may have been measured on more rows than these: `shares` (images, texts) are the rows here over
    the rows there, and deviations of resampled means shrink by their square root. A norm cannot be negative,
    so near zero the interval lies above the value: it shows what as many other rows would give.
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
    """Return the cell of the JS divergence of two histograms of cosines, its interval from resampled cosines.

    Cosines that share a row are not independent, so the interval is a little too narrow.
    """
    value = js_divergence(p_H, q_H)
    if not num:
        return cell(value, **stated)
    generator = np.random.default_rng(seed)
    drawn = [generator.multinomial(h_H.sum(), h_H / h_H.sum(), size=num) for h_H in (p_H, q_H)]
    low, high = np.quantile([js_divergence(p, q) for p, q in zip(*drawn, strict=True)], _QUANTILES)
    return cell(value, bounds=(float(low), float(high)), **stated)


def cloud_figures(covariance_DD: np.ndarray, n: int) -> tuple[dict[str, Cell], np.ndarray]:
    """Return trace, exponent, effective rank and condition number of `n` rows, and their spectrum (D,)."""
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
    """Compare covariance and spectrum of `n` aligned texts with those of the images."""
    return {
        "covariance_gap": possible(lambda: covariance_gap(image_DD, text_DD), n=n),
        "spectral_correlation": possible(lambda: spectral_correlation(image_D, text_D), n=n),
        "subspace_overlap": possible(
            lambda: subspace_overlap(image_DD, text_DD, q)[0], n=n, q=q, by_chance=q / len(image_D)
        ),
    }


def before_normalisation(affine: Affine, unit_ND: np.ndarray, ids: list[str]) -> np.ndarray:
    """Return the rows before the map scales them to length 1 (linear part, offset, noise), float64."""
    moved_ND = affine.scale * unit_ND if affine.matrix is None else unit_ND @ affine.matrix.T
    if affine.noise:
        moved_ND = moved_ND + affine.noise * noise_rows(ids, affine.embedding_dim, affine.seed)
    return moved_ND + affine.offset


def drift_figures(
    affine: Affine, unit_ND: np.ndarray, ids: list[str]
) -> tuple[dict[str, Cell], dict[str, list]]:
    """Measure the Phantom Drift (paper, sec. 3.4) of the map on these rows.

    Returns the figures, and the measured and predicted vectors (none if the map does not scale rows).
    """
    names = ("drift_measured", "drift_predicted", "drift_cosine", "drift_error")
    if not affine.unit_output:
        return {name: cell(None, note="does not scale rows to length 1") for name in names}, {}
    drift = fixed_frame.compare(before_normalisation(affine, unit_ND, ids))
    values = (drift.measured_norm, drift.predicted_norm, drift.cosine, drift.relative_error)
    figures = {name: cell(value, n=len(unit_ND)) for name, value in zip(names, values, strict=True)}
    return figures, {"measured": drift.measured_D.tolist(), "predicted": drift.predicted_D.tolist()}
