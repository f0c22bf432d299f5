"""Read an embedding store: its manifest, its row groups to share among tasks, and its rejected rows."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray.core import storage
from revision_ray.core.errors import DataError, shorten
from revision_ray.data import shards
from revision_ray.data.records import footer
from revision_ray.data.shards import EncoderIdentity, Manifest, Modality, Rejected

REJECTED = "rejected.parquet"


def write_rejected(uri: str, rejected: Sequence[Rejected]) -> None:
    """The list of rejected rows with their reasons stands at `uri`, also when it is empty."""
    columns = {
        name: pa.array([getattr(row, name) for row in rejected], pa.string())
        for name in ("id", "uri", "reason")
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(uri, sink.getvalue())


def read_rejected(uri: str) -> list[Rejected]:
    """The list that `write_rejected` wrote."""
    with storage.open_input(uri) as file:
        return [Rejected(**row) for row in pq.read_table(file, columns=["id", "uri", "reason"]).to_pylist()]


def check_rejected(rejected: Sequence[Rejected], num_rows: int, most: float, listed: str) -> None:
    """No more than the share `most` of `num_rows` rows was rejected.

    Raises:
        DataError: more were; the message gives the causes and where the list is.
    """
    if len(rejected) <= most * num_rows:
        return
    causes = Counter(row.reason for row in rejected).most_common(3)
    shown = "; ".join(f"{count} x {shorten(reason)}" for reason, count in causes)
    raise DataError(
        f"{len(rejected)} of {num_rows} rows were rejected ({shown}), more than max_rejected_fraction={most} "
        f"allows; the list is in {listed}; mend the input, or raise max_rejected_fraction"
    )


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The unit of work of every map-reduce over embeddings.

    `shard_hash` identifies the content of the shard wherever it lies.
    """

    uri: str
    shard_hash: str
    index: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Store:
    """One or more store directories of one modality, encoder and dimension, read as one."""

    uris: tuple[str, ...]
    modality: Modality
    embedding_dim: int
    encoder: EncoderIdentity
    domain: str
    alignment: str  # content hash of the fit that mapped these rows; empty for rows as encoded
    row_groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)

    @property
    def shard_hashes(self) -> frozenset[str]:
        return frozenset(group.shard_hash for group in self.row_groups)


def read_group(group: RowGroup, embedding_dim: int) -> np.ndarray:
    """The embeddings of a row group, (N, D), in their stored dtype; rows of another dimension are NaN.

    Raises:
        DataError: the shard is missing, damaged, or not the one that was listed.
    """
    block_ND = shards.read_embeddings(
        group.uri, group.index, embedding_dim=embedding_dim, content_hash=group.shard_hash
    )
    if len(block_ND) != group.num_rows:
        raise DataError(
            f"{group.uri}: row group {group.index} has {len(block_ND)} rows, listed were {group.num_rows}: "
            "the shard was replaced; restore it, or make the store again in a new output"
        )
    return block_ND


def read_group_ids(group: RowGroup, positions_N: np.ndarray | None = None) -> list[str]:
    """The ids of a row group, or of its rows at these positions, as text whatever the column's type."""
    column = shards.read_columns(group.uri, ["id"], group.index)["id"]
    ids = [str(row_id) for row_id in column.to_pylist()]
    return ids if positions_N is None else [ids[position] for position in positions_N.tolist()]


def shares(groups: Sequence[RowGroup], size: int) -> list[Sequence[RowGroup]]:
    """The row groups, in order, `size` of them together."""
    return [groups[at : at + size] for at in range(0, len(groups), size)]


def open_stores(uris: Sequence[str], modality: Modality) -> Store:
    """The stores at `uris` as one; a directory of plain Parquet files is taken with a warning.

    Raises:
        DataError: nothing there, another modality, or stores whose dimension or encoder differ.
    """
    if not uris:
        raise DataError(f"no {modality} store was given")
    opened = [_open(storage.absolute(uri), modality) for uri in uris]
    first = opened[0]
    for store in opened[1:]:
        if store.embedding_dim != first.embedding_dim:
            raise DataError(
                f"{store.uris[0]}: embedding_dim is {store.embedding_dim}, {first.uris[0]} has "
                f"{first.embedding_dim}; stores of different encoders cannot be joined"
            )
        if store.encoder.fingerprint != first.encoder.fingerprint:
            raise DataError(
                f"{store.uris[0]}: encoder is {store.encoder}, {first.uris[0]} has {first.encoder}; "
                "embed both with one encoder"
            )
        if store.alignment != first.alignment:
            raise DataError(
                f"{store.uris[0]} and {first.uris[0]}: one is aligned by a fit that the other is not"
            )
    # One shard copied into two stores is one shard: rows are counted once, whatever the listing says.
    groups = {(g.shard_hash, g.index): g for store in opened for g in store.row_groups}
    dropped = sum(len(store.row_groups) for store in opened) - len(groups)
    if dropped:
        log.warning("%d row groups of %s occur in more than one place and are read once", dropped, list(uris))
    return Store(
        uris=tuple(store.uris[0] for store in opened),
        modality=modality,
        embedding_dim=first.embedding_dim,
        encoder=first.encoder,
        domain=",".join(sorted({store.domain for store in opened if store.domain})),
        alignment=first.alignment,
        row_groups=tuple(groups[key] for key in sorted(groups)),
    )


