"""Which fits of a registry a sample of embeddings is nearest to: its moments by Ray, held against each fit's.

One figure decides the order: the Euclidean distance between the sample's centroid and the fit's (of both
sides together, the root of the sum of squares). Texts that a fit aligned lie around its image centroid, so
that is how far they miss these images; and for unit rows T = 1 - ||mu||^2, so a trace that differs has
moved the centroid too. The trace difference stands beside it.

Standard errors are the sample's: the fits' statistics are what would be used, and are taken as they are.

Shapes: D embedding dim, F fits, G groups of a jackknife.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from revision_ray.align.alignment import FLOORS, MIN_ROWS, Alignment, sampling_floor, unbiased_trace
from revision_ray.align.map_reduce import draw_sample, store_moments
from revision_ray.align.moments import Moments, jackknife_standard_error
from revision_ray.align.registry import RegistryEntry
from revision_ray.core.errors import AlignmentError, DataError
from revision_ray.data.shards import EncoderIdentity, Modality, Rejected
from revision_ray.data.store import Store, open_stores

BY_CHANCE, BEYOND, TOO_FEW = "by chance", "beyond chance", "too few rows"


@dataclass(frozen=True, kw_only=True)
class SampledMoments:
    """Moments of a uniform sample of a store's rows."""

    store: Store
    moments: Moments
    num_rejected: int


@dataclass(frozen=True, kw_only=True)
class FitSide:
    """What a fit says of one modality."""

    encoder: EncoderIdentity
    centroid: np.ndarray  # float64 (D,)
    trace: float
    num_rows: int


def side_of(fit: Alignment, modality: Modality) -> FitSide:
    if modality == "text":
        return FitSide(
            encoder=fit.text_encoder, centroid=fit.text_centroid, trace=fit.text_trace, num_rows=fit.num_texts
        )
    return FitSide(
        encoder=fit.image_encoder, centroid=fit.image_centroid, trace=fit.image_trace, num_rows=fit.num_images
    )


def sample_stores(
    uris: Sequence[str], modality: Modality, num_rows: int, seed: int, max_rejected_fraction: float
) -> SampledMoments:
    """Moments of at most `num_rows` rows of these stores, drawn uniformly.

    Raises:
        DataError: a store cannot be read, or too many of the sample's rows have no direction.
        AlignmentError: the rows are aligned already.
    """
    store = open_stores(uris, modality)
    if store.alignment:
        raise AlignmentError(f"{store.uris[0]}: is aligned already; name the store that it was made from")
    sample = draw_sample(store, num_rows, seed)
    moments, rejected = store_moments(store, f"{modality} sample", sample=sample)
    _check_rejected(rejected, moments.count, max_rejected_fraction, store)
    return SampledMoments(store=store, moments=moments, num_rejected=len(rejected))


def _check_rejected(rejected: Sequence[Rejected], num_valid: int, most: float, store: Store) -> None:
    if len(rejected) <= most * (num_valid + len(rejected)) and num_valid:
        return
    causes = Counter(row.reason for row in rejected).most_common(3)
    shown = "; ".join(f"{count} x {reason}" for reason, count in causes)
    raise DataError(
        f"{store.uris[0]}: {len(rejected)} of {num_valid + len(rejected)} sampled rows have no direction "
        f"({shown}; the first is {rejected[0].id} in {rejected[0].uri}); mend the store, or raise "
        "max_rejected_fraction"
    )


def rank(entries: Sequence[RegistryEntry], sampled: Mapping[Modality, SampledMoments]) -> dict[str, Any]:
    """The fits by distance, nearest first, with all figures; those that cannot be compared, with the reason.

    Fits of equal distance (as of the same data, by other strategies) share a rank.

    Raises:
        AlignmentError: none can be compared.
    """
    reasons = {entry.place.name: _incomparable(entry, sampled) for entry in entries}
    fits = {e.place.name: e.fit for e in entries if e.fit and not reasons[e.place.name]}
    left_out = [{"name": name, "reason": reason} for name, reason in reasons.items() if reason]
    if not fits:
        shown = "; ".join(f"{line['name']}: {line['reason']}" for line in left_out[:3])
        raise AlignmentError(f"none of {len(left_out)} fits can be compared with this sample ({shown})")
    figures = _figures(list(fits.values()), sampled)
    order = sorted(range(len(fits)), key=lambda number: (figures[number]["distance"], list(fits)[number]))
    places = {entry.place.name: entry.place for entry in entries}
    ranked = []
    for position, number in enumerate(order):
        name, figure = list(fits)[number], figures[number]
        equal = ranked and figure["distance"] == ranked[-1]["distance"]
        ranked.append({
            "rank": ranked[-1]["rank"] if equal else position + 1,
            "name": name,
            "uri": places[name].uri,
            "strategy": fits[name].strategy.strategy,
            "domain": fits[name].domain,
            "content_hash": fits[name].content_hash,
            **figure,
        })  # fmt: skip
    described = {modality: describe_sample(found) for modality, found in sampled.items()}
    return {"sample": described, "ranked": ranked, "not_comparable": left_out}


