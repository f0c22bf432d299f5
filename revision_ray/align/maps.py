"""Affine maps of unit rows, the common form of all alignment strategies, and float64 chunks of rows.

    z  = A u + offset + noise n           u = unit text row, A a scale or a matrix, n ~ N(0, I)
    z  = z / ||z||                        where `unit_output`
    z  = (z + r_k) / ||z + r_k||          for each centroid step k, r_k = mu_x - mu'_k

Each of the three lines gives a linear combination of the row and a few fixed vectors, so only its
coefficients are computed. Norms follow from inner products with the fixed vectors, and the mean over many
rows is computed without forming any aligned row.

Shapes: N rows, D embedding dim, C rows of a chunk, K centroid steps, J = 1 + K fixed vectors.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from revision_ray.core.errors import AlignmentError

# Rows of a chunk, so few that its float64 copy stays in the L2 cache (64 x 1280 x 8 bytes = 0.6 MB).
CHUNK_ROWS = 64
# A row of smaller norm counts as zero: the smallest positive float16 value, 6e-8, is larger.
SMALLEST_NORM = 1e-8
# The bits of a float16 shifted into a float32 represent its value times 2^-112, because the exponent biases
# differ by 112. Scaling by a power of two is exact, and the direction of a row does not depend on it.
_HALF_SCALE = 2.0**-112
_HALF_BITS = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]  # sign, exponent, fraction
_CACHE_LINE = 64


@dataclass(frozen=True)
class RowChunk:
    """Float64 rows with a direction (finite and not zero), not yet scaled to unit length."""

    rows_CD: np.ndarray
    inverse_norm_C: np.ndarray
    positions_C: np.ndarray  # positions of the rows in the block

    def unit_rows(self) -> np.ndarray:
        return self.rows_CD * self.inverse_norm_C[:, None]


def chunks(block_ND: np.ndarray, invalid: list[int]) -> Iterator[RowChunk]:
    """Yield the block in float64 chunks; append positions of NaN, infinite or zero rows to `invalid`.

    Rows of float16 are scaled by a power of two, and `inverse_norm_C` is that of the scaled rows. The next
    chunk overwrites the arrays of a chunk. The arrays are aligned in memory, so that equal values give equal
    bits wherever the block lies in memory.
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
        if half and (squared_C >= (65536 * _HALF_SCALE) ** 2).any():  # infinity and NaN widen to this or more
            valid_C &= np.isfinite(part_CD).all(axis=1)
        if not valid_C.all():
            invalid.extend(positions_C[~valid_C].tolist())
            rows_CD, squared_C, positions_C = rows_CD[valid_C], squared_C[valid_C], positions_C[valid_C]
        yield RowChunk(rows_CD, 1.0 / np.sqrt(squared_C), positions_C)


def _widen(half_CD: np.ndarray, bits_CD: np.ndarray, double_CD: np.ndarray) -> None:
    """Write finite float16 values times `_HALF_SCALE` to `double_CD`, exactly; `bits_CD` is scratch.

    NumPy's own conversion takes four times as long, and importing Torch for its conversion takes seconds in
    every worker.
    """
    np.copyto(bits_CD, half_CD.view(half_CD.dtype.str.replace("f2", "i2")))  # sign extended
    np.left_shift(bits_CD, 13, out=bits_CD)
    np.bitwise_and(bits_CD, _HALF_BITS, out=bits_CD)
    np.copyto(double_CD, bits_CD.view(np.float32))


