"""The fit job: fit an alignment to a text store and an image store, and save it.

One pass over each store collects its moments, and the map follows from them. Each centroid step then takes
one more pass over the texts, for mu'. A last pass over the texts measures the modality gap after alignment.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from revision_ray.align.alignment import (
    CONFIG,
    DOCUMENT,
    TENSORS,
    Alignment,
    FitInputs,
    ModalityGap,
    gap_floor,
    load_alignment,
    load_moments,
    save_alignment,
)
from revision_ray.align.apply import check_pair
from revision_ray.align.map_reduce import UniformSample, draw_sample, store_moments
from revision_ray.align.maps import Affine
from revision_ray.align.moments import Moments, gap_standard_error, modality_gap
from revision_ray.align.strategies import STRATEGIES, StrategyConfig, centroid_steps, fit_map
from revision_ray.core import artifact, config, storage
from revision_ray.core.cluster import one_thread
from revision_ray.core.config import MISSING
from revision_ray.core.errors import AlignmentError, ConfigError
from revision_ray.core.stage import Forecast, Stage, StageKind, StageWork, reads_keys, whole_sum
from revision_ray.data.shards import Rejected
from revision_ray.data.store import (
    REJECTED,
    Store,
    check_rejected,
    count_rows,
    open_stores,
    read_rejected,
    write_rejected,
)

log = logging.getLogger(__name__)

ROWS_TO_SETTLE = 10_000  # statistics are flat beyond this many rows a side (paper, app. E.1)


@dataclass(frozen=True, kw_only=True)
class FitJob(StrategyConfig):
    """Fit an alignment from unpaired text and image stores."""

    texts: str | list[str] = MISSING
    """Text store, or a list of them."""
    images: str | list[str] | None = None
    """Image store, or a list of them. Required, unless append_to names a fit that has images already."""
    output: str = MISSING
    """Directory to write the fit to."""
    append_to: str | None = None
    """Directory of a former fit to extend: its moments are added to those of the stores named here, without
    reading its shards again. Its texts (or a sample, see drift_rows) are read again for mu' and the gap
    after alignment. All its stores must still exist."""
    max_rows: int | None = None
    """Fit on a uniform sample of at most this many texts and as many images; all rows if not given."""
    drift_rows: int | None = None
    """Estimate mu' and the gap after alignment from a uniform sample of at most this many texts. If not
    given, max_rows applies, then all texts. The fit records the standard error."""
    domain: str | None = None
    """Subject of the data, as a label. If not given, the domains of the stores, joined by commas."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of rows is NaN, infinite, zero, or of another dimension."""
    allow_other_encoder: bool = False
    """Fit even if the stores were embedded with different encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rows", "drift_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more, or leave it out to take all rows")

    def strategy_config(self) -> StrategyConfig:
        return StrategyConfig(**{name: getattr(self, name) for name in StrategyConfig.__dataclass_fields__})


def run_fit(job: FitJob) -> str:
    """Fit an alignment, save it, and return a summary; an equal fit in the output is not made again.

    Raises:
        AlignmentError: the stores do not fit together, a side does not vary, or a store is aligned already.
        DataError: a store cannot be read, or too many rows were rejected.
        OutputError: the output holds something else.
    """
    output = storage.absolute(job.output)
    base = load_alignment(job.append_to) if job.append_to else None
    strategy = _strategy(job, base)
    inputs = _inputs(job, base)
    texts, images = open_stores(inputs.texts, "text"), open_stores(inputs.images, "image")
    if storage.exists(storage.join(output, DOCUMENT)):
        return _reuse(output, job.domain, strategy, inputs, texts, images)
    artifact.check_unused(output, "a fit", leftovers=(REJECTED, CONFIG, TENSORS))
    if texts.alignment:
        raise AlignmentError(f"{texts.uris[0]}: is aligned already; fit on the store that it was made from")
    check_pair(texts, images, job.allow_other_encoder)
    text, image, inputs = _both_moments(job, strategy, inputs, texts, images, output)
    for side, moments in (("text", text), ("image", image)):
        if moments.count < ROWS_TO_SETTLE:
            log.warning("only %d %s rows: statistics settle at about %d", moments.count, side, ROWS_TO_SETTLE)
    drift_rows = job.drift_rows or job.max_rows
    drift_sample = draw_sample(texts, drift_rows, strategy.seed) if drift_rows else None
    alignment = replace(
        fit_alignment(texts, images, text, image, strategy, drift_sample),
        domain=job.domain if job.domain is not None else _domain(texts, images),
        inputs=inputs,
    )
    config.save_resolved(job, storage.join(output, CONFIG))
    save_alignment(alignment, text, image, output)
    return describe(alignment, output)


def fit_alignment(
    texts: Store,
    images: Store,
    text: Moments,
    image: Moments,
    strategy: StrategyConfig,
    drift_sample: UniformSample | None = None,
) -> Alignment:
    """Fit the strategy to these moments; measure mu' and the gap after alignment on `texts`.

    `drift_sample` limits those measurements to a sample of the texts; None takes all. The result has no
    domain.

    Raises:
        AlignmentError: a side is empty or does not vary.
    """

    def measure(name: str, affine: Affine) -> Moments:
        return store_moments(texts, name, affine=affine, sample=drift_sample)[0]

    with one_thread():  # with more threads, the eigenvectors of second moments differ in their last bits
        affine = fit_map(text, image, strategy)
    affine, drifted = centroid_steps(affine, image, strategy, measure)
    after = measure("gap after", affine=affine)
    return Alignment(
        strategy=strategy,
        affine=affine,
        text_centroid=text.centroid,
        image_centroid=image.centroid,
        drifted_centroids=np.array([step.centroid for step in drifted]).reshape(-1, text.embedding_dim),
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
        drifted_centroid_standard_error=drifted[-1].centroid_standard_error if drifted else 0.0,
        inputs=FitInputs(texts=texts.uris, images=images.uris),
    )


def _gap(text: Moments, image: Moments, after: Moments, affine: Affine) -> ModalityGap:
    spread = after.trace if affine.unit_output else text.trace * affine.scale**2
    return ModalityGap(
        before=modality_gap(text, image),
        after=modality_gap(after, image),
        before_standard_error=gap_standard_error(text, image),
        after_standard_error=gap_floor(spread, after.count, image.trace, image.count),
    )


def _strategy(job: FitJob, base: Alignment | None) -> StrategyConfig:
    asked = job.strategy_config()
    if base is None or asked == base.strategy:
        return asked
    if asked == StrategyConfig():
        return base.strategy
    raise AlignmentError(
        f"append_to={job.append_to} was fitted with {base.strategy}, this job asks for {asked}; leave the "
        "strategy out to keep the former one, or fit all stores anew"
    )


def _inputs(job: FitJob, base: Alignment | None) -> FitInputs:
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
    former = base.inputs if base else FitInputs(texts=(), images=())
    return replace(
        former,
        texts=_joined(former.texts, texts),
        images=_joined(former.images, images),
        max_rows=job.max_rows,
        drift_rows=job.drift_rows,
    )


def _joined(former: tuple[str, ...], added: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*former, *(storage.absolute(uri) for uri in added)]))


def _reuse(
    output: str, domain: str | None, strategy: StrategyConfig, inputs: FitInputs, texts: Store, images: Store
) -> str:
    """Return the description of the fit in `output` if its settings and shards are the same.

    Raises:
        OutputError: its settings differ, or the stores have changed since.
    """
    former = load_alignment(output)
    artifact.check_same(
        output,
        "a fit",
        _identity(former.strategy, former.inputs, former.domain),
        _identity(strategy, inputs, former.domain if domain is None else domain),
    )
    artifact.refuse(
        output,
        "a fit",
        [
            f"shards of {', '.join(store.uris)} were added or replaced"
            for store, moments in zip((texts, images), load_moments(output), strict=True)
            if moments.shard_hashes != store.shard_hashes
        ],
        advice=f"to read only the new shards, give append_to={output} and another output",
    )
    log.info("%s holds this fit already; nothing is done again", output)
    return describe(former, output)


def _identity(strategy: StrategyConfig, inputs: FitInputs, domain: str) -> dict[str, Any]:
    return {
        **asdict(strategy),
        "domain": domain,
        "texts": list(inputs.texts),
        "images": list(inputs.images),
        "max_rows": inputs.max_rows,
        "drift_rows": inputs.drift_rows,
    }


def _both_moments(
    job: FitJob, strategy: StrategyConfig, inputs: FitInputs, texts: Store, images: Store, output: str
) -> tuple[Moments, Moments, FitInputs]:
    """Return the text moments, the image moments, and `inputs` with the number of rejected rows.

    The rejected rows are also listed in a file in the output.

    Raises:
        DataError: more of the rows read by this job were rejected than it allows.
    """
    second = STRATEGIES[strategy.strategy].second
    formers = load_moments(job.append_to) if job.append_to else (None, None)
    earlier = read_rejected(storage.join(job.append_to, REJECTED)) if job.append_to else []
    found = []
    for store, name, former in zip((texts, images), ("texts", "images"), formers, strict=True):
        sample = draw_sample(store, job.max_rows, strategy.seed) if job.max_rows else None
        found.append(_moments(store, name, former, second, sample))
    (text, text_rejected, texts_read), (image, image_rejected, images_read) = found
    listed = storage.join(output, REJECTED)
    write_rejected(listed, earlier + text_rejected + image_rejected)
    check_rejected(text_rejected, texts_read, job.max_rejected_fraction, listed)
    check_rejected(image_rejected, images_read, job.max_rejected_fraction, listed)
    counted = replace(
        inputs,
        num_rejected_texts=inputs.num_rejected_texts + len(text_rejected),
        num_rejected_images=inputs.num_rejected_images + len(image_rejected),
    )
    return text, image, counted


def _moments(
    store: Store, name: str, former: Moments | None, second: bool, sample: UniformSample | None
) -> tuple[Moments, list[Rejected], int]:
    """Return the moments of all shards, the rejected rows, and the number of rows read.

    Shards that are already counted in `former` are not read; its moments are extended in place.
    """
    if former is None:
        moments, rejected = store_moments(store, name, second=second, sample=sample)
        return moments, rejected, moments.count + len(rejected)
    gone = former.shard_hashes - store.shard_hashes
    if gone:
        raise AlignmentError(
            f"{len(gone)} shards that the former fit counts are no longer in {list(store.uris)}; "
            "restore them, or fit anew"
        )
    fresh = tuple(group for group in store.row_groups if group.shard_hash not in former.shard_hashes)
    known = len(store.row_groups) - len(fresh)
    log.info("%s: %d row groups are in the former fit's moments, %d are new", name, known, len(fresh))
    if not fresh:
        return former, [], 0
    added, rejected = store_moments(replace(store, row_groups=fresh), name, second=second)
    former.merge(added)
    return former, rejected, added.count + len(rejected)


def _domain(texts: Store, images: Store) -> str:
    if texts.domain != images.domain:
        log.warning("texts are of domain %r, images of %r", texts.domain, images.domain)
    return ",".join(sorted({store.domain for store in (texts, images) if store.domain}))


def describe(alignment: Alignment, output: str) -> str:
    """Return a summary of the fit as two lines of text."""
    gap = alignment.modality_gap
    return (
        f"{alignment.strategy.strategy} fitted on {alignment.num_texts:,} texts and "
        f"{alignment.num_images:,} images, d = {alignment.embedding_dim}: modality gap {gap.before:.4f} "
        f"(s.e. {gap.before_standard_error:.4f}) -> {gap.after:.2e}, "
        f"traces {alignment.text_trace:.4f} / {alignment.image_trace:.4f}\n"
        f"fit: {output}"
    )


# --- as a stage of a chain --------------------------------------------------------------------------------


def _work(forecast: Forecast, stage: Stage) -> StageWork:
    sides = [forecast.rows_read(stage, uris, count_rows) for uris in (stage.job.texts, stage.job.images)]
    most = stage.job.max_rows
    return StageWork(rows=whole_sum([min(rows, most) if rows and most else rows for rows in sides]))


def _done(stage: Stage) -> dict[str, Any]:
    document = stage.proof()
    return {"rows": document["num_texts"] + document["num_images"]}


def _summary(stages: Sequence[Stage]) -> str:
    """Return a table of the gap after each fit.

    A fit is named by its stage's title, else by its strategy, or by the stage where several fits share one.
    """
    alignments = [load_alignment(stage.output) for stage in stages]
    strategies = [alignment.strategy.strategy for alignment in alignments]
    lines = [f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}"]
    for stage, alignment, strategy in zip(stages, alignments, strategies, strict=True):
        name = stage.title or (strategy if strategies.count(strategy) == 1 else stage.name)
        gap = alignment.modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    last = alignments[-1]
    sizes = f"Fitted on {last.num_texts:,} texts and {last.num_images:,} images, unpaired."
    return f"{sizes}\n\n" + "\n".join(lines)


STAGE = StageKind(
    name="fit",
    job=FitJob,
    run=run_fit,
    reads=reads_keys("texts", "images", "append_to"),
    proof="alignment.json",
    work=_work,
    done=_done,
    summary=_summary,
)
