"""What training reads (a text store with its fit, or joined stores), and which rows make up which step.

An epoch is a sequence of rows: row groups in shuffled order, repeats and mixture weights included. It is cut
into windows of several global batches; the rows of a window are permuted and then cut into global batches.
So a batch mixes the rows of a few row groups, a run can start anywhere by skipping windows unread, and steps
do not depend on the number of workers or the micro batch size. The plan is a function of content, seed and
epoch.

Shapes: N rows, D embedding dim, I images of a row.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import check_store
from revision_ray.align.maps import Affine
from revision_ray.core import storage
from revision_ray.core.cluster import one_thread
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data import shards
from revision_ray.data.conversations import Conversation
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import RowGroup, open_stores, read_group
from revision_ray.train.joined import JoinedStore, Kind, read_joined
from revision_ray.train.samples import Formatter, TrainingSample, Unusable

# What a random stream is for, so that no two draws share one.
_ORDER, _COUNTS, _SUBSET, _WINDOW, _BATCHES = range(5)


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """How rows are ordered and cut into steps. Other settings are other steps."""

    global_batch_size: int = 256
    """Samples a step, over all workers and micro batches. The last step of an epoch may have fewer."""
    seed: int = 0
    """Of the order of rows."""
    batches_per_window: int = 64
    """Global batches whose rows are permuted together. More mix better, and take more memory and longer until
    the first batch."""
    group_by_length: bool = False
    """Make up global batches of samples of near lengths: less padding, batches less alike."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "batches_per_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """A source in the mixture: the rows of each of its row groups, and how often an epoch sees each row."""

    num_rows: tuple[int, ...]
    repeat: float = 1.0

    @property
    def epoch_rows(self) -> int:
        return int(self.repeat) * sum(self.num_rows) + self.num_drawn

    @property
    def num_drawn(self) -> int:
        """Rows that the broken part of the repeat count adds."""
        return round((self.repeat - int(self.repeat)) * sum(self.num_rows))


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """Rows of consecutive global batches, in permuted order: row `rows[i]` of row group `groups[i]`."""

    epoch: int
    index: int
    first_step: int
    groups: np.ndarray  # int64 (N,), counted through all parts
    rows: np.ndarray  # int64 (N,)


@dataclass(frozen=True, kw_only=True)
class WindowPart:
    """Batches [first_batch, stop_batch) of a window."""

    epoch: int
    index: int
    first_batch: int
    stop_batch: int


@dataclass(frozen=True)
class _Pieces:
    """An epoch's sequence: `count` rows of each row group, all of them unless `drawn`; `ends` add them up."""

    groups: np.ndarray
    drawn: np.ndarray
    ends: np.ndarray


