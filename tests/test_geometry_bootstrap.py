"""Resamples and intervals: closed forms, coverage, determinism, refusals."""

import math

import numpy as np
import pytest

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.geometry import bootstrap


def sample(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, 3)) + 2


def distance(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    return float(np.linalg.norm(one_ND.mean(axis=0) - other_ND.mean(axis=0)))


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


def test_the_reflection_takes_out_the_bias_of_repeated_rows():
    """Resamples of two clouds with one mean lie further apart than the samples do."""
    one_ND, other_ND = sample(200), sample(200, seed=1)
    found = bootstrap.interval(distance, one_ND, other_ND, bounds=(0, math.inf))
    assert found.bias > 0
    assert (found.low + found.high) / 2 < found.value


def test_means_of_resamples_are_those_of_the_rows_drawn(monkeypatch):
    rows_ND = sample(50)
    drawn = [rows.mean(axis=0) for [rows] in bootstrap.resamples(rows_ND, num=20, seed=4)]
    np.testing.assert_allclose(bootstrap.resampled_means(rows_ND, 20, seed=4), drawn, atol=1e-12)
    monkeypatch.setattr(bootstrap, "_COUNTS_BYTES", 3 * 8 * 50)  # three resamples at a time
    np.testing.assert_allclose(bootstrap.resampled_means(rows_ND, 20, seed=4), drawn, atol=1e-12)
    one = bootstrap.interval(lambda rows: float(rows.mean()), rows_ND[:, :1], num=20, seed=4)
    other = bootstrap.mean_interval(rows_ND[:, 0], num=20, seed=4)
    assert (one.low, one.high) == (pytest.approx(other.low), pytest.approx(other.high))


def test_resamples_depend_on_the_seed_and_their_number_alone():
    rows_ND = sample(30)
    whole = [rows for [rows] in bootstrap.resamples(rows_ND, num=5, seed=1)]
    tail = [rows for [rows] in bootstrap.resamples(rows_ND, num=2, seed=1, first=3)]
    np.testing.assert_array_equal(whole[3:], tail)
    other = [rows for [rows] in bootstrap.resamples(rows_ND, num=5, seed=2)]
    assert not np.array_equal(whole, other)
    assert bootstrap.interval(distance, rows_ND, rows_ND + 1) == bootstrap.interval(
        distance, rows_ND, rows_ND + 1
    )


def test_paired_arrays_are_drawn_together_and_others_apart():
    rows = np.arange(100)
    for one, other, third in bootstrap.resamples(rows, -rows, 2 * rows, num=3, paired=True):
        np.testing.assert_array_equal(one, -other)
        np.testing.assert_array_equal(2 * one, third)
        assert len(set(one.tolist())) < 100
    for one, other in bootstrap.resamples(rows, rows, num=3):
        assert not np.array_equal(one, other)
    assert [len(part) for part in next(bootstrap.resamples(rows, rows[:40], num=1))] == [100, 40]


def test_a_difference_within_pairs_has_no_spread_when_drawn_in_pairs():
    rows_ND = sample(80)
    shifted_ND = rows_ND + np.array([0.3, 0, 0])
    paired = bootstrap.interval(distance, rows_ND, shifted_ND, paired=True)
    assert paired.standard_error == pytest.approx(0, abs=1e-12)
    assert bootstrap.interval(distance, rows_ND, shifted_ND).standard_error > 0.05


def test_what_has_no_interval_is_refused():
    rows_ND = sample(10)
    with pytest.raises(DataError, match="there are none"):
        bootstrap.interval(lambda rows: 0.0, rows_ND[:0])
    with pytest.raises(DataError, match="there are none"):
        next(bootstrap.resamples(num=1))
    with pytest.raises(DataError, match="0 rows"):
        bootstrap.mean_interval(np.empty(0))
    with pytest.raises(DataError, match="row 1 is NaN"):
        bootstrap.mean_interval(np.array([1.0, np.nan, 2.0]))
    with pytest.raises(DataError, match="rows; row i"):
        bootstrap.interval(distance, rows_ND, rows_ND[:9], paired=True)
    with pytest.raises(DataError, match="not finite on 1 of 3"):
        bootstrap.from_replicates(1.0, np.array([1.0, math.inf, 2.0]))
    with pytest.raises(DataError, match="figure is nan"):
        bootstrap.from_replicates(math.nan, np.array([1.0, 2.0]))
    for num in (0, 1):
        with pytest.raises(ConfigError, match=f"{num} resamples"):
            bootstrap.interval(distance, rows_ND, rows_ND, num=num)
        with pytest.raises(ConfigError, match=f"{num} resamples"):
            bootstrap.mean_interval(rows_ND[:, 0], num=num)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ConfigError, match="level"):
            bootstrap.interval(distance, rows_ND, rows_ND, num=2, level=level)
