"""The cross-modal probe: heads against closed forms, intervals, words that say no more than the figures."""

import numpy as np
import pytest
from scipy.special import log_expit
from scipy.stats import norm

from revision_ray.core.errors import DataError
from revision_ray.geometry import probe
from revision_ray.geometry.probe import ProbeScores

HALF = 1.0  # half the distance of two class means; classes have unit variance in every direction


def two_classes(num_rows: int, seed: int, shift_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) of two Gaussian classes at -HALF and +HALF on the first axis, moved by `shift_D`."""
    generator = np.random.default_rng(seed)
    labels_N = np.arange(num_rows) % 2
    rows_ND = generator.standard_normal((num_rows, len(shift_D))) + shift_D
    rows_ND[:, 0] += HALF * (2 * labels_N - 1)
    return rows_ND, labels_N


def accuracy_and_nll(
    head: probe.LogisticHead, rows_ND: np.ndarray, labels_N: np.ndarray
) -> tuple[float, float]:
    log_NC = head.log_probabilities(rows_ND)
    return float((log_NC.argmax(1) == labels_N).mean()), float(probe.nll(log_NC, labels_N).mean())


def gap_of(along: float, across: float) -> np.ndarray:
    return np.array([along, across, *np.zeros(6)])


def expected(shift: float) -> tuple[float, float]:
    """(accuracy, nll) on rows shifted along the axis, of the true head: its log odds are 2 HALF x, so the
    margin of class +-1 is HALF +- shift."""
    margins, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    accuracy = np.mean([norm.cdf(HALF + shift), norm.cdf(HALF - shift)])
    losses = [-(weights @ log_expit(2 * HALF * (HALF + side * shift + margins))) for side in (1, -1)]
    return float(accuracy), float(np.mean(losses))


@pytest.mark.parametrize(
    ("along", "across"), [(0.0, 0.0), (0.5, 0.0), (1.5, 0.0), (0.0, 2.0)]
)  # a gap across the classes' axis costs nothing
def test_a_head_loses_across_a_gap_what_theory_says(along, across):
    train_ND, train_N = two_classes(8000, 1, gap_of(0, 0))
    test_ND, test_N = two_classes(20_000, 2, gap_of(along, across))
    head = probe.train_head(train_ND, train_N, 2, 1e-4)
    accuracy, loss = accuracy_and_nll(head, test_ND, test_N)
    expected_accuracy, expected_loss = expected(along)
    # Test: sqrt(1/4 / 20,000) = 0.004. Training: weights are known to sqrt(4 / 8000) = 0.02, times a gap of 2
    # and a slope of the accuracy of 0.24.
    assert accuracy == pytest.approx(expected_accuracy, abs=0.02)
    assert loss == pytest.approx(expected_loss, abs=0.04)


def test_closing_a_constructed_gap_restores_the_accuracy():
    train_ND, train_N = two_classes(8000, 1, gap_of(0, 0))
    test_ND, test_N = two_classes(20_000, 2, gap_of(1.5, 0))
    moved_ND = train_ND - train_ND.mean(0) + test_ND.mean(0)
    raw = accuracy_and_nll(probe.train_head(train_ND, train_N, 2, 1e-4), test_ND, test_N)
    aligned = accuracy_and_nll(probe.train_head(moved_ND, train_N, 2, 1e-4), test_ND, test_N)
    np.testing.assert_allclose(raw, expected(1.5), atol=0.04)  # 0.65 and 0.85
    np.testing.assert_allclose(aligned, expected(0), atol=0.04)  # 0.84 and 0.35


def test_separable_classes_are_told_apart_in_every_image():
    train_ND, train_N = two_classes(400, 1, gap_of(0, 0))
    test_ND, test_N = two_classes(400, 2, gap_of(0, 1))
    for rows_ND, labels_N in ((train_ND, train_N), (test_ND, test_N)):
        rows_ND[:, 0] = 10 * (2 * labels_N - 1)
    found, taken = probe.heads(train_ND, train_N, 2, seed=0)
    head = found[taken]
    assert accuracy_and_nll(head, test_ND, test_N)[0] == 1.0


def test_the_head_is_a_stationary_point_of_its_objective():
    """Against the gradient written out by hand, at another penalty than zero."""
    train_ND, train_N = two_classes(300, 3, gap_of(0.3, 0.2))
    head = probe.train_head(train_ND, train_N, 3, 0.05)  # a class without rows, too
    inputs_ND = (train_ND - train_ND.mean(0)) * np.sqrt(8)
    error_NC = np.exp(head.log_probabilities(train_ND)) - np.eye(3)[train_N]
    slope_DC = inputs_ND.T @ error_NC / 300 + 0.05 * head.weights_DC
    assert np.abs(slope_DC).max() < 2e-5  # the search ends at 1e-5
    assert np.abs(error_NC.mean(0)).max() < 2e-5


def test_under_a_heavy_penalty_only_the_class_frequencies_are_learnt():
    train_ND, _ = two_classes(1000, 4, gap_of(0, 0))
    labels_N = np.repeat([0, 1, 2], [500, 300, 200])
    head = probe.train_head(train_ND, labels_N, 3, 1e6)
    np.testing.assert_allclose(np.exp(head.log_probabilities(train_ND[:5])), [[0.5, 0.3, 0.2]] * 5, atol=1e-3)


def test_moving_training_and_test_rows_together_changes_nothing():
    train_ND, train_N = two_classes(500, 5, gap_of(0, 0))
    test_ND, _ = two_classes(50, 6, gap_of(0.5, 0.5))
    far_D = np.full(8, 30.0)
    one = probe.train_head(train_ND, train_N, 2, 1e-3).log_probabilities(test_ND)
    other = probe.train_head(train_ND + far_D, train_N, 2, 1e-3).log_probabilities(test_ND + far_D)
    np.testing.assert_allclose(one, other, atol=1e-4)  # the search ends at a gradient of 1e-5


def test_rows_without_a_label_are_neither_learnt_nor_tested():
    train_ND, labels_N = two_classes(400, 1, gap_of(0, 0))
    test_ND, truth_T = two_classes(60, 2, gap_of(0, 0))
    train_NA = np.stack([labels_N, 1 - labels_N], axis=1)
    test_TA = np.stack([truth_T, 1 - truth_T], axis=1)
    whole = probe.scores(train_ND, train_NA, test_ND, test_TA, [2, 2], seed=0)
    test_TA[:20, 0] = -1
    correct_PTA, nll_PTA = probe.scores(train_ND, train_NA, test_ND, test_TA, [2, 2], seed=0)
    assert np.isnan(correct_PTA[:, :20, 0]).all()
    assert np.isnan(nll_PTA[:, :20, 0]).all()
    np.testing.assert_array_equal(correct_PTA[:, 20:], whole[0][:, 20:])
    fewer_NA = train_NA.copy()
    fewer_NA[:100, 0] = -1
    half = probe.scores(train_ND, fewer_NA, test_ND, test_TA, [2, 2], seed=0)
    alone = probe.scores(train_ND[100:], train_NA[100:], test_ND, test_TA, [2, 2], seed=0)
    np.testing.assert_array_equal(half[1][..., 0], alone[1][..., 0])


def test_the_penalty_is_the_one_that_serves_rows_held_out_from_training():
    train_ND, train_N = two_classes(60, 1, np.zeros(40))  # so few that weak penalties overfit
    test_ND, test_N = two_classes(4000, 2, np.zeros(40))
    found, taken = probe.heads(train_ND, train_N, 2, seed=0)
    losses = [accuracy_and_nll(head, test_ND, test_N)[1] for head in found]
    assert losses[taken] < losses[-1]
    correct_PTA, nll_PTA = probe.scores(train_ND, train_N[:, None], test_ND, test_N[:, None], [2], seed=0)
    scored = ProbeScores.of([(correct_PTA, nll_PTA), (correct_PTA, nll_PTA)])
    np.testing.assert_allclose([each["nll"] for each in scored.by_penalty], losses, rtol=1e-12)
    assert scored.nll_STA.mean() == pytest.approx(losses[taken], rel=1e-12)


def bernoulli(share: float, num_rows: int, num_seeds: int, seed: int) -> np.ndarray:
    """(S, T, 1): the same draws under every seed."""
    drawn_T = np.random.default_rng(seed).random(num_rows) < share
    return np.broadcast_to(drawn_T[None, :, None], (num_seeds, num_rows, 1)).astype(float)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    found = probe.interval(probe.resample_scores(bernoulli(0.7, 1500, 3, 1), seed=0)[:, 0])
    share = found["mean"]
    assert share == bernoulli(0.7, 1500, 3, 1).mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 1500)
    # The quantile of 1000 resamples is known to about 4 % of the half-width.
    assert share - found["low"] == pytest.approx(half, rel=0.15)
    assert found["high"] - share == pytest.approx(half, rel=0.15)


def test_seeds_that_differ_widen_the_interval():
    same = bernoulli(0.7, 1500, 4, 1)
    moved = np.clip(same - np.array([0.0, 0.2, 0.4, 0.6])[:, None, None], -1, 1)
    widths = []
    for values in (same, moved):
        found = probe.interval(probe.resample_scores(values, seed=0)[:, 0])
        widths.append(found["high"] - found["low"])
    assert widths[1] > 3 * widths[0]


def test_missing_labels_count_in_no_mean():
    values = np.array([[[1.0, np.nan], [0.0, 4.0], [np.nan, 2.0]]])
    np.testing.assert_array_equal(probe.resample_scores(values, seed=0, resamples=5)[0], [0.5, 3.0])


def test_differences_are_paired():
    """Two strategies that err on the same rows differ by exactly nothing, however few rows there are."""
    one = ProbeScores(correct_STA=bernoulli(0.6, 40, 2, 1), nll_STA=bernoulli(0.6, 40, 2, 1))
    better = ProbeScores(correct_STA=one.correct_STA, nll_STA=one.nll_STA - 0.25)
    found = probe.difference(better, one, seed=0)
    assert found["accuracy"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["nll"]["low"] == pytest.approx(-0.25)
    assert found["nll"]["high"] == pytest.approx(-0.25)


def test_the_verdict_ranks_only_what_the_intervals_tell_apart():
    base = bernoulli(0.6, 200, 2, 1)
    noise = np.random.default_rng(2).normal(0, 1, base.shape)
    tested = {
        "none": ProbeScores(correct_STA=base, nll_STA=1 + base),
        "anchor": ProbeScores(correct_STA=base, nll_STA=0.5 + base),
        "realign": ProbeScores(correct_STA=base, nll_STA=0.501 + base + noise - noise.mean()),
    }
    said = probe.verdict(tested, ProbeScores(correct_STA=base, nll_STA=base), ["count"], seed=0)
    assert "images: anchor (" in said
    assert "Not to be told from it here: realign." in said
    assert "none is 0.500 nats behind" in said
    assert "Highest accuracy on real images: none" in said  # all three are equal
    assert said.count("Not to be told") == 2


def test_chance_is_the_most_frequent_class():
    train_NA = np.array([[0]] * 6 + [[1]] * 2 + [[-1]] * 9)
    test_TA = np.array([[0], [1], [1], [-1]])
    found = probe.chance(train_NA, test_TA, [2])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["nll"] == pytest.approx(
        -(np.log(0.7) + 2 * np.log(0.3)) / 3
    )  # (6 + 1) / 10 and (2 + 1) / 10


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([[0], [0], [-1]], [[0]], "have 1 classes of it"),
        ([[0], [1]], [[-1]], "no labelled images have it"),
    ],
)
def test_an_attribute_that_cannot_be_learnt_or_tested_is_refused(train, test, message):
    with pytest.raises(DataError, match=f"attribute count: .*{message}"):
        probe.check_labels(["count"], np.array(train), np.array(test), "texts", "images")
