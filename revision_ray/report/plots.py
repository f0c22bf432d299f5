"""The plot style of reports, studies and the training monitor: colours, panels, SVG and PNG files.

Each strategy has one colour, distinct to colour-blind readers. Nothing depends on colour alone: curves
differ in dashes, points in markers, rows have names. A figure of the report is a row of panels. On the page
each panel is an inline SVG, so that a narrow screen stacks them and text stays text.

Everything is drawn once, in the colours for light ground. In the page's SVG each of these colours becomes a
CSS variable, which has another value on dark ground.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from revision_ray.report.metrics import quoted

BLUE, ORANGE, GREEN, RED = "#1b4f99", "#c2600a", "#0b7358", "#c02f26"


@dataclass(frozen=True)
class CurveStyle:
    """How one curve looks. Styles of one light colour have one dark colour."""

    name: str
    light: str
    dark: str
    dash: str | tuple = "-"
    marker: str = "o"


INK = CurveStyle("ink", "#18212b", "#e8edf2")
SOFT = CurveStyle("soft", "#55626f", "#a3b0bd")
LINE = CurveStyle("line", "#d9dfe5", "#2f3a45")
IMAGE = CurveStyle("image", ORANGE, "#f0a04b", "-", "o")
GREY = SOFT.light
OTHERS = (
    CurveStyle("none", "#6b7682", "#98a5b2", "-", "s"),
    CurveStyle("mean_shift", INK.light, INK.dark, (0, (1, 1.5)), "x"),
    CurveStyle("c3", "#b8327c", "#f08cc0", (0, (5, 1.5)), "v"),
    CurveStyle("anchor", "#2f8fd0", "#7cc4f2", (0, (1.5, 1)), "<"),
    CurveStyle("anchor_trace", BLUE, "#6ea5ef", (0, (4, 1, 1, 1)), ">"),
    CurveStyle("realign", GREEN, "#3fc49c", "-", "D"),
    CurveStyle("blockwise", RED, "#ff8a7a", (0, (7, 1.5, 1.5, 1.5)), "^"),
    CurveStyle("gaussian_ot", "#6a3fb5", "#b79df5", (0, (3, 1)), "P"),
)
# Of strategies that have no style of their own here.
SPARE = CurveStyle("spare", "#6b7a00", "#c6d64a", (0, (2, 1, 1, 1, 1, 1)), "*")
BY_STRATEGY = {style.name: style for style in OTHERS}
# The four parts of the mean squared distance of a pair.
PARTS = (
    CurveStyle("beta", BLUE, "#6ea5ef"),
    CurveStyle("gamma", "#7fb2dd", "#2d5f96"),
    CurveStyle("delta", IMAGE.light, IMAGE.dark),
    CurveStyle("zeta", "#f2c492", "#7d5018"),
)
EVERY = (INK, SOFT, LINE, IMAGE, *OTHERS, SPARE, *PARTS)
_SPARE_LOOKS = (("-", "h"), ((0, (2, 1)), "d"), ((0, (6, 2)), "p"), ((0, (1, 1)), "8"))


def styles(strategies: Sequence[tuple[str, str]]) -> dict[str, CurveStyle]:
    """Choose a style for each (label, strategy), by label; further fits of a strategy share its colour."""
    looks: dict[str, CurveStyle] = {}
    num_fits: dict[str, int] = {}
    for label, strategy in strategies:
        looks[label] = style = BY_STRATEGY.get(strategy, SPARE)
        number = num_fits.get(style.name, 0)
        num_fits[style.name] = number + 1
        if number:
            dash, marker = _SPARE_LOOKS[(number - 1) % len(_SPARE_LOOKS)]
            looks[label] = replace(looks[label], dash=dash, marker=marker)
    return looks


def css() -> str:
    """Return the page's custom properties: `--c-NAME: light-dark(COLOUR, COLOUR);`."""
    return " ".join(f"--c-{style.name}: light-dark({style.light}, {style.dark});" for style in EVERY)


_DPI = 160
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that pictures are the same everywhere
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE.light,
    "axes.titlecolor": INK.light,
    "axes.labelcolor": SOFT.light,
    "text.color": INK.light,
    "xtick.color": LINE.light,
    "ytick.color": LINE.light,
    "xtick.labelcolor": SOFT.light,
    "ytick.labelcolor": SOFT.light,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": LINE.light,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "revision_ray",  # without one, ids in an SVG are random
}
# Pictures on white that no page explains: with a grid, and legends among the curves.
_STANDALONE = {
    "axes.grid": True,
    "legend.frameon": True,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
}


@contextmanager
def _styled(**settings: Any) -> Iterator[None]:
    """Draw in the style of this project, whatever the user's own settings of matplotlib are."""
    style: Any = {**matplotlib.rcParamsDefault, **_STYLE, **settings}
    del style["backend"]  # would stay set
    with matplotlib.rc_context(style):
        yield


