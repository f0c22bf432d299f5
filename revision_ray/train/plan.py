"""Which rows make up which step: a function of content, seed and epoch alone. No Ray.

An epoch is a sequence of rows: row groups in shuffled order, repeats and mixture weights included. It is cut
into windows of several global batches; the rows of a window are permuted and then cut into global batches. So
a batch mixes the rows of a few row groups, a run can start anywhere by skipping windows unread, and neither
the number of workers nor the micro batch size has a say in what a step sees.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from revision_ray import storage
from revision_ray.errors import ConfigError, DataError

# What a random stream is for, so that no two draws share one.
_ORDER, _COUNTS, _SUBSET, _WINDOW, _BATCHES = range(5)


@dataclass(frozen=True, kw_only=True)
class Order:
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
class Part:
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
class Window:
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


class Plan:
    """The steps that the parts of a mixture give.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, parts: Sequence[Part], order: Order) -> None:
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

    def window(self, epoch: int, index: int) -> Window:
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
        return Window(
            epoch=epoch,
            index=index,
            first_step=epoch * self.steps_per_epoch + index * self.order.batches_per_window,
            groups=np.concatenate(groups)[order],
            rows=np.concatenate(rows)[order],
        )

    def batches(self, window: Window, lengths: np.ndarray) -> list[np.ndarray]:
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
def _pieces(parts: tuple[Part, ...], seed: int, epoch: int) -> _Pieces:
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
