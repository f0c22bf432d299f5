"""The figures of a report, built from its measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from revision_ray.report import plots
from revision_ray.report.metrics import METRICS, shown, value_of
from revision_ray.report.plots import IMAGE, PARTS, SOFT, CurveStyle, PlotPanel, ReportFigure, styles


def every_figure(measured: Mapping[str, Any]) -> list[ReportFigure]:
    """Build the figures that these measurements allow, in the order of the page."""
    looks = styles([(entry["label"], entry["strategy"]) for entry in measured["strategies"]])
    built = [
        _at_a_glance(measured, looks),
        _scatter(measured, looks),
        _cosines(measured, looks),
        _spectra(measured, looks),
    ]
    if measured["curves"]["residual_energy"]:
        built += [_parts(measured), _residual_energy(measured, looks)]
    if measured["curves"]["drift"]:
        built.append(_drift(measured, looks))
    return built


def _in_words(measured: Mapping[str, Any], key: str) -> str:
    """Write a figure of all strategies in words: "none 0.554, realign 0.0003"."""
    metric = METRICS[key]
    return ", ".join(
        f"{e['label']} {shown(value_of(e, key), metric.percent)}" for e in measured["strategies"]
    )


def _at_a_glance(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    def rows(key: str) -> list[tuple[str, CurveStyle, Mapping[str, Any]]]:
        return [
            (e["label"], looks[e["label"]], {**e["figures"][key], "floor": value_of(e, "sampling_floor")})
            for e in measured["strategies"]
        ]

    chance = measured["strategies"][0]["figures"]["mixing_rate"].get("by_chance")
    panels = (
        plots.dots("Modality gap", "distance of the means (sphere of radius 1)", rows("modality_gap"),
                   log=True, floor="floor",
                   alt=f"Modality gap by strategy: {_in_words(measured, 'modality_gap')}."),
        plots.dots("Covariance gap", "relative difference", rows("covariance_gap"),
                   alt=f"Covariance gap by strategy: {_in_words(measured, 'covariance_gap')}."),
        plots.dots("Neighbours of the other kind", "kNN mixing rate, %", rows("mixing_rate"), percent=True,
                   marks=[(chance, "one cloud")] if chance else (),
                   alt=f"Mixing rate by strategy: {_in_words(measured, 'mixing_rate')}."),
        plots.dots("Neighbours kept", "overlap with before, %", rows("neighbourhood_overlap"), percent=True,
                   alt=f"Neighbourhood overlap by strategy: {_in_words(measured, 'neighbourhood_overlap')}."),
    )  # fmt: skip
    return ReportFigure(
        "strategies",
        "The strategies at a glance",
        "Left is better in the panels of gaps, right in those of neighbours. A tick in the first panel is "
        "the gap that sampling alone leaves: left of it no gap can be told from zero on rows outside the "
        "fit. Pale bars are 95 % intervals; near zero they lie right of their point, because other rows "
        "would show some gap by chance.",
        panels,
    )


def _scatter(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    clouds, shares = measured["curves"]["scatter"], measured["curves"]["plane"]["shares"]
    every = np.concatenate([np.asarray(points) for points in clouds.values()])
    limits = [_limits(every[:, axis]) for axis in (0, 1)]
    names = tuple(f"component {n + 1} ({100 * shares[n]:.0f} % of variance)" for n in (0, 1))
    panels = []
    for entry in measured["strategies"]:
        label = entry["label"]
        title = "before: none" if entry["strategy"] == "none" else f"after {label}"
        shown_clouds = (("images", IMAGE, clouds["image"]), ("texts", looks[label], clouds[label]))
        means = [np.mean(clouds[c], axis=0) for c in ("image", label)]
        apart = shown(float(np.linalg.norm(means[0] - means[1])))
        alt = f"Images and texts {title} on two principal components; their centres are {apart} apart there."
        panels.append(plots.scatter(title, shown_clouds, (names[0], names[1]), limits, alt))
    return ReportFigure(
        "scatter",
        "Images and texts, before and after",
        "Each point is an image (orange circles) or a text (the colour of its strategy), seen along the "
        "two directions in which both clouds together vary most before alignment; all panels have the same "
        "directions and scale. Alignment succeeds where the clouds cover each other.",
        panels,
    )


def before_and_after(measured: Mapping[str, Any]) -> ReportFigure | None:
    """Build the figure of the first screen: both clouds, before and after the fit of the verdict."""
    looks = styles([(entry["label"], entry["strategy"]) for entry in measured["strategies"]])
    fitted = [entry["label"] for entry in measured["strategies"] if entry["strategy"] != "none"]
    named = [measured["verdict"]["trusted"], "realign", *reversed(fitted)]
    chosen = next((label for label in named if label in fitted), None)
    if chosen is None:
        return None
    clouds = measured["curves"]["scatter"]
    raw = next(entry["label"] for entry in measured["strategies"] if entry["strategy"] == "none")
    every = np.concatenate([np.asarray(clouds[label]) for label in ("image", raw, chosen)])
    limits = [_limits(every[:, axis]) for axis in (0, 1)]
    panels = []
    for label, title in ((raw, "before"), (chosen, f"after {chosen}")):
        both = (("images", IMAGE, clouds["image"]), ("texts", looks[label], clouds[label]))
        alt = f"Images and texts {title}, on two principal components."
        panels.append(plots.scatter(title, both, ("", ""), limits, alt))
    return ReportFigure("first", "Before and after", "Orange: images. Other colour: texts.", panels)


def _limits(values: np.ndarray) -> tuple[float, float]:
    room = 0.06 * (values.max() - values.min())
    return float(values.min() - room), float(values.max() + room)


def _cosines(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    counts = measured["curves"]
    edges = [_filled(each) for group in ("cosines", "across") for each in counts[group].values()]
    low, high = min(e[0] for e in edges), max(e[1] for e in edges)
    panels = []
    for entry in measured["strategies"]:
        label = entry["label"]
        lines = [
            ("within images", IMAGE, *_density(counts["cosines"]["image"], low, high)),
            ("within texts", looks[label], *_density(counts["cosines"][label], low, high)),
            ("text to another's image", replace(SOFT, dash=(0, (2, 1.5))),
             *_density(counts["across"][label], low, high)),
        ]  # fmt: skip
        alt = (
            f"Densities of cosines with {label}: angular JS divergence within texts against within images "
            f"{shown(value_of(entry, 'angular_js'))}."
        )
        panels.append(
            plots.curves(
                label,
                lines,
                ("cosine", "density"),
                alt,
                small=True,
                filled="within images",
                mark=value_of(entry, "pair_cosine"),
            )
        )
    pairs = (
        " The dotted vertical line is the mean cosine of a text and its own image." if counts["pairs"] else ""
    )
    return ReportFigure(
        "cosines",
        "Angles between rows",
        "Orange areas: cosines of two images. Coloured curves: of two texts; an aligned text cloud has "
        f"the shape of the area. Dashed grey: of a text and some other image.{pairs} Cosine 1 is the same "
        "direction.",
        panels,
    )


def _filled(counts: Sequence[int]) -> tuple[int, int]:
    """Return the first and the last bin with more than stray cosines."""
    places = np.flatnonzero(np.asarray(counts) > 2e-4 * sum(counts))
    return int(places[0]), int(places[-1])


def _density(counts: Sequence[int], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bin centres and density, with two fine bins joined."""
    values = np.asarray(counts, float)
    width = 2 / len(values)
    values = values.reshape(-1, 2).mean(axis=1) / (values.sum() * width)
    centres = -1 + width * (2 * np.arange(len(values)) + 1)
    chosen = slice(max(low // 2 - 1, 0), high // 2 + 2)
    return centres[chosen], values[chosen]


def _spectra(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    spectra = measured["curves"]["spectra"]
    lines = []
    for label, values in spectra.items():
        spectrum = np.asarray(values)
        spectrum = spectrum[spectrum > spectrum[0] * 1e-12] / spectrum.sum()
        style = IMAGE if label == "image" else looks[label]
        lines.append(
            ("images" if label == "image" else label, style, np.arange(1, len(spectrum) + 1), spectrum)
        )
    alt = f"Spectra of the covariances; exponents: {_in_words(measured, 'spectrum_exponent')}."
    return ReportFigure(
        "spectra",
        "How variance spreads over directions",
        "Eigenvalues of each covariance as shares of its trace, the largest first, both axes logarithmic. "
        "A straight line is a power law; its slope is the exponent α. Curves of Anchor, Trace and ReAlign "
        "lie on each other where they do not change the shape.",
        (plots.curves("", lines, ("rank of the eigenvalue", "share of the trace"), alt, log=True),),
    )


def _parts(measured: Mapping[str, Any]) -> ReportFigure:
    rows = []
    for entry in measured["strategies"]:
        values = [value_of(entry, key) for key in ("beta", "gamma", "delta_trace", "zeta_trace")]
        if None not in values:
            beta, gamma, delta, zeta = (float(v or 0.0) for v in values)
            rows.append((entry["label"], (beta**2, gamma**2, delta, zeta)))
    names = ("‖β‖², mean in U", "‖γ‖², mean in V", "tr Cov δ, rest in U", "tr Cov ζ, rest in V")
    alt = f"Mean squared distance of a pair by strategy: {_in_words(measured, 'squared_distance')}."
    frame = measured["frame"]
    return ReportFigure(
        "decomposition",
        "What separates a text from its own image",
        f"Mean squared distance of a pair, split over the fixed frame: U are the {frame['rank_u']} leading "
        f"directions (of {measured['embedding_dim']}), V the rest. Bringing the means together removes the "
        "blue parts; the orange parts differ from pair to pair, and no shift can remove them.",
        (plots.stacked("", "mean squared distance", rows, list(zip(names, PARTS, strict=True)), alt),),
    )


def _residual_energy(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    energies = measured["curves"]["residual_energy"]
    lines = [
        (label, looks[label], np.arange(1, len(energy) + 1), np.asarray(energy))
        for label, energy in energies.items()
    ]
    dim = measured["embedding_dim"]
    isotropic = replace(SOFT, dash=(0, (1, 1.5)))
    lines.append(("isotropic", isotropic, np.array([1, dim]), np.array([1 / dim, 1.0])))
    alt = f"Residual energy; directions that hold 90 %: {_in_words(measured, 'directions_for_90')} of {dim}."
    return ReportFigure(
        "residual-energy",
        "How many directions the residual needs",
        "E(K): share of the residual's energy in its K leading directions. Noise of equal size in all "
        "directions would follow the dotted line; the further a curve lies above it, the fewer directions "
        "matter.",
        (plots.curves("", lines, ("directions K", "share of energy E(K)"), alt),),
    )


def _drift(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    panels: list[PlotPanel] = []
    for entry in measured["strategies"]:
        label = entry["label"]
        if label not in measured["curves"]["drift"]:
            continue
        curve = measured["curves"]["drift"][label]
        alt = (
            f"Phantom drift of {label}, predicted against measured, a point a dimension: cosine "
            f"{shown(value_of(entry, 'drift_cosine'))}, relative error "
            f"{shown(value_of(entry, 'drift_error'))}."
        )
        names = ("second order", "measured")
        panels.append(plots.agreement(label, looks[label], curve["predicted"], curve["measured"], names, alt))
    return ReportFigure(
        "drift",
        "Phantom drift",
        "A point is one dimension of the shift of the mean that scaling rows back to length 1 causes. On "
        "the diagonal the second-order formula is exact.",
        panels,
    )