def aligned(shape: tuple[int, int], dtype: type) -> np.ndarray:
    """Return an uninitialised array that starts on a cache line, where wide loads are twice as fast."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def noise_rows(ids: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """Return standard normal noise (N, D), float64, that depends only on row id and seed.

    A row therefore gets the same noise in every pass, in any batch and on any worker.
    """
    key = seed.to_bytes(8, "little", signed=True)
    noise_ND = np.empty((len(ids), dim))
    for row_D, row_id in zip(noise_ND, ids, strict=True):
        digest = hashlib.blake2b(row_id.encode(), digest_size=16, key=key).digest()
        np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).standard_normal(out=row_D)
    return noise_ND


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A fitted map from unit text rows to aligned rows; all arrays float64."""

    offset: np.ndarray  # (D,)
    scale: float = 1.0
    matrix: np.ndarray | None = None  # (D, D), used instead of scale
    noise: float = 0.0
    seed: int = 0
    unit_output: bool = True
    recentre: np.ndarray | None = None  # (K, D): mu_x - mu'_k

    @property
    def embedding_dim(self) -> int:
        return len(self.offset)

    @property
    def needs_ids(self) -> bool:
        return self.noise > 0

    def with_centroid_step(self, shift_D: np.ndarray) -> "Affine":
        """Return this map followed by a centroid step that adds `shift_D` = mu_x - mu' (paper, sec. 4.3)."""
        steps = np.empty((0, len(shift_D))) if self.recentre is None else self.recentre
        return replace(self, recentre=np.vstack([steps, shift_D]))

    def fixed_vectors(self) -> np.ndarray:
        """Return the offset and the centroid shifts, (J, D)."""
        return self.offset[None] if self.recentre is None else np.vstack([self.offset, self.recentre])

    def coefficients(
        self, chunk: RowChunk, ids: Sequence[str] | None, fixed_JD: np.ndarray, gram_JJ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows_CD, a_C and b_CJ such that the aligned rows are a * rows + b @ fixed.

        `fixed_JD` are the `fixed_vectors`, `gram_JJ` their inner products.

        Raises:
            AlignmentError: an aligned row has norm zero or NaN, or ids are needed and missing.
        """
        rows_CD, a_C = self._linear(chunk, ids)
        b_CJ = np.zeros((len(rows_CD), len(fixed_JD)))
        b_CJ[:, 0] = 1.0
        if not self.unit_output and self.recentre is None:
            return rows_CD, a_C, b_CJ
        squared_C = np.vecdot(rows_CD, rows_CD)
        inner_CJ = rows_CD @ fixed_JD.T
        for step in range(len(fixed_JD)):
            if step:
                b_CJ[:, step] += 1.0
            norm_C = np.sqrt(
                a_C**2 * squared_C + 2 * a_C * np.vecdot(inner_CJ, b_CJ) + np.vecdot(b_CJ @ gram_JJ, b_CJ)
            )
            if not (norm_C > 0).all():  # also catches NaN
                raise AlignmentError(
                    "a text row falls exactly onto the origin after alignment; fit on more, or more varied, "
                    "texts"
                )
            a_C = a_C / norm_C
            b_CJ = b_CJ / norm_C[:, None]
        return rows_CD, a_C, b_CJ

    def _linear(self, chunk: RowChunk, ids: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and factors whose product is A u + noise n."""
        if self.matrix is None and not self.noise:
            return chunk.rows_CD, self.scale * chunk.inverse_norm_C
        unit_CD = chunk.unit_rows()
        rows_CD = self.scale * unit_CD if self.matrix is None else unit_CD @ self.matrix.T
        if self.noise:
            if ids is None:
                raise AlignmentError("this map draws its noise from row ids, and no ids were given")
            chosen = [ids[int(position)] for position in chunk.positions_C]
            rows_CD = rows_CD + self.noise * noise_rows(chosen, self.embedding_dim, self.seed)
        return rows_CD, np.ones(len(rows_CD))

    def apply(self, text_ND: np.ndarray, ids: Sequence[str] | None = None) -> tuple[np.ndarray, list[int]]:
        """Return aligned rows, float32 (N, D), and the positions of rows without a direction.

        Rows without a direction (NaN, infinite or zero) become NaN. All is computed in float64 and rounded
        once.

        Raises:
            AlignmentError: the dimension differs, an aligned row has norm zero, or needed ids are missing.
        """
        if text_ND.ndim != 2 or text_ND.shape[1] != self.embedding_dim:
            raise AlignmentError(
                f"embeddings have shape {text_ND.shape}, the fit's dimension is {self.embedding_dim}"
            )
        fixed_JD = self.fixed_vectors()
        gram_JJ = fixed_JD @ fixed_JD.T
        aligned_ND = np.empty(text_ND.shape, np.float32)
        invalid: list[int] = []
        product_CD = np.empty((CHUNK_ROWS, self.embedding_dim))
        for chunk in chunks(text_ND, invalid):
            rows_CD, a_C, b_CJ = self.coefficients(chunk, ids, fixed_JD, gram_JJ)
            out_CD = np.matmul(b_CJ, fixed_JD, out=product_CD[: len(rows_CD)])
            out_CD += a_C[:, None] * rows_CD
            aligned_ND[chunk.positions_C] = out_CD
        aligned_ND[invalid] = np.nan
        return aligned_ND, invalid