def new_grid(
    rows: int = 1, columns: int = 1, width: float = 5.4, height: float = 3.6
) -> tuple[Figure, np.ndarray]:
    """Return an empty figure of `width` x `height` inches and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def image_files(draw: Callable[[], Figure]) -> dict[str, bytes]:
    """Draw a figure and return its files, {"png": bytes, "svg": bytes}; equal drawings give equal bytes."""
    with _styled(**_STANDALONE):
        figure = draw()
        png = _rendered(figure, "png")
        figure.set_layout_engine("none")  # the layout is done; doing it again takes as long as drawing
        return {"png": png, "svg": _rendered(figure, "svg")}


def _rendered(figure: Figure, form: Literal["png", "svg"], **options: Any) -> bytes:
    """Return the file of a figure on white, without date and version, which would differ between runs."""
    sink = io.BytesIO()
    names = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type")}[form]
    options = {"dpi": _DPI, "facecolor": "white", **options}
    figure.savefig(sink, format=form, metadata=dict.fromkeys(names), **options)
    return sink.getvalue()


@dataclass(frozen=True)
class PlotPanel:
    """One pair of axes: the function that draws it, its size in inches, and its description (`alt`)."""

    draw: Callable[[Axes], None]
    alt: str
    width: float = 3.4
    height: float = 2.9


@dataclass(frozen=True)
class ReportFigure:
    """A row of panels. `reading`: how to read it, in one or two sentences."""

    name: str
    title: str
    reading: str
    panels: Sequence[PlotPanel]

    @property
    def wide(self) -> bool:
        return max(panel.width for panel in self.panels) > 5


def png(figure: ReportFigure) -> bytes:
    """Draw all panels in one picture, at most three beside each other."""
    columns = min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    width, height = (max(getattr(p, side) for p in figure.panels) for side in ("width", "height"))
    with _styled():
        canvas = Figure(figsize=(columns * width, rows * height), layout="constrained")
        for place, panel in enumerate(figure.panels, 1):
            panel.draw(canvas.add_subplot(rows, columns, place))
        return _rendered(canvas, "png")


def svgs(figure: ReportFigure) -> list[str]:
    """Draw each panel as an inline SVG element in the page's colours."""
    return [_inline_svg(f"{figure.name}-{place}", panel) for place, panel in enumerate(figure.panels)]


def _inline_svg(name: str, panel: PlotPanel) -> str:
    # Clip paths and markers have hashes as ids; the salt makes them differ from those of other panels.
    with _styled(**{"svg.hashsalt": name}):
        canvas = Figure(figsize=(panel.width, panel.height), layout="constrained")
        panel.draw(canvas.add_subplot())
        root = ElementTree.fromstring(_rendered(canvas, "svg", facecolor="none"))
    for element in root.iter():
        # HTML has no namespaces. Groups have ids that nothing refers to and that other panels have, too.
        element.tag = _local(element.tag)
        names = [name for name in element.attrib if (element.tag, name) != ("g", "id")]
        element.attrib = {_local(name): element.attrib[name] for name in names}
    # The page sets the size.
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": panel.alt}
    svg = ElementTree.tostring(root, "unicode")
    for style in EVERY:
        svg = svg.replace(style.light, f"var(--c-{style.name})")
    return svg


def _local(name: str) -> str:
    """Return a name without its namespace."""
    return name.rpartition("}")[2]


def label_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Make the x axis logarithmic and label the sizes themselves, as far as their labels do not touch."""
    axes.set_xscale("log")
    axes.margins(x=0.07)
    labelled: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not labelled or labelled[-1] / size > 1.6:
            labelled.append(size)
    axes.set_xticks(labelled, [f"{size:,}" for size in labelled])
    axes.set_xticks([], minor=True)


def label_decades(axis: Axis) -> None:
    """Label 1, 2, 3 and 5 times powers of ten of a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_intervals(
    axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, float]], scale: float = 1
) -> None:
    """Draw estimates {"mean", "low", "high"}, times `scale`, over x."""
    means, lows, highs = (
        np.array([scale * each[end] for each in estimates]) for end in ("mean", "low", "high")
    )
    axes.errorbar(x, means, [means - lows, highs - means], marker="o", color=ORANGE, capsize=3)


