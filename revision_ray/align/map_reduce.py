"""Compute moments of whole stores as a Ray Data map-reduce; draw uniform samples of a store's rows.

Each task reads its row groups and returns their merged moments; the driver adds these as they arrive.
Merging is exact (`moments.ExactSum`), so the number of workers, the scheduling and retried tasks do not
change any bit. The driver holds one sum, whatever the number of rows.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import ray

from revision_ray.align import moments
from revision_ray.align.maps import Affine
from revision_ray.align.moments import Moments
from revision_ray.core import observe
from revision_ray.core.cluster import connect, data_context, one_thread, user_errors
from revision_ray.core.observe import progress
from revision_ray.data import shards
from revision_ray.data.shards import Rejected
from revision_ray.data.store import (
    RowGroup,
    Store,
    check_rejected,
    read_group,
    read_group_ids,
    write_rejected,
)

log = logging.getLogger(__name__)

# Row groups of one task. At most about 300 MB of 1280-d float16 rows, so that repeating a lost task is cheap;
# at least a quarter of that where there are enough row groups, so that scheduling is cheap.
_MOST_ROW_GROUPS_PER_TASK = 64
_FEWEST_ROW_GROUPS_PER_TASK = 16
_TASKS_PER_CPU = 4
_FEWEST_CPUS = 8  # an autoscaling cluster starts small; make enough tasks for it to grow


@dataclass(frozen=True, kw_only=True)
class UniformSample:
    """A uniform sample without replacement: the number of rows to take of each row group, and the seed."""

    rows: dict[tuple[str, int], int]  # (shard hash, index of the row group) -> number of rows
    seed: int
    without: "UniformSample | None" = None  # rows of this sample are excluded

    def size(self, group: RowGroup) -> int:
        """Return the number of rows to take of the row group."""
        return self.rows.get((group.shard_hash, group.index), 0)

    def positions(self, group: RowGroup) -> np.ndarray:
        """Return the positions of the rows to take of the row group, ascending.

        They depend only on the shard's content and the seed.
        """
        left_N = np.arange(group.num_rows)
        if self.without is not None:
            left_N = np.setdiff1d(left_N, self.without.positions(group))
        generator = np.random.default_rng([self.seed, int(group.shard_hash[:15], 16), group.index])
        return np.sort(generator.choice(left_N, self.size(group), replace=False))


def draw_sample(
    store: Store, num_rows: int, seed: int, without: UniformSample | None = None
) -> UniformSample | None:
    """Draw a uniform sample of `num_rows` of the store's rows; return None where it has no more than that.

    The number of rows per row group is drawn here; the rows themselves are drawn in the tasks, by
    `UniformSample.positions`. The sample depends only on the store's content and the seed. Rows of the
    sample `without` are excluded, to draw held-out rows; if at most `num_rows` others are left, all of them
    are taken.
    """
    if without is None and num_rows >= store.num_rows:
        return None
    groups = sorted(store.row_groups, key=lambda group: (group.shard_hash, group.index))
    left = [group.num_rows - (without.size(group) if without else 0) for group in groups]
    generator = np.random.default_rng(seed)
    counts = generator.multivariate_hypergeometric(left, min(num_rows, sum(left)), method="marginals")
    return UniformSample(
        rows={(g.shard_hash, g.index): int(n) for g, n in zip(groups, counts, strict=True) if n},
        seed=seed,
        without=without,
    )


def store_moments(
    store: Store,
    name: str,
    *,
    affine: Affine | None = None,
    second: bool = False,
    sample: UniformSample | None = None,
) -> tuple[Moments, list[Rejected]]:
    """Compute the moments of the store's unit rows with Ray; return them and the rows without a direction.

    Rows are mapped by `affine`, if given. `sample` limits the rows that are read. `name` labels the progress
    display. The moments carry the shard hashes of `store`.

    Raises:
        DataError: a shard is missing or unreadable.
    """
    connect()
    groups = [group for group in store.row_groups if sample is None or sample.size(group)]
    total = Moments.zeros(store.embedding_dim, second)
    rejected: list[Rejected] = []
    work = partial(
        _partial_moments, affine=affine, second=second, sample=sample, embedding_dim=store.embedding_dim
    )
    with progress(
        name, sum(sample.size(group) if sample else group.num_rows for group in groups), "rows"
    ) as shown:
        for result in _run(groups, work):
            total.merge(Moments.from_bytes(result["moments"]))
            found = [Rejected(**row) for row in json.loads(result["rejected"])]
            rejected += found
            observe.record(samples=result["num_rows"] - len(found), rejected=len(found))
            shown.advance(result["num_rows"])
    total.shard_hashes = store.shard_hashes
    return total, sorted(rejected, key=lambda row: (row.uri, row.id))


def checked_moments(
    store: Store,
    name: str,
    *,
    affine: Affine | None = None,
    second: bool = False,
    sample: UniformSample | None = None,
    max_rejected_fraction: float = 0.001,
    rejected_uri: str = "",
) -> Moments:
    """Compute moments as `store_moments` does; log rejected rows and list them in `rejected_uri`, if given.

    Raises:
        DataError: as `store_moments`, or more than `max_rejected_fraction` of the rows were rejected.
    """
    moments, rejected = store_moments(store, name, affine=affine, second=second, sample=sample)
    if rejected:
        listed = rejected_uri or f"{rejected[0].uri}, first: {rejected[0].id}"
        if rejected_uri:
            write_rejected(rejected_uri, rejected)
        check_rejected(rejected, moments.count + len(rejected), max_rejected_fraction, listed)
        log.warning("%s: %d rows without a direction are left out, see %s", name, len(rejected), listed)
    return moments


def _run(groups: Sequence[RowGroup], work: Any) -> Iterator[dict[str, Any]]:
    items = [{"row_groups": json.dumps([asdict(group) for group in share])} for share in _shares(groups)]
    with data_context() as context, user_errors():
        # With reservation, Ray Data runs one task at a time until it knows the cluster's resources, which
        # takes longer than many fits. Tasks return a few kilobytes, so they need no limit on memory.
        context.op_resource_reservation_enabled = False
        yield from ray.data.from_items(items, override_num_blocks=len(items)).map(work).iter_rows()


def _shares(groups: Sequence[RowGroup]) -> list[Sequence[RowGroup]]:
    """Split the row groups, in order, into about equal shares, one for each task."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    wanted = max(cpus, _FEWEST_CPUS) * _TASKS_PER_CPU
    number = min(wanted, len(groups) // _FEWEST_ROW_GROUPS_PER_TASK)
    number = max(number, min(len(groups), cpus), math.ceil(len(groups) / _MOST_ROW_GROUPS_PER_TASK))
    edges = [len(groups) * part // number for part in range(number + 1)]
    return [groups[start:end] for start, end in pairwise(edges)]


def moments_here(
    store: Store, *, affine: Affine | None = None, second: bool = False, sample: UniformSample | None = None
) -> tuple[Moments, list[Rejected]]:
    """Compute the same moments as `store_moments`, to the bit, in this process; for use inside Ray tasks."""
    total, rejected, _ = _sum_groups(store.row_groups, affine, second, sample, store.embedding_dim)
    total.shard_hashes = store.shard_hashes
    return total, sorted(rejected, key=lambda row: (row.uri, row.id))


def _partial_moments(
    item: dict[str, Any],
    *,
    affine: Affine | None,
    second: bool,
    sample: UniformSample | None,
    embedding_dim: int,
) -> dict[str, Any]:
    groups = [RowGroup(**document) for document in json.loads(item["row_groups"])]
    total, rejected, num_rows = _sum_groups(groups, affine, second, sample, embedding_dim)
    return {
        "moments": total.to_bytes(),
        "rejected": json.dumps([asdict(row) for row in rejected]),
        "num_rows": num_rows,
    }


def _sum_groups(
    groups: Sequence[RowGroup],
    affine: Affine | None,
    second: bool,
    sample: UniformSample | None,
    embedding_dim: int,
) -> tuple[Moments, list[Rejected], int]:
    """Return the moments, the rows without a direction, and the number of rows read."""
    rejected: list[Rejected] = []
    num_rows = 0
    with one_thread():
        sums = moments.RowSums(embedding_dim, affine, second)
        for group in groups:
            if sample is not None and not sample.size(group):
                continue
            block_ND, positions_N = read_sampled(group, sample, embedding_dim)
            num_rows += len(block_ND)
            ids = None
            if affine is not None and affine.needs_ids:
                ids = read_group_ids(group, positions_N)
            offset = moments.bucket_offset(group.shard_hash, group.index)
            invalid = sums.add(block_ND, ids, offset)
            if invalid:
                rejected += reasons(group, positions_N[invalid], embedding_dim)
    return sums.moments(), rejected, num_rows


def read_sampled(
    group: RowGroup, sample: UniformSample | None, embedding_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return stored embeddings (N, D) and positions (N,) of the row group's rows that are in the sample."""
    block_ND = read_group(group, embedding_dim)
    if sample is None:
        return block_ND, np.arange(len(block_ND))
    positions_N = sample.positions(group)
    return block_ND[positions_N], positions_N


def reasons(group: RowGroup, positions_N: np.ndarray, embedding_dim: int) -> list[Rejected]:
    """Return the rows at these positions of a row group, each with the reason why it is rejected."""
    ids = read_group_ids(group, positions_N)
    found = shards.describe_rows(group.uri, group.index, positions_N.tolist(), embedding_dim)
    return [
        Rejected(id=row_id, uri=f"{group.uri}:row group {group.index}, row {position}", reason=reason)
        for row_id, position, reason in zip(ids, positions_N, found, strict=True)
    ]