def _open(uri: str, modality: Modality) -> Store:
    if storage.exists(storage.join(uri, shards.MANIFEST)):
        return _of_manifest(uri, shards.read_manifest(uri), modality)
    if storage.exists(storage.join(uri, shards.SETTINGS)):
        raise DataError(
            f"{uri}: this store is unfinished (no {shards.MANIFEST}); run jobs/embed.py on it again"
        )
    return _of_bare_parquet(uri, modality)


def _of_manifest(uri: str, manifest: Manifest, modality: Modality) -> Store:
    if manifest.modality != modality:
        raise DataError(
            f"{uri}: holds {manifest.modality} embeddings, expected {modality}; are the two swapped?"
        )
    if not manifest.num_rows:
        raise DataError(
            f"{uri}: the store is empty ({manifest.num_rejected} rows were rejected, see rejected.parquet)"
        )
    groups = [
        RowGroup(uri=storage.join(uri, shard.name), shard_hash=shard.content_hash, index=index, num_rows=rows)
        for shard in manifest.shards
        for index, rows in enumerate(shard.row_group_rows)
    ]
    return Store(
        uris=(uri,),
        modality=modality,
        embedding_dim=manifest.embedding_dim,
        encoder=manifest.encoder,
        domain=manifest.domain,
        alignment=manifest.alignment,
        row_groups=tuple(groups),
    )


def _of_bare_parquet(uri: str, modality: Modality) -> Store:
    files = [path for path, _ in storage.list_files(uri, "*.parquet")]
    if not files:
        raise DataError(
            f"{uri}: no {shards.MANIFEST} and no Parquet files there; expected an embedding store"
        )
    log.warning("%s has no %s: its encoder is unknown and cannot be checked", uri, shards.MANIFEST)
    with ThreadPoolExecutor(8) as pool:
        groups = [group for found in pool.map(_bare_row_groups, files) for group in found]
    if not groups:
        raise DataError(f"{uri}: {len(files)} Parquet files there hold no rows")
    return Store(
        uris=(uri,),
        modality=modality,
        embedding_dim=_bare_dim(uri, groups),
        encoder=EncoderIdentity(),
        domain="",
        alignment="",
        row_groups=tuple(groups),
    )


def _bare_dim(uri: str, groups: Sequence[RowGroup]) -> int:
    """The most common length of the first row group that holds any vector."""
    for group in groups:
        if dim := shards.read_embeddings(group.uri, group.index).shape[1]:
            return dim
    raise DataError(f"{uri}: column embedding holds nothing but nulls")


def _bare_row_groups(path: str) -> list[RowGroup]:
    with storage.open_input(path) as file:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: is not a readable Parquet file: {shorten(error)}") from error
        footer = (metadata.metadata or {}).get(shards.FOOTER_KEY)
        shard_hash = shards.parse_footer(footer).content_hash if footer else _sha256_of(file)
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return [
        RowGroup(uri=path, shard_hash=shard_hash, index=index, num_rows=num_rows)
        for index, num_rows in enumerate(rows)
        if num_rows
    ]


def _sha256_of(file: pa.NativeFile) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read_buffer(1 << 24):
        digest.update(block)
    return digest.hexdigest()


def count_rows(uri: str) -> int | None:
    """Return the rows of the store at `uri` from its manifest or its footers; None if there is none."""
    manifest = storage.join(uri, "manifest.json")
    if storage.exists(manifest):
        return storage.read_json(manifest).get("num_rows")
    files = [file_uri for file_uri, _ in storage.list_files(uri, "*.parquet")]
    return sum(sum(footer(file_uri).rows) for file_uri in files) if files else None
