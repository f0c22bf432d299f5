"""The global fit: two map-reduces for the moments, then one pass over the texts for each centroid step.

texts, images --moments--> map --texts again--> mu' (each centroid step) --texts again--> gap after
"""

import logging
import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from revision_ray import config, storage
from revision_ray.align import alignment as artifact
from revision_ray.align.affine import Affine
from revision_ray.align.alignment import Alignment, Gap, Inputs, load_alignment, load_moments, save_alignment
from revision_ray.align.map_reduce import Sample, draw_sample, store_moments
from revision_ray.align.moments import NUM_BUCKETS, Moments
from revision_ray.align.strategies import STRATEGIES, StrategyConfig, fit_map
from revision_ray.config import MISSING
from revision_ray.data.rejected import REJECTED, check_rejected, write_rejected
from revision_ray.data.schema import Rejected
from revision_ray.data.store import Store, open_stores
from revision_ray.errors import AlignmentError

log = logging.getLogger(__name__)

ROWS_TO_SETTLE = 10_000  # statistics are flat beyond this many rows a side (paper, app. E.1)


@dataclass(frozen=True, kw_only=True)
class FitJob(StrategyConfig):
    """Fit an alignment from unpaired text and image stores."""

    texts: str | list[str] = MISSING
    """Text store, or several."""
    images: str | list[str] | None = None
    """Image store, or several. Required, unless append_to names a fit that has images already."""
    output: str = MISSING
    """Directory of the fit."""
    append_to: str | None = None
    """A fit whose moments these stores join; its shards are not read again for the moments. The texts that it
    names are read again for mu' (unless drift_rows says otherwise), so they must still be there."""
    max_rows: int | None = None
    """Fit on a uniform sample of this many rows a side."""
    drift_rows: int | None = None
    """Estimate mu' and the gap after from a uniform sample of this many texts; its standard error is stated."""
    domain: str | None = None
    """What the data are about; taken from the stores where they agree."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of rows is NaN, infinite, zero, or of another dimension."""
    allow_other_encoder: bool = False
    """Fit although the stores come from different encoders."""

    def strategy_config(self) -> StrategyConfig:
        return StrategyConfig(**{name: getattr(self, name) for name in StrategyConfig.__dataclass_fields__})


def run(job: FitJob) -> str:
    """Fit as `job` says, save, and describe the result."""
    output = storage.absolute(job.output)
    base = load_alignment(job.append_to) if job.append_to else None
    former = load_moments(job.append_to) if job.append_to else None
    strategy = _strategy(job, base)
    inputs = _inputs(job, base)
    if storage.exists(storage.join(output, artifact.DOCUMENT)):
        return _reuse(load_alignment(output), strategy, inputs, output)
    texts, images = open_stores(inputs.texts, "text"), open_stores(inputs.images, "image")
    _check_pair(texts, images, job.allow_other_encoder)
    second = STRATEGIES[strategy.strategy].second
    samples = [draw_sample(s, job.max_rows, job.seed) if job.max_rows else None for s in (texts, images)]
    text, text_rejected = _moments(texts, "texts", former and former[0], second, samples[0])
    image, image_rejected = _moments(images, "images", former and former[1], second, samples[1])
    listed = storage.join(output, REJECTED)
    write_rejected(listed, text_rejected + image_rejected)
    for rejected, moments in ((text_rejected, text), (image_rejected, image)):
        check_rejected(rejected, moments.count + len(rejected), job.max_rejected_fraction, listed)
    for side, moments in (("text", text), ("image", image)):
        if moments.count < ROWS_TO_SETTLE:
            log.warning("only %d %s rows: statistics settle at about %d", moments.count, side, ROWS_TO_SETTLE)
    drift_sample = draw_sample(texts, job.drift_rows, job.seed) if job.drift_rows else samples[0]
    alignment = fit(texts, images, text, image, strategy, drift_sample)
    alignment = replace(
        alignment,
        domain=job.domain if job.domain is not None else _domain(texts, images),
        inputs=replace(
            inputs, num_rejected_texts=len(text_rejected), num_rejected_images=len(image_rejected)
        ),
    )
    config.save_resolved(job, storage.join(output, "config.yaml"))
    save_alignment(alignment, text, image, output)
    return describe(alignment, output)


def fit(
    texts: Store,
    images: Store,
    text: Moments,
    image: Moments,
    strategy: StrategyConfig,
    drift_sample: Sample | None = None,
) -> Alignment:
    """The strategy fitted to these moments, its centroid steps measured on `texts`.

    Raises:
        AlignmentError: a side is empty or does not vary.
    """
    affine = fit_map(text, image, strategy)
    drifted: list[np.ndarray] = []
    num_steps = strategy.centroid_steps if STRATEGIES[strategy.strategy].centroid_step else 0
    aligned = None
    for step in range(num_steps):
        aligned, _ = store_moments(texts, f"mu' step {step + 1}", affine=affine, sample=drift_sample)
        drifted.append(aligned.centroid)
        affine = affine.with_centroid_step(image.centroid - aligned.centroid)
    after, _ = store_moments(texts, "gap after", affine=affine, sample=drift_sample)
    return Alignment(
        strategy=strategy,
        affine=affine,
        text_centroid=text.centroid,
        image_centroid=image.centroid,
        drifted_centroids=np.array(drifted).reshape(num_steps, text.embedding_dim),
        text_trace=text.trace,
        image_trace=image.trace,
        num_texts=text.count,
        num_images=image.count,
        domain="",
        text_encoder=texts.encoder,
        image_encoder=images.encoder,
        modality_gap=_gap(text, image, after, affine),
        text_centroid_standard_error=text.centroid_standard_error,
        image_centroid_standard_error=image.centroid_standard_error,
        drifted_centroid_standard_error=aligned.centroid_standard_error if aligned else 0.0,
        inputs=Inputs(texts=texts.uris, images=images.uris),
    )


