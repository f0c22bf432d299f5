"""The joined store: conversations or captions beside the embeddings of their images. No Ray.

A directory of Parquet shards, `rejected.parquet` and, written last, a manifest. Columns: `id`, `text` (a
caption, or a conversation as JSON), `num_images`, `num_characters`, and `embeddings`, large_binary: one unit
row of little-endian float32 an image, in the order of the `<image>` marks.

Shapes: N rows, D embedding dim.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray import storage
from revision_ray.data.rejected import REJECTED, write_rejected
from revision_ray.data.schema import Rejected
from revision_ray.data.shards import MANIFEST, EncoderIdentity
from revision_ray.errors import DataError, quote, shorten
from revision_ray.train.image_index import file_name

log = logging.getLogger(__name__)

Kind = Literal["conversations", "captions"]
FORMAT_VERSION = 2  # 2: records' system prompts, losses and images as data.records says
FOOTER_KEY = b"revision_ray_joined"
ROWS_PER_ROW_GROUP = 2048
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class JoinedShard:
    """A shard as the manifest lists it."""

    name: str
    content_hash: str
    row_group_rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class JoinedStore:
    """A joined store as its readers see it."""

    uri: str
    kind: Kind
    embedding_dim: int  # 0 where it was joined without images
    encoder: EncoderIdentity
    num_rows: int
    rejected: dict[str, int]  # by cause
    shards: tuple[JoinedShard, ...]


@dataclass(frozen=True, kw_only=True)
class JoinedRow:
    """A record on its way into a shard: `images` as it names them, `embeddings` as their bytes."""

    id: str
    where: str
    text: str
    num_characters: int
    images: tuple[str, ...]
    embeddings: bytes = b""


@dataclass(frozen=True, kw_only=True)
class JoinedFooter:
    """What a shard says of itself: which split it is from, and whether it is the last one of it."""

    split: str
    last: bool
    content_hash: str
    rejected: tuple[Rejected, ...]
    row_group_rows: tuple[int, ...] = ()
    image_paths: dict[str, bool] = field(default_factory=dict)
    """With match_images=file_name: paths of images that were found, and whether by their file name."""


def write_joined(
    uri: str,
    rows: Sequence[JoinedRow],
    rejected: Sequence[Rejected],
    split: str,
    *,
    last: bool,
    image_paths: Mapping[str, bool],
) -> None:
    """The rows stand at `uri` as one shard, which appears whole or not at all."""
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.large_string()),
        "num_images": pa.array([len(row.images) for row in rows], pa.int32()),
        "num_characters": pa.array([row.num_characters for row in rows], pa.int32()),
        "embeddings": pa.array([row.embeddings for row in rows], pa.large_binary()),
    }
    footer = {
        "split": split,
        "last": last,
        "content_hash": storage.sha256(*(b.to_pybytes() for c in columns.values() for b in c.buffers() if b)),
        "rejected": [asdict(row) for row in rejected],
        "image_paths": dict(image_paths),
    }
    table = pa.table(columns).replace_schema_metadata({FOOTER_KEY: json.dumps(footer).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=ROWS_PER_ROW_GROUP, use_dictionary=False, write_statistics=False,
        compression={**dict.fromkeys(columns, "zstd"), "embeddings": "none"},  # type: ignore[arg-type]
    )  # fmt: skip
    storage.write_bytes(uri, sink.getvalue())


def read_footers(output: str) -> dict[str, JoinedFooter]:
    """What the shards at `output` say of themselves, by URI."""
    uris = [uri for uri, _ in storage.list_files(output, "part-*.parquet")]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return dict(zip(uris, pool.map(_footer, uris), strict=True))


def _footer(uri: str) -> JoinedFooter:
    try:
        with storage.open_input(uri) as file:
            metadata = pq.read_metadata(file)
        found: dict[str, Any] = json.loads((metadata.metadata or {})[FOOTER_KEY])
        found["rejected"] = tuple(Rejected(**row) for row in found["rejected"])
        rows = [metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)]
        return JoinedFooter(**found, row_group_rows=tuple(count for count in rows if count))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{uri}: is no shard of a joined store ({quote(error)}); delete it") from error


def read_joined(uri: str, row_group: int, columns: Sequence[str]) -> pa.Table:
    """Columns of one row group of a shard.

    Raises:
        DataError: missing or damaged.
    """
    try:
        with storage.open_input(uri) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            return parquet.read_row_group(row_group, list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: row group {row_group} cannot be read: {shorten(error)}; delete the joined store "
            f"{storage.parent_of(uri)}, it is made again from its inputs"
        ) from error


def finish_joined(
    output: str, *, kind: Kind, embedding_dim: int, encoder: EncoderIdentity, max_rejected_fraction: float
) -> None:
    """The list of rejected records and the manifest stand.

    Raises:
        DataError: no rows, or more rejected records than the fraction allows; then there is no manifest.
    """
    footers = read_footers(output)
    rejected = [row for footer in footers.values() for row in footer.rejected]
    num_rows = sum(sum(footer.row_group_rows) for footer in footers.values())
    listed = storage.join(output, REJECTED)
    write_rejected(listed, rejected)
    causes = Counter(row.reason.partition(":")[0] for row in rejected)
    if len(rejected) > max_rejected_fraction * (num_rows + len(rejected)) or not num_rows:
        shown = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        first = f", the first is {rejected[0].uri}: {shorten(rejected[0].reason)}" if rejected else ""
        num_records = num_rows + len(rejected)
        raise DataError(
            f"{len(rejected)} of {num_records} records cannot be used ({shown or 'none'}{first}); "
            f"max_rejected_fraction is {max_rejected_fraction}; the list is in {listed}; mend the data, or "
            "raise max_rejected_fraction"
        )
    if rejected:
        log.warning("%d records cannot be used: %s; see %s", len(rejected), dict(causes), listed)
    shards = [
        {"name": storage.name_of(uri), "content_hash": f.content_hash, "row_group_rows": f.row_group_rows}
        for uri, f in sorted(footers.items())
        if f.row_group_rows
    ]
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "embedding_dim": embedding_dim,
        "encoder": asdict(encoder),
        "num_rows": num_rows,
        "rejected": dict(causes),
        "shards": shards,
    }
    storage.write_json(storage.join(output, MANIFEST), manifest)


def check_file_names(uris: Sequence[str]) -> None:
    """Check that images of the joined stores at `uris` that were found by file name are told apart by it.

    Raises:
        DataError: two different paths have the same file name; the message has both.
    """
    paths = [
        item for uri in uris for footer in read_footers(uri).values() for item in footer.image_paths.items()
    ]
    by_name = {}
    # Those found by their file name first: among the others an equal file name does no harm.
    for path, is_by_name in sorted(paths, key=lambda item: not item[1]):
        other = (
            by_name.setdefault(file_name(path), path) if is_by_name else by_name.get(file_name(path), path)
        )
        if other != path:
            raise DataError(
                f"match_images=file_name: the records' images {other!r:.200} and {path!r:.200} have the same "
                "file name and would get the same embedding; set image_root, or name images by their ids"
            )


def open_joined(uri: str) -> JoinedStore:
    """The joined store at directory `uri`.

    Raises:
        DataError: none there, unfinished, or of a format that this version does not read.
    """
    if not storage.exists(storage.join(uri, MANIFEST)):
        raise DataError(f"{uri}: no {MANIFEST}: no join, or an unfinished one; run its job again")
    document = storage.read_json(storage.join(uri, MANIFEST))
    version = document.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise DataError(f"{uri}: format_version is {version}, this version reads {FORMAT_VERSION}")
    shards = (
        JoinedShard(**{**entry, "row_group_rows": tuple(entry["row_group_rows"])})
        for entry in document.pop("shards")
    )
    encoder = EncoderIdentity(**document.pop("encoder"))
    return JoinedStore(uri=uri, shards=tuple(shards), encoder=encoder, **document)