class StepPlan:
    """The steps that the parts of a mixture give.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, parts: Sequence[MixturePart], order: StepOrder) -> None:
        self.parts, self.order = tuple(parts), order
        self.num_rows = sum(part.epoch_rows for part in parts)
        if not self.num_rows:
            raise DataError("the training data hold no rows; see what was rejected, and the repeat counts")
        self.steps_per_epoch = -(-self.num_rows // order.global_batch_size)
        self._group_rows = np.array([rows for part in parts for rows in part.num_rows], np.int64)

    @property
    def identity(self) -> str:
        """Equal for plans whose steps are made of the same places."""
        content = {"parts": [asdict(part) for part in self.parts], **asdict(self.order)}
        return storage.sha256(json.dumps(content, sort_keys=True).encode())

    def windows(self, start_step: int, num_steps: int) -> Iterator[WindowPart]:
        """The windows of steps [start_step, start_step + num_steps), epoch after epoch."""
        step, stop = start_step, start_step + num_steps
        while step < stop:
            epoch, batch = divmod(step, self.steps_per_epoch)
            index, first = divmod(batch, self.order.batches_per_window)
            window_end = min((index + 1) * self.order.batches_per_window, self.steps_per_epoch)
            last = min(window_end, batch + stop - step)
            yield WindowPart(
                epoch=epoch,
                index=index,
                first_batch=first,
                stop_batch=last - index * self.order.batches_per_window,
            )
            step += last - batch

    def window(self, epoch: int, index: int) -> StepWindow:
        """The rows of a window, without reading any."""
        pieces = _pieces(self.parts, self.order.seed, epoch)
        size = self.order.batches_per_window * self.order.global_batch_size
        start, stop = index * size, min((index + 1) * size, self.num_rows)
        groups, rows = [], []
        first = int(np.searchsorted(pieces.ends, start, side="right"))
        last = int(np.searchsorted(pieces.ends, stop, side="left"))
        for piece in range(first, last + 1):
            begin = int(pieces.ends[piece - 1]) if piece else 0
            chosen = self._rows_of(pieces, piece, epoch)[max(start - begin, 0) : stop - begin]
            groups.append(np.full(len(chosen), pieces.groups[piece], np.int64))
            rows.append(chosen)
        order = self._generator(epoch, _WINDOW, index).permutation(stop - start)
        return StepWindow(
            epoch=epoch,
            index=index,
            first_step=epoch * self.steps_per_epoch + index * self.order.batches_per_window,
            groups=np.concatenate(groups)[order],
            rows=np.concatenate(rows)[order],
        )

    def batches(self, window: StepWindow, lengths: np.ndarray) -> list[np.ndarray]:
        """Positions in the window of each global batch; `lengths` matter only to group by them."""
        size = self.order.global_batch_size
        positions = np.arange(len(window.rows))
        full = len(positions) // size
        if self.order.group_by_length:
            positions = np.argsort(lengths, kind="stable")
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        if self.order.group_by_length:
            order = self._generator(window.epoch, _BATCHES, window.index).permutation(full)
            batches[:full] = [batches[place] for place in order]
        return batches

    def _rows_of(self, pieces: _Pieces, piece: int, epoch: int) -> np.ndarray:
        group = int(pieces.groups[piece])
        num_rows = int(self._group_rows[group])
        if not pieces.drawn[piece]:
            return np.arange(num_rows)
        count = int(pieces.ends[piece] - (pieces.ends[piece - 1] if piece else 0))
        return np.sort(self._generator(epoch, _SUBSET, group).choice(num_rows, count, replace=False))

    def _generator(self, epoch: int, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.order.seed, epoch, purpose, number])


@lru_cache(maxsize=4)
def _pieces(parts: tuple[MixturePart, ...], seed: int, epoch: int) -> _Pieces:
    groups, counts, drawn = [], [], []
    first = 0
    for number, part in enumerate(parts):
        here = np.arange(first, first + len(part.num_rows))
        rows = np.array(part.num_rows, np.int64)
        first += len(here)
        for _ in range(int(part.repeat)):
            groups.append(here)
            counts.append(rows)
            drawn.append(np.zeros(len(here), bool))
        if part.num_drawn:
            generator = np.random.default_rng([seed, epoch, _COUNTS, number])
            groups.append(here)
            counts.append(generator.multivariate_hypergeometric(rows, part.num_drawn, method="marginals"))
            drawn.append(np.ones(len(here), bool))
    group_P, count_P, drawn_P = np.concatenate(groups), np.concatenate(counts), np.concatenate(drawn)
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(np.flatnonzero(count_P))
    return _Pieces(groups=group_P[order], drawn=drawn_P[order], ends=np.cumsum(count_P[order]))


def repeats_of_weights(num_rows: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Repeat counts that give each source its weight's share of an epoch as long as all sources together.

    Raises:
        ConfigError: a source with a weight has no rows, or all weights are zero.
    """
    total = sum(weights)
    if not total > 0:
        raise ConfigError("all weights of the mixture are zero")
    for rows, weight in zip(num_rows, weights, strict=True):
        if weight and not rows:
            raise ConfigError(f"a source of weight {weight} has no rows")
    share = sum(num_rows) / total
    return [weight * share / rows if rows else 0.0 for rows, weight in zip(num_rows, weights, strict=True)]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
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
    def parts(self) -> tuple[MixturePart, ...]:
        return (MixturePart(num_rows=tuple(group.num_rows for group in self.groups)),)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(part.epoch_rows for part in self.parts)

    @property
    def content_hash(self) -> str:
        """Identifies what the samples are made of, wherever it lies."""
        return storage.sha256(_identity(self.groups), self.alignment.encode())

    def texts(self, group: int, rows: np.ndarray) -> TextBatch:
        """These rows of a row group."""
        place = self.groups[group]
        table = shards.read_columns(place.uri, ["id", "text"], place.index).take(pa.array(rows))
        return TextBatch(
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
    ) -> list[TrainingSample | Unusable]:
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
    parts: tuple[MixturePart, ...]
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

    def texts(self, group: int, rows: np.ndarray) -> TextBatch:
        """These rows of a row group."""
        columns = ["id", "text", "num_characters", "num_images"]
        table = self._read(group, columns).take(pa.array(rows))
        return TextBatch(
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
    ) -> list[TrainingSample | Unusable]:
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
            MixturePart(num_rows=tuple(group.num_rows for group in groups), repeat=repeat)
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


def _made(make: Any, *arguments: Any) -> TrainingSample | Unusable:
    try:
        return make(*arguments)
    except Unusable as unusable:
        return unusable
