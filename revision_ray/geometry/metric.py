"""What a figure of the report is, and how its values are written down."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the report's tables. `paper`: the papers' figure by strategy, or by "image"."""

    key: str
    title: str
    definition: str
    better: str = ""  # low, high, or empty where neither is better
    percent: bool = False
    paired: bool = False
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_note: str = ""
    symbol: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that answer one question."""

    title: str
    explanation: str
    metrics: tuple[Metric, ...]


def shown(value: float | None, percent: bool = False) -> str:
    """A figure for a person: three significant digits, powers of ten where zeros would have to be counted."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞"
    if percent:
        return f"{100 * value:.1f} %" if abs(value) >= 0.0995 else f"{100 * value:.2f} %"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10{_superscript(int(exponent))}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{min(digits, 4)}f}"


def quoted(value: float, percent: bool = False) -> str:
    """A figure of the papers with the digits that they give."""
    if percent:
        return f"{100 * value:g} %"
    if abs(value) >= 1e-3:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.10e}".split("e")
    return f"{float(mantissa):g}×10{_superscript(int(exponent))}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
