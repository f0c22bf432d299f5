"""Join conversations or captions with the embeddings of their images, once, for every epoch to read.

A joined store is a directory of Parquet shards, `rejected.parquet` and, written last, a manifest. Columns:
`id`, `text` (a caption, or a conversation as JSON), `num_images`, `num_characters`, and `embeddings`,
large_binary: one unit row of little-endian float32 an image, in the order of the `<image>` marks. It lies
below a cache directory under a hash of its inputs, so other inputs never meet it.

Images are found by URI, id, path, or file name alone, in an index of the whole image store. It holds 64-bit
hashes beside places, 24 bytes a key, whatever the length of ids; two of ten million different keys share a
hash with a probability of 3e-6.

Shapes: N rows, D embedding dim.
"""

import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas.util
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from revision_ray.core import observe, storage
from revision_ray.core.cluster import connect, data_context, user_errors
from revision_ray.core.errors import DataError, quote, shorten
from revision_ray.core.observe import progress
from revision_ray.data import shards
from revision_ray.data.conversations import (
    BAD_CONVERSATION,
    UNREADABLE,
    Conversation,
    ConversationSource,
    read_conversations,
    record_splits,
)
from revision_ray.data.fields import TEXT_IDS, DerivedIds, RowError, known_id
from revision_ray.data.finish import claim
from revision_ray.data.images import without_image_ending
from revision_ray.data.records import read_records
from revision_ray.data.shards import MANIFEST, EncoderIdentity, Rejected, SourceSplit
from revision_ray.data.store import REJECTED, RowGroup, Store, read_group, write_rejected
from revision_ray.data.turns import CONVERSATION_FIELDS, caption_images, text_of

MISSING, AMBIGUOUS = -1, -2
WAYS = ("uri", "id", "path", "file name")
BY_NAME = WAYS.index("file name")
_SAME_ENDINGS = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}
_ANY_ENDING = "\0"


