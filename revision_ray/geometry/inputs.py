"""What a report is about: stores and fits that belong together, and which rows the fits have seen."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from revision_ray import storage
from revision_ray.align.affine import Affine
from revision_ray.align.alignment import Alignment, load_alignment, load_moments
from revision_ray.align.apply import check_store, open_pair
from revision_ray.align.map_reduce import draw_sample, store_moments
from revision_ray.align.moments import Moments
from revision_ray.align.strategies import STRATEGIES
from revision_ray.config import MISSING
from revision_ray.data.rejected import REJECTED, check_rejected, write_rejected
from revision_ray.data.store import Store
from revision_ray.errors import AlignmentError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """One encoder's embeddings and the fits made of them."""

    texts: str | list[str] = MISSING
    """Text store, or several."""
    images: str | list[str] = MISSING
    """Image store, or several. Rows whose ids occur on both sides are pairs; without any, figures that need
    pairs are left out."""
    alignments: list[str] = MISSING
    """Directories of fits. `none` is always measured beside them."""
    heldout_texts: str | list[str] | None = None
    """Measure on these texts instead, which no fit has seen; `texts` and `images` then only fix the frame."""
    heldout_images: str | list[str] | None = None
    """The same for images; give both or neither."""
    probe: str | None = None
    """probe.json of the cross-modal probe of jobs/study.py on these data. The verdict then rests on it."""

    def __post_init__(self) -> None:
        if (self.heldout_texts is None) != (self.heldout_images is None):
            raise ConfigError("give heldout_texts and heldout_images both, or neither")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One column of the report. `num_seen`: shards of the measured texts and images that the fit was made
    from; None where nothing was fitted."""

    label: str
    strategy: str
    affine: Affine
    alignment: Alignment | None = None
    uri: str = ""
    num_seen: tuple[int, int] | None = None

    @property
    def held_out(self) -> bool:
        """No measured row took part in the fit."""
        return not any(self.num_seen or ())

    def description(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "label": self.label, "strategy": self.strategy, "held_out": self.held_out, "fit": None,
        }  # fmt: skip
        if self.alignment is not None:
            gap = self.alignment.modality_gap
            used = STRATEGIES[self.strategy].settings if self.strategy in STRATEGIES else ()
            found["fit"] = {
                "uri": self.uri,
                "content_hash": self.alignment.content_hash,
                "settings": {
                    n: v for n, v in asdict(self.alignment.strategy).items() if n in (*used, "seed")
                },
                "num_texts": self.alignment.num_texts,
                "num_images": self.alignment.num_images,
                "domain": self.alignment.domain,
                "gap_before": gap.before,
                "gap_after": gap.after,
                "measured_shards_seen": list(self.num_seen or ()),
            }
        return found


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Opened and checked: what is measured, what fixes the frame, and the fits, `none` first."""

    texts: Store
    images: Store
    reference_texts: Store
    reference_images: Store
    fits: tuple[Fit, ...]
    output: str
    max_rejected_fraction: float

    def description(self) -> dict[str, Any]:
        stores = {"texts": self.texts, "images": self.images}
        if self.reference_texts != self.texts:
            stores |= {"frame_texts": self.reference_texts, "frame_images": self.reference_images}
        return {name: _described(store) for name, store in stores.items()}


def _described(store: Store) -> dict[str, Any]:
    return {
        "uris": list(store.uris),
        "num_rows": store.num_rows,
        "domain": store.domain,
        "encoder": asdict(store.encoder),
        "content_hash": storage.sha256(*(h.encode() for h in sorted(store.shard_hashes))),
    }


