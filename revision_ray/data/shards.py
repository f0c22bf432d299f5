"""Shards of an embedding store: the embedding column, the footer, the manifest, and rows on their way there.

The embedding column is `fixed_size_binary` (little-endian float16 or float32), uncompressed and without
dictionary: it reads an order of magnitude faster than any list column. Each shard's footer says what it is,
what it was read from and what was rejected. So a shard is its own commit record, and the manifest can always
be made again from the shards.

Shapes: N rows, D embedding_dim.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray.core import storage
from revision_ray.core.errors import DataError, shorten


def binary_rows(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    """The rows of a `fixed_size_binary` column that holds little-endian `dtype`; one chunk is not copied."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        for chunk in column.chunks
        if len(chunk)
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])
    return flat.view(dtype.newbyteorder("<")).reshape(-1, width // dtype.itemsize)


def list_rows(uri: str, column: pa.ChunkedArray, embedding_dim: int | None) -> np.ndarray:
    """The rows of a list or tensor column of floats; null rows and those of another length are NaN.

    `embedding_dim` None stands for the most common length. `uri` names errors.

    Raises:
        DataError: not such a column.
    """
    arrow_type = column.type
    if isinstance(arrow_type, pa.BaseExtensionType):  # tensor columns of Arrow and of Ray store a list below
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], arrow_type.storage_type)
        arrow_type = arrow_type.storage_type
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(arrow_type) for is_kind in listed) or not pa.types.is_floating(arrow_type.value_type):
        raise DataError(
            f"{uri}: column embedding is {arrow_type}; expected fixed_size_binary, or a list of floats"
        )
    rows = column.combine_chunks()
    if pa.types.is_fixed_size_list(arrow_type):
        rows = rows.cast(pa.large_list(arrow_type.value_type))
    lengths = np.asarray(rows.value_lengths().fill_null(-1))
    dim = embedding_dim
    if dim is None:
        dim = int(np.bincount(lengths[lengths >= 0]).argmax()) if (lengths >= 0).any() else 0
    dtype = np.float64 if pa.types.is_float64(arrow_type.value_type) else np.float32
    values_ND = np.full((len(lengths), dim), np.nan, dtype)
    good_N = lengths == dim
    flat = rows.filter(pa.array(good_N)).flatten()
    # A null number reads as NaN.
    values_ND[good_N] = flat.to_numpy(zero_copy_only=False).reshape(np.count_nonzero(good_N), dim)
    return values_ND


def describe_row(value: Sequence[float | None] | np.ndarray | None, embedding_dim: int) -> str:
    """Why a row has no direction: null, wrong dimension, NaN, infinite, zero, or too large to be squared."""
    if value is None or any(number is None for number in value):
        return "null"
    if len(value) != embedding_dim:
        return f"dimension {len(value)}, expected {embedding_dim}"
    row_D = np.asarray(value, np.float64)
    if np.isnan(row_D).any():
        return "NaN"
    if not np.isfinite(row_D).all():
        return "infinite"
    return f"values up to {np.abs(row_D).max():.0e}, out of range" if row_D.any() else "zero vector"