@dataclass(frozen=True)
class _Table:
    """Sorted hashes, the place of the first row of each and of a second one, or MISSING.

    A place is a row group in the upper 32 bits, a row in the lower.
    """

    hashes: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def of(hashes: np.ndarray, places: np.ndarray) -> "_Table":
        order = np.argsort(hashes, kind="stable")
        unique, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
        places = np.append(places[order], MISSING)
        second = np.where(counts > 1, places[np.where(counts > 1, starts + 1, 0)], MISSING)
        return _Table(unique, places[starts], second)

    def find(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The first and second places of `keys`."""
        if not len(self.hashes):
            return np.full(len(keys), MISSING), np.full(len(keys), MISSING)
        hashes = hash_of(keys)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        is_there = self.hashes[at] == hashes
        return np.where(is_there, self.first[at], MISSING), np.where(is_there, self.second[at], MISSING)


@dataclass(frozen=True)
class ImageMatches:
    """Of N images: where each one stands and how it was found.

    `places` are int64, or MISSING or AMBIGUOUS; `ways` index WAYS. `rivals` (N, 2) are the first two rows of
    an ambiguous name, and the first two that have the file name of a missing image, else MISSING.
    """

    places: np.ndarray
    ways: np.ndarray
    rivals: np.ndarray


@dataclass(frozen=True)
class ImageIndex:
    """The rows of an image store by each of the WAYS that a record may name them."""

    tables: tuple[_Table, ...]

    def find(self, images: Sequence[str], folder: str, *, by_name: bool = False) -> ImageMatches:
        """Find the images as records name them; their paths are relative to `folder`.

        Asked are the URI below `folder`, then as it is (several rows of one URI are one image); the id; the
        path that an id with the ending of its file makes, where the store knows the file, else the id as the
        path without the ending; and, only if `by_name`, the file name without folder and ending.
        """
        paths = [normal_path(image) for image in images]
        uris, ids, by_path, names = self.tables
        asked = [
            (0, uris, [_below(folder, path) for path in paths]),
            (0, uris, list(images)),
            (1, ids, list(images)),
            (1, ids, paths),
            (2, by_path, [_path_key(path) for path in paths]),
            (2, by_path, [without_image_ending(path) + _ANY_ENDING for path in paths]),
        ]
        if by_name:
            asked.append((BY_NAME, names, [file_name(path) for path in paths]))
        places = np.full(len(images), MISSING, np.int64)
        ways = np.zeros(len(images), np.int64)
        rivals = np.full((len(images), 2), MISSING, np.int64)
        for way, table, keys in asked:
            open_places = np.flatnonzero(places == MISSING)
            if not len(open_places):
                break
            first, second = table.find([keys[place] for place in open_places.tolist()])
            is_ambiguous = (second != MISSING) & (way != 0)
            places[open_places] = np.where(is_ambiguous, AMBIGUOUS, first)
            rivals[open_places[is_ambiguous]] = np.stack([first, second], axis=1)[is_ambiguous]
            ways[open_places] = way
        missing = np.flatnonzero(places == MISSING)
        if len(missing):
            rivals[missing] = np.stack(names.find([file_name(paths[at]) for at in missing.tolist()]), axis=1)
        return ImageMatches(places, ways, rivals)


def normal_path(path: str) -> str:
    """`path` with slashes, without `./` and the like; a URI as it is."""
    return path if "://" in path else posixpath.normpath(path.replace("\\", "/"))


def _below(folder: str, path: str) -> str:
    """The URI of `path`, which may be one itself, in `folder`."""
    if "://" in path or path.startswith("/") or not folder:
        return path
    while path.startswith("../"):  # An object store would take the dots for a part of the name.
        folder, path = storage.parent_of(folder), path.removeprefix("../")
    return storage.join(folder, path)


def file_name(path: str) -> str:
    """The last segment of `path`, without the ending of an image file."""
    return without_image_ending(posixpath.basename(path))


def hash_of(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,)."""
    # The stubs take its lazy import for an object.
    return pandas.util.hash_array(np.array(keys, dtype=object), categorize=False)  # type: ignore[operator]


def _path_key(path: str) -> str:
    stem, ending = posixpath.splitext(path)
    return stem + _SAME_ENDINGS.get(ending.lower(), ending.lower())


def _path_of(row_id: str, uri: str) -> str:
    """The key of the path of a row: its id with the ending of the file, where that is the file's path."""
    stem, ending = posixpath.splitext(uri.partition("?")[0])
    if ending and (stem == row_id or stem.endswith(f"/{row_id}")):
        return _path_key(row_id + ending)
    return row_id + _ANY_ENDING


def key_hashes(group: RowGroup) -> np.ndarray:
    """uint64 (4, N): the keys of a row group's rows, in the order of WAYS.

    Raises:
        DataError: the shard is missing or damaged.
    """
    has_uri = "uri" in shards.column_names(group.uri)
    table = shards.read_columns(group.uri, ["id", "uri"] if has_uri else ["id"], group.index)
    ids = [str(row_id) for row_id in table["id"].to_pylist()]
    uris = [uri or "" for uri in table["uri"].to_pylist()] if has_uri else [""] * len(ids)
    paths = [_path_of(row_id, uri) for row_id, uri in zip(ids, uris, strict=True)]
    return np.stack([hash_of(keys) for keys in (uris, ids, paths, [file_name(row_id) for row_id in ids])])


def build_index(hashes_of_groups: Sequence[np.ndarray]) -> ImageIndex:
    """The index of row groups whose `key_hashes` these are, in the order of the store."""
    places = [
        (np.int64(number) << 32) + np.arange(hashes.shape[1], dtype=np.int64)
        for number, hashes in enumerate(hashes_of_groups)
    ]
    all_places = np.concatenate([np.empty(0, np.int64), *places])
    return ImageIndex(
        tuple(
            _Table.of(
                np.concatenate([np.empty(0, np.uint64), *(h[way] for h in hashes_of_groups)]), all_places
            )
            for way in range(len(WAYS))
        )
    )


log = logging.getLogger(__name__)

Kind = Literal["conversations", "captions"]
FORMAT_VERSION = 2  # 2: records' system prompts, losses and images as data.fields says
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


# A task holds this many rows with their embeddings, about 100 MB at D = 1280, and reads each row group that
# they need once. An image store in another order than the records, on remote storage, is thus read once for
# each shard; on a local disk only the pages of the rows are touched.
_ROWS_PER_SHARD = 16384
_BYTES_PER_SPLIT = 64 * 2**20
_GROUPS_PER_INDEX_TASK = 64


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every task needs to know. `index` refers to an ImageIndex in the object store."""

    output: str
    kind: Kind
    image_root: str
    by_name: bool
    groups: tuple[RowGroup, ...]
    embedding_dim: int
    index: Any


def join(
    source: ConversationSource,
    images: Store | None,
    cache: str,
    *,
    kind: Kind = "conversations",
    max_rejected_fraction: float = 0.001,
) -> JoinedStore:
    """The records of `source`, beside the embeddings of their images, stand in a joined store below `cache`.

    One that stands there already is returned; one that was interrupted goes on. Without `images` only records
    without an image are taken. What names an image: see `data.fields`; how it is found: `ImageIndex`.

    Raises:
        DataError: the source or the image store cannot be read, no rows, or more rejected records than the
            fraction allows; then the list of them is written and no manifest. Or images are matched by file
            name, and two different paths have the same one.
    """
    splits = record_splits(source, _BYTES_PER_SPLIT)
    settings = _settings(splits, source, images, kind)
    key = storage.sha256(json.dumps(settings, sort_keys=True).encode())[:16]
    output = storage.join(storage.absolute(cache), key)
    stands = storage.exists(storage.join(output, MANIFEST))
    if not stands:
        claim(output, settings)
        done = {footer.split for footer in read_footers(output).values() if footer.last}
        _write_all([split for split in splits if split.key not in done], source, images, output, kind)
        finish_joined(
            output,
            kind=kind,
            embedding_dim=images.embedding_dim if images else 0,
            encoder=images.encoder if images else EncoderIdentity(),
            max_rejected_fraction=max_rejected_fraction,
        )
    joined = open_joined(output)
    if source.match_images == "file_name":
        check_file_names([output])
    if not stands:
        observe.record(samples=joined.num_rows, rejected=sum(joined.rejected.values()))
    return joined


def _settings(
    splits: Sequence[SourceSplit], source: ConversationSource, images: Store | None, kind: Kind
) -> dict[str, Any]:
    """Everything that decides the content of the joined store. Repeats do not: they belong to the plan."""
    shard_hashes = sorted(images.shard_hashes) if images else []
    return {
        "kind": kind,
        "records": [[split.key, split.identity] for split in splits],
        "image_root": source.image_root,
        "match_images": source.match_images,
        "images": storage.sha256(*(shard_hash.encode() for shard_hash in shard_hashes)),
        "rows_per_shard": _ROWS_PER_SHARD,
        "joined_format_version": FORMAT_VERSION,
    }


def _write_all(
    splits: Sequence[SourceSplit], source: ConversationSource, images: Store | None, output: str, kind: Kind
) -> None:
    if not splits:
        return
    connect()
    with data_context() as context, user_errors():
        context.op_resource_reservation_enabled = False  # see align.map_reduce: tasks return next to nothing
        index = _index(images)
        work = _Work(
            output=output,
            kind=kind,
            image_root=source.image_root,
            by_name=source.match_images == "file_name",
            groups=images.row_groups if images else (),
            embedding_dim=images.embedding_dim if images else 0,
            index=ray.put(index),
        )
        ways: Counter[str] = Counter()
        items = [{"split": json.dumps(asdict(split))} for split in splits]
        pipeline = ray.data.from_items(items, override_num_blocks=len(items)).map(partial(_write, work=work))
        with progress("join", None, "records") as shown:
            for row in pipeline.iter_rows():
                shown.advance(row["num_records"])
                ways.update(json.loads(row["ways"]))
    if ways:
        log.info("images were found by %s", ", ".join(f"{way}: {count}" for way, count in ways.items()))
    if ways["file name"]:
        log.warning(
            "match_images=file_name: %d images were found by their file name alone", ways["file name"]
        )


def _index(images: Store | None) -> ImageIndex:
    """The index of the whole store, its keys read and hashed in tasks."""
    groups = images.row_groups if images else ()
    items = [
        {"first": first, "row_groups": json.dumps([asdict(g) for g in groups[first : first + step]])}
        for step in (_GROUPS_PER_INDEX_TASK,)
        for first in range(0, len(groups), step)
    ]
    hashes: dict[int, np.ndarray] = {}
    if items:
        for row in ray.data.from_items(items, override_num_blocks=len(items)).map(_hash_keys).iter_rows():
            sizes = json.loads(row["sizes"])
            parts = np.split(np.frombuffer(row["hashes"], np.uint64), np.cumsum(sizes)[:-1] * len(WAYS))
            hashes |= {row["first"] + n: part.reshape(len(WAYS), -1) for n, part in enumerate(parts)}
    return build_index([hashes[number] for number in range(len(groups))])


def _hash_keys(item: dict[str, Any]) -> dict[str, Any]:
    found = [key_hashes(RowGroup(**document)) for document in json.loads(item["row_groups"])]
    sizes = [keys.shape[1] for keys in found]
    return {
        "first": item["first"],
        "sizes": json.dumps(sizes),
        "hashes": b"".join(keys.tobytes() for keys in found),
    }


def _write(item: dict[str, Any], *, work: _Work) -> dict[str, Any]:
    """The shards of one split stand; its last one, which says so, is written last."""
    document = json.loads(item["split"])
    split = SourceSplit(**{**document, "files": tuple(document["files"])})
    index: ImageIndex = ray.get(work.index)
    ways: Counter[str] = Counter()
    num_records = number = 0
    rows: list[JoinedRow] = []
    rejected: list[Rejected] = []
    for found in _CONTENTS[work.kind](split):
        num_records += 1
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        rows.append(found)
        if len(rows) == _ROWS_PER_SHARD:
            _write_shard(rows, rejected, index, work, split, number, ways, last=False)
            rows, rejected, number = [], [], number + 1
    _write_shard(rows, rejected, index, work, split, number, ways, last=True)
    return {"num_records": num_records, "ways": json.dumps(ways)}


def _conversations(split: SourceSplit) -> Iterator[JoinedRow | Rejected]:
    for record in read_conversations(split):
        if not isinstance(record, Conversation):
            yield record
            continue
        yield JoinedRow(
            id=record.id,
            where=split.uri,
            text=record.to_json(),
            num_characters=record.num_characters,
            images=record.images,
        )


def _captions(split: SourceSplit) -> Iterator[JoinedRow | Rejected]:
    derived = DerivedIds()
    for found in read_records(split, CONVERSATION_FIELDS):
        try:
            fields = found.fields()
            text = text_of(fields)
            named = caption_images(fields)
            if len(named) != 1:
                raise RowError(
                    f"a caption names one image; found {len(named)} in 'image', 'image_id' or 'id'"
                )
            identity = known_id(fields, TEXT_IDS) or named[0]
            yield JoinedRow(id=identity, where=found.where, text=text, num_characters=len(text), images=named)
        except RowError as error:
            cause = BAD_CONVERSATION if found.bad is None else UNREADABLE
            yield found.rejected(f"{cause}: {error}", derived)


_CONTENTS = {"conversations": _conversations, "captions": _captions}


def _write_shard(
    rows: list[JoinedRow],
    rejected: list[Rejected],
    index: ImageIndex,
    work: _Work,
    split: SourceSplit,
    number: int,
    ways: Counter[str],
    *,
    last: bool,
) -> None:
    """The rows whose images all have an embedding stand in shard `number` of the split, the others listed."""
    names = [image for row in rows for image in row.images]
    matches = index.find(names, work.image_root or storage.parent_of(split.uri), by_name=work.by_name)
    embedding_ND, problems = _embeddings(matches, work)
    ways.update(WAYS[way] for way in matches.ways[matches.places >= 0].tolist())
    kept: list[JoinedRow] = []
    first = 0
    for row in rows:
        mine = range(first, first + len(row.images))
        first += len(row.images)
        bad = next((place for place in mine if place in problems), None)
        if bad is None:
            kept.append(replace(row, embeddings=embedding_ND[mine.start : mine.stop].tobytes()))
        else:
            reason = f"missing_embedding: image {names[bad]!r:.120}: {problems[bad]}"
            rejected.append(Rejected(id=row.id, uri=row.where, reason=reason))
    uri = storage.join(work.output, f"part-{split.key}-{number:05d}.parquet")
    image_paths = {}
    if work.by_name:
        for name, way, place in zip(names, matches.ways.tolist(), matches.places.tolist(), strict=True):
            if place >= 0:
                path = normal_path(name)
                image_paths[path] = image_paths.get(path, False) or way == BY_NAME
    write_joined(uri, kept, rejected, split.key, last=last, image_paths=image_paths)


def _embeddings(matches: ImageMatches, work: _Work) -> tuple[np.ndarray, dict[int, str]]:
    """float32 (N, D) unit rows at these places of the image store, and why a position has none."""
    places = matches.places
    embedding_ND = np.zeros((len(places), work.embedding_dim), np.float32)
    missing = np.flatnonzero(places < 0)
    missing = missing[
        np.argsort(matches.rivals[missing, 0], kind="stable")
    ]  # by row group, to read each once
    problems = {int(at): _problem(matches.rivals[at], work) for at in missing}
    known = np.flatnonzero(places >= 0)
    known = known[np.argsort(places[known], kind="stable")]
    groups = places[known] >> 32
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    for start, end in pairwise(edges.tolist()):
        chosen = known[start:end]
        block_ND = read_group(work.groups[int(groups[start])], work.embedding_dim)
        rows_ND = block_ND[places[chosen] & 0xFFFFFFFF].astype(np.float64)
        norm_N = np.linalg.norm(rows_ND, axis=1)
        good = np.isfinite(norm_N) & (norm_N > 0)
        embedding_ND[chosen[good]] = rows_ND[good] / norm_N[good, None]
        problems |= dict.fromkeys(chosen[~good].tolist(), "its embedding has no direction")
    return embedding_ND, problems


def _problem(rivals: np.ndarray, work: _Work) -> str:
    """Why an image has no embedding, and what to do. `rivals` are places of rows that it may have meant."""
    known = [place for place in rivals.tolist() if place != MISSING]
    names = [_ids_of(work.groups[place >> 32])[place & 0xFFFFFFFF] for place in known]
    named = " and ".join(f"{name!r:.90}" for name in names)
    if not known:
        return "the image store has no such row"
    if len(known) > 1:
        return (
            f"several rows of the image store go by that name: {named}; set image_root to the folder that "
            "the records' paths are relative to, or name images by their ids"
        )
    return (
        f"the image store has no such row; {named} has the same file name: set image_root to the folder that "
        "the records' paths are relative to, or match_images=file_name where file names tell images apart"
    )


@lru_cache(maxsize=8)
def _ids_of(group: RowGroup) -> list[str]:
    return [str(row_id) for row_id in shards.read_columns(group.uri, ["id"], group.index)["id"].to_pylist()]
