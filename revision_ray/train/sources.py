"""What training reads: a text store and its fit, or joined stores. Row groups in, samples out.

Shapes: N rows, D embedding dim, I images of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from revision_ray import storage
from revision_ray.align.affine import Affine
from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import check_store
from revision_ray.cluster import one_thread
from revision_ray.data import shards
from revision_ray.data.conversations import Conversation
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import RowGroup, open_stores, read_group
from revision_ray.errors import DataError
from revision_ray.train.joined_store import JoinedStore, Kind, read_joined
from revision_ray.train.plan import Part
from revision_ray.train.samples import Formatter, Sample, Unusable


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows without their embeddings. `num_characters` stands in for a length before there are tokens."""

    ids: list[str]
    texts: list[str]
    num_characters: np.ndarray  # int64 (N,)
    num_images: np.ndarray  # int64 (N,)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Captions with their aligned embeddings in the place of images (paper sec. 5, stage 1)."""

    groups: tuple[RowGroup, ...]
    embedding_dim: int
    encoder: EncoderIdentity
    affine: Affine
    alignment: str  # content hash of the fit

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(num_rows=tuple(group.num_rows for group in self.groups)),)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(part.epoch_rows for part in self.parts)

    @property
    def content_hash(self) -> str:
        """Identifies what the samples are made of, wherever it lies."""
        return storage.sha256(_identity(self.groups), self.alignment.encode())

    def texts(self, group: int, rows: np.ndarray) -> Texts:
        """These rows of a row group."""
        place = self.groups[group]
        table = shards.read_columns(place.uri, ["id", "text"], place.index).take(pa.array(rows))
        return Texts(
            ids=[str(row_id) for row_id in table["id"].to_pylist()],
            texts=table["text"].to_pylist(),
            num_characters=_int64(pc.call_function("utf8_length", [table["text"]])),
            num_images=np.ones(len(rows), np.int64),
        )

    def embeddings(self, group: int, rows: np.ndarray) -> list[np.ndarray]:
        """(1, D) as stored, of each of these rows of a row group."""
        block_ND = read_group(self.groups[group], self.embedding_dim)[rows]
        return [row_D[None] for row_D in block_ND]

    def samples(
        self, formatter: Formatter, ids: Sequence[str], texts: Sequence[str], embeds: Sequence[np.ndarray]
    ) -> list[Sample | Unusable]:
        """The captions behind their aligned embeddings."""
        with one_thread():
            aligned_ND, _ = self.affine.apply(np.concatenate(list(embeds)), list(ids))
        return [
            _made(formatter.caption, row_id, text, row_D)
            for row_id, text, row_D in zip(ids, texts, aligned_ND, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class JoinedSource:
    """Conversations or captions with the embeddings of their images: a mixture of joined stores."""

    kind: Kind
    groups: tuple[RowGroup, ...]  # of all parts, one after the other
    parts: tuple[Part, ...]
    embedding_dim: int
    encoder: EncoderIdentity

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(part.epoch_rows for part in self.parts)

    @property
    def content_hash(self) -> str:
        """Identifies what the samples are made of, wherever it lies, and how often an epoch sees them."""
        repeats = repr([(len(part.num_rows), part.repeat) for part in self.parts])
        return storage.sha256(_identity(self.groups), repeats.encode(), self.kind.encode())

    def texts(self, group: int, rows: np.ndarray) -> Texts:
        """These rows of a row group."""
        columns = ["id", "text", "num_characters", "num_images"]
        table = self._read(group, columns).take(pa.array(rows))
        return Texts(
            ids=table["id"].to_pylist(),
            texts=table["text"].to_pylist(),
            num_characters=_int64(table["num_characters"]),
            num_images=_int64(table["num_images"]),
        )

    def embeddings(self, group: int, rows: np.ndarray) -> list[np.ndarray]:
        """float32 (I, D) of each of these rows of a row group."""
        column = self._read(group, ["embeddings"]).take(pa.array(rows))["embeddings"]
        shape = (-1, self.embedding_dim) if self.embedding_dim else (0, 0)
        return [np.frombuffer(value.as_buffer(), "<f4").reshape(shape) for value in column]

    def samples(
        self, formatter: Formatter, ids: Sequence[str], texts: Sequence[str], embeds: Sequence[np.ndarray]
    ) -> list[Sample | Unusable]:
        """The conversations, or the captions behind the embeddings of their images."""
        if self.kind == "captions":
            rows = zip(ids, texts, embeds, strict=True)
            return [_made(formatter.caption, row_id, text, row[0]) for row_id, text, row in rows]
        return [
            _made(formatter.conversation, Conversation.from_json(text), row)
            for text, row in zip(texts, embeds, strict=True)
        ]

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        place = self.groups[group]
        table = read_joined(place.uri, place.index, columns)
        if table.num_rows != place.num_rows:
            raise DataError(
                f"{place.uri}: row group {place.index} has {table.num_rows} rows, listed were "
                f"{place.num_rows}; delete the joined store, it is made again from its inputs"
            )
        return table


Source = TextSource | JoinedSource


def text_source(texts: Sequence[str], alignment: str, *, allow_other_encoder: bool = False) -> TextSource:
    """The captions of text stores, to be aligned by the fit at directory `alignment` as they are read.

    Raises:
        AlignmentError: no fit there, one of another encoder or dimension, or texts that are aligned already.
        DataError: no store there, or an empty one.
    """
    store, fit = open_stores(texts, "text"), load_alignment(alignment)
    check_store(store, fit, allow_other_encoder)
    _check_texts(store.row_groups)
    return TextSource(
        groups=_ordered(store.row_groups),
        embedding_dim=store.embedding_dim,
        encoder=store.encoder,
        affine=fit.affine,
        alignment=fit.content_hash,
    )


def joined_stores_source(stores: Sequence[JoinedStore], repeats: Sequence[float]) -> JoinedSource:
    """The mixture of these joined stores, each row of which an epoch sees so many times.

    Raises:
        DataError: stores of different kinds, dimensions or encoders, or none.
    """
    if not stores:
        raise DataError("no training data were given")
    with_images = [store for store in stores if store.embedding_dim] or list(stores)
    first = with_images[0]
    for store in stores:
        other = store.embedding_dim and (
            store.embedding_dim != first.embedding_dim
            or store.encoder.fingerprint != first.encoder.fingerprint
        )
        if store.kind != stores[0].kind or other:
            raise DataError(
                f"{store.uri}: holds {store.kind} with embeddings of {store.encoder.name or 'no encoder'}, "
                f"d = {store.embedding_dim}; {first.uri}: {first.kind}, {first.encoder.name}, "
                f"d = {first.embedding_dim}; a mixture needs one encoder"
            )
    by_store = [_ordered(_groups_of(store)) for store in stores]
    return JoinedSource(
        kind=first.kind,
        groups=tuple(group for groups in by_store for group in groups),
        parts=tuple(
            Part(num_rows=tuple(group.num_rows for group in groups), repeat=repeat)
            for groups, repeat in zip(by_store, repeats, strict=True)
        ),
        embedding_dim=first.embedding_dim,
        encoder=first.encoder,
    )


def _groups_of(store: JoinedStore) -> list[RowGroup]:
    return [
        RowGroup(
            uri=storage.join(store.uri, shard.name), shard_hash=shard.content_hash, index=index, num_rows=rows
        )
        for shard in store.shards
        for index, rows in enumerate(shard.row_group_rows)
    ]


def _check_texts(groups: Sequence[RowGroup]) -> None:
    uri = groups[0].uri
    if "text" not in shards.column_names(uri):
        raise DataError(f"{uri}: has no column text; stage 1 needs the captions beside their embeddings")


def _ordered(groups: Sequence[RowGroup]) -> tuple[RowGroup, ...]:
    """By content, so that neither the place nor the names of shards have a say in the order of training."""
    return tuple(sorted(groups, key=lambda group: (group.shard_hash, group.index)))


def _identity(groups: Sequence[RowGroup]) -> bytes:
    return repr([(group.shard_hash, group.index, group.num_rows) for group in groups]).encode()


def _int64(column: Any) -> np.ndarray:
    return np.asarray(column.to_numpy(), np.int64)


def _made(make: Any, *arguments: Any) -> Sample | Unusable:
    try:
        return make(*arguments)
    except Unusable as unusable:
        return unusable
