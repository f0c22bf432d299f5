"""Exact nearest neighbours by cosine, and the figures made of them (arXiv 2602.07026 sec. 6; AnisoAlign B.2).

A search is a matrix product per block of queries, so memory does not grow with the number of queries, and
blocks may be searched anywhere: a query's neighbours depend on the query and the base alone. Figures take
the index arrays that such searches give; the union of both sets has the images first, then the texts.

Shapes: Q queries, N rows, K neighbours, D embedding dim, C candidates.
"""

import numpy as np

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry.spectra import directions, same_dim, same_shape

# Of the cosines of a block, and of the rows that are gathered to score candidates.
_BLOCK_BYTES = 64_000_000


def nearest(
    queries_QD: np.ndarray,
    base_ND: np.ndarray,
    k: int,
    exclude: np.ndarray | None = None,
    block_rows: int | None = None,
) -> np.ndarray:
    """Indices (Q, K) of the `k` rows of the base that have the largest cosine with each query, nearest first.

    Rows need not be of unit length. `exclude` (Q,) names a row of the base that is no neighbour of its
    query: the query itself. The order is that of float64 products, and of two equal ones the lower index
    comes first: float32 products only choose candidates, with a margin above their worst rounding, and
    candidates are then scored pair by pair in float64. So neither the size of blocks (`block_rows`, set by
    memory unless given) nor the number of threads changes the result.

    Raises:
        ConfigError: `k` is below 1.
        DataError: the base has too few rows, the dimensions differ, or rows are not finite or are zero.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; at least 1 neighbour")
    same_dim(queries_QD, base_ND, "queries and base")
    base_ND = directions(base_ND, "the base")
    available = len(base_ND) - (exclude is not None)
    if k > available:
        raise DataError(
            f"{k} neighbours among {available} rows (a row itself not counted); take more rows or a smaller k"
        )
    if not len(queries_QD):
        return np.empty((0, k), np.int64)
    queries_QD = directions(queries_QD, "the queries")
    if exclude is not None and len(exclude) != len(queries_QD):
        raise DataError(f"{len(exclude)} rows to leave out for {len(queries_QD)} queries; expected one each")
    base32_DN = base_ND.astype(np.float32).T
    size = block_rows or max(_BLOCK_BYTES // (4 * len(base_ND)), 1)
    blocks = []
    for start in range(0, len(queries_QD), size):
        block = slice(start, start + size)
        left_out = None if exclude is None else np.asarray(exclude)[block]
        blocks.append(_nearest_of_block(queries_QD[block], base_ND, base32_DN, k, left_out))
    return np.concatenate(blocks)


def _nearest_of_block(
    queries_QD: np.ndarray, base_ND: np.ndarray, base32_DN: np.ndarray, k: int, exclude_Q: np.ndarray | None
) -> np.ndarray:
    num_rows, dim = base_ND.shape
    cosine_QN = queries_QD.astype(np.float32) @ base32_DN
    if exclude_Q is not None:
        cosine_QN[np.arange(len(queries_QD)), exclude_Q] = -np.inf
    # A float32 product of unit vectors is off by less than (D + 2) eps / 2; two of them are compared here.
    margin = 2 * (dim + 2) * np.finfo(np.float32).eps
    least_Q = np.partition(cosine_QN, num_rows - k, axis=1)[:, num_rows - k] - margin
    near_QN = cosine_QN >= least_Q[:, None]
    # In a cloud that is nearly a point every row is a candidate; then one pass over the base is cheaper.
    crowded_Q = near_QN.sum(axis=1) > max(4 * k, num_rows // 4)
    near_QN[crowded_Q] = False
    found_QK = np.empty((len(queries_QD), k), np.int64)
    found_QK[~crowded_Q] = _best_candidates(queries_QD, base_ND, near_QN, k)
    for query in np.flatnonzero(crowded_Q):
        score_N = np.vecdot(base_ND, queries_QD[query])
        if exclude_Q is not None:
            score_N[exclude_Q[query]] = -np.inf
        found_QK[query] = np.argsort(-score_N, kind="stable")[:k]
    return found_QK


def _best_candidates(queries_QD: np.ndarray, base_ND: np.ndarray, near_QN: np.ndarray, k: int) -> np.ndarray:
    """The best `k` of the candidates of every query that has any (at least k then)."""
    query_C, row_C = np.nonzero(near_QN)
    size = max(_BLOCK_BYTES // (16 * base_ND.shape[1]), 1)
    parts = [
        np.vecdot(base_ND[row_C[start : start + size]], queries_QD[query_C[start : start + size]])
        for start in range(0, len(row_C), size)
    ]
    score_C = np.concatenate(parts) if parts else np.empty(0)
    order_C = np.lexsort((row_C, -score_C, query_C))
    begin = np.flatnonzero(np.diff(query_C, prepend=-1))  # candidates stay grouped by query
    return row_C[order_C[begin[:, None] + np.arange(k)]]


def union_neighbours(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> np.ndarray:
    """Neighbours (N_x + N_y, K) of every row within the union of images and texts, without the row itself.

    The same, in blocks: `nearest(union[a:b], union, k, exclude=np.arange(a, b))`.
    """
    same_dim(image_ND, text_ND, "images and texts")
    union_ND = np.concatenate([image_ND, text_ND])
    return nearest(union_ND, union_ND, k, exclude=np.arange(len(union_ND)))


def cross_modal_shares(neighbours_NK: np.ndarray, num_images: int) -> np.ndarray:
    """Share (N_x + N_y,) of each row's neighbours that are of the other modality.

    `neighbours_NK` is that of `union_neighbours`: one row for each row of the union, images first.

    Raises:
        DataError: it names a row that it does not have, so it is only a part.
    """
    if neighbours_NK.max(initial=0) >= len(neighbours_NK):
        raise DataError(
            f"neighbours of {len(neighbours_NK)} rows name row {neighbours_NK.max()}; give those of the "
            "whole union, images first"
        )
    is_image_N = np.arange(len(neighbours_NK)) < num_images
    return np.mean(is_image_N[neighbours_NK] != is_image_N[:, None], axis=1)


def mixing_rate(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> float:
    """Share of cross-modal neighbours among the k nearest of every row in the union of both sets.

    0 where the clouds lie apart, `mixing_rate_by_chance` where they are one.
    """
    return float(cross_modal_shares(union_neighbours(image_ND, text_ND, k), len(image_ND)).mean())


def mixing_rate_by_chance(num_images: int, num_texts: int) -> float:
    """Mixing rate of two samples of one distribution: 2 N_x N_y / (N (N - 1)), near 1/2 for equal sizes."""
    total = num_images + num_texts
    return 2 * num_images * num_texts / (total * (total - 1))


def origin_entropies(neighbours_NK: np.ndarray, num_images: int) -> np.ndarray:
    """Binary entropy (N_x + N_y,) of the origin of each row's neighbours: 0 (all of one side) to 1 (half)."""
    share_N = cross_modal_shares(neighbours_NK, num_images)
    both = np.stack([share_N, 1 - share_N])
    return -np.sum(both * np.log2(np.where(both > 0, both, 1.0)), axis=0)


