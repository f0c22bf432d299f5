"""Mergeable moments of unit rows (count, mean, second moments), equal to the bit for any partition.

Each row group is summed in float64. The sums of row groups are then added in fixed point: each is rounded
once, to a multiple of 2^-52. For a block of unit rows this is below the rounding of float64 itself.
Fixed-point addition is associative, so the order of the row groups does not matter.

Shapes: N rows, D embedding dim, C rows of a chunk, B buckets, J fixed vectors of a map.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from revision_ray.align.maps import CHUNK_ROWS, Affine, aligned, chunks
from revision_ray.core.errors import AlignmentError, shorten

_FRACTION_BITS = 52
# Rows of a symmetric matrix that are added at a time, so that temporary arrays stay in the L2 cache.
_TILE_ROWS = 16


@dataclass
class ExactSum:
    """A sum of float64 arrays in fixed point: value = high + low * 2^-52, 0 <= low < 2^52.

    Addition is associative and commutative to the bit. Range: 2^63, at a resolution of 2.2e-16.
    """

    high: np.ndarray  # int64
    low: np.ndarray  # int64

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "ExactSum":
        return ExactSum(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def add(self, values: np.ndarray, index: slice | tuple[slice, slice] = slice(None)) -> None:
        """Add `values` (float64, finite) to the sum at `index`."""
        whole = np.trunc(values)  # so the fraction `values - whole` is exact, and is rounded only once
        self._add(
            whole.astype(np.int64), np.rint((values - whole) * 2.0**_FRACTION_BITS).astype(np.int64), index
        )

    def merge(self, other: "ExactSum") -> None:
        """Add `other` to this sum, in place."""
        self._add(other.high, other.low, slice(None))

    def add_lower(self, values_DD: np.ndarray) -> None:
        """Add the lower triangle of the symmetric `values_DD`; call `mirror_lower` after the last one."""
        for start in range(0, len(values_DD), _TILE_ROWS):
            end = start + _TILE_ROWS
            index = (slice(start, end), slice(0, end))
            self.add(values_DD[index], index)

    def mirror_lower(self) -> None:
        """Copy the lower triangle onto the upper one."""
        above_DD = ~np.tri(len(self.high), dtype=bool)
        for part_DD in (self.high, self.low):
            np.copyto(part_DD, part_DD.T, where=above_DD)

    def _add(self, high: np.ndarray, low: np.ndarray, index: slice | tuple[slice, slice]) -> None:
        total = self.low[index] + low
        self.high[index] += high + (total >> _FRACTION_BITS)
        self.low[index] = total & ((1 << _FRACTION_BITS) - 1)

    def value(self, index: int | slice = slice(None)) -> np.ndarray:
        """Return the sum, or its entry at `index` of the first axis, rounded to float64."""
        return self.high[index].astype(np.float64) + self.low[index].astype(np.float64) * 2.0**-_FRACTION_BITS

    def total(self) -> "ExactSum":
        """Return the exact sum over the first axis."""
        result = ExactSum.zeros(self.high.shape[1:])
        for high, low in zip(self.high, self.low, strict=True):
            result._add(high, low, slice(None))
        return result


# Number of disjoint parts of the rows for standard errors by the delete-a-group jackknife.
NUM_BUCKETS = 16
# Rows in one matrix product of the second moments; the embedding store's row groups are of this size.
_ROWS_PER_PRODUCT = 2048


@dataclass
class Moments:
    """Count, sum and (on request) second moment of unit rows, with the shards that they came from."""

    counts: np.ndarray  # int64 (B,)
    sums: ExactSum  # (B, D)
    second: ExactSum | None  # (D, D)
    shard_hashes: frozenset[str] = frozenset()

    @staticmethod
    def zeros(embedding_dim: int, second: bool = False) -> "Moments":
        return Moments(
            np.zeros(NUM_BUCKETS, np.int64),
            ExactSum.zeros((NUM_BUCKETS, embedding_dim)),
            ExactSum.zeros((embedding_dim, embedding_dim)) if second else None,
        )

    @property
    def embedding_dim(self) -> int:
        return self.sums.high.shape[1]

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def centroid(self) -> np.ndarray:
        """Mean of the unit rows, float64 (D,).

        Raises:
            AlignmentError: no rows were counted.
        """
        self._require_rows()
        return self.sums.total().value() / self.count

    @property
    def trace(self) -> float:
        """Mean squared distance to the centroid: T = 1 - ||mu||^2 for unit rows (paper, sec. 4.2)."""
        return float(1.0 - np.sum(self.centroid**2))

    @property
    def covariance(self) -> np.ndarray:
        """Centred covariance, float64 (D, D), symmetric.

        Raises:
            AlignmentError: the second moments were not collected.
        """
        if self.second is None:
            raise AlignmentError(
                "these moments hold no second moments; fit again with a strategy that collects them"
            )
        centroid = self.centroid
        return self.second.value() / self.count - np.outer(centroid, centroid)

    @property
    def centroid_standard_error(self) -> float:
        """Root mean square distance between this centroid and the population's: sqrt(T / (N - 1)).

        Infinite with fewer than two rows.
        """
        return math.sqrt(self.trace / (self.count - 1)) if self.count > 1 else math.inf

    def without_bucket(self, bucket: int) -> tuple[int, np.ndarray]:
        """Return count and centroid of all rows except those of one bucket, for the jackknife."""
        count = self.count - int(self.counts[bucket])
        return count, (self.sums.total().value() - self.sums.value(bucket)) / count

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return counts (G,) and centroids (G, D) of all rows except those of one bucket.

        G is the number of buckets that hold rows, or 0 where fewer than two do.
        """
        filled = np.flatnonzero(self.counts) if np.count_nonzero(self.counts) > 1 else []
        rest = [self.without_bucket(int(bucket)) for bucket in filled]
        counts_G = np.array([count for count, _ in rest], np.int64)
        return counts_G, np.array([centroid for _, centroid in rest]).reshape(len(rest), self.embedding_dim)

    def merge(self, other: "Moments") -> None:
        """Add the rows of `other`, in place. Merging is exact: order and grouping do not change any bit.

        Raises:
            AlignmentError: dimensions differ, a shard is counted already, or only one of the two has second
                moments.
        """
        if other.embedding_dim != self.embedding_dim:
            raise AlignmentError(
                f"moments of dimension {other.embedding_dim} cannot join those of {self.embedding_dim}"
            )
        twice = self.shard_hashes & other.shard_hashes
        if twice:
            raise AlignmentError(f"{len(twice)} shards are already counted, among them {min(twice)}")
        if (self.second is None) != (other.second is None):
            raise AlignmentError(
                "one side has second moments and the other has not; fit both with the same strategy"
            )
        self.counts = self.counts + other.counts
        self.sums.merge(other.sums)
        if self.second is not None and other.second is not None:
            self.second.merge(other.second)
        self.shard_hashes |= other.shard_hashes

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all int64 arrays by name, without the shard hashes; the inverse of `of_tensors`."""
        tensors = {"counts": self.counts, "sum_high": self.sums.high, "sum_low": self.sums.low}
        if self.second is not None:
            tensors |= {"second_high": self.second.high, "second_low": self.second.low}
        return tensors

    @staticmethod
    def of_tensors(tensors: Mapping[str, np.ndarray], shard_hashes: Iterable[str]) -> "Moments":
        """Return the moments whose `tensors()` and shard hashes are given.

        Raises:
            KeyError: a tensor is missing.
        """
        has_second = "second_high" in tensors
        return Moments(
            tensors["counts"],
            ExactSum(tensors["sum_high"], tensors["sum_low"]),
            ExactSum(tensors["second_high"], tensors["second_low"]) if has_second else None,
            frozenset(shard_hashes),
        )

    def to_bytes(self) -> bytes:
        """Return the moments as the bytes of a safetensors file; the inverse of `from_bytes`."""
        return safetensors.numpy.save(self.tensors(), {"shard_hashes": json.dumps(sorted(self.shard_hashes))})

    @staticmethod
    def from_bytes(content: bytes) -> "Moments":
        """Return the moments that `to_bytes` wrote.

        Raises:
            AlignmentError: `content` is not a safetensors file of moments.
        """
        try:
            tensors = safetensors.numpy.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return Moments.of_tensors(tensors, json.loads(header["__metadata__"]["shard_hashes"]))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise AlignmentError(f"these are not saved moments: {shorten(error)}") from error

    def _require_rows(self) -> None:
        if not self.count:
            raise AlignmentError("no rows were counted, so there is no centroid; is the store empty?")


def bucket_offset(shard_hash: str, row_group: int) -> int:
    """Return the bucket of a row group's first chunk; it depends only on shard content and group index."""
    return (int(shard_hash[:8], 16) + row_group) % NUM_BUCKETS


