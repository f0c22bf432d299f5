"""The plot style of every report and study: colours, dashes and markers, and drawing as SVG and PNG.

Each strategy has one colour, distinct to colour-blind readers. Nothing depends on colour alone: curves
differ in dashes, points in markers, rows have names. A figure is a row of panels. On the page every panel is
an SVG of its own, so that a narrow screen stacks them; its text stays text. Only the colours differ between
SVG and PNG.

Shapes: H histogram bins.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from revision_ray.report.verdict import quoted


@dataclass(frozen=True)
class CurveStyle:
    """How one curve looks: its colours on light and on dark ground."""

    name: str
    light: str
    dark: str
    dash: str | tuple = "-"
    marker: str = "o"


INK = CurveStyle("ink", "#18212b", "#e8edf2")
SOFT = CurveStyle("soft", "#55626f", "#a3b0bd")
LINE = CurveStyle("line", "#d9dfe5", "#2f3a45")
IMAGE = CurveStyle("image", "#c2600a", "#f0a04b", "-", "o")
OTHERS = (
    CurveStyle("none", "#6b7682", "#98a5b2", "-", "s"),
    CurveStyle("mean_shift", "#18212b", "#e8edf2", (0, (1, 1.5)), "x"),
    CurveStyle("c3", "#b8327c", "#f08cc0", (0, (5, 1.5)), "v"),
    CurveStyle("anchor", "#2f8fd0", "#7cc4f2", (0, (1.5, 1)), "<"),
    CurveStyle("anchor_trace", "#1b4f99", "#6ea5ef", (0, (4, 1, 1, 1)), ">"),
    CurveStyle("realign", "#0b7358", "#3fc49c", "-", "D"),
    CurveStyle("blockwise", "#c02f26", "#ff8a7a", (0, (7, 1.5, 1.5, 1.5)), "^"),
    CurveStyle("gaussian_ot", "#6a3fb5", "#b79df5", (0, (3, 1)), "P"),
    CurveStyle("aniso", "#6b7a00", "#c6d64a", (0, (2, 1, 1, 1, 1, 1)), "*"),
)
BY_STRATEGY = {style.name: style for style in OTHERS}
# The four parts of the mean squared distance of a pair.
PARTS = (
    CurveStyle("beta", "#1b4f99", "#6ea5ef"),
    CurveStyle("gamma", "#7fb2dd", "#2d5f96"),
    CurveStyle("delta", "#c2600a", "#f0a04b"),
    CurveStyle("zeta", "#f2c492", "#7d5018"),
)
_SPARE_DASHES = ("-", (0, (2, 1)), (0, (6, 2)), (0, (1, 1)))
_SPARE_MARKERS = ("h", "d", "p", "8")


def styles(strategies: Sequence[tuple[str, str]]) -> dict[str, CurveStyle]:
    """Label to style for (label, strategy); further fits of a strategy keep its colour alone."""
    found: dict[str, CurveStyle] = {}
    seen: dict[str, int] = {}
    for label, strategy in strategies:
        base = BY_STRATEGY.get(strategy, OTHERS[0])
        number = seen.get(strategy, 0)
        seen[strategy] = number + 1
        if number:
            spare = (number - 1) % len(_SPARE_DASHES)
            base = CurveStyle(base.name, base.light, base.dark, _SPARE_DASHES[spare], _SPARE_MARKERS[spare])
        found[label] = base
    return found


EVERY = (INK, SOFT, LINE, IMAGE, *OTHERS, *PARTS)


def css(dark: bool) -> str:
    """The custom properties of the page: `--c-NAME: colour;`."""
    return " ".join(f"--c-{style.name}: {style.dark if dark else style.light};" for style in EVERY)


Draw = Callable[[Axes, "PlotColours"], None]

_DPI = 160
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "revision_ray",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "path.simplify": False,
}


@dataclass(frozen=True)
class PlotPanel:
    """One pair of axes: what draws it, and its size in inches. `alt`: what it shows, in words."""

    draw: Draw
    alt: str
    width: float = 3.4
    height: float = 2.9


@dataclass(frozen=True)
class ReportFigure:
    """`reading`: how to read it, one or two sentences."""

    name: str
    title: str
    reading: str
    panels: Sequence[PlotPanel]

    @property
    def wide(self) -> bool:
        return max(panel.width for panel in self.panels) > 5


class PlotColours:
    """Colours by style: those of light ground, or placeholders that become the page's custom properties."""

    def __init__(self, placeholders: bool) -> None:
        names = [style.name for style in EVERY]
        self.placeholders = (
            {name: f"#fe01{place:02x}" for place, name in enumerate(names)} if placeholders else {}
        )

    def __call__(self, style: CurveStyle) -> str:
        return self.placeholders.get(style.name, style.light)

    def to_page(self, svg: str) -> str:
        for name, colour in self.placeholders.items():
            svg = svg.replace(colour, f"var(--c-{name})")
        return svg


