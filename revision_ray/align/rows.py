"""Rows on the unit sphere: cache-sized float64 chunks of a block, and noise that belongs to a row.

Shapes: N rows, D embedding dim, C rows of a chunk.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Rows of a chunk: small enough that its float64 copy stays in the L2 cache (64 x 1280 x 8 bytes = 0.6 MB).
CHUNK_ROWS = 64
# A row whose norm is below this carries no direction: float16 holds nothing smaller but zero.
SMALLEST_NORM = 1e-8


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

    The arrays of a chunk are overwritten by the next one. One copy into aligned memory first: the same
    values then give the same bits wherever they came from.
    """
    dim = block_ND.shape[1]
    staged = torch.from_numpy(np.empty((CHUNK_ROWS, dim), block_ND.dtype.newbyteorder("=")))
    single = torch.empty((CHUNK_ROWS, dim), dtype=torch.float32)
    double = torch.empty((CHUNK_ROWS, dim), dtype=torch.float64)
    for start in range(0, len(block_ND), CHUNK_ROWS):
        part_CD = block_ND[start : start + CHUNK_ROWS]
        size = len(part_CD)
        np.copyto(staged.numpy()[:size], part_CD)
        # Torch widens half floats by way of float32 ten times faster than NumPy does.
        source = single[:size].copy_(staged[:size]) if staged.dtype == torch.float16 else staged[:size]
        rows_CD = double[:size].copy_(source).numpy()
        squared_C = np.vecdot(rows_CD, rows_CD)
        positions_C = np.arange(start, start + size)
        valid_C = np.isfinite(squared_C) & (squared_C > SMALLEST_NORM**2)
        if not valid_C.all():
            invalid.extend(positions_C[~valid_C].tolist())
            rows_CD, squared_C, positions_C = rows_CD[valid_C], squared_C[valid_C], positions_C[valid_C]
        yield Chunk(rows_CD, 1.0 / np.sqrt(squared_C), positions_C)


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
