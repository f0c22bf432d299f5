"""Resamples and intervals: closed forms, coverage, determinism, refusals."""

import math

import numpy as np
import pytest

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import bootstrap


def sample(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, 3)) + 2


def test_the_spread_of_a_mean_is_its_standard_error():
    values_N = sample(400)[:, 0]
    found = bootstrap.mean_interval(values_N, num=2000)
    expected = values_N.std() / math.sqrt(400)
    # The standard deviation of 2000 draws is known to 1 / sqrt(4000) of itself, five times over.
    assert found.standard_error == pytest.approx(expected, rel=5 / math.sqrt(4000))
    assert found.value == pytest.approx(values_N.mean())
    assert found.low == pytest.approx(found.value - 1.96 * expected, abs=0.3 * expected)
    assert found.high == pytest.approx(found.value + 1.96 * expected, abs=0.3 * expected)
    assert abs(found.bias) < 5 * expected / math.sqrt(2000)
    assert (found.level, found.num) == (0.95, 2000)


def test_intervals_cover_the_population_as_often_as_they_say():
    covered = []
    for seed in range(300):
        values_N1 = sample(60, seed)[:, :1]
        means_B = bootstrap.resampled_means(values_N1, 200)[:, 0]
        both = [bootstrap.from_replicates(values_N1.mean(), means_B, level=level) for level in (0.5, 0.9)]
        covered.append([found.low < 2 < found.high for found in both])
    # Five standard errors of a share of 300, and 60 values give intervals that are a little short.
    assert np.mean(covered, axis=0)[0] == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 300) + 0.01)
    assert np.mean(covered, axis=0)[1] == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / 300) + 0.01)


def test_ends_are_reflected_percentiles_cut_off_at_the_bounds():
    replicates = np.arange(101) / 100 + 5
    found = bootstrap.from_replicates(5.2, replicates, level=0.8)
    assert (found.low, found.high) == (pytest.approx(10.4 - 5.9), pytest.approx(10.4 - 5.1))
    assert found.bias == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(replicates.std(ddof=1))
    cut = bootstrap.from_replicates(5.2, replicates, level=0.8, bounds=(4.8, 5.0))
    assert (cut.value, cut.low, cut.high) == (5.2, 4.8, 5.0)


def drawn_rows(num_rows: int, number: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).integers(num_rows, size=num_rows)


def test_the_reflection_takes_out_the_bias_of_repeated_rows():
    """Resamples of two clouds with one mean lie further apart than the samples do."""
    one_ND, other_ND = sample(200), sample(200, seed=1)
    moved_BD = bootstrap.resampled_means(one_ND, seed=0) - bootstrap.resampled_means(other_ND, seed=1)
    distances_B = np.linalg.norm(moved_BD, axis=1)
    distance = float(np.linalg.norm(one_ND.mean(axis=0) - other_ND.mean(axis=0)))
    found = bootstrap.from_replicates(distance, distances_B, bounds=(0, math.inf))
    assert found.bias > 0
    assert (found.low + found.high) / 2 < found.value


def test_means_of_resamples_are_those_of_the_rows_drawn(monkeypatch):
    """The means depend on the seed and the number of the resample alone, not on how many are made at once."""
    rows_ND = sample(50)
    means = [rows_ND[drawn_rows(50, number, seed=4)].mean(axis=0) for number in range(20)]
    np.testing.assert_allclose(bootstrap.resampled_means(rows_ND, 20, seed=4), means, atol=1e-12)
    monkeypatch.setattr(bootstrap, "_COUNTS_BYTES", 3 * 8 * 50)  # three resamples at a time
    np.testing.assert_allclose(bootstrap.resampled_means(rows_ND, 20, seed=4), means, atol=1e-12)
    other = bootstrap.resampled_means(rows_ND, 20, seed=5)
    assert not np.allclose(other, means)


def test_the_interval_of_a_mean_is_that_of_its_resamples():
    values_N = sample(50)[:, 0]
    means = np.array([values_N[drawn_rows(50, number, seed=4)].mean() for number in range(20)])
    expected = bootstrap.from_replicates(values_N.mean(), means)
    found = bootstrap.mean_interval(values_N, num=20, seed=4)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found == bootstrap.mean_interval(values_N, num=20, seed=4)


def test_what_has_no_interval_is_refused():
    rows_ND = sample(10)
    with pytest.raises(DataError, match="0 rows"):
        bootstrap.mean_interval(np.empty(0))
    with pytest.raises(DataError, match="row 1 is NaN"):
        bootstrap.mean_interval(np.array([1.0, np.nan, 2.0]))
    with pytest.raises(DataError, match="not finite on 1 of 3"):
        bootstrap.from_replicates(1.0, np.array([1.0, math.inf, 2.0]))
    with pytest.raises(DataError, match="is nan"):
        bootstrap.from_replicates(math.nan, np.array([1.0, 2.0]))
    for num in (0, 1):
        with pytest.raises(ConfigError, match=f"{num} resamples"):
            bootstrap.mean_interval(rows_ND[:, 0], num=num)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ConfigError, match="level"):
            bootstrap.mean_interval(rows_ND[:, 0], num=2, level=level)
