"""Compare the answers of two runs, or of two conditions of one run, with paired tests. Does not use Ray.

Shapes: N questions, C clusters (images).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, permutation_test

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.evaluate.answers import RULES, judge
from revision_ray.evaluate.ask import answers_path
from revision_ray.evaluate.benchmarks import read_parquet
from revision_ray.evaluate.prepare import load_questions

FORMAT_VERSION = 1
_CONDITIONS = ("image", "blind", "shuffled")
_RESAMPLES = 9999
_BATCH_ENTRIES = 4_000_000  # largest matrix of resamples, to bound memory


@dataclass(frozen=True, kw_only=True)
class JudgedRun:
    """The answers of one run to a benchmark under one condition, judged by today's rules."""

    where: str
    asked: dict[str, tuple[str, str, str]]
    """Prompt, true answers and image of every question, by its id."""
    correct: dict[str, bool]
    num_unparsed: int


def compare(runs: Sequence[str], benchmarks: Sequence[str], output: str, seed: int) -> str:
    """Compare one or two evaluate outputs, write `comparison.json` below `output`, and return a table.

    Two runs are compared under every condition that both have, and the conditions of each run with each
    other. `benchmarks` limits the comparison to these names; if empty, all common benchmarks are compared.

    Raises:
        ConfigError: no run, or more than two.
        DataError: a run holds no answers, the runs have no benchmark in common, they asked different
            questions, or answers lack the image that they are about.
    """
    if not 1 <= len(runs) <= 2:
        raise ConfigError(f"compare names {len(runs)} runs; expected one or two outputs of jobs/evaluate.py")
    runs = [storage.absolute(run) for run in runs]
    held = [_benchmarks(run) for run in runs]
    common = [name for name in held[0] if all(name in other for other in held)]
    chosen = [name for name in common if not benchmarks or name in benchmarks]
    if not chosen:
        told = "; ".join(f"{run} holds {', '.join(names)}" for run, names in zip(runs, held, strict=True))
        asked_for = f"; asked for were {', '.join(benchmarks)}" if benchmarks else ""
        raise DataError(f"no benchmark to compare: {told}{asked_for}")
    left_out = {
        run: [name for name in names if name not in common] for run, names in zip(runs, held, strict=True)
    }
    comparisons: list[dict[str, Any]] = []
    skipped: list[str] = []
    for name in chosen:
        answers = [_judged(run, name) for run in runs]
        for condition in _CONDITIONS if len(runs) > 1 else ():
            having = [condition in judged for judged in answers]
            if all(having):
                sides = {"benchmark": name, "first": condition, "second": condition, "runs": [1, 2]}
                comparisons.append({**sides, **paired(answers[0][condition], answers[1][condition], seed)})
            elif any(having):
                skipped.append(f"{name} {condition}, which only run {having.index(True) + 1} holds")
        for number, judged in enumerate(answers, 1):
            for first, second in combinations(judged, 2):
                sides = {"benchmark": name, "first": first, "second": second, "runs": [number, number]}
                comparisons.append({**sides, **paired(judged[first], judged[second], seed)})
    if not comparisons:
        raise DataError(f"nothing to compare: {', '.join(runs)}: no condition twice, and no two conditions")
    report = {
        "format_version": FORMAT_VERSION,
        "rules": RULES,
        "runs": runs,
        "comparisons": comparisons,
        "skipped": skipped,
        "only_in_one_run": left_out,
    }
    path = storage.join(storage.absolute(output), "comparison.json")
    storage.write_json(path, report)
    return f"{table(report)}\n\nComparison: {path}"


def _benchmarks(run: str) -> list[str]:
    root = storage.join(run, "answers")
    files = [file for file, _ in storage.list_files(root, recursive=True)] if storage.exists(root) else []
    names = {storage.name_of(storage.parent_of(file)) for file in files if file.endswith(".parquet")}
    if not names:
        raise DataError(f"{run}: holds no answers; name the output of a run of jobs/evaluate.py")
    return sorted(names)


def _judged(run: str, name: str) -> dict[str, JudgedRun]:
    """Read the answers of a run to a benchmark and judge them; return them by condition."""
    questions = {question.id: question for question in load_questions(run, name)}
    found = {}
    for condition in _CONDITIONS:
        path = answers_path(run, name, condition)
        if not storage.exists(path):
            continue
        rows = read_parquet(path)
        if "image" not in rows.column_names or rows.column("image").null_count:
            raise DataError(
                f"{path}: does not say which image each answer is about, so that answers about one image "
                "cannot be kept together; evaluate again into another output"
            )
        asked, correct, num_unparsed = {}, {}, 0
        for row in rows.to_pylist():
            question = questions.get(row["id"])
            if question is None:
                raise DataError(f"{path}: answers {row['id']}, which is not among the questions of the run")
            verdict = judge(question.scoring, row["raw"], question.answers,
                            letters=question.letters, options=question.options)  # fmt: skip
            asked[row["id"]] = (row["prompt"], " | ".join(question.answers), row["image"])
            correct[row["id"]] = verdict.correct
            num_unparsed += verdict.predicted is None
        found[condition] = JudgedRun(where=path, asked=asked, correct=correct, num_unparsed=num_unparsed)
    return found


