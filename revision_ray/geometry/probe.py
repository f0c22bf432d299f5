"""The cross-modal probe: a linear head learns attributes from aligned text and is tested on real images.

Distances between distributions do not show which strategy serves a model that is trained on text and then
sees images; a few logistic regressions do. Accuracy shows whether the classes stay apart across the gap, the
negative log-likelihood (nats) whether the head's confidence carries over as well.
studies/cross_modal_probe.py calls this.

Shapes: N training rows, T test rows, D embedding dim, C classes, A attributes, P penalties,
S seeds, R resamples.
Labels are indices of an attribute's classes, -1 if a row has no label of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
from scipy.special import log_softmax

from revision_ray.core.errors import DataError

# Strengths of the penalty on the weights, strong to weak.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_VALIDATION_SHARE = 0.2
_MAX_ITERATIONS = 500
_RESAMPLES = 1000
_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class LogisticHead:
    """Multinomial logistic regression: logits are (x - centre) sqrt(D) W + b."""

    centre_D: np.ndarray
    weights_DC: np.ndarray
    bias_C: np.ndarray

    def log_probabilities(self, rows_ND: np.ndarray) -> np.ndarray:
        """Return log probabilities (N, C) of the classes."""
        inputs_ND = _scaled(rows_ND, self.centre_D)
        return log_softmax(inputs_ND @ self.weights_DC + self.bias_C, axis=1)


def _scaled(rows_ND: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    # Entries near one, so that one penalty means the same in every dimension.
    return (rows_ND.astype(np.float64) - centre_D) * math.sqrt(rows_ND.shape[1])


def train_head(
    rows_ND: np.ndarray,
    labels_N: np.ndarray,
    num_classes: int,
    penalty: float,
    start: LogisticHead | None = None,
) -> LogisticHead:
    """Fit the head that minimises mean negative log-likelihood + penalty / 2 * |W|^2; the minimum is unique.

    Rows are centred on their own mean, which only eases the search (the bias is not penalised). `start` is a
    head of the same rows to begin from.
    """
    dim = rows_ND.shape[1]
    centre_D = rows_ND.astype(np.float64).mean(0)
    inputs_ND = _scaled(rows_ND, centre_D)
    truth_NC = np.eye(num_classes)[labels_N]
    begin = np.zeros((dim + 1, num_classes))
    if start is not None:
        begin = np.vstack([start.weights_DC, start.bias_C])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        both = flat.reshape(dim + 1, num_classes)
        log_NC = log_softmax(inputs_ND @ both[:-1] + both[-1], axis=1)
        error_NC = (np.exp(log_NC) - truth_NC) / len(inputs_ND)
        value = -np.vdot(log_NC, truth_NC) / len(inputs_ND) + penalty / 2 * np.vdot(both[:-1], both[:-1])
        slope = np.vstack([inputs_ND.T @ error_NC + penalty * both[:-1], error_NC.sum(0)])
        return float(value), slope.ravel()

    minimum = scipy.optimize.minimize(
        loss, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _MAX_ITERATIONS, "gtol": 1e-5}
    )
    both = minimum.x.reshape(dim + 1, num_classes)
    return LogisticHead(centre_D=centre_D, weights_DC=both[:-1], bias_C=both[-1])


def heads(
    rows_ND: np.ndarray, labels_N: np.ndarray, num_classes: int, seed: int
) -> tuple[list[LogisticHead], int]:
    """Train a head for each of `PENALTIES` on 80 % of the rows; return the heads and the index of the best.

    The best has the lowest nll on the other 20 %: training on text has nothing else to choose by.
    """
    order_N = np.random.default_rng(seed).permutation(len(rows_ND))
    num_held = max(1, int(len(rows_ND) * _VALIDATION_SHARE))
    held_N, rest_N = order_N[:num_held], order_N[num_held:]
    trained: list[LogisticHead] = []
    for penalty in PENALTIES:
        start = trained[-1] if trained else None
        trained.append(train_head(rows_ND[rest_N], labels_N[rest_N], num_classes, penalty, start))
    losses = [nll(head.log_probabilities(rows_ND[held_N]), labels_N[held_N]).mean() for head in trained]
    return trained, int(np.argmin(losses))


def nll(log_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood (N,) of the true class, in nats."""
    return -np.take_along_axis(log_NC, labels_N[:, None], axis=1)[:, 0]


