"""Inputs of a report: checked stores and fits, samples of rows, and pairs of texts and images of one id.

Tasks read the stores; only sampled rows reach the driver. All samples depend on content and seed alone.

Shapes: N rows, D embedding dim.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from revision_ray.align.alignment import Alignment, load_alignment, load_moments
from revision_ray.align.apply import check_store, open_pair
from revision_ray.align.map_reduce import UniformSample, checked_moments, draw_sample, read_sampled
from revision_ray.align.maps import SMALLEST_NORM, Affine
from revision_ray.align.moments import Moments
from revision_ray.align.strategies import STRATEGIES
from revision_ray.core import storage
from revision_ray.core.cluster import connect, user_errors
from revision_ray.core.config import MISSING
from revision_ray.core.errors import AlignmentError, ConfigError
from revision_ray.data.store import REJECTED, RowGroup, Store, read_group, read_group_ids, shares
from revision_ray.geometry.spectra import id_keys

log = logging.getLogger(__name__)

# Ids a side that are searched for pairs: those with the smallest hashes, so the same ones on both sides.
PAIR_CANDIDATES = 200_000
_ROW_GROUPS_PER_TASK = 8
_HASHED = np.dtype([("hash", "<u8"), ("group", "<u4"), ("row", "<u4")])
# Rounding to float16 changes the length of a unit row by less than this.
_UNIT_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Rows as stored, with their ids. `num_dropped` rows without a direction are left out."""

    ids: list[str]
    stored_ND: np.ndarray
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def norms_N(self) -> np.ndarray:
        return np.linalg.norm(self.stored_ND.astype(np.float64), axis=1)

    @property
    def unit_ND(self) -> np.ndarray:
        """Return the rows scaled to length 1, float64."""
        return self.stored_ND.astype(np.float64) / self.norms_N[:, None]

    @property
    def share_off_unit(self) -> float:
        """Return the share of rows whose stored length is not 1 within the rounding of float16."""
        return float(np.mean(np.abs(self.norms_N - 1) > _UNIT_TOLERANCE)) if len(self) else 0.0

    def take(self, positions: np.ndarray) -> "SampledRows":
        """Return the rows at these positions."""
        return SampledRows(ids=[self.ids[p] for p in positions], stored_ND=self.stored_ND[positions])


@dataclass(frozen=True, kw_only=True)
class MatchedPairs:
    """Texts and images of the same ids, row by row.

    `num_matched` ids matched in the searched share of all ids.
    """

    text: SampledRows
    image: SampledRows
    num_matched: int
    share_searched: float


def draw_rows(store: Store, num_rows: int, seed: int) -> SampledRows:
    """Draw a uniform sample of the store's rows without replacement; all rows if it has fewer.

    Raises:
        DataError: a shard is missing or damaged.
    """
    connect()
    sample = draw_sample(store, num_rows, seed)
    groups = [g for g in store.row_groups if sample is None or (g.shard_hash, g.index) in sample.rows]
    tasks = [_drawn.remote(s, sample, store.embedding_dim) for s in shares(groups, _ROW_GROUPS_PER_TASK)]
    with user_errors():
        parts = ray.get(tasks)
    rows = _valid([i for ids, _ in parts for i in ids], np.concatenate([block for _, block in parts]))
    if rows.share_off_unit:
        log.warning(
            "%s: %.1f %% of rows are not of length one (%.3g to %.3g); they are scaled to it",
            ", ".join(store.uris), 100 * rows.share_off_unit, rows.norms_N.min(), rows.norms_N.max(),
        )  # fmt: skip
    return rows


def draw_pairs(texts: Store, images: Store, num_pairs: int, seed: int) -> MatchedPairs | None:
    """Draw up to `num_pairs` pairs of rows whose id is in both stores; None if no id matches.

    The choice depends on the ids and the seed, not on the shards. In large stores only the `PAIR_CANDIDATES`
    ids with the smallest hashes are searched. Of an id that a store has twice, the first row counts.

    Raises:
        DataError: a shard is missing or damaged.
    """
    connect()
    share = min(1.0, PAIR_CANDIDATES / max(texts.num_rows, images.num_rows))
    with user_errors():
        text_H, image_H = _hashed(texts, share, seed), _hashed(images, share, seed)
        common, at_text, at_image = np.intersect1d(
            text_H["hash"], image_H["hash"], assume_unique=True, return_indices=True
        )
        if not len(common):
            return None
        chosen = slice(0, num_pairs)  # of the smallest hashes: a uniform draw
        text = _read(texts, text_H[at_text[chosen]])
        image = _read(images, image_H[at_image[chosen]])
    good = np.flatnonzero(_has_direction(text.stored_ND) & _has_direction(image.stored_ND))
    good = np.array([p for p in good if text.ids[p] == image.ids[p]], np.int64)
    if not len(good):
        return None
    return MatchedPairs(
        text=text.take(good), image=image.take(good), num_matched=len(common), share_searched=share
    )