def paired(first: JudgedRun, second: JudgedRun, seed: int) -> dict[str, Any]:
    """Return the difference in accuracy, first minus second, with its interval and tests.

    McNemar's exact test assumes independent questions. Questions about the same image are not independent;
    then trust the interval (percentile bootstrap over images) and `sign_flip_p` (a permutation test that
    swaps the two sides of all questions of an image together). Both are None if there is only one image.

    Raises:
        DataError: the two sides asked different questions.
    """
    _check_same(first, second)
    ids = sorted(first.asked)
    first_N = np.array([first.correct[each] for each in ids], np.int64)
    second_N = np.array([second.correct[each] for each in ids], np.int64)
    _, cluster_N = np.unique([first.asked[each][2] for each in ids], return_inverse=True)
    only_first, only_second = int(np.sum(first_N > second_N)), int(np.sum(first_N < second_N))
    discordant = only_first + only_second
    first_C, second_C = np.bincount(cluster_N, first_N), np.bincount(cluster_N, second_N)
    sizes_C = np.bincount(cluster_N)
    return {
        "num": len(ids),
        "num_images": len(sizes_C),
        "accuracy": [float(first_N.mean()), float(second_N.mean())],
        "num_unparsed": [first.num_unparsed, second.num_unparsed],
        "difference": float(first_N.mean() - second_N.mean()),
        "interval": _interval(first_C - second_C, sizes_C, seed),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        "sign_flip_p": _sign_flip(first_C, second_C, seed),
    }


def _check_same(first: JudgedRun, second: JudgedRun) -> None:
    missing = [
        sorted(one.asked.keys() - other.asked.keys()) for one, other in ((first, second), (second, first))
    ]
    if any(missing):
        told = "; ".join(
            f"{len(ids)} only in {side.where} (such as {ids[0]})"
            for side, ids in zip((first, second), missing, strict=True)
            if ids
        )
        raise DataError(
            f"different questions were asked: {told}; evaluate both with the same data, max_items and seed"
        )
    for each, asked in first.asked.items():
        for what, one, other in zip(
            ("prompt", "true answer", "image"), asked, second.asked[each], strict=True
        ):
            if one != other:
                raise DataError(
                    f"question {each} has another {what} in {first.where} ({one[:80]!r}) than in "
                    f"{second.where} ({other[:80]!r}); evaluate both with the same data"
                )


def _interval(differences_C: np.ndarray, sizes_C: np.ndarray, seed: int) -> list[float] | None:
    if len(sizes_C) < 2:
        return None
    found = bootstrap(
        (differences_C, sizes_C),
        lambda sums, sizes, axis=-1: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_ENTRIES // len(sizes_C)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def _sign_flip(first_C: np.ndarray, second_C: np.ndarray, seed: int) -> float | None:
    if len(first_C) < 2:
        return None
    differing = first_C != second_C  # swapping equal sides changes nothing
    if differing.sum() < 2:
        return 1.0
    found = permutation_test(
        (first_C[differing], second_C[differing]),
        lambda one, other, axis=-1: (one - other).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_ENTRIES // int(differing.sum())),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def table(report: dict[str, Any]) -> str:
    """Return the comparisons as text: accuracies and difference in per cent, the interval, both tests."""
    lines = [f"run {number}: {run}" for number, run in enumerate(report["runs"], 1)]
    labels = [" ".join(_label(each)) for each in report["comparisons"]]
    width = max(map(len, labels)) + 2
    heads = f"{'questions':>9}{'images':>8}{'first':>7}{'second':>8}{'difference':>12}"
    tests = f"{'95 % interval':>16}{'McNemar p':>11}{'by image p':>12}"
    lines += ["", f"{'accuracy, %':<{width}}{heads}{tests}"]
    for label, each in zip(labels, report["comparisons"], strict=True):
        first, second = (100 * accuracy for accuracy in each["accuracy"])
        ends = each["interval"]
        interval = f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "-"
        by_image = "-" if each["sign_flip_p"] is None else f"{each['sign_flip_p']:.4f}"
        lines.append(
            f"{label:<{width}}{each['num']:>9,}{each['num_images']:>8,}{first:>7.1f}{second:>8.1f}"
            f"{100 * each['difference']:>+12.1f}{interval:>16}{each['mcnemar_p']:>11.4f}{by_image:>12}"
        )
    lines += list(_notes(report))
    return "\n".join(lines)


def _label(comparison: dict[str, Any]) -> tuple[str, str, str]:
    first, second = comparison["runs"]
    if first != second:
        return comparison["benchmark"], comparison["first"], "run 1 - run 2"
    return comparison["benchmark"], f"{comparison['first']} - {comparison['second']}", f"run {first}"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    if any(each["num_images"] < each["num"] for each in report["comparisons"]):
        yield ""
        yield "Questions share images, which McNemar's test takes for independent: trust the interval and the"
        yield "p by image."
    for each in report["comparisons"]:
        if any(each["num_unparsed"]):
            counts = " and ".join(map(str, each["num_unparsed"]))
            yield f"{' '.join(_label(each))}: {counts} answers could not be parsed and count as wrong"
    for entry in report["skipped"]:
        yield f"not compared: {entry}"
    for run, names in report["only_in_one_run"].items():
        if names:
            yield f"not compared: {', '.join(names)}, which only {run} holds"
