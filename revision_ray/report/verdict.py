"""The verdict of a report in words: how large the gap is, whether the fits close it, which strategy to trust.

Geometry alone does not decide which strategy trains the better model. A cross-modal probe on the same data
does: if one is given, the verdict rests on it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from revision_ray.report.metrics import find_strategy, shown, value_of

# A fit has closed the gap if what is left is at most this share of the raw gap, or what chance leaves.
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
    """The verdict for readers who do not know the paper. `trusted`: a label, empty if undecided."""

    headline: str
    facts: tuple[KeyFigure, ...]
    paragraphs: tuple[str, ...]
    trusted: str
    rests_on: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Column:
    """What the verdict reads of one strategy."""

    label: str
    strategy: str
    held_out: bool
    gap: float
    floor: float
    trace: float
    overlap: float | None
    covariance_gap: float | None
    mixing: float | None
    mixing_by_chance: float

    @staticmethod
    def of(entry: Mapping[str, Any]) -> "_Column":
        return _Column(
            **{name: entry[name] for name in ("label", "strategy", "held_out")},
            gap=value_of(entry, "modality_gap") or 0.0,
            floor=value_of(entry, "sampling_floor") or 0.0,
            trace=value_of(entry, "trace") or 0.0,
            overlap=value_of(entry, "neighbourhood_overlap"),
            covariance_gap=value_of(entry, "covariance_gap"),
            mixing=value_of(entry, "mixing_rate"),
            mixing_by_chance=entry["figures"].get("mixing_rate", {}).get("by_chance", 0.5),
        )


def verdict(measured: Mapping[str, Any], probe: Sequence[Mapping[str, Any]] | None) -> GapVerdict:
    """Judge one encoder by its figures and, if there is one, its probe (rows of label, loss, accuracy)."""
    unaligned = find_strategy(measured, "none")
    assert unaligned is not None, "none is always measured"
    raw = _Column.of(unaligned)
    fitted = [_Column.of(entry) for entry in measured["strategies"] if entry["strategy"] != "none"]
    closed = [each for each in fitted if each.gap <= max(CLOSED_SHARE * raw.gap, 2 * each.floor)]
    if probe:
        trusted, choice = _by_probe(probe, [raw.label, *(each.label for each in fitted)])
    else:
        trusted, choice = _by_geometry(closed)
    spread = math.sqrt(raw.trace)
    times = raw.gap / spread if spread else math.inf
    headline = (
        f"This encoder keeps texts and images {shown(raw.gap)} apart: {times:.1f} times as far as a text "
        "typically lies from the average text."
    )
    if raw.gap <= 2 * raw.floor:
        headline = f"These samples show no gap that could be told from zero ({shown(raw.gap)})."
    return GapVerdict(
        headline=headline,
        facts=tuple(_facts(raw, fitted, times, trusted)),
        paragraphs=tuple(filter(None, (_closing(raw, fitted, closed), _mixing(closed or fitted), choice))),
        trusted=trusted,
        rests_on="probe" if probe else "geometry",
    )


def _list(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def _closing(raw: _Column, fitted: Sequence[_Column], closed: Sequence[_Column]) -> str:
    """Say which fits close the gap, and whether these rows took part in them."""
    if not fitted:
        return "No fit was given, so this report describes the gap only. Make one with jobs/fit.py."
    where = " None of the measured rows took part in a fit."
    if not all(each.held_out for each in fitted):
        where = (
            " These rows took part in the fit, so the figure flatters it: name heldout_texts and "
            "heldout_images for rows that did not."
        )
    if not closed:
        best = min(fitted, key=lambda each: each.gap)
        return (
            f"No fit closes the gap on these rows: the best, {best.label}, leaves {shown(best.gap)} of "
            f"{shown(raw.gap)}. Were they fitted on the same domain and encoder?{where}"
        )
    others = [each.label for each in fitted if each not in closed]
    rest = f" {_list(others)} {'does' if len(others) == 1 else 'do'} not." if others else ""
    meeting = _list([each.label for each in closed])
    return (
        f"The centroids meet after {meeting}: what is left is within chance or 5 % of the gap.{rest}{where}"
    )


def _mixing(columns: Sequence[_Column]) -> str:
    """Say whether the clouds mix, which a closed gap of centroids does not tell."""
    measured = [each for each in columns if each.mixing is not None]
    if not measured:
        return ""
    best = max(measured, key=lambda each: each.mixing or 0.0)
    rate, chance = best.mixing or 0.0, best.mixing_by_chance
    if rate >= 0.8 * chance:
        return (
            f"Texts and images then mix: after {best.label} {shown(rate, True)} of a row's neighbours "
            f"are of the other kind ({shown(chance, True)} for one and the same cloud)."
        )
    return (
        f"Meeting centroids are not the same as one cloud. Even in the best case ({best.label}) only "
        f"{shown(rate, True)} of a row's nearest neighbours are of the other kind, where one and the same "
        f"cloud would give {shown(chance, True)}: differences of shape remain."
    )


def _by_geometry(closed: Sequence[_Column]) -> tuple[str, str]:
    """Return the label to trust (empty if undecided) and why, from overlap and covariance gap."""
    judged = [each for each in closed if each.covariance_gap is not None and each.overlap is not None]
    if not judged:
        return "", ""
    most = max(each.overlap or 0.0 for each in judged)
    keeping = [each for each in judged if (each.overlap or 0.0) >= most - TIE]
    # The paper's strategy, if others keep no more than it does.
    faithful = next((each for each in keeping if each.strategy == "realign"), keeping[0])
    alike = min(judged, key=lambda each: each.covariance_gap or math.inf)
    kept = shown(faithful.overlap, True)
    if alike is faithful:
        return alike.label, (
            f"Of these, {alike.label} both keeps the texts' neighbourhoods best ({kept}) and comes "
            "nearest to the images' shape. Geometry alone does not prove that it trains the better model; "
            "a cross-modal probe (jobs/study.py) would."
        )
    costly = (alike.overlap or 0.0) < KEPT_LEAST
    caution = ", at a cost in meaning that speaks against it" if costly else ""
    return "", (
        f"Two wishes pull apart: {faithful.label} keeps the texts' neighbourhoods best ({kept}, "
        f"covariance gap {shown(faithful.covariance_gap)}), {alike.label} comes nearest to "
        f"the images' shape (covariance gap {shown(alike.covariance_gap)}, neighbourhoods "
        f"kept {shown(alike.overlap, True)}){caution}. Geometry cannot weigh one against the other: run the "
        "cross-modal probe (jobs/study.py) and give its result as probe=."
    )


def _by_probe(probe: Sequence[Mapping[str, Any]], measured: Sequence[str]) -> tuple[str, str]:
    """Return the label with the lowest loss on real images, and which ones cannot be told from it."""
    best = min(probe, key=lambda row: row["loss"])
    near = [row["label"] for row in probe if row is not best and row["loss_low"] <= best["loss_high"]]
    reason = (
        f"A head trained on aligned texts and tested on real images does best with {best['label']}: "
        f"loss {shown(best['loss'])}, accuracy {shown(best['accuracy'], True)}"
    )
    if near:
        reason += f". {_list(near)} cannot be told from it with these seeds."
    else:
        reason += "; no other strategy comes within its interval."
    if best["label"] not in measured:
        reason += " The probe fitted it by itself; it is not among the fits of this report."
    return best["label"], reason


def _facts(raw: _Column, fitted: Sequence[_Column], times: float, trusted: str) -> list[KeyFigure]:
    facts = [
        KeyFigure(
            name="Gap before alignment",
            value=shown(raw.gap),
            explanation=f"{times:.1f} × the spread of the texts; opposite ends of the sphere are 2 apart",
        )
    ]
    if fitted:
        best = min(fitted, key=lambda each: each.gap)
        by_chance = best.gap <= 2 * best.floor
        limit = "chance alone leaves {}" if by_chance else "more than the {} that chance leaves"
        facts.append(
            KeyFigure(
                name=f"Left after {best.label}",
                value=shown(best.gap),
                explanation=limit.format(shown(best.floor)),
            )
        )
    overlaps = [each.overlap for each in fitted if each.overlap is not None]
    if overlaps:
        low, high = min(overlaps), max(overlaps)
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
    return facts
