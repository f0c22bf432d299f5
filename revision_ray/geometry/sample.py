"""Rows for measuring: uniform samples of a store, and pairs of rows whose ids two stores share.

Tasks read; only what was drawn reaches the driver. Everything is a function of content and seed.

Shapes: N rows, D embedding dim.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from revision_ray.align.map_reduce import Sample, draw_sample, read_sampled
from revision_ray.align.rows import SMALLEST_NORM
from revision_ray.cluster import connect, user_errors
from revision_ray.data.store import RowGroup, Store, read_group, read_group_ids, shares
from revision_ray.geometry.rows import id_keys

log = logging.getLogger(__name__)

# Ids a side that are looked at for pairs: those whose hash is smallest, so both sides look at the same ones.
PAIR_CANDIDATES = 200_000
_ROW_GROUPS_PER_TASK = 8
_HASHED = np.dtype([("hash", "<u8"), ("group", "<u4"), ("row", "<u4")])
# Half floats round a unit row's length by less than this.
_UNIT_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that have a direction, as stored, with their ids. `num_dropped` had none and are left out."""

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
        """float64, of length one."""
        return self.stored_ND.astype(np.float64) / self.norms_N[:, None]

    @property
    def share_off_unit(self) -> float:
        """Share of rows whose stored length is not one, beyond what half floats round."""
        return float(np.mean(np.abs(self.norms_N - 1) > _UNIT_TOLERANCE)) if len(self) else 0.0

    def take(self, positions: np.ndarray) -> "Rows":
        """The rows at these positions."""
        return Rows(ids=[self.ids[p] for p in positions], stored_ND=self.stored_ND[positions])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Texts and images of the same ids, row by row. `num_matched` ids matched among those looked at, which
    are the share `share_searched` of all."""

    text: Rows
    image: Rows
    num_matched: int
    share_searched: float


def draw_rows(store: Store, num_rows: int, seed: int) -> Rows:
    """A uniform sample of the store's rows without replacement; all of them where it has no more.

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


def draw_pairs(texts: Store, images: Store, num_pairs: int, seed: int) -> Pairs | None:
    """Up to `num_pairs` ids that both stores hold, the same for the same ids whatever the shards; None where
    no id matches.

    Of large stores the ids with the smallest hashes are looked at, `PAIR_CANDIDATES` a side. Where an id
    occurs twice in a store its first row counts.

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
    return Pairs(text=text.take(good), image=image.take(good), num_matched=len(common), share_searched=share)


def _has_direction(rows_ND: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        norms_N = np.linalg.norm(rows_ND.astype(np.float64), axis=1)
    return np.isfinite(norms_N) & (norms_N > SMALLEST_NORM)


def _valid(ids: list[str], stored_ND: np.ndarray) -> Rows:
    good_N = _has_direction(stored_ND)
    kept = [row_id for row_id, good in zip(ids, good_N, strict=True) if good]
    return Rows(ids=kept, stored_ND=stored_ND[good_N], num_dropped=int((~good_N).sum()))


@ray.remote(num_cpus=0.5)
def _drawn(
    groups: Sequence[RowGroup], sample: Sample | None, embedding_dim: int
) -> tuple[list[str], np.ndarray]:
    ids, blocks = [], []
    for group in groups:
        block_ND, positions_N = read_sampled(group, sample, embedding_dim)
        ids += read_group_ids(group, positions_N)
        blocks.append(np.array(block_ND))
    return ids, np.concatenate(blocks)


def _hashed(store: Store, share: float, seed: int) -> np.ndarray:
    """(H,) hashes and places of the ids whose hash falls into the share, sorted by hash, each once."""
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


def _read(store: Store, places: np.ndarray) -> Rows:
    """The rows at these places, in their order, also those without a direction."""
    ids = [""] * len(places)
    stored: list[np.ndarray] = [np.empty(0)] * len(places)
    wanted = [np.flatnonzero(places["group"] == group) for group in np.unique(places["group"])]
    tasks = [
        _at.remote(store.row_groups[places["group"][at[0]]], places["row"][at], store.embedding_dim)
        for at in wanted
    ]
    for at, (found, block_ND) in zip(wanted, ray.get(tasks), strict=True):
        for position, row_id, row_D in zip(at, found, block_ND, strict=True):
            ids[position], stored[position] = row_id, row_D
    return Rows(ids=ids, stored_ND=np.stack(stored))


@ray.remote(num_cpus=0.5)
def _at(group: RowGroup, rows: np.ndarray, embedding_dim: int) -> tuple[list[str], np.ndarray]:
    return read_group_ids(group, rows), read_group(group, embedding_dim)[rows]
