"""The verdict of a report in words: how large the gap is, whether the fits are good, which strategy to trust.

Geometry alone does not decide which strategy trains the better model. A cross-modal probe on the same data
does; where one is given, the verdict rests on it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


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


# A fit has closed the gap when what is left is no more than this share of the raw gap, or than chance leaves.
CLOSED_SHARE = 0.05
# Neighbourhood overlap below which alignment changes what texts mean to each other.
KEPT_LEAST = 0.7
# Overlaps that differ by less are equal.
TIE = 0.01


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One figure of the first screen."""

    name: str
    value: str
    explanation: str


@dataclass(frozen=True, kw_only=True)
class GapVerdict:
    """What a reader who has not seen the paper should know. `trusted`: a label, empty where undecided."""

    headline: str
    facts: tuple[KeyFigure, ...]
    paragraphs: tuple[str, ...]
    trusted: str
    rests_on: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


def value_of(entry: Mapping[str, Any], key: str) -> float | None:
    """The figure `key` of a strategy, None where there is none."""
    return entry["figures"].get(key, {}).get("value")


def strategy(measured: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The first column of this strategy."""
    return next((entry for entry in measured["strategies"] if entry["strategy"] == name), None)


def verdict(measured: Mapping[str, Any], probe: Sequence[Mapping[str, Any]] | None) -> GapVerdict:
    """From one encoder's figures and, where there is one, its probe: rows of label, loss, accuracy."""
    raw = strategy(measured, "none")
    assert raw is not None, "none is always measured"
    fitted = [entry for entry in measured["strategies"] if entry["strategy"] != "none"]
    closed = [entry for entry in fitted if _closes(entry, raw)]
    trusted, choice, rests_on = _choice(raw, fitted, closed, probe)
    gap, spread = value_of(raw, "modality_gap") or 0.0, math.sqrt(value_of(raw, "trace") or 0.0)
    times = gap / spread if spread else math.inf
    headline = (
        f"This encoder keeps texts and images {shown(gap)} apart: {times:.1f} times as far as a text "
        "typically lies from the average text."
    )
    if gap <= 2 * (value_of(raw, "sampling_floor") or 0.0):
        headline = f"These samples show no gap that could be told from zero ({shown(gap)})."
    return GapVerdict(
        headline=headline,
        facts=_facts(measured, raw, fitted, times, trusted),
        paragraphs=tuple(
            filter(None, (_fits(raw, fitted, closed), _left(measured, closed or fitted), choice))
        ),
        trusted=trusted,
        rests_on=rests_on,
    )


def _closes(entry: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    gap, before = value_of(entry, "modality_gap"), value_of(raw, "modality_gap")
    floor = value_of(entry, "sampling_floor")
    assert gap is not None
    assert before is not None
    assert floor is not None
    return gap <= max(CLOSED_SHARE * before, 2 * floor)


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    labels = [entry["label"] for entry in entries]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def _fits(raw: Any, fitted: Sequence[Any], closed: Sequence[Any]) -> str:
    if not fitted:
        return "No fit was given, so this report describes the gap only. Make one with jobs/fit.py."
    seen = [entry for entry in fitted if not entry["held_out"]]
    where = (
        " These rows took part in the fit, so the figure flatters it: name heldout_texts and "
        "heldout_images for rows that did not."
        if seen
        else " None of the measured rows took part in a fit."
    )
    if not closed:
        best = min(fitted, key=lambda entry: value_of(entry, "modality_gap") or 0.0)
        left = shown(value_of(best, "modality_gap"))
        return (
            f"No fit closes the gap on these rows: the best, {best['label']}, leaves {left} of "
            f"{shown(value_of(raw, 'modality_gap'))}. Were they fitted on the same domain and encoder?{where}"
        )
    open_ = [entry for entry in fitted if entry not in closed]
    rest = f" {_names(open_)} {'does' if len(open_) == 1 else 'do'} not." if open_ else ""
    met = f"The centroids meet after {_names(closed)}: what is left is within chance or 5 % of the gap."
    return f"{met}{rest}{where}"


def _left(measured: Mapping[str, Any], entries: Sequence[Any]) -> str:
    """What a closed centroid gap does not say."""
    mixing = [entry for entry in entries if value_of(entry, "mixing_rate") is not None]
    if not mixing:
        return ""
    best = max(mixing, key=lambda entry: value_of(entry, "mixing_rate") or 0.0)
    chance = best["figures"]["mixing_rate"].get("by_chance", 0.5)
    rate = value_of(best, "mixing_rate") or 0.0
    if rate >= 0.8 * chance:
        return (
            f"Texts and images then mix: after {best['label']} {shown(rate, True)} of a row's neighbours "
            f"are of the other kind ({shown(chance, True)} for one and the same cloud)."
        )
    return (
        f"Meeting centroids are not the same as one cloud. Even in the best case ({best['label']}) only "
        f"{shown(rate, True)} of a row's nearest neighbours are of the other kind, where one and the same "
        f"cloud would give {shown(chance, True)}: differences of shape remain."
    )


def _choice(
    raw: Any, fitted: Sequence[Any], closed: Sequence[Any], probe: Sequence[Mapping[str, Any]] | None
) -> tuple[str, str, str]:
    """(label to trust or empty, why, what that rests on)."""
    if probe:
        return _by_probe(probe, [raw["label"], *(entry["label"] for entry in fitted)])
    judged = [
        entry
        for entry in closed
        if value_of(entry, "covariance_gap") is not None
        and value_of(entry, "neighbourhood_overlap") is not None
    ]
    if not judged:
        return "", "", "geometry"
    most = max(value_of(entry, "neighbourhood_overlap") or 0.0 for entry in judged)
    keeping = [e for e in judged if (value_of(e, "neighbourhood_overlap") or 0.0) >= most - TIE]
    # The strategy of the paper, where others keep no more than it does.
    faithful = next((e for e in keeping if e["strategy"] == "realign"), keeping[0])
    alike = min(judged, key=lambda entry: value_of(entry, "covariance_gap") or math.inf)
    kept = shown(value_of(faithful, "neighbourhood_overlap"), True)
    if alike is faithful:
        return (
            alike["label"],
            f"Of these, {alike['label']} both keeps the texts' neighbourhoods best ({kept}) and comes "
            "nearest to the images' shape. Geometry alone does not prove that it trains the better model; "
            "a cross-modal probe (jobs/study.py) would.",
            "geometry",
        )
    damage = value_of(alike, "neighbourhood_overlap") or 0.0
    caution = ", at a cost in meaning that speaks against it" if damage < KEPT_LEAST else ""
    return (
        "",
        f"Two wishes pull apart: {faithful['label']} keeps the texts' neighbourhoods best ({kept}, "
        f"covariance gap {shown(value_of(faithful, 'covariance_gap'))}), {alike['label']} comes nearest to "
        f"the images' shape (covariance gap {shown(value_of(alike, 'covariance_gap'))}, neighbourhoods "
        f"kept {shown(damage, True)}){caution}. Geometry cannot weigh one against the other: run the "
        "cross-modal probe (jobs/study.py) and give its result as probe=.",
        "geometry",
    )


def _by_probe(probe: Sequence[Mapping[str, Any]], measured: Sequence[str]) -> tuple[str, str, str]:
    best = min(probe, key=lambda row: row["loss"])
    near = [row for row in probe if row is not best and row["loss_low"] <= best["loss_high"]]
    told = (
        f"A head trained on aligned texts and tested on real images does best with {best['label']}: "
        f"loss {shown(best['loss'])}, accuracy {shown(best['accuracy'], True)}"
    )
    told += (
        f". {_names(near)} cannot be told from it with these seeds."
        if near
        else "; no other strategy comes within its interval."
    )
    if best["label"] not in measured:
        told += " The probe fitted it by itself; it is not among the fits of this report."
    return best["label"], told, "probe"


def _facts(
    measured: Mapping[str, Any], raw: Any, fitted: Sequence[Any], times: float, trusted: str
) -> tuple[KeyFigure, ...]:
    facts = [
        KeyFigure(
            name="Gap before alignment",
            value=shown(value_of(raw, "modality_gap")),
            explanation=f"{times:.1f} × the spread of the texts; opposite ends of the sphere are 2 apart",
        )
    ]
    if fitted:
        best = min(fitted, key=lambda entry: value_of(entry, "modality_gap") or 0.0)
        left, floor = value_of(best, "modality_gap") or 0.0, value_of(best, "sampling_floor") or 0.0
        told = "chance alone leaves" if left <= 2 * floor else "more than the"
        tail = "" if left <= 2 * floor else " that chance leaves"
        facts.append(
            KeyFigure(
                name=f"Left after {best['label']}",
                value=shown(left),
                explanation=f"{told} {shown(floor)}{tail}",
            )
        )
        kept = [entry for entry in fitted if value_of(entry, "neighbourhood_overlap") is not None]
        if kept:
            low, high = (f(value_of(e, "neighbourhood_overlap") or 0.0 for e in kept) for f in (min, max))
            span = f"{100 * high:.0f} %" if high - low < TIE else f"{100 * low:.0f} to {100 * high:.0f} %"
            facts.append(
                KeyFigure(
                    name="Neighbours kept",
                    value=span,
                    explanation="of each text's nearest texts, by strategy",
                )
            )
    facts.append(
        KeyFigure(
            name="Strategy to trust",
            value=trusted or "undecided",
            explanation="see below why" if trusted else "geometry alone does not tell",
        )
    )
    return tuple(facts)
