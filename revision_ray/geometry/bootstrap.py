"""Confidence intervals by the bootstrap: how a figure moves when the sample's rows are drawn anew.

Shapes: N rows, D embedding dim, B resamples.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry.spectra import finite_rows

# Not scipy.stats.bootstrap: each resample has a seed of its own, so that tasks can share them out, rows are
# vectors, and means are one matrix product, without a gathered copy of the rows for every resample.
# Of the counts that say how often each resample holds each row.
_COUNTS_BYTES = 64_000_000


@dataclass(frozen=True)
class Interval:
    """A figure of the sample, and the ends between which the population's lies with probability `level`.

    `bias` is the mean of the resamples minus the value, `standard_error` their standard deviation.
    """

    value: float
    low: float
    high: float
    level: float
    num: int
    bias: float
    standard_error: float


def interval(
    statistic: Callable[..., float],
    *arrays: np.ndarray,
    num: int = 200,
    seed: int = 0,
    level: float = 0.95,
    paired: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Bootstrap interval of `statistic(*arrays)` over the rows of the arrays.

    `paired` draws the same rows of all arrays; otherwise each is drawn for itself. For means of rows
    `mean_interval` and `resampled_means` are much faster.

    Ends are reflected percentiles (2 value - upper quantile, 2 value - lower quantile), cut off at `bounds`,
    the values that the figure can take: a resample repeats rows, which lowers ranks and raises distances
    between means, and the reflection takes that bias out where plain percentiles may miss the value.
    Figures of nearest neighbours are not for this (a repeated row is its own neighbour at distance 0): give
    `mean_interval` the figure of each row.

    Raises:
        ConfigError: fewer than two resamples, or a level that is not between 0 and 1.
        DataError: an array is empty, paired ones differ in length, or a figure is NaN or infinite.
    """
    whole = float(statistic(*arrays))
    replicates_B = np.array(
        [statistic(*resample) for resample in resamples(*arrays, num=num, seed=seed, paired=paired)], float
    )
    return from_replicates(whole, replicates_B, level=level, bounds=bounds)


def resamples(
    *arrays: np.ndarray, num: int, seed: int = 0, paired: bool = False, first: int = 0
) -> Iterator[list[np.ndarray]]:
    """The arrays with their rows drawn anew, with replacement, `num` times.

    Resample number b (from `first` on) depends on the seed and b alone, so tasks can share them out.

    Raises:
        DataError: an array is empty, or paired ones differ in length.
    """
    lengths = [len(array) for array in arrays]
    if not lengths or not min(lengths):
        raise DataError("the bootstrap draws from rows, and there are none")
    if paired and len(set(lengths)) > 1:
        raise DataError(f"paired arrays have {lengths} rows; row i of each must belong together")
    for number in range(first, first + num):
        generator = np.random.default_rng([seed, number])
        drawn = [generator.integers(length, size=length) for length in lengths[: 1 if paired else None]]
        yield [
            array[rows] for array, rows in zip(arrays, drawn * len(arrays) if paired else drawn, strict=True)
        ]


def from_replicates(
    value: float,
    replicates_B: np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The interval of a figure from its values on resamples; for several figures of the same resamples.

    Raises:
        ConfigError: fewer than two replicates, or a level that is not between 0 and 1.
        DataError: a figure is NaN or infinite.
    """
    replicates_B = np.asarray(replicates_B, np.float64)
    if len(replicates_B) < 2:
        raise ConfigError(
            f"{len(replicates_B)} resamples have no spread; at least 2, and 200 for an interval"
        )
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; expected a probability between 0 and 1, such as 0.95")
    wrong = int(np.sum(~np.isfinite(replicates_B)))
    if wrong or not math.isfinite(value):
        raise DataError(
            f"the figure is {value:.4g}, and not finite on {wrong} of {len(replicates_B)} resamples, so it "
            "has no interval"
        )
    lower, upper = np.quantile(replicates_B, [(1 - level) / 2, (1 + level) / 2])
    low, high = np.clip([2 * value - upper, 2 * value - lower], *bounds)
    return Interval(
        value=float(value),
        low=float(low),
        high=float(high),
        level=level,
        num=len(replicates_B),
        bias=float(replicates_B.mean() - value),
        standard_error=float(replicates_B.std(ddof=1)),
    )


def resampled_means(rows_ND: np.ndarray, num: int = 200, seed: int = 0) -> np.ndarray:
    """Means (B, D) of `num` resamples of the rows, as one matrix product.

    Two samples drawn apart need two seeds: the distance between their centroids is
    `np.linalg.norm(resampled_means(x, seed=0) - resampled_means(y, seed=1), axis=1)` on each resample.

    Raises:
        DataError: no rows, or rows that are not finite.
    """
    rows_ND = finite_rows(rows_ND)
    count = len(rows_ND)
    mean_D = rows_ND.mean(axis=0)
    size = max(_COUNTS_BYTES // (8 * count), 1)
    parts = [np.empty((0, rows_ND.shape[1]))]
    for start in range(0, num, size):
        draws = [
            np.bincount(np.random.default_rng([seed, number]).integers(count, size=count), minlength=count)
            for number in range(start, min(start + size, num))
        ]
        parts.append(np.stack(draws).astype(np.float64) @ (rows_ND - mean_D) / count)
    return np.concatenate(parts) + mean_D


def mean_interval(
    values_N: np.ndarray,
    *,
    num: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Bootstrap interval of the mean of one figure a row, such as each query's share of kept neighbours.

    Rows are drawn anew, what they were compared with stays.

    Raises:
        ConfigError: as `from_replicates`.
        DataError: no values, or values that are not finite.
    """
    values_N1 = np.asarray(values_N, np.float64)[:, None]
    means_B = resampled_means(values_N1, num, seed)[:, 0]
    return from_replicates(float(values_N1.mean()), means_B, level=level, bounds=bounds)
