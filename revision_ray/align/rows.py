"""Rows on the unit sphere: cache-sized float64 chunks of a block, and noise that belongs to a row.

Shapes: N rows, D embedding dim, C rows of a chunk.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Rows of a chunk: small enough that its float64 copy stays in the L2 cache (64 x 1280 x 8 bytes = 0.6 MB).
CHUNK_ROWS = 64
# A row whose norm is below this carries no direction: float16 holds nothing smaller but zero.
SMALLEST_NORM = 1e-8
# A half float's bits, moved into a float32, read as its value times 2^-112: the difference of the two
# exponent biases. Scaling by a power of two is exact, and a row's direction does not depend on it.
_HALF_SCALE = 2.0**-112
_HALF_BITS = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]  # sign, exponent, fraction
_CACHE_LINE = 64


@dataclass(frozen=True)
class Chunk:
    """Rows that have a direction, in float64, not yet of unit length."""

    rows_CD: np.ndarray
    inverse_norm_C: np.ndarray
    positions_C: np.ndarray  # of these rows in the block

    def unit_rows(self) -> np.ndarray:
        return self.rows_CD * self.inverse_norm_C[:, None]


def chunks(block_ND: np.ndarray, invalid: list[int]) -> Iterator[Chunk]:
    """The block in float64 chunks. Positions of rows that are NaN, infinite or zero go to `invalid` instead.

    Rows of a chunk are scaled by a power of two that belongs to the dtype; `inverse_norm_C` fits them. The
    arrays of a chunk are overwritten by the next one, and are aligned: the same values give the same bits
    wherever they came from.
    """
    dim = block_ND.shape[1]
    half = block_ND.dtype == np.float16
    bits = aligned((CHUNK_ROWS, dim), np.int32)
    double = aligned((CHUNK_ROWS, dim), np.float64)
    smallest = SMALLEST_NORM * (_HALF_SCALE if half else 1.0)
    for start in range(0, len(block_ND), CHUNK_ROWS):
        part_CD = block_ND[start : start + CHUNK_ROWS]
        size = len(part_CD)
        rows_CD = double[:size]
        if half:
            _widen(part_CD, bits[:size], rows_CD)
        else:
            np.copyto(rows_CD, part_CD)
        squared_C = np.vecdot(rows_CD, rows_CD)
        positions_C = np.arange(start, start + size)
        valid_C = np.isfinite(squared_C) & (squared_C > smallest**2)
        if half and (squared_C >= (65536 * _HALF_SCALE) ** 2).any():  # what infinity and NaN would come to
            valid_C &= np.isfinite(part_CD).all(axis=1)
        if not valid_C.all():
            invalid.extend(positions_C[~valid_C].tolist())
            rows_CD, squared_C, positions_C = rows_CD[valid_C], squared_C[valid_C], positions_C[valid_C]
        yield Chunk(rows_CD, 1.0 / np.sqrt(squared_C), positions_C)


def _widen(half_CD: np.ndarray, bits_CD: np.ndarray, double_CD: np.ndarray) -> None:
    """`double_CD` holds the finite half floats times `_HALF_SCALE`, exactly; `bits_CD` is scratch.

    NumPy's own conversion takes four times as long, and Torch's takes seconds to import in every worker.
    """
    np.copyto(bits_CD, half_CD.view(half_CD.dtype.str.replace("f2", "i2")))  # sign extended
    np.left_shift(bits_CD, 13, out=bits_CD)
    np.bitwise_and(bits_CD, _HALF_BITS, out=bits_CD)
    np.copyto(double_CD, bits_CD.view(np.float32))


def aligned(shape: tuple[int, int], dtype: type) -> np.ndarray:
    """An empty array that starts on a cache line, where wide loads are twice as fast."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def noise_rows(ids: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """Standard normal noise (N, D), float64: a function of the row's id and the seed, and of nothing else.

    So a row gets the same noise in every pass, in any batch and on any worker.
    """
    key = seed.to_bytes(8, "little", signed=True)
    noise_ND = np.empty((len(ids), dim))
    for row_D, row_id in zip(noise_ND, ids, strict=True):
        digest = hashlib.blake2b(row_id.encode(), digest_size=16, key=key).digest()
        np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).standard_normal(out=row_D)
    return noise_ND
