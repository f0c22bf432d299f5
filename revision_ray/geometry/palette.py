"""Colours, dashes and markers: one for each strategy, the same everywhere, told apart by colour-blind eyes.

Nothing depends on colour alone: curves differ in dashes, points in markers, rows have names.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How one curve looks: its colours on light and on dark ground."""

    name: str
    light: str
    dark: str
    dash: str | tuple = "-"
    marker: str = "o"


INK = Style("ink", "#18212b", "#e8edf2")
SOFT = Style("soft", "#55626f", "#a3b0bd")
LINE = Style("line", "#d9dfe5", "#2f3a45")
IMAGE = Style("image", "#c2600a", "#f0a04b", "-", "o")
OTHERS = (
    Style("none", "#6b7682", "#98a5b2", "-", "s"),
    Style("mean_shift", "#18212b", "#e8edf2", (0, (1, 1.5)), "x"),
    Style("c3", "#b8327c", "#f08cc0", (0, (5, 1.5)), "v"),
    Style("anchor", "#2f8fd0", "#7cc4f2", (0, (1.5, 1)), "<"),
    Style("anchor_trace", "#1b4f99", "#6ea5ef", (0, (4, 1, 1, 1)), ">"),
    Style("realign", "#0b7358", "#3fc49c", "-", "D"),
    Style("blockwise", "#c02f26", "#ff8a7a", (0, (7, 1.5, 1.5, 1.5)), "^"),
    Style("gaussian_ot", "#6a3fb5", "#b79df5", (0, (3, 1)), "P"),
    Style("aniso", "#6b7a00", "#c6d64a", (0, (2, 1, 1, 1, 1, 1)), "*"),
)
BY_STRATEGY = {style.name: style for style in OTHERS}
# The four parts of the mean squared distance of a pair.
PARTS = (
    Style("beta", "#1b4f99", "#6ea5ef"),
    Style("gamma", "#7fb2dd", "#2d5f96"),
    Style("delta", "#c2600a", "#f0a04b"),
    Style("zeta", "#f2c492", "#7d5018"),
)
_SPARE_DASHES = ("-", (0, (2, 1)), (0, (6, 2)), (0, (1, 1)))
_SPARE_MARKERS = ("h", "d", "p", "8")


def styles(strategies: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """Label to style for (label, strategy); further fits of a strategy keep its colour alone."""
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for label, strategy in strategies:
        base = BY_STRATEGY.get(strategy, OTHERS[0])
        number = seen.get(strategy, 0)
        seen[strategy] = number + 1
        if number:
            spare = (number - 1) % len(_SPARE_DASHES)
            base = Style(base.name, base.light, base.dark, _SPARE_DASHES[spare], _SPARE_MARKERS[spare])
        found[label] = base
    return found


EVERY = (INK, SOFT, LINE, IMAGE, *OTHERS, *PARTS)


def css(dark: bool) -> str:
    """The custom properties of the page: `--c-NAME: colour;`."""
    return " ".join(f"--c-{style.name}: {style.dark if dark else style.light};" for style in EVERY)