class RowSums:
    """Accumulator that adds blocks of rows to moments and reuses its buffers from block to block.

    Each block is summed in float64, in fixed chunks in file order. The sums of blocks are added exactly, so
    the same blocks give the same bits in any order. Callers must limit BLAS to one thread.
    """

    def __init__(self, embedding_dim: int, affine: Affine | None = None, second: bool = False) -> None:
        self._affine = affine
        self._fixed_JD = affine.fixed_vectors() if affine else np.empty((0, embedding_dim))
        self._gram_JJ = self._fixed_JD @ self._fixed_JD.T
        self._total = Moments.zeros(embedding_dim, second)
        # Rows are collected here for the second moments: one large matrix product is several times as fast.
        size = (_ROWS_PER_PRODUCT, embedding_dim) if second else (0, 0)
        self._waiting_ND, self._num_waiting = aligned(size, np.float64), 0
        self._second_DD, self._product_DD = (np.empty((size[1],) * 2) for _ in range(2))
        self._num_products = 0

    def add(self, block_ND: np.ndarray, ids: Sequence[str] | None = None, offset: int = 0) -> list[int]:
        """Scale the block's rows to unit length, map them, and add them to the moments.

        Rows without a direction (NaN, infinite or zero) are left out; their positions are returned. `offset`
        is the bucket of the first chunk, see `bucket_offset`. `ids` are needed where the map adds noise.
        """
        sums_BD = np.zeros((NUM_BUCKETS, block_ND.shape[1]))
        counts, fixed_JD = self._total.counts, self._fixed_JD
        invalid: list[int] = []
        for number, chunk in enumerate(chunks(block_ND, invalid)):
            bucket = (offset + number) % NUM_BUCKETS
            if self._affine:
                rows_CD, a_C, b_CJ = self._affine.coefficients(chunk, ids, fixed_JD, self._gram_JJ)
            else:
                rows_CD, a_C, b_CJ = chunk.rows_CD, chunk.inverse_norm_C, np.empty((len(chunk.rows_CD), 0))
            sums_BD[bucket] += a_C @ rows_CD + b_CJ.sum(0) @ fixed_JD
            counts[bucket] += len(rows_CD)
            if self._total.second is not None:
                self._wait(rows_CD, a_C, b_CJ)
        self._total.sums.add(sums_BD)
        if self._total.second is not None:
            self._multiply()
            if self._num_products:
                self._total.second.add_lower(self._second_DD)
            self._num_products = 0
        return invalid

    def _wait(self, rows_CD: np.ndarray, a_C: np.ndarray, b_CJ: np.ndarray) -> None:
        out_CD = self._waiting_ND[self._num_waiting : self._num_waiting + len(rows_CD)]
        np.multiply(a_C[:, None], rows_CD, out=out_CD)
        if b_CJ.shape[1]:
            out_CD += b_CJ @ self._fixed_JD
        self._num_waiting += len(rows_CD)
        if self._num_waiting > _ROWS_PER_PRODUCT - CHUNK_ROWS:
            self._multiply()

    def _multiply(self) -> None:
        """Add the collected rows to the second moments of this block."""
        if not self._num_waiting:
            return
        rows_ND = self._waiting_ND[: self._num_waiting]
        # NumPy recognizes A.T @ A and halves the work (BLAS syrk).
        first = not self._num_products
        product_DD = np.matmul(rows_ND.T, rows_ND, out=self._second_DD if first else self._product_DD)
        if not first:
            self._second_DD += product_DD
        self._num_products += 1
        self._num_waiting = 0

    def moments(self) -> Moments:
        """Return the moments of all added rows. Call this last: add nothing afterwards."""
        if self._total.second is not None:
            self._total.second.mirror_lower()
        return self._total


