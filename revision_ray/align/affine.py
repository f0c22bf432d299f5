"""The map that every strategy is: affine, perhaps noisy, back onto the sphere, centroid steps.

    z  = A u + offset + noise n           u = unit text row, A a scale or a matrix, n ~ N(0, I)
    z  = z / ||z||                        where `unit_output`
    z  = (z + r_k) / ||z + r_k||          for each centroid step k, r_k = mu_x - mu'_k

Every stage is a linear combination of the row and a few fixed vectors, so rows are described by their
coefficients: norms follow from inner products with the fixed vectors, and a mean over many rows needs
no aligned row to be made.

Shapes: N rows, D embedding dim, C rows of a chunk, K centroid steps, J = 1 + K fixed vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from revision_ray.align.rows import CHUNK_ROWS, Chunk, chunks, noise_rows
from revision_ray.errors import AlignmentError


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A fitted map from unit text rows to aligned rows; all arrays float64."""

    offset: np.ndarray  # (D,)
    scale: float = 1.0
    matrix: np.ndarray | None = None  # (D, D), takes the place of scale
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
        """This map followed by one more centroid step that adds `shift_D` = mu_x - mu' (paper, sec. 4.3)."""
        steps = np.empty((0, len(shift_D))) if self.recentre is None else self.recentre
        return replace(self, recentre=np.vstack([steps, shift_D]))

    def fixed_vectors(self) -> np.ndarray:
        """(J, D): the offset and the centroid shifts."""
        return self.offset[None] if self.recentre is None else np.vstack([self.offset, self.recentre])

    def coefficients(
        self, chunk: Chunk, ids: Sequence[str] | None, fixed_JD: np.ndarray, gram_JJ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows_CD, a_C, b_CJ): the aligned rows are a * rows + b @ fixed."""
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

    def _linear(self, chunk: Chunk, ids: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and factors whose product is A u + noise n."""
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
        """Aligned rows, float32 (N, D), and the positions of rows without a direction, which come out as NaN.

        Computed in float64 and rounded once.

        Raises:
            AlignmentError: another dimension, or ids are needed and missing.
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
