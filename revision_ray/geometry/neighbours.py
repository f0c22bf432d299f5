"""Exact nearest neighbours by cosine, and the figures made of them (arXiv 2602.07026 sec. 6; AnisoAlign B.2).

The search is a matrix product per block of queries, so memory does not grow with the number of queries, and
tasks can share the blocks: a query's neighbours depend on the query and the base alone. The figures take the
index arrays that `nearest_others` returns. Where images and texts are searched together, images come first.

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
    """Return the indices (Q, K) of the `k` rows of the base with the largest cosine to each query, in order.

    Rows need not be of unit length. `exclude` (Q,) is a row of the base to leave out for each query, such as
    the query itself. Rows are ordered by float64 products, equal ones by index: float32 products only choose
    candidates, with a margin above their worst rounding error, and candidates are then scored pair by pair in
    float64. So neither the block size (`block_rows`, by default set by memory) nor the number of threads
    changes the result.

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
    """Return the best `k` candidates of each query that has candidates (those have at least k)."""
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


def nearest_others(rows_ND: np.ndarray, k: int, first: int = 0, last: int | None = None) -> np.ndarray:
    """Return the indices (Q, K) of the `k` nearest other rows of rows `first` to `last` (all by default).

    Blocks of rows can be searched in different tasks and concatenated.

    Raises:
        ConfigError, DataError: as `nearest`.
    """
    itself_Q = np.arange(len(rows_ND))[first:last]
    return nearest(rows_ND[itself_Q], rows_ND, k, exclude=itself_Q)


def cross_modal_shares(neighbours_NK: np.ndarray, num_images: int) -> np.ndarray:
    """Return the share (N_x + N_y,) of each row's neighbours that are of the other modality.

    `neighbours_NK` holds the neighbours of every image, then of every text, among both together. The mean is
    the kNN mixing rate: 0 if the clouds lie apart, `mixing_rate_by_chance` if they are one.

    Raises:
        DataError: `neighbours_NK` names a row that it does not have, so it is only a part.
    """
    if neighbours_NK.max(initial=0) >= len(neighbours_NK):
        raise DataError(
            f"neighbours of {len(neighbours_NK)} rows name row {neighbours_NK.max()}; give those of the "
            "whole union, images first"
        )
    is_image_N = np.arange(len(neighbours_NK)) < num_images
    return np.mean(is_image_N[neighbours_NK] != is_image_N[:, None], axis=1)


def mixing_rate_by_chance(num_images: int, num_texts: int) -> float:
    """Return the mixing rate of two samples of one distribution: 2 N_x N_y / (N (N - 1)), about 1/2."""
    total = num_images + num_texts
    return 2 * num_images * num_texts / (total * (total - 1))


def origin_entropies(neighbours_NK: np.ndarray, num_images: int) -> np.ndarray:
    """Return the binary entropy (N_x + N_y,) of the origin of each row's neighbours.

    0: all of one modality, 1: half and half. M_k^Z is the mean over the texts, M_k^X that over the images.
    Arguments and errors are those of `cross_modal_shares`.
    """
    share_N = cross_modal_shares(neighbours_NK, num_images)
    both = np.stack([share_N, 1 - share_N])
    return -np.sum(both * np.log2(np.where(both > 0, both, 1.0)), axis=0)


def kept_shares(before_NK: np.ndarray, after_NK: np.ndarray) -> np.ndarray:
    """Return the share (N,) of each row's neighbours `before` that are also among those `after`.

    The mean is the neighbourhood overlap Omega_k ("neighbourhood consistency" is the same figure).

    Raises:
        DataError: the shapes differ.
    """
    same_shape(before_NK, after_NK, "neighbours before and after")
    return np.mean((before_NK[:, :, None] == after_NK[:, None, :]).any(axis=2), axis=1)
