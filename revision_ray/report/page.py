"""The report as one HTML file that loads nothing from elsewhere."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from revision_ray.report import claims, plots
from revision_ray.report.metrics import ANISO_PAPER, IMAGE, REALIGN_PAPER, SECTIONS, Metric, quoted, shown
from revision_ray.report.plots import ReportFigure

TEMPLATE = "page.html"


def render(document: Mapping[str, Any], figures: Sequence[ReportFigure], first: ReportFigure | None) -> str:
    """Render the page of a report; `first` is the small figure on its first screen."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = environment.from_string(files("revision_ray.report").joinpath(TEMPLATE).read_text("utf-8"))
    strategies = document["strategies"]
    looks = plots.styles([(entry["label"], entry["strategy"]) for entry in strategies])
    return template.render(
        report=document,
        colours=Markup(plots.css()),
        columns=[
            {"label": entry["label"], "colour": looks[entry["label"]].name, "held_out": entry["held_out"]}
            for entry in strategies
        ],
        tables=[
            _table(document, section.title, section.explanation, section.metrics) for section in SECTIONS
        ],
        first=None
        if first is None
        else {"figure": first, "svgs": [Markup(svg) for svg in plots.svgs(first)]},
        figures=[
            {"figure": figure, "svgs": [Markup(svg) for svg in plots.svgs(figure)]} for figure in figures
        ],
        claims=[{**row, "ours": _typeset(claims.text_of(row["figures"]))} for row in document["claims"]],
        tally=_tally(document["claims"]),
        elsewhere=claims.ELSEWHERE,
        studies=claims.STUDIES,
        papers=(REALIGN_PAPER, ANISO_PAPER),
        shown=shown,
    )


def _table(
    document: Mapping[str, Any], title: str, explanation: str, metrics: Sequence[Metric]
) -> dict[str, Any]:
    columns = [(IMAGE, document["image"]["figures"])]
    columns += [(entry["strategy"], entry["figures"]) for entry in document["strategies"]]
    rows = [
        {
            "metric": metric,
            "symbol": _typeset(metric.symbol),
            "stated": _stated(metric, [figures for _, figures in columns[1:]]),
            "cells": [_cell(metric, name, figures) for name, figures in columns],
        }
        for metric in metrics
    ]
    # The images have a column only in tables with figures of them.
    with_image = any(row["cells"][0]["value"] for row in rows)
    if not with_image:
        for row in rows:
            row["cells"] = row["cells"][1:]
    return {"title": title, "explanation": explanation, "rows": rows, "with_image": with_image}


def _cell(metric: Metric, name: str, figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a cell: figure, interval, the paper's value, and a tooltip (`more`)."""
    measured = figures.get(metric.key)
    paper = metric.paper.get(name)
    texts = {"value": "", "interval": "", "more": "", "missing": "", "paper": ""}
    texts["paper"] = "" if paper is None else quoted(paper, metric.percent)
    if measured is None:
        return texts
    if measured["value"] is None:
        note = measured.get("note", "")
        instead = {"value": "∞"} if note == "infinite" else {"missing": _short(note)}
        return {**texts, **instead, "more": note}
    texts["value"] = shown(measured["value"], metric.percent)
    if "low" in measured:
        low, high = (shown(measured[end], metric.percent).removesuffix(" %") for end in ("low", "high"))
        texts["interval"] = f"{low} to {high}"
    texts["more"] = _conditions(measured, metric.percent)
    return texts


def _conditions(cell: Mapping[str, Any], percent: bool) -> str:
    """Write the conditions of a figure, such as "n = 2,000, k = 20, by chance 50.0 %"."""
    parts = []
    for key, value in cell.items():
        if key in ("value", "low", "high", "note"):
            continue
        if key == "by_chance":
            parts.append(f"by chance {shown(value, percent)}")
        else:
            name = {"num_images": "images", "num_cosines": "cosines", "of": "dimensions"}.get(key, key)
            parts.append(f"{name} = {shown(value)}")
    return ", ".join(parts)


def _stated(metric: Metric, columns: Sequence[Mapping[str, Any]]) -> str:
    """Write the conditions that all columns share."""
    cells = [
        figures[metric.key] for figures in columns if figures.get(metric.key, {}).get("value") is not None
    ]
    if not cells:
        return ""
    shared = {k: v for k, v in cells[0].items() if all(cell.get(k) == v for cell in cells)}
    return _conditions(shared, metric.percent)


def _typeset(symbol: str) -> Markup:
    """Set index and exponent of a symbol such as "M_k^Z" in HTML."""
    indexed = re.sub(r"_(\w+?)(?=\^|\b)", r"<sub>\1</sub>", str(escape(symbol)))
    return Markup(re.sub(r"\^(\w+)", r"<sup>\1</sup>", indexed))


def _short(note: str) -> str:
    if note.startswith("needs paired"):
        return "needs pairs"
    return "n/a"


def _tally(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    words = [row["supported"] for row in rows]
    return {word: words.count(word) for word in ("yes", "partly", "no", "cannot be told")}
