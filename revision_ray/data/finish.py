"""Finish a store: find repeated ids and mend them, list rejected rows, write the manifest.

Ids are hashed in tasks and shuffled by hash, so no process holds them all.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from revision_ray.core import artifact, storage
from revision_ray.core.cluster import connect, user_errors
from revision_ray.core.errors import DataError
from revision_ray.data import shards
from revision_ray.data.shards import EmbeddingTable, Layout, Manifest, Rejected, ShardFooter
from revision_ray.data.store import REJECTED, check_rejected, write_rejected

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


def mend_shard(uri: str, repeated: Repeated, number_all: bool, layout: Layout) -> ShardFooter:
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


log = logging.getLogger(__name__)

DuplicateIds = Literal["reject", "number"]
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class FinishSettings:
    """What the manifest says beyond the footers, and what is tolerated."""

    domain: str
    layout: Layout
    max_rejected_fraction: float
    duplicate_ids: DuplicateIds
    alignment: str = ""


def read_footers(output: str) -> dict[str, ShardFooter]:
    """Footers of the shards in the store at `output`, by URI."""
    uris = [uri for uri, _ in storage.list_files(output, "part-*.parquet")]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return dict(zip(uris, pool.map(shards.read_footer, uris), strict=True))


def claim(output: str, settings: dict[str, object]) -> None:
    """Write the settings that decide a store's content into it, or check that they are the same.

    Raises:
        OutputError: it is a store of other settings, or the directory holds something else.
    """
    settings = {"format_version": shards.FORMAT_VERSION, **settings}
    artifact.claim(output, shards.SETTINGS, settings, "an embedding store")


def finish_store(output: str, finish: FinishSettings, *, changed: bool = True) -> Manifest:
    """The manifest and the list of rejected rows stand, made from the shards' footers.

    `changed` says whether shards were added, so that ids have to be compared again.

    Raises:
        DataError: no rows, or more rejected rows than `finish` allows; then the manifest is not written.
    """
    manifest_uri = storage.join(output, shards.MANIFEST)
    former = shards.read_manifest(output) if storage.exists(manifest_uri) else None
    footers = read_footers(output)
    if not footers:
        raise DataError(f"{output}: the sources hold no rows")
    dims = {footer.embedding_dim: uri for uri, footer in footers.items()}
    if len(dims) > 1:
        raise DataError(f"{output}: shards of different dimensions: {dims}; name an output for each encoder")
    known = {entry.name for entry in former.shards} if former else set()
    repeated = _repeated_by_shard(footers, known) if changed or former is None else {}
    rejected = _list_rejected(footers, repeated, finish, storage.join(output, REJECTED))
    # Only now, when the job is sure to succeed: what a shard has lost cannot be had again without encoding.
    number_all = finish.duplicate_ids == "number"
    footers |= {uri: mend_shard(uri, rows, number_all, finish.layout) for uri, rows in repeated.items()}
    entries = [shards.entry_of(storage.name_of(uri), footer) for uri, footer in sorted(footers.items())]
    num_rows = sum(entry.num_rows for entry in entries)
    if not num_rows:
        raise DataError(f"{output}: the sources hold no rows")
    first = next(iter(footers.values()))
    manifest = Manifest(
        modality=first.modality,
        embedding_dim=first.embedding_dim,
        dtype=first.dtype,
        num_rows=num_rows,
        num_rejected=len(rejected),
        num_truncated=sum(entry.num_truncated for entry in entries),
        domain=finish.domain,
        encoder=first.encoder,
        shards=tuple(entries),
        layout=finish.layout,
        alignment=finish.alignment,
    )
    storage.write_json(manifest_uri, asdict(manifest))
    return manifest


def describe(manifest: Manifest, output: str) -> str:
    """What the store holds, for a person."""
    truncated = f", {manifest.num_truncated} truncated" if manifest.modality == "text" else ""
    return (
        f"{manifest.num_rows:,} {manifest.modality} embeddings, d = {manifest.embedding_dim}, in "
        f"{len(manifest.shards)} shards; {manifest.num_rejected} rows rejected{truncated}\nstore: {output}"
    )


def _repeated_by_shard(footers: dict[str, ShardFooter], known: set[str]) -> dict[str, Repeated]:
    """Rows of repeated ids, by shard URI. Shards that a manifest lists (`known`) come first, so they stay."""
    order = sorted(footers, key=lambda uri: (storage.name_of(uri) not in known, *footers[uri].place))
    return {order[place]: rows for place, rows in find_repeated(order).items()}


def _list_rejected(
    footers: dict[str, ShardFooter], repeated: dict[str, Repeated], finish: FinishSettings, listed: str
) -> list[Rejected]:
    """All rejected rows, those with repeated ids included, written to `listed`; few enough for `finish`."""
    rejected = [row for footer in footers.values() for row in footer.rejected]
    num_rows = len(rejected) + sum(footer.num_rows for footer in footers.values())
    if finish.duplicate_ids == "reject":
        rejected += [row for uri, rows in repeated.items() for row in rejected_rows(uri, rows)]
    if repeated:
        log.warning(
            "%d rows repeat an id: those of equal content get a number, those of other content are %s",
            sum(len(rows) for rows in repeated.values()),
            "rejected" if finish.duplicate_ids == "reject" else "numbered too",
        )
    rejected.sort(key=lambda row: (row.uri, row.id))
    write_rejected(listed, rejected)
    check_rejected(rejected, num_rows, finish.max_rejected_fraction, listed)
    return rejected