def of_block(
    block_ND: np.ndarray,
    *,
    affine: Affine | None = None,
    ids: Sequence[str] | None = None,
    second: bool = False,
    offset: int = 0,
) -> tuple[Moments, list[int]]:
    """Return the moments of one block of rows, and the positions of rows without a direction.

    Rows are scaled to unit length and then mapped by `affine`, if given. Rows without a direction are left
    out. See `RowSums`.
    """
    sums = RowSums(block_ND.shape[1], affine, second)
    invalid = sums.add(block_ND, ids, offset)
    return sums.moments(), invalid


def merged(parts: Iterable[Moments], embedding_dim: int, second: bool = False) -> Moments:
    """Return the merged moments of all parts."""
    total = Moments.zeros(embedding_dim, second)
    for part in parts:
        total.merge(part)
    return total


def jackknife_standard_error(estimates: np.ndarray) -> np.ndarray:
    """Return the delete-a-group jackknife standard error over the first axis.

    Each entry of `estimates` is computed without the rows of one group. NaN with fewer than two entries.
    """
    if len(estimates) < 2:
        return np.full(estimates.shape[1:], math.nan)
    squares = np.sum((estimates - estimates.mean(0)) ** 2, axis=0)
    return np.sqrt((len(estimates) - 1) / len(estimates) * squares)


def modality_gap(text: Moments, image: Moments) -> float:
    """Return the Euclidean distance between the two centroids."""
    return float(np.linalg.norm(image.centroid - text.centroid))


def gap_standard_error(text: Moments, image: Moments) -> float:
    """Return the standard error of ||mu_x - mu_y||, by a delete-a-group jackknife over each side's buckets.

    NaN where a side's rows fill fewer than two buckets.
    """
    errors = []
    for moving, still in ((text, image), (image, text)):
        _, centroids_GD = moving.leave_one_out()
        gaps_G = np.linalg.norm(centroids_GD - still.centroid, axis=1)
        errors.append(float(jackknife_standard_error(gaps_G)))
    return math.hypot(*errors)