SplitKind = Literal["image_files", "image_tar", "image_parquet", "image_json", "image_csv", "image_tsv",
                    "text_files", "text_lines", "text_jsonl", "text_json", "text_parquet", "text_tar",
                    "text_csv", "text_tsv"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SourceSplit:
    """A piece of a source that one task reads from start to end, always the same rows in the same order.

    `start` and `stop` count what the kind counts: bytes of a line or JSON file (a record belongs to the range
    where it begins), row groups of a Parquet file; both 0 where the whole file is one split. `files` lists
    the members of an `image_files` or `text_files` split, whose `uri` is the folder that ids are relative to,
    and is empty otherwise. `identity` changes when the content may have changed (sizes and modification
    times).
    """

    kind: SplitKind
    uri: str
    start: int = 0
    stop: int = 0
    files: tuple[str, ...] = ()
    identity: str = ""

    @property
    def key(self) -> str:
        """16 hex digits, a function of what is read and not of when: names the shards made from it."""
        parts = [self.kind, self.uri, str(self.start), str(self.stop), *self.files]
        return storage.sha256(*(part.encode() for part in parts))[:16]


@dataclass(frozen=True, kw_only=True)
class TextRow:
    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """An image as stored: `content` is the encoded file, decoded by `data.images`."""

    id: str
    uri: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A row that did not make it, and why. `uri` names where it was found."""

    id: str
    uri: str
    reason: str


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
class ShardFooter:
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


def write_shard(uri: str, rows: EmbeddingTable, footer: ShardFooter, layout: Layout = "binary") -> ShardEntry:
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
        compression={**compressed, "embedding": "none"},  # type: ignore[arg-type]  # the stubs know no mapping
        write_statistics=False,
        data_page_size=4 << 20,
    )
    storage.write_bytes(uri, sink.getvalue())
    return entry_of(storage.name_of(uri), footer)


def entry_of(name: str, footer: ShardFooter) -> ShardEntry:
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
    """Of the values and not of the file, so that it outlives a change of Parquet writer; of the rows and not
    of where their sources lay, so that it outlives a move of these."""
    parts = []
    for name in sorted(columns.keys() - {"uri"}):
        parts.append(name.encode())
        for buffer in columns[name].buffers():
            parts.append(b"" if buffer is None else memoryview(buffer))
    return storage.sha256(*parts)


def read_footer(uri: str) -> ShardFooter:
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
            f"{uri}: is not a shard of an embedding store ({shorten(error)}); delete it or restore it"
        ) from error


def parse_footer(text: str | bytes) -> ShardFooter:
    """The footer whose JSON is `text`."""
    document = json.loads(text)
    document["encoder"] = EncoderIdentity(**document["encoder"])
    document["rejected"] = tuple(Rejected(**entry) for entry in document["rejected"])
    document["split_files"] = tuple(document["split_files"])
    return ShardFooter(**document)


def read_embeddings(
    uri: str, row_group: int | None = None, *, embedding_dim: int | None = None, content_hash: str = ""
) -> np.ndarray:
    """The embeddings of a shard (or of one row group) as (N, D); a view of the file's pages where the column
    is `fixed_size_binary` in one chunk, so not to be written to.

    List columns of floats are accepted, more slowly. A row that is null, or not of length `embedding_dim` (by
    default the most common length), becomes a row of NaN, so that it is rejected and counted where rows are
    checked. A `content_hash` must be that of the shard's footer, where there is one.

    Raises:
        DataError: damaged, no `embedding` column, not of floats, or of another content hash.
    """
    table, metadata = _read(uri, ["embedding"], row_group)
    column = table.column("embedding")
    footer = json.loads(metadata[FOOTER_KEY]) if FOOTER_KEY in metadata else {}
    if content_hash and footer.get("content_hash", content_hash) != content_hash:
        raise DataError(
            f"{uri}: this shard's content is not what the manifest lists: it was replaced; restore it, or "
            "make the store again in a new output"
        )
    if not pa.types.is_fixed_size_binary(column.type):
        return list_rows(uri, column, embedding_dim)
    if not footer:
        raise DataError(
            f"{uri}: column embedding is {column.type} without this project's footer, so its dtype is "
            "unknown; expected a list of floats, or a shard that jobs/embed.py wrote"
        )
    rows_ND = binary_rows(column, np.dtype(footer["dtype"]))
    if embedding_dim in (None, rows_ND.shape[1]):
        return rows_ND
    return np.full((len(rows_ND), embedding_dim), np.nan, rows_ND.dtype)


def read_columns(uri: str, columns: Sequence[str], row_group: int | None = None) -> pa.Table:
    """Columns other than the embedding of a shard, or of one row group of it.

    Raises:
        DataError: damaged, or a column is missing.
    """
    return _read(uri, columns, row_group)[0]


def column_names(uri: str) -> list[str]:
    """The columns of the shard at `uri`."""
    with storage.open_input(uri) as file:
        return _parquet(uri, file).schema_arrow.names


def _read(uri: str, columns: Sequence[str], row_group: int | None) -> tuple[pa.Table, dict[bytes, bytes]]:
    with storage.open_input(uri) as file:
        parquet = _parquet(uri, file)
        missing = {"id", "embedding", *columns} - set(parquet.schema_arrow.names)
        if missing:
            raise DataError(f"{uri}: has columns {parquet.schema_arrow.names}, needs also {sorted(missing)}")
        groups = range(parquet.num_row_groups) if row_group is None else [row_group]
        try:
            table = parquet.read_row_groups(list(groups), list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{uri}: cannot be read as the manifest lists it: {shorten(error)}; restore it, or make "
                f"the store "
                "again in a new output"
            ) from error
        return table, parquet.schema_arrow.metadata or {}


def _parquet(uri: str, file: pa.NativeFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: is not a readable Parquet file: {shorten(error)}") from error


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
            f"{uri}/{MANIFEST}: damaged: {shorten(error)}; re-run jobs/embed.py on the same output"
        ) from error


def describe_rows(uri: str, row_group: int, positions: Sequence[int], embedding_dim: int) -> list[str]:
    """Why each of these rows of a row group has no direction."""
    column = _read(uri, ["embedding"], row_group)[0].column("embedding")
    listed = not pa.types.is_fixed_size_binary(column.type)
    values_ND = None if listed else read_embeddings(uri, row_group)
    return [
        describe_row(column[position].as_py() if values_ND is None else values_ND[position], embedding_dim)
        for position in positions
    ]