def origin_entropy(image_ND: np.ndarray, text_ND: np.ndarray, k: int = 20) -> tuple[float, float]:
    """(M_k^Z, M_k^X): mean entropy of neighbour origin over the aligned texts, and over the images."""
    entropy_N = origin_entropies(union_neighbours(image_ND, text_ND, k), len(image_ND))
    return float(entropy_N[len(image_ND) :].mean()), float(entropy_N[: len(image_ND)].mean())


def kept_shares(before_NK: np.ndarray, after_NK: np.ndarray) -> np.ndarray:
    """Share (N,) of each row's neighbours `before` that are among those `after`."""
    same_shape(before_NK, after_NK, "neighbours before and after")
    return np.mean((before_NK[:, :, None] == after_NK[:, None, :]).any(axis=2), axis=1)


def neighbourhood_overlap(before_ND: np.ndarray, after_ND: np.ndarray, k: int = 10) -> float:
    """Share of a text's k nearest texts that are still among its k nearest after alignment, mean over texts.

    Omega_k, "neighbourhood consistency", is the same figure: nothing else is said of it.
    """
    same_shape(before_ND, after_ND, "embeddings before and after alignment")
    itself = np.arange(len(before_ND))
    return float(
        kept_shares(
            nearest(before_ND, before_ND, k, exclude=itself), nearest(after_ND, after_ND, k, exclude=itself)
        ).mean()
    )