def svgs(figure: ReportFigure) -> list[str]:
    """Each panel as an inline SVG element without ids that another could have, metadata, or references."""
    return [_svg(f"{figure.name}-{place}", panel) for place, panel in enumerate(figure.panels)]


def _svg(name: str, panel: PlotPanel) -> str:
    ink = PlotColours(placeholders=True)
    with mpl.rc_context(_settings(ink)):
        canvas = Canvas(figsize=(panel.width, panel.height), layout="constrained")
        FigureCanvasSVG(canvas)
        _draw(canvas.add_subplot(), panel, ink)
        svg = rendered(canvas, "svg", transparent=True).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font: bold ([\d.]+)px [^;\"]*", r"font-weight: 600; font-size: \1px", svg)
    # Of the root only its box matters: the page sets the size.
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box, "matplotlib gives its SVG a viewBox"
    svg = re.sub(
        r"<svg[^>]*>",
        f'<svg viewBox="{box[1]}" role="img" aria-label="{_attribute(panel.alt)}">',
        svg,
        count=1,
    )
    return ink.to_page(svg)


def _settings(ink: PlotColours) -> Any:
    """Matplotlib's settings, by names that its stubs list one by one."""
    return {**_RC, "axes.titlecolor": ink(INK)}


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def png(figure: ReportFigure) -> bytes:
    """All panels in one picture, on white, at most three beside each other."""
    ink = PlotColours(placeholders=False)
    columns = min(3, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    size = columns * max(p.width for p in figure.panels), rows * max(p.height for p in figure.panels)
    with mpl.rc_context(_settings(ink)):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        for place, panel in enumerate(figure.panels):
            _draw(canvas.add_subplot(rows, columns, place + 1), panel, ink)
        return rendered(canvas, "png", dpi=_DPI, facecolor="white")


def rendered(canvas: Canvas, form: Literal["png", "svg"], **options: Any) -> bytes:
    """The file of a figure, without what differs from one drawing to the next."""
    sink = io.BytesIO()
    canvas.savefig(sink, format=form, metadata={{"png": "Software", "svg": "Date"}[form]: None}, **options)
    return sink.getvalue()


def _draw(axes: Axes, panel: PlotPanel, ink: PlotColours) -> None:
    axes.set_facecolor("none")
    panel.draw(axes, ink)
    axes.tick_params(which="both", color=ink(LINE), labelcolor=ink(SOFT))
    for spine in axes.spines.values():
        spine.set_color(ink(LINE))
    axes.xaxis.label.set_color(ink(SOFT))
    axes.yaxis.label.set_color(ink(SOFT))
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else ():
        text.set_color(ink(INK))


def _plain_ticks(axis: Any) -> None:
    """Names at powers of ten, also at 2 and 5 times those where the axis spans less than a hundred."""
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
    """A point a strategy with its interval; `floor` names a figure that is drawn as a tick in each row."""
    factor = 100 if percent else 1

    def draw(axes: Axes, ink: PlotColours) -> None:
        drawn = [(label, style, figures) for label, style, figures in rows if figures["value"] is not None]
        for place, (_, style, found) in enumerate(drawn):
            value = found["value"] * factor
            axes.axhline(place, color=ink(LINE), linewidth=0.6, zorder=0)
            if "low" in found:
                ends = [found["low"] * factor, found["high"] * factor]
                axes.plot(ends, [place] * 2, color=ink(style), linewidth=3, alpha=0.35, solid_capstyle="butt")
            if floor and found.get(floor) is not None:
                axes.plot(
                    [found[floor] * factor], [place], "|", color=ink(SOFT), markersize=11, markeredgewidth=1.4
                )
            axes.plot([value], [place], style.marker, color=ink(style), markersize=6, clip_on=False)
        for at, name in marks:
            axes.axvline(at * factor, color=ink(SOFT), linewidth=0.9, linestyle=(0, (2, 2)))
            axes.text(at * factor, -0.55, f"{name} ", color=ink(SOFT), fontsize=7.5, va="center", ha="right")
        _name_rows(axes, [label for label, _, _ in drawn])
        if log:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            most = max([found.get("high", found["value"]) * factor for _, _, found in drawn], default=1.0)
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
    """Points of several clouds on the plane and scale of every other panel; no ticks without names."""

    def draw(axes: Axes, ink: PlotColours) -> None:
        for name, style, points in clouds:
            xy = np.asarray(points)
            edge = 0.7 if style.marker == "x" else 0.0  # a cross is nothing but edge
            axes.plot(xy[:, 0], xy[:, 1], style.marker, color=ink(style), markersize=2.6, alpha=0.55,
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
    """Lines over x; the one named `filled` is an area, `mark` a vertical line. Small panels have no legend.

    Of curves that coincide the earlier ones show as the edges of wider bands.
    """

    def draw(axes: Axes, ink: PlotColours) -> None:
        if mark is not None:
            axes.axvline(mark, color=ink(INK), linewidth=1.2, linestyle=(0, (1, 1)))
        for place, (name, style, x, y) in enumerate(lines):
            if name == filled:
                axes.fill_between(x, y, color=ink(style), alpha=0.25, linewidth=0, label=name)
            else:
                width = 1.5 if small else 3.4 - 2.2 * place / max(len(lines) - 1, 1)
                axes.plot(x, y, color=ink(style), linestyle=style.dash, label=name, linewidth=width)
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
    """A bar a strategy, its parts side by side."""

    def draw(axes: Axes, ink: PlotColours) -> None:
        for number, (name, style) in enumerate(parts):
            left = [sum(values[:number]) for _, values in rows]
            axes.barh(range(len(rows)), [values[number] for _, values in rows], left=left, color=ink(style),
                      label=name, height=0.62)  # fmt: skip
        _name_rows(axes, [label for label, _ in rows])
        axes.set(title=title, xlabel=axis)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return PlotPanel(draw, alt, width=6.8, height=1.0 + 0.32 * max(len(rows), 4))


def agreement(
    title: str, style: CurveStyle, x: Any, y: Any, axes_names: tuple[str, str], alt: str
) -> PlotPanel:
    """Points that lie on the diagonal where prediction and measurement agree."""

    def draw(axes: Axes, ink: PlotColours) -> None:
        most = 1.08 * float(np.max(np.abs([x, y])))
        axes.plot([-most, most], [-most, most], color=ink(SOFT), linewidth=0.9, linestyle=(0, (2, 2)))
        edge = 0.7 if style.marker == "x" else 0.0
        axes.plot(x, y, style.marker, color=ink(style), markersize=3, alpha=0.7, markeredgewidth=edge)
        axes.set_xlim(-most, most)
        axes.set_ylim(-most, most)
        axes.set(aspect="equal", title=title, xlabel=axes_names[0], ylabel=axes_names[1])
        axes.locator_params(nbins=5)

    return PlotPanel(draw, alt, width=3.4, height=3.2)
