"""One figure a study: labelled axes with units, no decoration; the same result gives the same SVG."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from revision_ray.report.plots import rendered

# Told apart by lightness, too (Okabe and Ito's colours).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b"
_DOTS_PER_INCH = 160
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.hashsalt": "revision_ray",
    "svg.fonttype": "path",
}


def files(draw: Callable[[dict[str, Any]], Figure], result: dict[str, Any]) -> dict[str, bytes]:
    """{"png", "svg"}: the files of the figure that `draw`, a study's function below, makes of its result."""
    with matplotlib.rc_context(_STYLE):
        figure = draw(result)
        return {
            "png": rendered(figure, "png", dpi=_DOTS_PER_INCH, facecolor="white"),
            "svg": rendered(figure, "svg", dpi=_DOTS_PER_INCH, facecolor="white"),
        }


def _figure(columns: int = 1, width: float = 5.4, height: float = 3.6, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _numbers_of_rows(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis that names the sizes themselves, as far as they do not run into each other."""
    axes.set_xscale("log")
    axes.margins(x=0.07)
    shown: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not shown or shown[-1] / size > 1.6:
            shown.append(size)
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.set_xticks([], minor=True)


def _plain_decades(axis: Axis) -> None:
    """A logarithmic axis with ticks at 1, 2, 3 and 5 times powers of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def sample_efficiency(result: dict[str, Any]) -> Figure:
    figure, grid = _figure()
    axes = grid[0, 0]
    mean, spread = np.array(result["mean"]), np.array(result["sd"])
    for trial in np.array(result["gaps"]).T:
        axes.plot(result["sizes"], trial, ".", color=_BLUE, alpha=0.3, markersize=4, linewidth=0)
    label = f"{result['strategy']}, mean and s.d. of {len(result['gaps'][0])} trials"
    axes.errorbar(result["sizes"], mean, spread, color=_BLUE, marker="o", capsize=3, label=label)
    if result["expected"]:
        axes.plot(
            result["sizes"],
            result["expected"],
            "--",
            color=_ORANGE,
            label="expected from sampling alone (r.m.s.)",
        )
    axes.axhline(result["floor"], color=_GREY, linestyle=":", label="floor of the held-out rows")
    axes.set_yscale("log")
    _plain_decades(axes.yaxis)
    _numbers_of_rows(axes, result["sizes"])
    axes.set_xlabel("rows of the fit, each side")
    axes.set_ylabel("modality gap of held-out rows\n(Euclidean, unit embeddings)")
    axes.legend()
    return figure


def precision(result: dict[str, Any]) -> Figure:
    figure, grid = _figure()
    axes = grid[0, 0]
    for name, label, colour, mark in (
        ("float32", "float32, row by row", _ORANGE, "o"),
        ("float64", "float64, row by row", _BLUE, "s"),
        ("moments", "this library", _GREEN, "^"),
    ):
        # A logarithmic axis has no zero: an error of none is shown at the resolution of float64.
        values = np.maximum(result[name], np.finfo(np.float64).eps / 16)
        axes.plot(result["sizes"], values, marker=mark, color=colour, label=label)
    axes.set_yscale("log")
    _numbers_of_rows(axes, result["sizes"])
    axes.set(xlabel="rows summed", ylabel="error of the mean\n(Euclidean norm, against an exact sum)")
    axes.legend(loc="center right")
    return figure


def centroid_steps(result: dict[str, Any]) -> Figure:
    figure, grid = _figure()
    axes = grid[0, 0]
    axes.plot(result["steps"], result["gap_on_fit"], marker="o", color=_BLUE, label="rows of the fit")
    axes.plot(result["steps"], result["gap_held_out"], marker="s", color=_ORANGE, label="held-out rows")
    axes.axhline(result["floor"], color=_GREY, linestyle=":", label="floor of the held-out rows")
    axes.set_yscale("log")
    axes.set_xticks(result["steps"])
    axes.set_xlabel("centroid steps after Anchor and Trace")
    axes.set_ylabel("modality gap\n(Euclidean, unit embeddings)")
    axes.legend()
    return figure


def domain_transfer(result: dict[str, Any]) -> Figure:
    names = result["domains"]
    rows = np.array([*result["gap"], result["raw"]])
    size = (2.6 + 1.1 * len(names), 1.6 + 0.6 * len(rows))
    figure, grid = _figure(width=size[0], height=size[1])
    axes = grid[0, 0]
    axes.grid(False)
    image = axes.imshow(np.log10(rows), cmap="Blues", aspect="auto")
    middle = np.log10(rows).mean()
    for (y, x), value in np.ndenumerate(rows):
        colour = "white" if np.log10(value) > middle else "black"
        axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(rows)), [*names, "(no alignment)"])
    axes.axhline(len(names) - 0.5, color="white", linewidth=4)
    axes.set(xlabel="measured on held-out rows of", ylabel="statistics of")
    axes.set_title(f"modality gap after {result['strategy']} (Euclidean; darker is larger)")
    axes.tick_params(length=0)
    image.set_clim(np.log10(rows).min() - 0.3, np.log10(rows).max() + 0.1)
    return figure


