"""Conversations or captions joined with the embeddings of their images, once, for every epoch to read.

The joined store lies below a cache directory under a hash of what it is made from, so that other inputs never
meet it. Tasks read a split of the records each, find its images in an index of the whole image store, and
write shards; the index holds 16 bytes a key.

Shapes: N rows, D embedding dim.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import ray

from revision_ray import metrics, storage
from revision_ray.cluster import connect, data_context, user_errors
from revision_ray.data import shards
from revision_ray.data.conversations import (
    BAD_CONVERSATION,
    UNREADABLE,
    Conversation,
    ConversationSource,
    read_conversations,
    record_splits,
)
from revision_ray.data.finish import claim
from revision_ray.data.records import TEXT_IDS, DerivedIds, RowError, known_id
from revision_ray.data.schema import Rejected, Split
from revision_ray.data.shards import MANIFEST, EncoderIdentity
from revision_ray.data.store import RowGroup, Store, read_group
from revision_ray.data.text_rows import read_records
from revision_ray.data.turns import CONVERSATION_FIELDS, caption_images, text_of
from revision_ray.progress import progress
from revision_ray.train.image_index import (
    BY_NAME,
    MISSING,
    WAYS,
    ImageIndex,
    Matches,
    build_index,
    key_hashes,
    normal_path,
)
from revision_ray.train.joined_store import (
    FORMAT_VERSION,
    JoinedRow,
    JoinedStore,
    Kind,
    check_file_names,
    finish_joined,
    open_joined,
    read_footers,
    write_joined,
)

log = logging.getLogger(__name__)

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
    without an image are taken. What names an image: see `data.records`; how it is found: `ImageIndex`.

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
        metrics.record(samples=joined.num_rows, rejected=sum(joined.rejected.values()))
    return joined


def _settings(
    splits: Sequence[Split], source: ConversationSource, images: Store | None, kind: Kind
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
    splits: Sequence[Split], source: ConversationSource, images: Store | None, output: str, kind: Kind
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
    split = Split(**{**document, "files": tuple(document["files"])})
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


def _conversations(split: Split) -> Iterator[JoinedRow | Rejected]:
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


def _captions(split: Split) -> Iterator[JoinedRow | Rejected]:
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
    split: Split,
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


def _embeddings(matches: Matches, work: _Work) -> tuple[np.ndarray, dict[int, str]]:
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
