"""The embedding store: a directory of Parquet shards and a manifest, one row an embedding.

The embedding column is `fixed_size_binary` (little-endian float16 or float32), uncompressed and without
dictionary: it reads an order of magnitude faster than any list column. Each shard's footer says what it
is, what it was read from and what was rejected, so a shard is its own commit record and the manifest
can always be made again from the shards.

Shapes: N rows, D embedding_dim.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray import storage
from revision_ray.data.schema import Rejected
from revision_ray.errors import DataError

FORMAT_VERSION = 1
FOOTER_KEY = b"revision_ray"
MANIFEST, SETTINGS = "manifest.json", "settings.json"
# A few MB a row group at D = 1280, float16: large enough to read at full speed, small enough to share out.
ROWS_PER_ROW_GROUP = 2048

Modality = Literal["text", "image"]
Layout = Literal["binary", "list"]


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """Which encoder made the rows; both empty where nobody knows."""

    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What one shard says of itself.

    `split` and `index` place it: the `index`-th shard of that split, the `last` one where `last` is set.
    `identity` is the split's when it was read. `content_hash` is over ids, texts and embeddings.
    """

    modality: Modality
    embedding_dim: int
    dtype: str
    encoder: EncoderIdentity
    content_hash: str = ""
    num_rows: int = 0
    num_truncated: int = 0
    split: str = ""
    split_uri: str = ""
    split_start: int = 0
    split_files: tuple[str, ...] = ()
    identity: str = ""
    index: int = 0
    last: bool = True
    rejected: tuple[Rejected, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def place(self) -> tuple[str, int, tuple[str, ...], int]:
        """Where its rows stand among those of all shards: by source, then in the order of reading."""
        return self.split_uri, self.split_start, self.split_files[:1], self.index


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as the manifest lists it."""

    name: str
    num_rows: int
    content_hash: str
    row_group_rows: tuple[int, ...]
    num_truncated: int = 0
    num_rejected: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The store as a whole. `shards` are sorted by name."""

    modality: Modality
    embedding_dim: int
    dtype: str
    num_rows: int
    num_rejected: int
    num_truncated: int
    domain: str
    encoder: EncoderIdentity
    shards: tuple[ShardEntry, ...]
    layout: Layout = "binary"
    alignment: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """Rows on their way into a shard. `embedding_ND` is any float array, cast to the store's dtype."""

    ids: Sequence[str]
    embedding_ND: np.ndarray
    columns: dict[str, pa.Array] = field(default_factory=dict)


def write_shard(uri: str, rows: EmbeddingTable, footer: Footer, layout: Layout = "binary") -> ShardEntry:
    """The rows stand at `uri` as one Parquet shard, which appears whole or not at all.

    Raises:
        DataError: the storage refused the write.
    """
    dtype = np.dtype(footer.dtype).newbyteorder("<")
    values = np.ascontiguousarray(rows.embedding_ND, dtype=dtype).reshape(len(rows.ids), footer.embedding_dim)
    embedding = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(dtype.itemsize * footer.embedding_dim), len(values), [None, pa.py_buffer(values)]
    )
    columns = {"id": pa.array(rows.ids, pa.string()), "embedding": embedding, **rows.columns}
    footer = replace(footer, content_hash=_content_hash(columns), num_rows=len(values))
    if layout == "list":
        # Parquet readers other than Arrow know no half floats: the list layout is always float32.
        flat = pa.array(values.astype(np.float32).reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, footer.embedding_dim)
    table = pa.table(columns).replace_schema_metadata({FOOTER_KEY: json.dumps(asdict(footer)).encode()})
    sink = pa.BufferOutputStream()
    compressed = dict.fromkeys(columns, "zstd")
    pq.write_table(
        table,
        sink,
        row_group_size=ROWS_PER_ROW_GROUP,
        use_dictionary=False,
        compression={**compressed, "embedding": "none"},
        write_statistics=False,
        data_page_size=4 << 20,
    )
    storage.write_bytes(uri, sink.getvalue())
    return entry_of(storage.name_of(uri), footer)


def entry_of(name: str, footer: Footer) -> ShardEntry:
    """The manifest's line for a shard with this footer."""
    full, rest = divmod(footer.num_rows, ROWS_PER_ROW_GROUP)
    return ShardEntry(
        name=name,
        num_rows=footer.num_rows,
        content_hash=footer.content_hash,
        row_group_rows=(ROWS_PER_ROW_GROUP,) * full + ((rest,) if rest else ()),
        num_truncated=footer.num_truncated,
        num_rejected=len(footer.rejected),
    )


def _content_hash(columns: dict[str, pa.Array]) -> str:
    """Of the values and not of the file, so that it outlives a change of Parquet writer."""
    parts = []
    for name in sorted(columns):
        parts.append(name.encode())
        for buffer in columns[name].buffers():
            parts.append(b"" if buffer is None else memoryview(buffer))
    return storage.sha256(*parts)


def read_footer(uri: str) -> Footer:
    """What the shard at `uri` says of itself.

    Raises:
        DataError: not a Parquet file, or not a shard of an embedding store.
    """
    try:
        with storage.open_input(uri) as file:
            metadata = pq.read_schema(file).metadata or {}
        return parse_footer(metadata[FOOTER_KEY])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{uri}: is not a shard of an embedding store ({error}); delete it or restore it"
        ) from error


def parse_footer(text: str | bytes) -> Footer:
    """The footer whose JSON is `text`."""
    document = json.loads(text)
    document["encoder"] = EncoderIdentity(**document["encoder"])
    document["rejected"] = tuple(Rejected(**entry) for entry in document["rejected"])
    document["split_files"] = tuple(document["split_files"])
    return Footer(**document)