def caption_length(result: dict[str, Any]) -> Figure:
    groups = [group for group in (result["bins"], result["stores"]) if group]
    names = ("bins of one store", "stores: " + ", ".join(row["name"] for row in result["stores"]))
    truncated = any(row["truncated"] is not None for row in result["bins"] + result["stores"])
    wanted = [("raw_gap", "raw modality gap\n(Euclidean)"), ("effective_rank", "effective rank"),
              ("trace", "trace")]  # fmt: skip
    probed = any(row["probe"] for row in result["stores"])
    wanted += [("truncated", "cut off by the encoder\n(% of texts)")] if truncated else []
    panels = len(wanted) + probed
    figure, grid = _figure(columns=panels, width=2.3 * panels, height=3.3)
    for axes, (key, label) in zip(grid[0], wanted, strict=False):
        for rows, colour, name in zip(groups, (_BLUE, _ORANGE), names, strict=False):
            scale = 100.0 if key == "truncated" else 1.0
            known = [row for row in rows if row[key] is not None]
            x, y = [row["mean_words"] for row in known], [scale * row[key] for row in known]
            errors = [row["raw_gap_standard_error"] or 0.0 for row in known] if key == "raw_gap" else None
            axes.errorbar(x, y, errors, marker="o", color=colour, capsize=2, label=name)
        axes.set_ylabel(label)
        axes.margins(x=0.1, y=0.15)
    if probed:
        _probed_stores(grid[0, -1], [row for row in result["stores"] if row["probe"]])
    for axes in grid[0]:
        axes.set_xlabel("words (mean)")
    if len(groups) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _with_intervals(
    axes: Axes, x: Sequence[float], found: Sequence[dict[str, float]], scale: float = 1, capsize: int = 3
) -> None:
    means, lows, highs = (np.array([scale * each[end] for each in found]) for end in ("mean", "low", "high"))
    axes.errorbar(x, means, [means - lows, highs - means], marker="o", color=_ORANGE, capsize=capsize)


def _probed_stores(axes: Axes, stores: Sequence[dict[str, Any]]) -> None:
    found = [row["probe"]["accuracy"] for row in stores]
    _with_intervals(axes, [row["mean_words"] for row in stores], found, scale=100, capsize=2)
    axes.set_ylabel("probe on real images:\naccuracy (%)")
    axes.margins(x=0.1, y=0.15)


def c3_sigma(result: dict[str, Any]) -> Figure:
    wanted = [
        ("gap", "modality gap of held-out rows\n(Euclidean)", 1.0, None),
        ("alpha", "spectrum exponent alpha", 1.0, ("images", result["image_alpha"])),
        ("mixing_rate", f"kNN mixing rate (%), k = {result['k']}", 100.0, None),
    ]
    figure, grid = _figure(columns=2, rows=2, width=6.6, height=5.2)
    for axes, (key, label, scale, line) in zip(grid.flat, wanted, strict=False):
        axes.plot(result["lengths"], scale * np.array(result[key]), marker="o", color=_BLUE)
        if line:
            axes.axhline(line[1], color=_GREY, linestyle=":", label=line[0])
            axes.legend()
        axes.set_ylabel(label)
    last = grid.flat[3]
    if result["probe"]:
        _with_intervals(last, result["lengths"], [probed["nll"] for probed in result["probe"]])
        last.set_ylabel("probe on real images:\nnegative log-likelihood (nats)")
    else:
        last.set_axis_off()
        last.text(0.5, 0.5, "no labels, no probe", ha="center", color=_GREY)
    for axes in grid.flat:
        axes.set_xlabel("length of the noise, sigma sqrt(d)")
    return figure


def probe(result: dict[str, Any]) -> Figure:
    named = sorted(result["strategies"].items(), key=lambda item: -item[1]["nll"]["mean"])
    named.append(("images (upper bound)", result["upper_bound"]))
    figure, grid = _figure(columns=2, width=7.4, height=1.3 + 0.3 * len(named))
    for axes, (key, label) in zip(
        grid[0],
        (
            ("nll", "negative log-likelihood on real images (nats)"),
            ("accuracy", "accuracy on real images (%)"),
        ),
        strict=True,
    ):
        scale = 100.0 if key == "accuracy" else 1.0
        for place, (name, found) in enumerate(named):
            middle, low, high = (scale * found[key][part] for part in ("mean", "low", "high"))
            colour = _GREY if name.startswith("images (") else _BLUE
            axes.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], marker="o", color=colour, capsize=3
            )
            if key == "nll":
                best = min(each["nll"] for each in found["by_penalty"])
                axes.plot(best, place, "|", color=_ORANGE, markersize=9, markeredgewidth=1.5)
        axes.set_xlabel(label)
        if key == "nll":
            axes.set_xscale("log")
            _plain_decades(axes.xaxis)
        axes.set_yticks(range(len(named)), [name for name, _ in named] if key == "nll" else [])
        axes.set_ylim(-0.6, len(named) - 0.4)
    grid[0, 0].set_ylabel("head trained on")
    for look, colour, label in (
        ("o", _BLUE, "penalty chosen on held-out text, 95 % interval"),
        ("|", _ORANGE, "penalty chosen in hindsight on the images"),
    ):
        grid[0, 0].plot([], [], look, color=colour, markeredgewidth=1.5, label=label)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