def _plain_ticks(axis: Any) -> None:
    """Label powers of ten, and 2 and 5 times those if the axis spans less than a factor of a hundred."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: quoted(value)))
    axis.set_minor_formatter(NullFormatter())


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def dots(
    title: str, axis: str, rows: Sequence[tuple[str, CurveStyle, Mapping[str, Any]]], *, log: bool = False,
    percent: bool = False, floor: str = "", marks: Sequence[tuple[float, str]] = (), alt: str = "",
) -> PlotPanel:  # fmt: skip
    """Draw each strategy's point and interval; `floor` names the figure that is a tick in each row."""
    factor = 100 if percent else 1

    def draw(axes: Axes) -> None:
        drawn = [(label, style, cell) for label, style, cell in rows if cell["value"] is not None]
        for place, (_, style, cell) in enumerate(drawn):
            value = cell["value"] * factor
            axes.axhline(place, color=LINE.light, linewidth=0.6, zorder=0)
            if "low" in cell:
                ends = [cell["low"] * factor, cell["high"] * factor]
                axes.plot(
                    ends, [place] * 2, color=style.light, linewidth=3, alpha=0.35, solid_capstyle="butt"
                )
            if floor and cell.get(floor) is not None:
                axes.plot(
                    [cell[floor] * factor], [place], "|", color=SOFT.light, markersize=11, markeredgewidth=1.4
                )
            axes.plot([value], [place], style.marker, color=style.light, markersize=6, clip_on=False)
        for at, name in marks:
            axes.axvline(at * factor, color=SOFT.light, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.text(at * factor, -0.55, f"{name} ", color=SOFT.light, fontsize=7.5, va="center", ha="right")
        _name_rows(axes, [label for label, _, _ in drawn])
        if log:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            most = max([cell.get("high", cell["value"]) * factor for _, _, cell in drawn], default=1.0)
            most = max([most or 1.0, *(at * factor for at, _ in marks)])
            axes.set_xlim(-0.04 * most, 1.08 * most)
        axes.set(title=title, xlabel=axis)

    return PlotPanel(draw, alt, width=3.4, height=0.95 + 0.26 * max(len(rows), 3))


def scatter(
    title: str,
    clouds: Sequence[tuple[str, CurveStyle, Any]],
    axes_names: tuple[str, str],
    limits: Any,
    alt: str,
) -> PlotPanel:
    """Draw points of several clouds within `limits`; without names of axes there are no ticks."""

    def draw(axes: Axes) -> None:
        for name, style, points in clouds:
            xy = np.asarray(points)
            edge = 0.7 if style.marker == "x" else 0.0  # a cross is nothing but edge
            axes.plot(xy[:, 0], xy[:, 1], style.marker, color=style.light, markersize=2.6, alpha=0.55,
                      markeredgewidth=edge, label=name)  # fmt: skip
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.set(aspect="equal", title=title, xlabel=axes_names[0], ylabel=axes_names[1])
        if any(axes_names):
            axes.locator_params(nbins=5)
        else:
            axes.set_xticks([])
            axes.set_yticks([])

    return PlotPanel(draw, alt, *((3.2, 2.9) if any(axes_names) else (2.1, 1.95)))


def curves(
    title: str, lines: Sequence[tuple[str, CurveStyle, Any, Any]], axes_names: tuple[str, str], alt: str, *,
    log: bool = False, small: bool = False, filled: str = "", mark: float | None = None,
) -> PlotPanel:  # fmt: skip
    """Draw lines over x; the one named `filled` is an area, `mark` a vertical line; no legend if `small`.

    Earlier lines are wider, so that all lines that coincide are seen.
    """

    def draw(axes: Axes) -> None:
        if mark is not None:
            axes.axvline(mark, color=INK.light, linewidth=1.2, linestyle=(0, (1, 1)))
        for place, (name, style, x, y) in enumerate(lines):
            if name == filled:
                axes.fill_between(x, y, color=style.light, alpha=0.25, linewidth=0, label=name)
            else:
                width = 1.5 if small else 3.4 - 2.2 * place / max(len(lines) - 1, 1)
                axes.plot(x, y, color=style.light, linestyle=style.dash, label=name, linewidth=width)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            _plain_ticks(axes.xaxis)
            _plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=title, xlabel=axes_names[0], ylabel=axes_names[1])
        if not small:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.2)

    return PlotPanel(draw, alt, *((3.2, 2.5) if small else (6.8, 3.6)))


def stacked(
    title: str,
    axis: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[tuple[str, CurveStyle]],
    alt: str,
) -> PlotPanel:
    """Draw a bar for each strategy, its parts side by side."""

    def draw(axes: Axes) -> None:
        for number, (name, style) in enumerate(parts):
            left = [sum(values[:number]) for _, values in rows]
            axes.barh(range(len(rows)), [values[number] for _, values in rows], left=left, color=style.light,
                      label=name, height=0.62)  # fmt: skip
        _name_rows(axes, [label for label, _ in rows])
        axes.set(title=title, xlabel=axis)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return PlotPanel(draw, alt, width=6.8, height=1.0 + 0.32 * max(len(rows), 4))


def agreement(
    title: str, style: CurveStyle, x: Any, y: Any, axes_names: tuple[str, str], alt: str
) -> PlotPanel:
    """Draw points that lie on the diagonal if prediction and measurement agree."""

    def draw(axes: Axes) -> None:
        most = 1.08 * float(np.max(np.abs([x, y])))
        axes.plot([-most, most], [-most, most], color=SOFT.light, linewidth=0.9, linestyle=(0, (2, 2)))
        edge = 0.7 if style.marker == "x" else 0.0
        axes.plot(x, y, style.marker, color=style.light, markersize=3, alpha=0.7, markeredgewidth=edge)
        axes.set_xlim(-most, most)
        axes.set_ylim(-most, most)
        axes.set(aspect="equal", title=title, xlabel=axes_names[0], ylabel=axes_names[1])
        axes.locator_params(nbins=5)

    return PlotPanel(draw, alt, width=3.4, height=3.2)