def read_embeddings(uri: str, row_group: int | None = None) -> np.ndarray:
    """The embeddings of a shard (or of one row group) as (N, D), read-only, without a copy where the column
    is `fixed_size_binary` in one chunk.

    List columns of floats are accepted, more slowly; a null row, or one of another length, becomes a row of
    NaN as long as the most common length, so that it is rejected and counted where rows are checked.

    Raises:
        DataError: no `embedding` column, or not of floats.
    """
    with storage.open_input(uri) as file:
        parquet = _parquet(uri, file)
        columns = ["embedding"]
        table = parquet.read(columns, use_threads=False) if row_group is None else parquet.read_row_group(
            row_group, columns, use_threads=False
        )  # fmt: skip
        metadata = parquet.schema_arrow.metadata or {}
    column = table.column("embedding")
    if pa.types.is_fixed_size_binary(column.type):
        dtype = json.loads(metadata[FOOTER_KEY])["dtype"] if FOOTER_KEY in metadata else "float16"
        return _binary_rows(column, np.dtype(dtype))
    return _list_rows(uri, column)


def _parquet(uri: str, file: pa.NativeFile) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: is not a readable Parquet file: {error}") from error
    missing = {"id", "embedding"} - set(parquet.schema_arrow.names)
    if missing:
        raise DataError(f"{uri}: has columns {parquet.schema_arrow.names}, needs also {sorted(missing)}")
    return parquet


def _binary_rows(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        for chunk in column.chunks
        if len(chunk)
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])
    return flat.view(dtype.newbyteorder("<")).reshape(-1, width // dtype.itemsize)


def _list_rows(uri: str, column: pa.ChunkedArray) -> np.ndarray:
    arrow_type = column.type
    if isinstance(arrow_type, pa.BaseExtensionType):  # tensor columns of Arrow and of Ray store a list below
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], arrow_type.storage_type)
        arrow_type = arrow_type.storage_type
    if not (
        pa.types.is_list(arrow_type)
        or pa.types.is_large_list(arrow_type)
        or pa.types.is_fixed_size_list(arrow_type)
    ) or not pa.types.is_floating(arrow_type.value_type):
        raise DataError(
            f"{uri}: column embedding is {arrow_type}; expected fixed_size_binary, or a list of floats"
        )
    rows = column.combine_chunks()
    rows = (
        rows.cast(pa.large_list(arrow_type.value_type)) if pa.types.is_fixed_size_list(arrow_type) else rows
    )
    lengths = np.asarray(rows.value_lengths().fill_null(-1))
    dim = int(np.bincount(lengths[lengths >= 0]).argmax()) if (lengths >= 0).any() else 0
    values = np.full((len(lengths), dim), np.nan, dtype=np.float64 if pa.types.is_float64(arrow_type.value_type)
                     else np.float32)  # fmt: skip
    good = lengths == dim
    flat = rows.filter(pa.array(good)).flatten()
    values[good] = np.asarray(flat.fill_null(float("nan"))).reshape(-1, dim)
    return values


def read_columns(uri: str, columns: Sequence[str], row_group: int | None = None) -> pa.Table:
    """Columns other than the embedding of a shard, or of one row group of it."""
    with storage.open_input(uri) as file:
        parquet = _parquet(uri, file)
        missing = set(columns) - set(parquet.schema_arrow.names)
        if missing:
            raise DataError(f"{uri}: has columns {parquet.schema_arrow.names}, needs also {sorted(missing)}")
        if row_group is None:
            return parquet.read(list(columns), use_threads=False)
        return parquet.read_row_group(row_group, list(columns), use_threads=False)


def read_manifest(uri: str) -> Manifest:
    """The manifest of the store at directory `uri`.

    Raises:
        DataError: none there, or of a format that this version does not read.
    """
    document = storage.read_json(storage.join(uri, MANIFEST))
    try:
        version = document["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(f"{uri}: format_version is {version}, this version reads {FORMAT_VERSION}")
        document["encoder"] = EncoderIdentity(**document["encoder"])
        document["shards"] = tuple(
            ShardEntry(**{**entry, "row_group_rows": tuple(entry["row_group_rows"])})
            for entry in document["shards"]
        )
        return Manifest(**document)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{uri}/{MANIFEST}: damaged: {error}; re-run jobs/embed.py on the same output"
        ) from error


def describe_rows(uri: str, row_group: int, positions: Sequence[int], embedding_dim: int) -> list[str]:
    """What is wrong with each of these rows: wrong dimension, null, NaN, infinite, or zero."""
    with storage.open_input(uri) as file:
        column = _parquet(uri, file).read_row_group(row_group, ["embedding"]).column("embedding")
    values_ND = read_embeddings(uri, row_group)
    listed = not pa.types.is_fixed_size_binary(column.type)
    described = []
    for position in positions:
        value = column[position].as_py() if listed else values_ND[position]
        if value is None or any(number is None for number in value):
            described.append("null")
        elif len(value) != embedding_dim:
            described.append(f"dimension {len(value)}, expected {embedding_dim}")
        elif np.isnan(value).any():
            described.append("NaN")
        elif not np.isfinite(value).all():
            described.append("infinite")
        else:
            described.append("zero vector")
    return described


def column_names(uri: str) -> list[str]:
    """The columns of the shard at `uri`."""
    with storage.open_input(uri) as file:
        return _parquet(uri, file).schema_arrow.names