def scores(
    train_ND: np.ndarray,
    train_NA: np.ndarray,
    test_TD: np.ndarray,
    test_TA: np.ndarray,
    num_classes: Sequence[int],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Train one head an attribute and score the test rows.

    Returns (correct, nll), each (1 + P, T, A), NaN if a test row has no label: first of the chosen head, then
    of the heads of each penalty.
    """
    correct_PTA, nll_PTA = np.full((2, 1 + len(PENALTIES), *test_TA.shape), np.nan)
    for attribute, classes in enumerate(num_classes):
        known_N = train_NA[:, attribute] >= 0
        trained, chosen = heads(train_ND[known_N], train_NA[known_N, attribute], classes, seed)
        labelled_T = test_TA[:, attribute] >= 0
        truth = test_TA[labelled_T, attribute]
        for place, head in enumerate([trained[chosen], *trained]):
            log_TC = head.log_probabilities(test_TD[labelled_T])
            correct_PTA[place, labelled_T, attribute] = log_TC.argmax(1) == truth
            nll_PTA[place, labelled_T, attribute] = nll(log_TC, truth)
    return correct_PTA, nll_PTA


def chance(train_NA: np.ndarray, test_TA: np.ndarray, num_classes: Sequence[int]) -> dict[str, float]:
    """Return accuracy and nll of predicting the training labels' frequencies, means over the attributes."""
    accuracies, losses = [], []
    for attribute, classes in enumerate(num_classes):
        labels = train_NA[:, attribute]
        counts_C = np.bincount(labels[labels >= 0], minlength=classes) + 1.0  # no class is impossible
        truth = test_TA[test_TA[:, attribute] >= 0, attribute]
        accuracies.append(float((truth == counts_C.argmax()).mean()))
        losses.append(float(-np.log(counts_C / counts_C.sum())[truth].mean()))
    return {"accuracy": float(np.mean(accuracies)), "nll": float(np.mean(losses))}


def check_labels(
    attributes: Sequence[str], train_NA: np.ndarray, test_TA: np.ndarray, train: str, test: str
) -> None:
    """Check that every attribute has two or more classes to learn from, and test rows.

    Raises:
        DataError: one of them does not.
    """
    for place, name in enumerate(attributes):
        learnt = np.unique(train_NA[train_NA[:, place] >= 0, place])
        if len(learnt) < 2:
            raise DataError(
                f"attribute {name}: the labelled {train} have {len(learnt)} classes of it, expected 2 or "
                "more; label more rows, or name the attributes to probe in probe.attributes"
            )
        if not (test_TA[:, place] >= 0).any():
            raise DataError(
                f"attribute {name}: no labelled {test} have it; label some, or leave it out of "
                "probe.attributes"
            )


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Scores of each test row under each seed, NaN if it has no label."""

    correct_STA: np.ndarray
    nll_STA: np.ndarray
    by_penalty: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def of(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> "ProbeScores":
        """Collect the results of `scores` of each seed."""
        correct_SPTA, nll_SPTA = (np.stack(parts) for parts in zip(*seeds, strict=True))
        by_penalty = [
            {
                "penalty": penalty,
                "accuracy": float(np.nanmean(correct_SPTA[:, place], axis=(0, 1)).mean()),
                "nll": float(np.nanmean(nll_SPTA[:, place], axis=(0, 1)).mean()),
            }
            for place, penalty in enumerate(PENALTIES, 1)
        ]
        return ProbeScores(correct_STA=correct_SPTA[:, 0], nll_STA=nll_SPTA[:, 0], by_penalty=by_penalty)


def resample_scores(values_STA: np.ndarray, seed: int, resamples: int = _RESAMPLES) -> np.ndarray:
    """Return means (R + 1, A) over seeds and test rows: first as measured, then of R resamples of both.

    The same `seed` draws the same rows and seeds, so differences between two strategies are paired.
    """
    num_seeds, num_rows, _ = values_STA.shape
    generator = np.random.default_rng(seed)
    seeds_RS = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), resamples)
    rows_RT = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), resamples)
    weights_RS = np.vstack([np.ones(num_seeds), seeds_RS]) / num_seeds
    weights_RT = np.vstack([np.ones(num_rows), rows_RT]).astype(np.float64)
    known_TA = ~np.isnan(values_STA[0])
    filled_STA = np.nan_to_num(values_STA)
    sums_SRA = weights_RT @ filled_STA
    means_RA = np.einsum("rs,sra->ra", weights_RS, sums_SRA)
    # An attribute without a row in a resample has no mean there.
    with np.errstate(invalid="ignore"):
        return means_RA / (weights_RT @ known_TA)


def interval(values_R: np.ndarray) -> dict[str, float]:
    """Return {"mean", "low", "high"}: the measured value (the first) and the central 95 % of the others."""
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.nanpercentile(values_R[1:], [tail, 100 - tail])
    return {"mean": float(values_R[0]), "low": float(low), "high": float(high)}


def summary(scored: ProbeScores, attributes: Sequence[str], seed: int) -> dict[str, Any]:
    """Return accuracy and nll with intervals, over all attributes and of each, and the means of each seed."""
    accuracy_RA = resample_scores(scored.correct_STA, seed)
    nll_RA = resample_scores(scored.nll_STA, seed)
    by_seed = [
        {
            "accuracy": float(np.nanmean(correct_TA, axis=0).mean()),
            "nll": float(np.nanmean(nll_TA, axis=0).mean()),
        }
        for correct_TA, nll_TA in zip(scored.correct_STA, scored.nll_STA, strict=True)
    ]
    return {
        "accuracy": interval(accuracy_RA.mean(1)),
        "nll": interval(nll_RA.mean(1)),
        "per_attribute": {
            name: {"accuracy": interval(accuracy_RA[:, place]), "nll": interval(nll_RA[:, place])}
            for place, name in enumerate(attributes)
        },
        "seeds": by_seed,
        "by_penalty": scored.by_penalty,
    }


def difference(one: ProbeScores, other: ProbeScores, seed: int) -> dict[str, dict[str, float]]:
    """Return {"accuracy", "nll"} of `one` minus `other` on the same rows and seeds, means over attributes."""
    return {
        name: interval((resample_scores(a, seed) - resample_scores(b, seed)).mean(1))
        for name, a, b in (
            ("accuracy", one.correct_STA, other.correct_STA),
            ("nll", one.nll_STA, other.nll_STA),
        )
    }


def best_penalty(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the penalty with the lowest nll on real images, which text alone cannot tell."""
    return min(figures["by_penalty"], key=lambda each: each["nll"])


def verdict(
    tested: Mapping[str, ProbeScores], upper_bound: ProbeScores, attributes: Sequence[str], seed: int
) -> str:
    """Say which strategy to trust on these data, and which ones cannot be told from it."""
    summaries = {name: summary(scored, attributes, seed) for name, scored in tested.items()}
    sentences = []
    for figure, best_of, what, form in (
        ("nll", min, "negative log-likelihood of real images", "{:.3f} nats"),
        ("accuracy", max, "accuracy on real images", "{:.3f}"),
    ):
        means = {name: figures[figure]["mean"] for name, figures in summaries.items()}
        best = best_of(means, key=lambda name: means[name])
        against = {
            name: difference(scored, tested[best], seed)[figure]
            for name, scored in tested.items()
            if name != best
        }
        close = [name for name, diff in against.items() if diff["low"] <= 0 <= diff["high"]]
        word = "Lowest" if best_of is min else "Highest"
        sentences.append(f"{word} {what}: {best} ({form.format(means[best])}).")
        if close:
            sentences.append(f"Not to be told from it here: {', '.join(close)}.")
        if "none" in against and "none" not in close:
            sentences.append(f"Against it, none is {form.format(abs(against['none']['mean']))} behind.")
    if all(figures["by_penalty"] for figures in summaries.values()):
        hindsight = {name: best_penalty(figures)["nll"] for name, figures in summaries.items()}
        best = min(hindsight, key=lambda name: hindsight[name])
        spread = max(hindsight.values()) - hindsight[best]
        sentences.append(
            f"With the penalty that suits the real images best, which text cannot tell, {best} leads with "
            f"{hindsight[best]:.3f} nats and the others are at most {spread:.3f} behind; what they lose "
            "beyond that is confidence that does not carry over."
        )
    limit = summary(upper_bound, attributes, seed)
    sentences.append(
        f"Heads trained on images themselves reach {limit['nll']['mean']:.3f} nats and "
        f"{limit['accuracy']['mean']:.3f}."
    )
    return " ".join(sentences)