def describe_sample(found: SampledMoments) -> dict[str, Any]:
    return {
        "stores": list(found.store.uris),
        "num_rows": found.moments.count,
        "num_rejected": found.num_rejected,
        "num_rows_in_store": found.store.num_rows,
        "embedding_dim": found.store.embedding_dim,
        "encoder": asdict(found.store.encoder),
        "domain": found.store.domain,
        "trace": unbiased_trace(found.moments.trace, found.moments.count),
        "centroid_standard_error": _finite(found.moments.centroid_standard_error),
    }


def _incomparable(entry: RegistryEntry, sampled: Mapping[Modality, SampledMoments]) -> str:
    """Why fit and sample have no space in common; empty where they have, or where an encoder is unknown."""
    if entry.fit is None:
        return entry.damage
    for modality, found in sampled.items():
        dim, encoder = found.store.embedding_dim, found.store.encoder
        if dim != entry.fit.embedding_dim:
            return f"dimension {entry.fit.embedding_dim}, the {modality} sample has {dim}"
        own = side_of(entry.fit, modality).encoder
        if encoder.fingerprint and own.fingerprint and encoder.fingerprint != own.fingerprint:
            return (
                f"{modality} encoder {own.name} ({own.fingerprint[:12]}), the sample's is {encoder.name} "
                f"({encoder.fingerprint[:12]})"
            )
    return ""


def _figures(fits: Sequence[Alignment], sampled: Mapping[Modality, SampledMoments]) -> list[dict[str, Any]]:
    """Of each fit: the distance over all sides, its error, its floor, how much farther than the nearest."""
    sides = {modality: _side_figures(fits, modality, found) for modality, found in sampled.items()}
    squares_F = sum(
        np.array([figures["centroid_distance"] for figures in side]) ** 2 for side in sides.values()
    )
    distances_F = np.sqrt(squares_F)
    nearest = int(np.argmin(distances_F))
    variances_F, margin_variances_F = np.zeros(len(fits)), np.zeros(len(fits))
    for modality, found in sampled.items():
        _, rest_GD = found.moments.leave_one_out()
        centroids_FD = np.array([side_of(fit, modality).centroid for fit in fits])
        moved_GF = np.array([np.linalg.norm(centroids_FD - rest_D, axis=1) for rest_D in rest_GD])
        own_F = np.array([figures["centroid_distance"] for figures in sides[modality]])
        moved_GF = np.sqrt(np.maximum(squares_F - own_F**2, 0) + moved_GF.reshape(-1, len(fits)) ** 2)
        variances_F += jackknife_standard_error(moved_GF) ** 2
        margin_variances_F += jackknife_standard_error(moved_GF - moved_GF[:, [nearest]]) ** 2
    spreads_F = [math.sqrt(max(sum(side_of(fit, side).trace for side in sampled), 0.0)) for fit in fits]
    fewest_F = [
        min(min(found.moments.count, side_of(fit, modality).num_rows) for modality, found in sampled.items())
        for fit in fits
    ]
    result = []
    for number, distance in enumerate(distances_F.tolist()):
        floor = math.hypot(*(side[number]["sampling_floor"] for side in sides.values()))
        result.append({
            "distance": distance,
            "standard_error": _finite(math.sqrt(variances_F[number])),
            "sampling_floor": floor,
            "verdict": _verdict(distance, floor, fewest_F[number]),
            "share_of_spread": distance / spreads_F[number] if spreads_F[number] else None,
            "farther_than_nearest": distance - float(distances_F[nearest]),
            "farther_standard_error": _finite(math.sqrt(margin_variances_F[number])),
            "sides": {modality: side[number] for modality, side in sides.items()},
        })  # fmt: skip
    return result


def _verdict(distance: float, floor: float, fewest_rows: int) -> str:
    if fewest_rows < MIN_ROWS:
        return TOO_FEW
    return BEYOND if distance > FLOORS * floor else BY_CHANCE


def _side_figures(
    fits: Sequence[Alignment], modality: Modality, found: SampledMoments
) -> list[dict[str, Any]]:
    """Of each fit, on one side: distance of the centroids, difference of the traces (sample minus fit)."""
    moments = found.moments
    counts_G, rest_GD = moments.leave_one_out()
    trace = unbiased_trace(moments.trace, moments.count)
    traces_G = (1.0 - np.sum(rest_GD**2, axis=1)) * counts_G / np.maximum(counts_G - 1, 1)
    trace_error = _finite(float(jackknife_standard_error(traces_G)))
    figures = []
    for fit in fits:
        side = side_of(fit, modality)
        moved_G = np.linalg.norm(rest_GD - side.centroid, axis=1)
        fit_trace = unbiased_trace(side.trace, side.num_rows)
        figures.append({
            "centroid_distance": float(np.linalg.norm(moments.centroid - side.centroid)),
            "standard_error": _finite(float(jackknife_standard_error(moved_G))),
            "sampling_floor": sampling_floor(side.trace, side.num_rows, moments.count),
            "fit_trace": fit_trace,
            "trace_difference": trace - fit_trace,
            "trace_difference_standard_error": trace_error,
        })  # fmt: skip
    return figures


def _finite(value: float) -> float | None:
    """None (JSON has no NaN) where a sample is too small to tell."""
    return value if math.isfinite(value) else None
