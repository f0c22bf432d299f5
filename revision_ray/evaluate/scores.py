"""Figures over scored answers: accuracy with its interval, and what single benchmarks report beside it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One scored answer. `groups`: name of a grouping to the group that the question belongs to."""

    id: str
    answer: str
    predicted: str | None
    correct: bool
    groups: dict[str, str]


def wilson(num_correct: int, num: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95 %; (0, 1) where nothing was counted.

    It holds for independent questions; several questions about one image make it a little too narrow.
    """
    if num == 0:
        return 0.0, 1.0
    interval = binomtest(num_correct, num).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy(rows: Iterable[Answered]) -> dict[str, Any]:
    """{"accuracy", "num", "num_unparsed", "interval"} of the rows."""
    rows = list(rows)
    num_correct = sum(row.correct for row in rows)
    return {
        "accuracy": num_correct / len(rows) if rows else 0.0,
        "num": len(rows),
        "num_unparsed": sum(row.predicted is None for row in rows),
        "interval": list(wilson(num_correct, len(rows))),
    }


def by_group(rows: Sequence[Answered], grouping: str) -> dict[str, list[Answered]]:
    """group -> its rows, groups in the order of their names."""
    found: dict[str, list[Answered]] = defaultdict(list)
    for row in rows:
        found[row.groups[grouping]].append(row)
    return dict(sorted(found.items()))


def all_right(rows: Sequence[Answered], *groupings: str) -> float:
    """Share of the units, named by `groupings` together, of which every question was answered right."""
    units: dict[tuple[str, ...], bool] = {}
    for row in rows:
        unit = tuple(row.groups[grouping] for grouping in groupings)
        units[unit] = units.get(unit, True) and row.correct
    return sum(units.values()) / len(units) if units else 0.0


def mean_of_groups(rows: Sequence[Answered], grouping: str) -> float:
    """The mean of the groups' accuracies, each group weighing the same."""
    groups = by_group(rows, grouping).values()
    return sum(sum(row.correct for row in group) / len(group) for group in groups) / len(groups)


def mme(rows: Sequence[Answered]) -> dict[str, Any]:
    """acc+: both questions of an image right; over all, and by category."""
    categories = by_group(rows, "category").items()
    return {
        "acc_plus": all_right(rows, "category", "image"),
        "acc_plus_by_category": {name: all_right(group, "image") for name, group in categories},
    }


def mmstar(rows: Sequence[Answered]) -> dict[str, Any]:
    return {"mean_of_l2_categories": mean_of_groups(rows, "l2_category")}


def pope(rows: Sequence[Answered]) -> dict[str, Any]:
    """F1 of "yes" and the share of "yes" among the answers, over all and by category."""
    return {
        **_yes(rows),
        "by_category": {name: _yes(group) for name, group in by_group(rows, "category").items()},
    }


def _yes(rows: Sequence[Answered]) -> dict[str, float]:
    said = [row for row in rows if row.predicted == "yes"]
    hits = sum(row.correct for row in said)
    true = sum(row.answer == "yes" for row in rows)
    # 2 tp / (2 tp + fp + fn), where an answer that cannot be parsed is a miss.
    f1 = 2 * hits / (len(said) + true) if said or true else 0.0
    return {"f1": f1, "yes_ratio": len(said) / len(rows) if rows else 0.0}


def hallusion_bench(rows: Sequence[Answered]) -> dict[str, Any]:
    """aAcc over questions; fAcc: all questions about a figure right; qAcc: one question, of all figures."""
    unit = ("category", "subcategory", "set")
    return {
        "aAcc": accuracy(rows)["accuracy"],
        "fAcc": all_right(rows, *unit, "figure"),
        "qAcc": all_right(rows, *unit, "question"),
    }


def crpe(rows: Sequence[Answered]) -> dict[str, Any]:
    """circular: a question counts as right only if it is in every order of its options."""
    return {"circular": all_right(rows, "question")}
