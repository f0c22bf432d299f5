"""Angles within a cloud, before and after alignment, and distances within pairs (arXiv 2602.07026 sec. 6).

Shapes: N rows, D embedding dim, P pairs of rows, H histogram bins.
"""

import numpy as np

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry.spectra import directions, finite_rows, pearson, same_shape, unit_rows

NUM_PAIRS = 200_000
# Bins of width 0.01 over -1..1.
NUM_BINS = 200
# Bytes of the rows that are gathered at once, so that they stay in the cache.
_GATHERED_BYTES = 1_000_000


def row_pairs(num_rows: int, num_pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `num_pairs` different pairs i < j of rows without replacement; all pairs if there are fewer.

    Returns the indices (P,) of both rows.

    Raises:
        ConfigError: `num_pairs` is below 1.
        DataError: fewer than two rows.
    """
    if num_pairs < 1:
        raise ConfigError(f"{num_pairs} pairs of rows; at least 1")
    if num_rows < 2:
        raise DataError(f"{num_rows} rows have no pairs; at least 2 are needed for this figure")
    possible = num_rows * (num_rows - 1) // 2
    generator = np.random.default_rng(seed)
    if possible < 2 * num_pairs:
        first, second = np.triu_indices(num_rows, 1)
        if possible <= num_pairs:
            return first, second
        chosen = np.sort(generator.permutation(possible)[:num_pairs])
        return first[chosen], second[chosen]
    keys = np.empty(0, np.int64)
    while len(keys) < num_pairs:
        missing = num_pairs - len(keys)
        one = generator.integers(num_rows, size=missing)
        other = (one + generator.integers(1, num_rows, size=missing)) % num_rows  # never the same row
        drawn = np.minimum(one, other) * num_rows + np.maximum(one, other)
        keys = np.sort(np.concatenate([keys, drawn]))
        keys = keys[np.diff(keys, prepend=-1) > 0]  # np.unique hashes, which takes far longer
    return keys // num_rows, keys % num_rows


def pair_cosines(rows_ND: np.ndarray, num_pairs: int = NUM_PAIRS, seed: int = 0) -> np.ndarray:
    """Return the cosines (P,) of a seeded sample of pairs of rows, or of all pairs if there are fewer.

    Rows need not be of unit length.

    Raises:
        DataError: fewer than two rows, or rows that are not finite or have no direction.
    """
    rows_ND = directions(rows_ND, minimum=2)
    return _cosines_of(rows_ND, *row_pairs(len(rows_ND), num_pairs, seed))


def cosine_histogram(cosines_P: np.ndarray, bins: int = NUM_BINS) -> np.ndarray:
    """Count cosines in `bins` equal bins over -1..1; returns (H,).

    Raises:
        ConfigError: `bins` is below 1.
        DataError: a value is not between -1 and 1.
    """
    if bins < 1:
        raise ConfigError(f"{bins} bins; at least 1")
    cosines_P = np.asarray(cosines_P, np.float64)
    if not np.all(np.abs(cosines_P) <= 1 + 1e-9):  # false for NaN, too
        raise DataError("cosines lie between -1 and 1; some of these do not")
    place_P = np.floor((np.clip(cosines_P, -1, 1) + 1) * (bins / 2)).astype(np.int64)
    return np.bincount(np.minimum(place_P, bins - 1), minlength=bins)


def js_divergence(p_H: np.ndarray, q_H: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two histograms in nats: 0 if equal, ln 2 if disjoint.

    The histograms hold counts or shares; each is divided by its sum.

    Of two `angle_histogram`s this is the angular divergence of two clouds. State the number of bins and of
    pairs beside it: with P pairs a side, two samples of one distribution already differ by about
    (filled bins - 1) / (4 P).

    Raises:
        DataError: the histograms have different bins, a negative entry, or no entries at all.
    """
    same_shape(p_H, q_H, "the two histograms")
    shares = []
    for histogram_H in (p_H, q_H):
        counts_H = np.asarray(histogram_H, np.float64)
        if not np.isfinite(counts_H).all() or counts_H.min(initial=0) < 0 or not counts_H.sum():
            raise DataError(
                "a histogram has negative, infinite or only zero counts; expected counts of 0 or more"
            )
        shares.append(counts_H / counts_H.sum())
    middle_H = (shares[0] + shares[1]) / 2
    halves = (np.sum(s[s > 0] * np.log(s[s > 0] / middle_H[s > 0])) for s in shares)
    return max(float(sum(halves) / 2), 0.0)


def angle_histogram(
    rows_ND: np.ndarray, num_pairs: int = NUM_PAIRS, seed: int = 0, bins: int = NUM_BINS
) -> np.ndarray:
    """Return the histogram (H,) of the pairwise cosines within a cloud.

    Raises:
        ConfigError: as `cosine_histogram`.
        DataError: as `pair_cosines`.
    """
    return cosine_histogram(pair_cosines(rows_ND, num_pairs, seed), bins)


def row_cosines(unit_ND: np.ndarray, rows_ND: np.ndarray) -> np.ndarray:
    """Return the cosine (N,) of each unit row with row i of `rows_ND`, which may have any length.

    Phi is the mean for texts before and after alignment.

    Raises:
        DataError: the shapes differ, `unit_ND` is not of unit length, or rows are not finite or are zero.
    """
    same_shape(unit_ND, rows_ND, "the two sides")
    return np.vecdot(unit_rows(unit_ND, "the unit rows"), directions(rows_ND, "the other rows"))


def cosine_correlation(
    before_ND: np.ndarray, after_ND: np.ndarray, num_pairs: int = NUM_PAIRS, seed: int = 0
) -> float:
    """Return Psi: the correlation of pairwise cosines before and after alignment, over the same pairs.

    Raises:
        DataError: the shapes differ, fewer than three rows, or all cosines of a side are equal.
    """
    same_shape(before_ND, after_ND, "embeddings before and after alignment")
    before_ND, after_ND = directions(before_ND, "before", 3), directions(after_ND, "after", 3)
    pairs = row_pairs(len(before_ND), num_pairs, seed)
    return pearson(_cosines_of(before_ND, *pairs), _cosines_of(after_ND, *pairs), "pairwise cosines")


def pair_distances(image_ND: np.ndarray, text_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ||Delta - m|| and ||Delta|| of each pair, (N,) and (N,).

    Row i of both sides is a pair, Delta = e_x - e_y, m = E[Delta] (AnisoAlign sec. 3).

    Raises:
        DataError: the shapes differ, rows are not finite, or every pair coincides.
    """
    same_shape(image_ND, text_ND, "images and their texts")
    gap_ND = finite_rows(image_ND, "images") - finite_rows(text_ND, "texts")
    whole_N = np.linalg.norm(gap_ND, axis=1)
    if not whole_N.any():
        raise DataError("every pair coincides")
    return np.linalg.norm(gap_ND - gap_ND.mean(axis=0), axis=1), whole_N


def residual_ratio(residual_N: np.ndarray, whole_N: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return E||Delta - m|| / E||Delta|| from the distances that `pair_distances` gives.

    1 means that shifting the mean achieves nothing.
    """
    return residual_N.mean(axis=axis) / whole_N.mean(axis=axis)


def _cosines_of(unit_ND: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    """Return the products of the rows of each pair, in parts so that memory does not grow with P."""
    size = max(_GATHERED_BYTES // (2 * unit_ND[0].nbytes), 1)
    parts = [
        np.vecdot(unit_ND[first_P[start : start + size]], unit_ND[second_P[start : start + size]])
        for start in range(0, len(first_P), size)
    ]
    return np.clip(np.concatenate(parts), -1.0, 1.0)
