"""Ids that occur twice in a store: found by a hash shuffle over all shards, mended in the shards concerned.

Ids are hashed in tasks and shuffled by hash, so no process ever holds them all.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from revision_ray import storage
from revision_ray.cluster import connect, user_errors
from revision_ray.data import shards
from revision_ray.data.schema import Rejected
from revision_ray.data.shards import EmbeddingTable, Footer, Layout

# About 200 MB of hashes to a partition.
_ROWS_PER_PARTITION = 8_000_000
# Every task leaves a part for every partition, and this process holds a reference to each: with a task a
# shard, a store of 1e9 rows would leave 15 million of them.
_SHARDS_PER_TASK = 64
_TASKS_PER_CPU = 4
_HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("content", "<u8"), ("shard", "<u4"), ("row", "<u4")])

# Row positions of one shard whose id occurs earlier: True where the content is the same too.
Repeated = dict[int, bool]


def find_repeated(uris: Sequence[str]) -> dict[int, Repeated]:
    """For each shard (by its place in `uris`) the rows whose id stands earlier, in it or in another shard."""
    connect()
    shares = _shares(len(uris))
    with user_errors():
        num_rows = sum(ray.get([_count.remote([uris[place] for place in share]) for share in shares]))
        partitions = 1 + num_rows // _ROWS_PER_PARTITION
        hashed: Any = _hashes.options(num_returns=partitions)
        columns = [hashed.remote([(uris[place], place) for place in share], partitions) for share in shares]
        parts = [[column] for column in columns] if partitions == 1 else columns
        found = [_repeated.remote(*[part[p] for part in parts]) for p in range(partitions)]
        merged: dict[int, Repeated] = defaultdict(dict)
        for result in found:
            for place, row, same in ray.get(result):
                merged[place][row] = same
    return dict(merged)


def _shares(number: int) -> list[range]:
    """The places of `number` shards in parts of which a task takes one."""
    tasks = max(1, int(ray.cluster_resources().get("CPU", 1))) * _TASKS_PER_CPU
    size = min(_SHARDS_PER_TASK, max(1, number // tasks))
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


@ray.remote(num_cpus=0.5)
def _count(uris: list[str]) -> int:
    return sum(shards.read_footer(uri).num_rows for uri in uris)


@ray.remote(num_cpus=0.5)
def _hashes(placed: list[tuple[str, int]], partitions: int) -> np.ndarray | list[np.ndarray]:
    rows = np.concatenate([_hashes_of(uri, place) for uri, place in placed])
    if partitions == 1:
        return rows
    chosen = rows["high"] % np.uint64(partitions)
    return [rows[chosen == partition] for partition in range(partitions)]


def _hashes_of(uri: str, place: int) -> np.ndarray:
    ids = shards.read_columns(uri, ["id"]).column("id").to_pylist()
    rows = np.empty(len(ids), _HASHES)
    rows["shard"], rows["row"] = place, np.arange(len(ids))
    digests = b"".join(hashlib.blake2b(row_id.encode(), digest_size=16).digest() for row_id in ids)
    halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
    rows["high"], rows["low"] = halves[:, 0], halves[:, 1]
    rows["content"] = np.frombuffer(_contents(uri), "<u8")
    return rows


def _contents(uri: str) -> bytes:
    if "text" in shards.column_names(uri):
        values = [text.encode() for text in shards.read_columns(uri, ["text"]).column("text").to_pylist()]
    else:
        values = [row.tobytes() for row in shards.read_embeddings(uri)]
    return b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in values)


@ray.remote(num_cpus=0.5)
def _repeated(*parts: np.ndarray) -> list[tuple[int, int, bool]]:
    rows = np.sort(np.concatenate(parts), order=["high", "low", "shard", "row"])
    same_id = np.zeros(len(rows), bool)
    same_id[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    first = np.maximum.accumulate(np.where(same_id, 0, np.arange(len(rows))))
    same_content = rows["content"] == rows["content"][first]
    return [
        (int(rows["shard"][i]), int(rows["row"][i]), bool(same_content[i])) for i in np.flatnonzero(same_id)
    ]


def rejected_rows(uri: str, repeated: Repeated) -> list[Rejected]:
    """The rows of the shard at `uri` whose id stands earlier under other content."""
    other = [row for row, same in sorted(repeated.items()) if not same]
    ids = shards.read_columns(uri, ["id"]).column("id").take(other).to_pylist() if other else []
    reason = "duplicate id: an earlier row with other content has it"
    return [
        Rejected(id=row_id, uri=f"{storage.name_of(uri)}:row {row}", reason=reason)
        for row, row_id in zip(other, ids, strict=True)
    ]


def mend_shard(uri: str, repeated: Repeated, number_all: bool, layout: Layout) -> Footer:
    """The shard at `uri` with its repeated ids mended, written in place of the former; its new footer.

    A row whose id was given to the same content before is kept under `ID-SPLIT-SHARD-ROW`; so is one whose
    content differs if `number_all`; otherwise it is rejected and listed.
    """
    footer = shards.read_footer(uri)
    names = ("text", "uri", "truncated")
    table = shards.read_columns(uri, ["id", *(n for n in names if n in shards.column_names(uri))])
    embedding_ND = shards.read_embeddings(uri)
    ids = table.column("id").to_pylist()
    kept = [row for row in range(len(ids)) if number_all or repeated.get(row, True)]
    for row in repeated:
        ids[row] = f"{ids[row]}-{footer.split[:8]}-{footer.index}-{row}"
    columns = {
        name: pa.array(table.column(name).take(kept).to_pylist(), table.column(name).type)
        for name in names
        if name in table.column_names
    }
    footer = replace(
        footer,
        rejected=(*footer.rejected, *([] if number_all else rejected_rows(uri, repeated))),
        num_truncated=sum(columns["truncated"].to_pylist())
        if "truncated" in columns
        else footer.num_truncated,
    )
    rows = EmbeddingTable(ids=[ids[row] for row in kept], embedding_ND=embedding_ND[kept], columns=columns)
    entry = shards.write_shard(uri, rows, footer, layout)
    return replace(footer, num_rows=entry.num_rows, content_hash=entry.content_hash)
