"""Labelled rows of a store as arrays, a bounded uniform sample of them. Ray.

Which rows are taken is a function of their ids and a seed (the lowest hashes win), so it depends neither on
how the store is cut into shards nor on which task ends first. Shapes: N rows, D embedding dim, A attributes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from revision_ray.align.map_reduce import Sample, read_sampled
from revision_ray.align.rows import chunks
from revision_ray.cluster import connect, user_errors
from revision_ray.data.store import RowGroup, Store, read_group, read_group_ids, shares
from revision_ray.geometry.rows import id_keys
from revision_ray.geometry.studies.inputs import GROUPS_PER_TASK
from revision_ray.geometry.studies.labels import Labels


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Unit rows with their ids and labels."""

    ids: list[str]
    rows_ND: np.ndarray  # float32
    codes_NA: np.ndarray  # int16
    order_N: np.ndarray  # uint64: hash of id and seed

    def __len__(self) -> int:
        return len(self.ids)

    def taken(self, positions_N: np.ndarray) -> "Rows":
        return Rows(
            ids=[self.ids[at] for at in positions_N.tolist()],
            rows_ND=self.rows_ND[positions_N],
            codes_NA=self.codes_NA[positions_N],
            order_N=self.order_N[positions_N],
        )

    def lowest(self, most: int) -> "Rows":
        """The `most` rows of lowest hash, in its order."""
        return self.taken(np.argsort(self.order_N, kind="stable")[:most])

    def without(self, ids: Sequence[str]) -> "Rows":
        gone = set(ids)
        return self.taken(np.flatnonzero([row_id not in gone for row_id in self.ids]))


def labelled_rows(store: Store, labels: Labels, most: int, seed: int) -> Rows:
    """At most `most` of the store's rows that have a label, uniformly drawn, as unit rows.

    Rows without a direction are left out. The driver holds twice as many rows at most.
    """
    connect()
    shared = ray.put(labels)
    read = ray.remote(_read)
    running = [
        read.remote(share, store.embedding_dim, shared, most, seed)
        for share in shares(store.row_groups, GROUPS_PER_TASK)
    ]
    kept = _none(store.embedding_dim, len(labels.attributes))
    with user_errors():
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            kept = _joined([kept, ray.get(done)]).lowest(most)
    return kept


def _read(groups: Sequence[RowGroup], dim: int, labels: Labels, most: int, seed: int) -> Rows:
    kept = _none(dim, len(labels.attributes))
    for group in groups:
        ids = read_group_ids(group)
        keys_N = id_keys(ids)
        known_N, codes_NA = labels.of(keys_N)
        unit_ND, valid_N = unit_rows(read_group(group, dim)[known_N])
        found = Rows(
            ids=[ids[known_N[at]] for at in valid_N.tolist()],
            rows_ND=unit_ND,
            codes_NA=codes_NA[valid_N],
            order_N=_mixed(keys_N[known_N[valid_N]], seed),
        )
        kept = _joined([kept, found]).lowest(most)
    return kept


def sample_rows(store: Store, sample: Sample | None) -> tuple[list[str], np.ndarray]:
    """(ids, float32 unit rows (N, D)) of a sample, read in this process."""
    ids: list[str] = []
    found = [np.empty((0, store.embedding_dim), np.float32)]
    for group in store.row_groups:
        if sample is not None and not sample.size(group):
            continue
        block_ND, positions_N = read_sampled(group, sample, store.embedding_dim)
        unit_ND, valid_N = unit_rows(block_ND)
        ids += read_group_ids(group, positions_N[valid_N])
        found.append(unit_ND)
    return ids, np.concatenate(found)


def unit_rows(block_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 unit rows of those that have a direction, their positions in the block)."""
    parts = [(chunk.unit_rows().astype(np.float32), chunk.positions_C) for chunk in chunks(block_ND, [])]
    if not parts:
        return np.empty((0, block_ND.shape[1]), np.float32), np.empty(0, np.int64)
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([at for _, at in parts])


def _none(dim: int, num_attributes: int) -> Rows:
    return Rows(
        ids=[],
        rows_ND=np.empty((0, dim), np.float32),
        codes_NA=np.empty((0, num_attributes), np.int16),
        order_N=np.empty(0, np.uint64),
    )


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(
        ids=[row_id for part in parts for row_id in part.ids],
        rows_ND=np.concatenate([part.rows_ND for part in parts]),
        codes_NA=np.concatenate([part.codes_NA for part in parts]),
        order_N=np.concatenate([part.order_N for part in parts]),
    )


def _mixed(keys_N: np.ndarray, seed: int) -> np.ndarray:
    """Every key scrambled under `seed` (the finaliser of splitmix64), so that other seeds draw other rows."""
    mixed_N = keys_N + np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))
