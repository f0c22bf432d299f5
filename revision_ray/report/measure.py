"""Measure the report's figures for every strategy; stores and fits go in, one plain dictionary comes out.

    stores --map-reduce--> second moments --> gap, spectra, shape
       |---uniform sample--> cosines, neighbours (blocks of queries as tasks), drift, projections
       `---ids of both-----> pairs --> residuals, decomposition in a fixed frame (arXiv 2602.07026 sec. 3)

Shapes: N rows or pairs, D embedding dim, K neighbours, H histogram bins, R and S dimensions of U and V.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from scipy.stats import bootstrap

from revision_ray.align.alignment import gap_floor
from revision_ray.align.maps import Affine
from revision_ray.align.moments import Moments
from revision_ray.core.cluster import one_thread, user_errors
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.core.observe import progress
from revision_ray.geometry import angles, neighbours, spectra
from revision_ray.geometry.fixed_frame import (
    FixedFrame,
    angle_by_chance_degrees,
    block_covariances,
    coupling,
    decompose,
    frame_of,
    identities,
    leading_angle_degrees,
)
from revision_ray.geometry.spectra import (
    covariance,
    cumulative_energy,
    effective_condition_number,
    effective_dimension,
    eigenvalues_of,
    residual_anisotropy,
)
from revision_ray.report.cells import (
    NEEDS_PAIRS,
    Cell,
    beside_images,
    cell,
    cloud_figures,
    divergence_cell,
    drift_figures,
    gap_bounds,
    mean_cell,
    possible,
)
from revision_ray.report.metrics import METRICS
from revision_ray.report.sample import (
    MatchedPairs,
    ReportInputs,
    SampledRows,
    draw_pairs,
    draw_rows,
    second_moments,
)

PAIRED = tuple(key for key, metric in METRICS.items() if metric.paired)
# Ridge of the coupling, as a share of the mean eigenvalue of D D'; it steadies directions of little variance.
RIDGE = 1e-3


def without_pairs(reason: str = NEEDS_PAIRS) -> dict[str, Cell]:
    """Return the cells of all paired figures, empty for this reason."""
    return {key: cell(None, note=reason) for key in PAIRED}


def pair_figures(
    image_ND: np.ndarray, text_ND: np.ndarray, frame: FixedFrame, residual_energy: float, num: int, seed: int
) -> tuple[dict[str, Cell], list[float]]:
    """Measure all paired figures of unit images and their aligned texts, and E(K) of the residual (D,)."""
    difference_ND = image_ND - text_ND
    residual_ND = difference_ND - difference_ND.mean(axis=0)
    values_D = eigenvalues_of(covariance(residual_ND))
    n, dim = image_ND.shape
    text_norms_N = np.linalg.norm(text_ND, axis=1)
    cosines_N = np.vecdot(image_ND, text_ND) / np.where(text_norms_N > 0, text_norms_N, 1)
    energy_D = cumulative_energy(values_D) if values_D[0] else np.ones(dim)
    return {
        "pair_cosine": mean_cell(cosines_N, num, seed),
        "residual_ratio": _residual_ratio(image_ND, text_ND, num, seed),
        "residual_anisotropy": possible(lambda: residual_anisotropy(values_D), n=n),
        "effective_dimension": possible(lambda: effective_dimension(values_D) / dim, n=n),
        "directions_for_90": cell(int(np.searchsorted(energy_D, 0.9 - 1e-12)) + 1, n=n),
        **_in_frame(image_ND, text_ND, frame, residual_energy, num, seed),
    }, energy_D.tolist()


def _residual_ratio(image_ND: np.ndarray, text_ND: np.ndarray, num: int, seed: int) -> Cell:
    """Return the residual ratio; each resample keeps the mean difference of all pairs."""
    n = len(image_ND)
    try:
        distances = angles.pair_distances(image_ND, text_ND)
    except DataError as error:
        return cell(None, n=n, note=str(error))
    value = float(angles.residual_ratio(*distances))
    if not num or n < 2:  # one pair has no spread
        return cell(value, n=n)
    resampled = bootstrap(
        distances,
        angles.residual_ratio,
        paired=True,
        n_resamples=num,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return cell(value, n=n, bounds=(float(resampled.low), float(resampled.high)))


def _in_frame(
    image_ND: np.ndarray, text_ND: np.ndarray, frame: FixedFrame, energy: float, num: int, seed: int
) -> dict[str, Cell]:
    parts = decompose(image_ND, text_ND, frame)
    n = len(image_ND)
    squared_N = np.sum((image_ND - text_ND) ** 2, axis=1)
    cells: dict[str, Any] = {
        "delta_trace": mean_cell(np.sum(parts.delta_ND**2, axis=1), num, seed),
        "zeta_trace": mean_cell(np.sum(parts.zeta_ND**2, axis=1), num, seed),
        "squared_distance": mean_cell(squared_N, num, seed),
        "identity_error": cell(max(identities(parts).values()), n=n),
    }
    covariances = block_covariances(parts, frame)
    for key, block_RR in zip(("kappa_u", "kappa_v"), covariances, strict=True):
        cells[key] = _kappa(block_RR, n, energy)
    cells["gamma_angle"] = possible(
        lambda: leading_angle_degrees(frame.v_DS.T @ parts.gamma_D, covariances[1]),
        n=n,
        by_chance=angle_by_chance_degrees(frame.v_DS.shape[1]),
    )
    try:
        ridge = coupling(parts.delta_ND, parts.zeta_ND, frame, RIDGE)
    except DataError as error:
        return cells | {
            key: cell(None, n=n, note=str(error)) for key in ("coupling_norm", "coupling_explained")
        }
    cells["coupling_norm"] = cell(ridge.spectral_norm, n=n, ridge=RIDGE)
    cells["coupling_explained"] = cell(
        ridge.explained_variance, n=n, ridge=RIDGE, by_chance=ridge.chance_explained_variance
    )
    return cells


def _kappa(covariance_RR: np.ndarray, n: int, energy: float) -> Cell:
    values_R = eigenvalues_of(covariance_RR)
    if not values_R[0]:
        return cell(None, n=n, note="nothing varies in this block")
    kappa, rank = effective_condition_number(values_R, energy)
    return cell(kappa, n=n, energy=energy, rank=rank, of=len(values_R))


log = logging.getLogger(__name__)

_QUERIES_PER_TASK = 2048


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Settings of the measurements."""

    seed: int = 0
    """Seed of samples, pairs of rows and resamples."""
    num_heldout: int = 10_000
    """At most this many rows a side for cosines and neighbours, and pairs."""
    max_rows: int | None = None
    """Take second moments from a uniform sample of this many rows a side; by default from all."""
    num_bootstrap: int = 200
    """Resamples of each 95 % interval; 0 for no intervals."""
    num_cosines: int = 200_000
    """Pairs of rows whose cosines are compared."""
    k_mixing: int = 20
    """Neighbours of the mixing rate and of the origin entropies."""
    k_overlap: int = 10
    """Neighbours of the neighbourhood overlap."""
    num_directions: int | None = None
    """q of the subspace overlap; by default a tenth of the dimension (paper: 128 of 1280)."""
    frame_energy: float = 0.9
    """Share of the trace of both covariances together that U holds."""
    residual_energy: float = 0.99
    """Share of the trace that the effective condition numbers use."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of rows is NaN, infinite, zero, or of another dimension."""

    def __post_init__(self) -> None:
        for name, least in (("num_heldout", 3), ("num_cosines", 1), ("k_mixing", 1), ("k_overlap", 1),
                            ("num_bootstrap", 0), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {least} or more")
        for name in ("max_rows", "num_directions"):
            if (value := getattr(self, name)) is not None and value < 2 - (name == "num_directions"):
                raise ConfigError(f"{name} is {value}; expected more, or leave it out")
        for name in ("frame_energy", "residual_energy"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows and moments on which every strategy is measured."""

    image: Moments
    text_rows: SampledRows
    image_rows: SampledRows
    pairs: MatchedPairs | None
    frame: FixedFrame
    text_nearest_NK: np.ndarray | None
    image_counts_H: np.ndarray
    projection: spectra.Plane


def measure(inputs: ReportInputs, settings: MeasureSettings) -> dict[str, Any]:
    """Measure the figures of each strategy and of the images, the curves for the plots, and the row counts.

    Raises:
        AlignmentError: fits and stores do not belong together, or a side does not vary.
        DataError: a store cannot be read, or has too many rows without a direction.
    """
    image = second_moments(inputs, inputs.images, "images", settings.max_rows, settings.seed)
    sample, curves = _draw_samples(inputs, settings, image)
    dim = image.embedding_dim
    q = min(settings.num_directions or max(1, round(dim / 10)), dim)
    image_cells, image_D = cloud_figures(image.covariance, image.count)
    curves["spectra"] = {"image": image_D.tolist()}
    strategies = []
    with progress("strategies", len(inputs.fits), "strategies") as shown:
        for fit in inputs.fits:
            text = second_moments(
                inputs, inputs.texts, fit.label, settings.max_rows, settings.seed, fit.affine
            )
            cells, values_D = cloud_figures(text.covariance, text.count)
            cells |= beside_images(text.covariance, image.covariance, values_D, image_D, text.count, q)
            with one_thread():
                cells |= _row_figures(fit.affine, text, sample, settings, curves, fit.label)
            if fit.alignment is not None:
                own = fit.alignment.modality_gap.after
                cells["fit_gap"] = cell(own, n=fit.alignment.num_texts, num_images=fit.alignment.num_images)
            curves["spectra"][fit.label] = values_D.tolist()
            strategies.append({**fit.description(), "figures": cells})
            shown.advance(1, fit.label)
    return {
        "embedding_dim": dim,
        "inputs": inputs.description(),
        "measured_on": _measured_on(inputs, sample, image),
        "frame": {
            "rank_u": sample.frame.u_DR.shape[1],
            "rank_v": sample.frame.v_DS.shape[1],
            "energy": settings.frame_energy,
            "num_rows": sample.frame.num_rows,
        },
        "image": {"figures": image_cells},
        "strategies": strategies,
        "curves": curves,
    }


def _draw_samples(
    inputs: ReportInputs, settings: MeasureSettings, image: Moments
) -> tuple[_Sample, dict[str, Any]]:
    seed = settings.seed
    num = min(settings.num_heldout, inputs.texts.num_rows, inputs.images.num_rows)
    text_rows, image_rows = draw_rows(inputs.texts, num, seed), draw_rows(inputs.images, num, seed)
    pairs = draw_pairs(inputs.texts, inputs.images, settings.num_heldout, seed)
    image_ND = image_rows.unit_ND
    image_counts_H = angles.angle_histogram(image_ND, settings.num_cosines, seed)
    nearest_NK = None
    if len(text_rows) > settings.k_overlap:
        nearest_NK = _nearest(text_rows.unit_ND, settings.k_overlap)
    curves: dict[str, Any] = {"cosines": {"image": image_counts_H.tolist()}}
    for name in ("across", "pairs", "residual_energy", "drift", "scatter"):
        curves[name] = {}
    with one_thread():
        plane = spectra.plane(image_ND, text_rows.unit_ND)
        curves["scatter"]["image"] = plane.points(image_ND, seed)
        curves["plane"] = {"shares": plane.shares}
    return _Sample(
        image=image,
        text_rows=text_rows,
        image_rows=image_rows,
        pairs=pairs,
        frame=_frame(inputs, settings, image),
        text_nearest_NK=nearest_NK,
        image_counts_H=image_counts_H,
        projection=plane,
    ), curves


def _frame(inputs: ReportInputs, settings: MeasureSettings, image: Moments) -> FixedFrame:
    """Return the frame of `texts` and `images`, not of held-out stores: it is fixed before it is used."""
    name, most, seed = "frame", settings.max_rows, settings.seed
    text = second_moments(inputs, inputs.reference_texts, name, most, seed)
    if inputs.reference_images != inputs.images:
        image = second_moments(inputs, inputs.reference_images, name, most, seed)
    with one_thread():
        reference_DD = text.covariance + image.covariance
        return frame_of(reference_DD, settings.frame_energy, min(text.count, image.count))


def _row_figures(
    affine: Affine,
    text: Moments,
    sample: _Sample,
    settings: MeasureSettings,
    curves: dict[str, Any],
    label: str,
) -> dict[str, Cell]:
    """Measure the figures of one strategy that need rows; add its curves to `curves`."""
    seed, num = settings.seed, settings.num_bootstrap
    rows = sample.text_rows
    before_ND, image_ND = rows.unit_ND, sample.image_rows.unit_ND
    after_ND = _aligned(affine, rows)
    gap_D = sample.image.centroid - text.centroid
    shares = len(image_ND) / sample.image.count, len(after_ND) / text.count
    floor = gap_floor(float(np.trace(text.covariance)), text.count, sample.image.trace, sample.image.count)
    cells = {
        "modality_gap": cell(
            float(np.linalg.norm(gap_D)),
            n=text.count,
            bounds=gap_bounds(image_ND, after_ND, gap_D, shares, num, seed),
            num_images=sample.image.count,
        ),
        "sampling_floor": cell(floor, n=text.count, num_images=sample.image.count),
        "beta": cell(float(np.linalg.norm(sample.frame.u_DR.T @ gap_D)), n=text.count),
        "gamma": cell(float(np.linalg.norm(sample.frame.v_DS.T @ gap_D)), n=text.count),
    }
    counts_H = angles.angle_histogram(after_ND, settings.num_cosines, seed)
    cells["angular_js"] = divergence_cell(
        counts_H,
        sample.image_counts_H,
        num,
        seed,
        n=len(after_ND),
        num_cosines=int(counts_H.sum()),
        bins=len(counts_H),
    )
    cells |= _neighbour_figures(image_ND, after_ND, sample.text_nearest_NK, settings)
    cells["displacement_cosine"] = mean_cell(angles.row_cosines(before_ND, after_ND), num, seed)
    cells["cosine_correlation"] = possible(
        lambda: angles.cosine_correlation(before_ND, after_ND, settings.num_cosines, seed), n=len(after_ND)
    )
    drift, curve = drift_figures(affine, before_ND, rows.ids)
    curves["cosines"][label] = counts_H.tolist()
    curves["across"][label] = _histogram_across(image_ND, after_ND, settings.num_cosines)
    curves["scatter"][label] = sample.projection.points(after_ND, seed)
    if curve:
        curves["drift"][label] = curve
    return cells | drift | _measure_pairs(affine, sample, settings, curves, label)


def _measure_pairs(
    affine: Affine, sample: _Sample, settings: MeasureSettings, curves: dict[str, Any], label: str
) -> dict[str, Cell]:
    if sample.pairs is None:
        return without_pairs()
    if len(sample.pairs.text) < 3:
        return without_pairs(f"only {len(sample.pairs.text)} pairs; at least 3 are needed")
    image_ND, text_ND = sample.pairs.image.unit_ND, _aligned(affine, sample.pairs.text)
    cells, energy_D = pair_figures(
        image_ND, text_ND, sample.frame, settings.residual_energy, settings.num_bootstrap, settings.seed
    )
    curves["residual_energy"][label] = energy_D
    curves["pairs"][label] = angles.cosine_histogram(angles.row_cosines(image_ND, text_ND)).tolist()
    return cells


def _aligned(affine: Affine, rows: SampledRows) -> np.ndarray:
    """Return the mapped rows, computed in float32 as for training, as float64 (N, D)."""
    return affine.apply(rows.stored_ND, rows.ids)[0].astype(np.float64)


def _histogram_across(image_ND: np.ndarray, text_ND: np.ndarray, num: int) -> list[int]:
    """Return the histogram of cosines of texts and other texts' images: row i with rows i + 1, i + 2, ..."""
    n = min(len(image_ND), len(text_ND))
    shifts = range(1, min(n, 1 + math.ceil(num / n)))
    unit_ND = spectra.directions(text_ND[:n])
    counts = [angles.cosine_histogram(np.vecdot(image_ND[:n], np.roll(unit_ND, s, axis=0))) for s in shifts]
    return np.sum(counts, axis=0).tolist()


def _neighbour_figures(
    image_ND: np.ndarray, text_ND: np.ndarray, before_NK: np.ndarray | None, settings: MeasureSettings
) -> dict[str, Cell]:
    num, seed, k, k_overlap = settings.num_bootstrap, settings.seed, settings.k_mixing, settings.k_overlap
    names = ("mixing_rate", "origin_entropy_text", "origin_entropy_image")
    cells = {}
    if k >= len(image_ND) + len(text_ND):
        cells = {name: cell(None, note=f"k = {k} needs more rows", k=k) for name in names}
    else:
        near_NK = _nearest(np.concatenate([image_ND, text_ND]), k)
        entropies_N = neighbours.origin_entropies(near_NK, len(image_ND))
        values = (
            neighbours.cross_modal_shares(near_NK, len(image_ND)),
            entropies_N[len(image_ND) :],
            entropies_N[: len(image_ND)],
        )
        cells = {name: mean_cell(v, num, seed, k=k) for name, v in zip(names, values, strict=True)}
        chance = neighbours.mixing_rate_by_chance(len(image_ND), len(text_ND))
        cells["mixing_rate"]["by_chance"] = chance
    if before_NK is None:
        cells["neighbourhood_overlap"] = cell(None, note=f"k = {k_overlap} needs more rows", k=k_overlap)
    else:
        shares_N = neighbours.kept_shares(before_NK, _nearest(text_ND, k_overlap))
        cells["neighbourhood_overlap"] = mean_cell(shares_N, num, seed, k=k_overlap)
    return cells


def _nearest(rows_ND: np.ndarray, k: int) -> np.ndarray:
    """Return the exact nearest other rows (N, K) of each row, with one task for each block of queries."""
    base = ray.put(rows_ND)
    starts = range(0, len(rows_ND), _QUERIES_PER_TASK)
    with user_errors():
        return np.concatenate(ray.get([_nearest_of_block.remote(base, start, k) for start in starts]))


@ray.remote(num_cpus=1)
def _nearest_of_block(rows_ND: np.ndarray, start: int, k: int) -> np.ndarray:
    with one_thread():
        return neighbours.nearest_others(rows_ND, k, start, start + _QUERIES_PER_TASK)


def _measured_on(inputs: ReportInputs, sample: _Sample, image: Moments) -> dict[str, Any]:
    pairs = sample.pairs
    return {
        "num_texts": inputs.texts.num_rows,
        "num_images": inputs.images.num_rows,
        "num_images_in_moments": image.count,
        "num_sampled_texts": len(sample.text_rows),
        "num_sampled_images": len(sample.image_rows),
        "num_dropped": sample.text_rows.num_dropped + sample.image_rows.num_dropped,
        "share_off_unit": {
            "text": sample.text_rows.share_off_unit, "image": sample.image_rows.share_off_unit,
        },
        "pairs": None
        if pairs is None
        else {
            "num": len(pairs.text), "num_matched": pairs.num_matched, "share_searched": pairs.share_searched,
        },
    }  # fmt: skip