def open_inputs(sources: Sources, output: str, max_rejected_fraction: float) -> Inputs:
    """The stores and fits of `sources`, checked against each other; rejected rows are listed below `output`.

    Raises:
        DataError: a store is missing, damaged or of the other modality.
        AlignmentError: a fit is missing or damaged, or stores and fits are of other encoders or dimensions.
    """
    measured = reference = open_pair(sources.texts, sources.images)
    if sources.heldout_texts is not None and sources.heldout_images is not None:
        measured = open_pair(sources.heldout_texts, sources.heldout_images)
    _check_same(measured[0], reference[0])
    fits = [_opened(storage.absolute(uri), *measured) for uri in sources.alignments]
    if not any(fit.strategy == "none" for fit in fits):
        as_they_are = Affine(offset=np.zeros(measured[0].embedding_dim), unit_output=False)
        fits.append(Fit(label="none", strategy="none", affine=as_they_are))
    order = list(STRATEGIES)
    fits.sort(key=lambda fit: order.index(fit.strategy) if fit.strategy in order else len(order))
    return Inputs(
        texts=measured[0],
        images=measured[1],
        reference_texts=reference[0],
        reference_images=reference[1],
        fits=_labelled(fits),
        output=output,
        max_rejected_fraction=max_rejected_fraction,
    )


def _check_same(heldout: Store, reference: Store) -> None:
    same = heldout.encoder.fingerprint == reference.encoder.fingerprint
    if heldout.embedding_dim != reference.embedding_dim or not same:
        raise AlignmentError(
            f"{heldout.uris[0]} was made by {heldout.encoder} ({heldout.embedding_dim} dimensions), "
            f"{reference.uris[0]} by {reference.encoder} ({reference.embedding_dim}); held-out rows must "
            "come from the same encoder"
        )


def _opened(uri: str, texts: Store, images: Store) -> Fit:
    alignment = load_alignment(uri)
    check_store(texts, alignment, allow_other_encoder=False)
    if images.encoder.fingerprint != alignment.image_encoder.fingerprint:
        raise AlignmentError(
            f"{images.uris[0]}: was made by {images.encoder}, the images of {uri} by "
            f"{alignment.image_encoder}; embed with the encoder of the fit, or fit again"
        )
    seen = [
        len(m.shard_hashes & s.shard_hashes) for m, s in zip(load_moments(uri), (texts, images), strict=True)
    ]
    strategy = alignment.strategy.strategy
    return Fit(
        label=strategy,
        strategy=strategy,
        affine=alignment.affine,
        alignment=alignment,
        uri=uri,
        num_seen=(seen[0], seen[1]) if strategy != "none" else None,
    )


def _labelled(fits: list[Fit]) -> tuple[Fit, ...]:
    """The same fits; those of one strategy are told apart by the name of their directory, else by number."""
    many = Counter(fit.strategy for fit in fits)
    named = [
        f"{fit.strategy} ({storage.name_of(fit.uri)})" if many[fit.strategy] > 1 else fit.strategy
        for fit in fits
    ]
    labels = [
        label if named.count(label) == 1 else f"{label} #{named[: at + 1].count(label)}"
        for at, label in enumerate(named)
    ]
    return tuple(replace(fit, label=label) for fit, label in zip(fits, labels, strict=True))


def moments_of(
    inputs: Inputs, store: Store, name: str, max_rows: int | None, seed: int, affine: Affine | None = None
) -> Moments:
    """Second moments of the store's unit rows, mapped by `affine` where one is given.

    Raises:
        DataError: too many rows have no direction; they are listed below the report's output.
        AlignmentError: all rows are equal.
    """
    sample = draw_sample(store, max_rows, seed) if max_rows else None
    moments, rejected = store_moments(store, name, affine=affine, second=True, sample=sample)
    if rejected:
        listed = storage.join(inputs.output, REJECTED)
        write_rejected(listed, rejected)
        check_rejected(rejected, moments.count + len(rejected), inputs.max_rejected_fraction, listed)
        log.warning("%s: %d rows without a direction are left out, see %s", name, len(rejected), listed)
    if np.trace(moments.covariance) < 1e-12:
        raise AlignmentError(
            f"all {moments.count} {store.modality} embeddings of {', '.join(store.uris)} are equal, so they "
            "have no shape to report on; check what was embedded"
        )
    return moments