def _has_direction(rows_ND: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        norms_N = np.linalg.norm(rows_ND.astype(np.float64), axis=1)
    return np.isfinite(norms_N) & (norms_N > SMALLEST_NORM)


def _valid(ids: list[str], stored_ND: np.ndarray) -> SampledRows:
    good_N = _has_direction(stored_ND)
    kept = [row_id for row_id, good in zip(ids, good_N, strict=True) if good]
    return SampledRows(ids=kept, stored_ND=stored_ND[good_N], num_dropped=int((~good_N).sum()))


@ray.remote(num_cpus=0.5)
def _drawn(
    groups: Sequence[RowGroup], sample: UniformSample | None, embedding_dim: int
) -> tuple[list[str], np.ndarray]:
    ids, blocks = [], []
    for group in groups:
        block_ND, positions_N = read_sampled(group, sample, embedding_dim)
        ids += read_group_ids(group, positions_N)
        blocks.append(np.array(block_ND))
    return ids, np.concatenate(blocks)


def _hashed(store: Store, share: float, seed: int) -> np.ndarray:
    """Return hashes and places (H,) of the ids whose hash is in the share, sorted by hash, each id once."""
    parts = ray.get(
        [
            _hashes.remote(groups, at * _ROW_GROUPS_PER_TASK, share, seed)
            for at, groups in enumerate(shares(store.row_groups, _ROW_GROUPS_PER_TASK))
        ]
    )
    rows = np.sort(np.concatenate(parts), order=["hash", "group", "row"])
    first = np.ones(len(rows), bool)
    first[1:] = rows["hash"][1:] != rows["hash"][:-1]
    return rows[first]


@ray.remote(num_cpus=0.5)
def _hashes(groups: Sequence[RowGroup], first_group: int, share: float, seed: int) -> np.ndarray:
    limit, key = int(share * 2**64), seed.to_bytes(8, "little", signed=True)
    parts = []
    for place, group in enumerate(groups, first_group):
        hashes = id_keys(read_group_ids(group), key)
        chosen = np.flatnonzero(hashes < limit) if limit < 2**64 else np.arange(len(hashes))
        rows = np.empty(len(chosen), _HASHED)
        rows["hash"], rows["group"], rows["row"] = hashes[chosen], place, chosen
        parts.append(rows)
    return np.concatenate(parts)


def _read(store: Store, places: np.ndarray) -> SampledRows:
    """Read the rows at these places, in this order, also those without a direction."""
    ids = [""] * len(places)
    stored: list[np.ndarray] = [np.empty(0)] * len(places)
    by_group = [np.flatnonzero(places["group"] == group) for group in np.unique(places["group"])]
    tasks = [
        _at.remote(store.row_groups[places["group"][at[0]]], places["row"][at], store.embedding_dim)
        for at in by_group
    ]
    for at, (group_ids, block_ND) in zip(by_group, ray.get(tasks), strict=True):
        for position, row_id, row_D in zip(at, group_ids, block_ND, strict=True):
            ids[position], stored[position] = row_id, row_D
    return SampledRows(ids=ids, stored_ND=np.stack(stored))


@ray.remote(num_cpus=0.5)
def _at(group: RowGroup, rows: np.ndarray, embedding_dim: int) -> tuple[list[str], np.ndarray]:
    return read_group_ids(group, rows), read_group(group, embedding_dim)[rows]


@dataclass(frozen=True, kw_only=True)
class ReportSources:
    """The stores of one encoder, and the fits made from them."""

    texts: str | list[str] = MISSING
    """Text store, or several."""
    images: str | list[str] = MISSING
    """Image store, or several. Rows whose ids occur on both sides are pairs; without any, figures that need
    pairs are left out."""
    alignments: list[str] = MISSING
    """Directories of fits. `none` is always measured beside them."""
    heldout_texts: str | list[str] | None = None
    """Measure on these texts instead, which no fit used; `texts` and `images` then only fix the frame."""
    heldout_images: str | list[str] | None = None
    """The same for images; give both or neither."""
    probe: str | None = None
    """probe.json of the cross-modal probe of jobs/study.py on these data. The verdict then rests on it."""

    def __post_init__(self) -> None:
        if (self.heldout_texts is None) != (self.heldout_images is None):
            raise ConfigError("give heldout_texts and heldout_images both, or neither")


@dataclass(frozen=True, kw_only=True)
class ReportedFit:
    """One column of the report. `num_seen`: shards of the measured texts and images that the fit used; None
    if nothing was fitted."""

    label: str
    strategy: str
    affine: Affine
    alignment: Alignment | None = None
    uri: str = ""
    num_seen: tuple[int, int] | None = None

    @property
    def held_out(self) -> bool:
        """Return whether no measured row took part in the fit."""
        return not any(self.num_seen or ())

    def description(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "label": self.label, "strategy": self.strategy, "held_out": self.held_out, "fit": None,
        }  # fmt: skip
        if self.alignment is not None:
            gap = self.alignment.modality_gap
            used = STRATEGIES[self.strategy].settings if self.strategy in STRATEGIES else ()
            described["fit"] = {
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
        return described


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Opened and checked inputs: measured stores, stores that fix the frame, and fits, `none` first."""

    texts: Store
    images: Store
    reference_texts: Store
    reference_images: Store
    fits: tuple[ReportedFit, ...]
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


def open_inputs(sources: ReportSources, output: str, max_rejected_fraction: float) -> ReportInputs:
    """Open the stores and fits of `sources` and check them against each other.

    Rejected rows will be listed in `output`.

    Raises:
        DataError: a store is missing, damaged or of the other modality.
        AlignmentError: a fit is missing or damaged, or encoders or dimensions of stores and fits differ.
    """
    measured = reference = open_pair(sources.texts, sources.images)
    if sources.heldout_texts is not None and sources.heldout_images is not None:
        measured = open_pair(sources.heldout_texts, sources.heldout_images)
    _check_same(measured[0], reference[0])
    fits = [_open_fit(storage.absolute(uri), *measured) for uri in sources.alignments]
    if not any(fit.strategy == "none" for fit in fits):
        identity = Affine(offset=np.zeros(measured[0].embedding_dim), unit_output=False)
        fits.append(ReportedFit(label="none", strategy="none", affine=identity))
    order = list(STRATEGIES)
    fits.sort(key=lambda fit: order.index(fit.strategy) if fit.strategy in order else len(order))
    return ReportInputs(
        texts=measured[0],
        images=measured[1],
        reference_texts=reference[0],
        reference_images=reference[1],
        fits=_label_fits(fits),
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


def _open_fit(uri: str, texts: Store, images: Store) -> ReportedFit:
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
    return ReportedFit(
        label=strategy,
        strategy=strategy,
        affine=alignment.affine,
        alignment=alignment,
        uri=uri,
        num_seen=(seen[0], seen[1]) if strategy != "none" else None,
    )


def _label_fits(fits: list[ReportedFit]) -> tuple[ReportedFit, ...]:
    """Give fits of one strategy different labels: by the name of their directory, else by number."""
    num_fits = Counter(fit.strategy for fit in fits)
    named = [
        f"{fit.strategy} ({storage.name_of(fit.uri)})" if num_fits[fit.strategy] > 1 else fit.strategy
        for fit in fits
    ]
    labels = [
        label if named.count(label) == 1 else f"{label} #{named[: at + 1].count(label)}"
        for at, label in enumerate(named)
    ]
    return tuple(replace(fit, label=label) for fit, label in zip(fits, labels, strict=True))


def second_moments(
    inputs: ReportInputs,
    store: Store,
    name: str,
    max_rows: int | None,
    seed: int,
    affine: Affine | None = None,
) -> Moments:
    """Return second moments of the store's unit rows, mapped by `affine` if it is given.

    Raises:
        DataError: too many rows have no direction; they are listed in the report's output.
        AlignmentError: all rows are equal.
    """
    moments = checked_moments(
        store,
        name,
        affine=affine,
        second=True,
        sample=draw_sample(store, max_rows, seed) if max_rows else None,
        max_rejected_fraction=inputs.max_rejected_fraction,
        rejected_uri=storage.join(inputs.output, REJECTED),
    )
    if np.trace(moments.covariance) < 1e-12:
        raise AlignmentError(
            f"all {moments.count} {store.modality} embeddings of {', '.join(store.uris)} are equal, so they "
            "have no shape to report on; check what was embedded"
        )
    return moments
