"""Compute the results of the answers for results.json, and format them as a table."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from revision_ray.evaluate import scores
from revision_ray.evaluate.ask import answers_path
from revision_ray.evaluate.benchmarks import benchmark, read_parquet
from revision_ray.evaluate.prepare import PreparedBenchmark
from revision_ray.evaluate.scores import Answered

FORMAT_VERSION = 1


def results(
    output: str, prepared: Mapping[str, PreparedBenchmark], conditions: Sequence[str]
) -> dict[str, Any]:
    """Return the figures of every benchmark below `output`: by condition, over all questions and by group.

    `average` is the mean of the benchmarks' accuracies, with equal weights (the paper's headline figure);
    variants of one benchmark count as one.
    """
    benchmarks = {}
    for name, asked in prepared.items():
        rows = {condition: _answered(answers_path(output, name, condition)) for condition in conditions}
        benchmarks[name] = {**_figures(name, rows), "left_out": asked.left_out}
    average = {condition: _average(benchmarks, condition) for condition in conditions}
    return {"format_version": FORMAT_VERSION, "benchmarks": benchmarks, "average": average}


def _average(benchmarks: Mapping[str, Any], condition: str) -> float:
    families: dict[str, list[float]] = {}
    for name, found in benchmarks.items():
        family = benchmark(name).family or name
        families.setdefault(family, []).append(found["conditions"][condition]["accuracy"])
    return mean(mean(variants) for variants in families.values())


def _answered(uri: str) -> list[Answered]:
    names = [field for field in Answered.__dataclass_fields__ if field != "groups"]
    return [
        Answered(groups=json.loads(row["groups"]), **{name: row[name] for name in names})
        for row in read_parquet(uri).to_pylist()
    ]


def _figures(name: str, rows: dict[str, list[Answered]]) -> dict[str, Any]:
    spec = benchmark(name)
    groups: dict[str, dict[str, Any]] = {}
    for grouping in spec.shown:
        parted = {condition: scores.by_group(answered, grouping) for condition, answered in rows.items()}
        names = list(parted["image"])
        if names != [""]:  # a column that these files lack
            groups[grouping] = {
                group: {condition: scores.accuracy(parted[condition][group]) for condition in rows}
                for group in names
            }
    return {
        "conditions": {condition: scores.accuracy(answered) for condition, answered in rows.items()},
        "groups": groups,
        "metrics": {c: spec.metrics(answered) for c, answered in rows.items()} if spec.metrics else {},
    }


def table(found: Mapping[str, Any], conditions: Sequence[str]) -> str:
    """Return one line per benchmark and group: accuracy in per cent and interval, under each condition."""
    lines = []
    for name, figures in found["benchmarks"].items():
        lines.append((name, figures["conditions"]))
        for grouping, groups in figures["groups"].items():
            several = len(figures["groups"]) > 1
            lines += [(f"  {grouping + ' ' if several else ''}{group}", by) for group, by in groups.items()]
    width = max(len("accuracy, %"), *(len(label) for label, _ in lines)) + 2
    heads = "".join(f"{condition:>10}{'95 % interval':>16}" for condition in conditions)
    out = [f"{'accuracy, %':<{width}}{'questions':>9}{heads}"]
    for label, by in lines:
        cells = "".join(_cell(by[condition]) for condition in conditions)
        out.append(f"{label:<{width}}{by['image']['num']:>9,}{cells}")
    if len(found["benchmarks"]) > 1:
        means = "".join(f"{100 * found['average'][condition]:>10.1f}{'':>16}" for condition in conditions)
        out.append(f"{'average':<{width}}{'':>9}{means}")
    for name, figures in found["benchmarks"].items():
        out += [f"{name}: {_metrics(figures['metrics']['image'])}"] if figures["metrics"] else []
        unparsed = [f"{figures['conditions'][each]['num_unparsed']} {each}" for each in conditions]
        if any(figures["conditions"][each]["num_unparsed"] for each in conditions):
            out.append(f"{name}: answers that could not be parsed and count as wrong: {', '.join(unparsed)}")
        for reason, count in figures["left_out"].items():
            out.append(f"{name}: {count} rows left out ({reason})")
    return "\n".join(out)


def _cell(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{100 * figures['accuracy']:>10.1f}{f'[{100 * low:.1f}, {100 * high:.1f}]':>16}"


def _metrics(found: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in plain.items())
