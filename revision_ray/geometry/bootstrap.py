"""Bootstrap confidence intervals of means over rows.

Shapes: N rows, D embedding dim, B resamples.
"""

import math
from dataclasses import dataclass

import numpy as np

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry.spectra import finite_rows

# Not scipy.stats.bootstrap: rows are vectors, and all means are one matrix product, without a copy of the
# rows for each resample. Bytes of the counts that say how often each resample holds each row:
_COUNTS_BYTES = 64_000_000


@dataclass(frozen=True)
class Interval:
    """A figure of a sample, and the ends between which the population's figure lies with probability `level`.

    `bias` is the mean of the `num` resamples minus the value, `standard_error` their standard deviation.
    """

    value: float
    low: float
    high: float
    level: float
    num: int
    bias: float
    standard_error: float


def from_replicates(
    value: float,
    replicates_B: np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Return the interval of a figure from its values on resamples.

    The ends are reflected percentiles (2 value - upper quantile, 2 value - lower quantile), cut off at
    `bounds`, the values that the figure can take: a resample repeats rows, which raises distances between
    means, and the reflection takes that bias out where plain percentiles may miss the value.

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
            f"the figure is {value:.4g}, and not finite on {wrong} of {len(replicates_B)} resamples: there "
            "is no interval"
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
    """Return the means (B, D) of `num` resamples of the rows.

    Resample number b draws its rows with the seed [seed, b]. Two unpaired samples need two seeds: the
    distances between their resampled centroids are
    `np.linalg.norm(resampled_means(x, seed=0) - resampled_means(y, seed=1), axis=1)`.

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
    """Return the interval of the mean of one value a row, such as each query's share of kept neighbours.

    Rows are resampled; what they were compared with is not. So this also serves figures of nearest
    neighbours, which resampled rows would distort (a repeated row is its own neighbour).

    Raises:
        ConfigError: as `from_replicates`.
        DataError: no values, or values that are not finite.
    """
    values_N1 = np.asarray(values_N, np.float64)[:, None]
    means_B = resampled_means(values_N1, num, seed)[:, 0]
    return from_replicates(float(values_N1.mean()), means_B, level=level, bounds=bounds)