def _gap(text: Moments, image: Moments, after: Moments, affine: Affine) -> Gap:
    spread = after.trace if affine.unit_output else text.trace * affine.scale**2
    return Gap(
        before=float(np.linalg.norm(image.centroid - text.centroid)),
        after=float(np.linalg.norm(image.centroid - after.centroid)),
        before_standard_error=gap_standard_error(text, image),
        after_standard_error=math.sqrt(
            spread / max(after.count - 1, 1) + image.trace / max(image.count - 1, 1)
        ),
    )


def gap_standard_error(text: Moments, image: Moments) -> float:
    """Standard error of ||mu_x - mu_y||: delete-a-group jackknife over the buckets of each side; NaN where a
    side has too few rows to form two."""
    variance = 0.0
    for moving, still in ((text, image), (image, text)):
        filled = [bucket for bucket in range(NUM_BUCKETS) if moving.counts[bucket]]
        if len(filled) < 2:
            return math.nan
        gaps = np.array(
            [np.linalg.norm(moving.without_bucket(bucket)[1] - still.centroid) for bucket in filled]
        )
        variance += (len(filled) - 1) / len(filled) * float(np.sum((gaps - gaps.mean()) ** 2))
    return math.sqrt(variance)


def _strategy(job: FitJob, base: Alignment | None) -> StrategyConfig:
    asked = job.strategy_config()
    if base is None or asked == base.strategy:
        return asked
    if asked == StrategyConfig():
        return base.strategy
    raise AlignmentError(
        f"append_to={job.append_to} was fitted with {base.strategy}, this job asks for {asked}; leave the strategy "
        "out to keep the former one, or fit all stores anew"
    )


def _inputs(job: FitJob, base: Alignment | None) -> Inputs:
    texts, images = ([job.texts] if isinstance(job.texts, str) else job.texts), job.images or []
    images = [images] if isinstance(images, str) else images
    if base is None and not images:
        raise AlignmentError(
            "images: name an image store; a fit needs both modalities (they need not be paired)"
        )
    if base is not None and (base.inputs.max_rows or job.max_rows):
        raise AlignmentError(
            "append_to and max_rows do not go together: a sample cannot be extended; fit anew"
        )
    former = base.inputs if base else Inputs(texts=(), images=())
    return Inputs(
        texts=_joined(former.texts, texts),
        images=_joined(former.images, images),
        max_rows=job.max_rows,
        drift_rows=job.drift_rows,
    )


def _joined(former: tuple[str, ...], added: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*former, *(storage.absolute(uri) for uri in added)]))


def _reuse(found: Alignment, strategy: StrategyConfig, inputs: Inputs, output: str) -> str:
    same = replace(found.inputs, num_rejected_texts=0, num_rejected_images=0) == inputs
    if found.strategy == strategy and same:
        log.info("%s holds this fit already; nothing is done again", output)
        return describe(found, output)
    raise AlignmentError(
        f"{output} already holds another fit ({found.strategy.strategy} of {list(found.inputs.texts)} and "
        f"{list(found.inputs.images)}); name another output, or remove that one yourself"
    )


def _check_pair(texts: Store, images: Store, allow_other_encoder: bool) -> None:
    if texts.embedding_dim != images.embedding_dim:
        raise AlignmentError(
            f"texts have dimension {texts.embedding_dim}, images {images.embedding_dim}; both sides must come from "
            "the same dual encoder"
        )
    if texts.encoder.fingerprint != images.encoder.fingerprint and not allow_other_encoder:
        raise AlignmentError(
            f"texts were made by {asdict(texts.encoder)}, images by {asdict(images.encoder)}; embed both with one "
            "encoder, or set allow_other_encoder=true if you know that they share a space"
        )


def _moments(
    store: Store, name: str, former: Moments | None, second: bool, sample: Sample | None
) -> tuple[Moments, list[Rejected]]:
    """Moments of all shards, those that `former` counts taken from there."""
    if former is None:
        return store_moments(store, name, second=second, sample=sample)
    fresh = tuple(group for group in store.row_groups if group.shard_hash not in former.shard_hashes)
    known = len(store.row_groups) - len(fresh)
    log.info("%s: %d row groups are in the former fit's moments, %d are new", name, known, len(fresh))
    if fresh:
        added, rejected = store_moments(replace(store, row_groups=fresh), name, second=second)
        former.merge(added)
        return former, rejected
    return former, []


def _domain(texts: Store, images: Store) -> str:
    if texts.domain != images.domain:
        log.warning("texts are of domain %r, images of %r", texts.domain, images.domain)
    return ",".join(sorted({store.domain for store in (texts, images) if store.domain}))


def describe(alignment: Alignment, output: str) -> str:
    """What the fit did, for a person."""
    gap = alignment.modality_gap
    return (
        f"{alignment.strategy.strategy} fitted on {alignment.num_texts:,} texts and {alignment.num_images:,} images, "
        f"d = {alignment.embedding_dim}: modality gap {gap.before:.4f} (s.e. {gap.before_standard_error:.4f}) -> "
        f"{gap.after:.2e}, traces {alignment.text_trace:.4f} / {alignment.image_trace:.4f}\n"
        f"fit: {output}"
    )


__all__ = ["FitJob", "describe", "fit", "gap_standard_error", "run"]
