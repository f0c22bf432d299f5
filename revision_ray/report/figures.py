"""The figures of a report, drawn from its measurements, and the figure of gap dynamics.

The dynamics figure is the paper's Figure 1 (arXiv 2602.07026 sec. 3), drawn from dynamics.jsonl. The same
records give the same bytes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from revision_ray.core import storage
from revision_ray.core.errors import DataError
from revision_ray.report import plots
from revision_ray.report.claims import METRICS
from revision_ray.report.plots import (
    IMAGE,
    PARTS,
    SOFT,
    CurveStyle,
    PlotPanel,
    ReportFigure,
    rendered,
    styles,
)
from revision_ray.report.verdict import shown, value_of


def every_figure(measured: Mapping[str, Any]) -> list[ReportFigure]:
    """The figures that these measurements allow, in the order of the page."""
    looks = styles([(entry["label"], entry["strategy"]) for entry in measured["strategies"]])
    found = [
        _at_a_glance(measured, looks),
        _scatter(measured, looks),
        _cosines(measured, looks),
        _spectra(measured, looks),
    ]
    if measured["curves"]["residual_energy"]:
        found += [_parts(measured), _residual_energy(measured, looks)]
    if measured["curves"]["drift"]:
        found.append(_drift(measured, looks))
    return found


def _told(measured: Mapping[str, Any], key: str) -> str:
    """ "none 0.554, realign 0.0003": the figure of every strategy, in words."""
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
                   alt=f"Modality gap by strategy: {_told(measured, 'modality_gap')}."),
        plots.dots("Covariance gap", "relative difference", rows("covariance_gap"),
                   alt=f"Covariance gap by strategy: {_told(measured, 'covariance_gap')}."),
        plots.dots("Neighbours of the other kind", "kNN mixing rate, %", rows("mixing_rate"), percent=True,
                   marks=[(chance, "one cloud")] if chance else (),
                   alt=f"Mixing rate by strategy: {_told(measured, 'mixing_rate')}."),
        plots.dots("Neighbours kept", "overlap with before, %", rows("neighbourhood_overlap"), percent=True,
                   alt=f"Neighbourhood overlap by strategy: {_told(measured, 'neighbourhood_overlap')}."),
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
    """Two clouds without axes for the first screen: as they are, and after the fit that is spoken of."""
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
    found = measured["curves"]
    edges = [_filled(counts) for group in ("cosines", "across") for counts in found[group].values()]
    low, high = min(e[0] for e in edges), max(e[1] for e in edges)
    panels = []
    for entry in measured["strategies"]:
        label = entry["label"]
        lines = [
            ("within images", IMAGE, *_density(found["cosines"]["image"], low, high)),
            ("within texts", looks[label], *_density(found["cosines"][label], low, high)),
            ("text to another's image", CurveStyle("soft", SOFT.light, SOFT.dark, (0, (2, 1.5))),
             *_density(found["across"][label], low, high)),
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
        " The dotted vertical line is the mean cosine of a text and its own image." if found["pairs"] else ""
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
    """First and last bin that hold more than stray cosines."""
    places = np.flatnonzero(np.asarray(counts) > 2e-4 * sum(counts))
    return int(places[0]), int(places[-1])


def _density(counts: Sequence[int], low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin centres and density, two of the fine bins together."""
    values = np.asarray(counts, float)
    width = 2 / len(values)
    values = values.reshape(-1, 2).mean(axis=1) / (values.sum() * width)
    centres = -1 + width * (2 * np.arange(len(values)) + 1)
    chosen = slice(max(low // 2 - 1, 0), high // 2 + 2)
    return centres[chosen], values[chosen]


def _spectra(measured: Mapping[str, Any], looks: Mapping[str, CurveStyle]) -> ReportFigure:
    found = measured["curves"]["spectra"]
    lines = []
    for label, values in found.items():
        spectrum = np.asarray(values)
        spectrum = spectrum[spectrum > spectrum[0] * 1e-12] / spectrum.sum()
        style = IMAGE if label == "image" else looks[label]
        lines.append(
            ("images" if label == "image" else label, style, np.arange(1, len(spectrum) + 1), spectrum)
        )
    alt = f"Spectra of the covariances; exponents: {_told(measured, 'spectrum_exponent')}."
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
    alt = f"Mean squared distance of a pair by strategy: {_told(measured, 'squared_distance')}."
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
    found = measured["curves"]["residual_energy"]
    lines = [
        (label, looks[label], np.arange(1, len(energy) + 1), np.asarray(energy))
        for label, energy in found.items()
    ]
    dim = measured["embedding_dim"]
    isotropic = CurveStyle("soft", SOFT.light, SOFT.dark, (0, (1, 1.5)))
    lines.append(("isotropic", isotropic, np.array([1, dim]), np.array([1 / dim, 1.0])))
    alt = f"Residual energy; directions that hold 90 %: {_told(measured, 'directions_for_90')} of {dim}."
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


Records = Sequence[dict[str, Any]]
BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9730d", "#2f8f5b", "#b3262e", "#6b7280"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "gap dynamics",  # else the ids in the file are random
    "svg.fonttype": "none",
}


def read_records(uri: str) -> list[dict[str, Any]]:
    """The records of a dynamics.jsonl, in the order of steps.

    Raises:
        DataError: nothing there, no records, or a line that is none.
    """
    records = []
    for number, line in enumerate(storage.read_bytes(uri).decode().splitlines(), 1):
        try:
            record = json.loads(line)
            whole = {"step", "gap_norm", "late"} <= record.keys()
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise DataError(
                f"{uri}: line {number} is no record of gap dynamics; name the dynamics.jsonl that "
                "jobs/train_encoder.py writes"
            )
        records.append(record)
    if not records:
        raise DataError(f"{uri}: holds no records; train with monitor.every_steps above 0")
    return sorted(records, key=lambda record: record["step"])


def draw_file(records_uri: str, output: str) -> list[str]:
    """The figure of the records at `records_uri` stands at OUTPUT.png and OUTPUT.svg; both URIs."""
    images = draw(read_records(records_uri))
    uris = [f"{output}.{form}" for form in images]
    for uri, content in zip(uris, images.values(), strict=True):
        storage.write_bytes(uri, content)
    return uris


def draw(records: Records) -> dict[str, bytes]:
    """{"png": bytes, "svg": bytes} of the figure of `records`."""
    # Not the style of whoever draws; but a backend, once set, would stay.
    style: Any = {**matplotlib.rcParamsDefault, **_STYLE}
    del style["backend"]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13.5, 10.5), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid: Any = figure.subplots(3, 3)
        for axes, panel in zip(grid.flat, _PANELS, strict=True):
            panel(axes, records)
        figure.suptitle(_title(records), fontsize=11, x=0.01, ha="left")
        png = rendered(figure, "png", dpi=130)
        figure.set_layout_engine("none")  # places are found; finding them again takes as long as drawing
        return {"png": png, "svg": rendered(figure, "svg")}


def _title(records: Records) -> str:
    last = records[-1]
    frozen = last["frozen_at"]
    frame = f"frozen at step {frozen}" if frozen is not None else "not frozen yet"
    return (
        f"The modality gap while the encoder trains. {last['num_probe']:,} held-out pairs, d = "
        f"{last['embedding_dim']}; U holds {last['energy']:.0%} of Cov(image) + Cov(text): rank "
        f"{last['rank']}, {frame} (dashed line)"
    )


# --- panels -----------------------------------------------------------------------------------------------


def _biases(axes: Axes, records: Records) -> None:
    axes.set_title("Mean gap m = β + γ")
    _line(axes, records, "gap_norm", "‖m‖, the modality gap", GREY)
    _line(axes, records, "beta_norm", "‖β‖, its part in U (PMB)", BLUE)
    _line(axes, records, "gamma_norm", "‖γ‖, its part in V (POB)", ORANGE)
    _finish(axes, records, "Euclidean norm", bottom=0)


def _leak(axes: Axes, records: Records) -> None:
    axes.set_title("Gradients outside U: leak_ref")
    _line(axes, records, "leak_ref", "leak_ref: gradients in V", BLUE)
    _line(axes, records, "sin_theta", "sin θ of U and U now", ORANGE, only_frozen=True)
    _line(axes, records, "leak_isotropic", "isotropic gradients", GREY, style=":")
    _finish(axes, records, "share of the gradients' RMS, sine", bottom=0, top=1.05)


def _drift_panel(axes: Axes, records: Records) -> None:
    axes.set_title("Drift and stability of γ (POB)")
    _line(axes, records, "pob_drift", "drift ‖γ − γ(t₀)‖ / ‖γ(t₀)‖", BLUE)
    _line(axes, records, "pob_stability", "stability: cosine of γ with the probe before", ORANGE)
    _finish(axes, records, "relative change, cosine")


def _condition(axes: Axes, records: Records) -> None:
    share = records[-1]["kappa_energy"]
    axes.set_title(f"Anisotropy: κ_eff ({share:.0%} of the energy)")
    for side, colour in (("u", BLUE), ("v", ORANGE)):
        residual = {"u": "δ in U", "v": "ζ in V"}[side]
        _line(axes, records, f"kappa_eff_{side}", f"{residual}, at each probe", colour, alpha=0.45)
        _line(axes, records, f"kappa_eff_{side}", f"{residual}, covariances averaged", colour, late=True)
    axes.set_yscale("log")
    _finish(axes, records, "effective condition number", bottom=1)


def _rho(axes: Axes, records: Records) -> None:
    axes.set_title("Residual and gradients in U: ρ_eig")
    _line(axes, records, "rho_eig", "at each probe", BLUE, alpha=0.45)
    _line(axes, records, "rho_eig", "covariances averaged", BLUE, late=True)
    known = [record["rho_eig"] for record in records if record["rho_eig"] is not None]
    label = "correlation of the eigenvalues\nof Cov(δ) and gradients"
    _finish(axes, records, label, bottom=min([-0.02, *known]), top=1.05)


def _angle(axes: Axes, records: Records) -> None:
    axes.set_title("γ against the variance in V")
    _line(axes, records, "gamma_angle_degrees", "at each probe", BLUE, alpha=0.45)
    _line(axes, records, "gamma_angle_degrees", "averaged", BLUE, late=True)
    _line(axes, records, "gamma_angle_by_chance_degrees", "random direction", GREY, style=":")
    _finish(axes, records, "angle to the first eigenvector\nof Cov(ζ), degrees", bottom=0, top=95)


def _traces(axes: Axes, records: Records) -> None:
    axes.set_title("Traces: sides and residuals")
    _line(axes, records, "trace_image", "Cov(image)", BLUE)
    _line(axes, records, "trace_text", "Cov(text)", ORANGE)
    _line(axes, records, "trace_delta", "Cov(δ): residual in U", GREEN)
    _line(axes, records, "trace_zeta", "Cov(ζ): residual in V", RED)
    _finish(axes, records, "trace of the covariance", bottom=0)


def _spectra_panel(axes: Axes, records: Records) -> None:
    late = next((record["late"] for record in reversed(records) if record["late"]), None)
    source = late or records[-1]
    behind = f"average of the last {late['num_probes']} probes" if late else "last probe"
    axes.set_title(f"Spectra, {behind}")
    named = (
        ("delta_eigenvalues", "Cov(δ) in U", BLUE),
        ("gradient_eigenvalues", "gradients in U", GREEN),
        ("zeta_eigenvalues", "Cov(ζ) in V", ORANGE),
    )
    for key, label, colour in named:
        values = np.array(source[key] or [])
        if values.sum() > 0:
            kept = values[values > values[0] * 1e-12] / values[0]
            axes.plot(np.arange(1, len(kept) + 1), kept, color=colour, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue over the largest")
    axes.legend()


def _loss(axes: Axes, records: Records) -> None:
    axes.set_title("Training loss")
    _line(axes, records, "train_loss", "InfoNCE, mean since the probe before", BLUE)
    _finish(axes, records, "loss, nats")


_PANELS: tuple[Callable[[Axes, Records], None], ...] = (
    _biases, _leak, _drift_panel, _condition, _rho, _angle, _traces, _spectra_panel, _loss,
)  # fmt: skip


# --- parts of a panel -------------------------------------------------------------------------------------


def _line(
    axes: Axes,
    records: Records,
    key: str,
    label: str,
    colour: str,
    *,
    style: str = "-",
    alpha: float = 1.0,
    late: bool = False,
    only_frozen: bool = False,
) -> None:
    """`key` over steps, with gaps where there is none; `late`: of the averaged covariances."""
    if only_frozen:
        records = [record for record in records if record["frozen"]]
    sources = [(record["late"] or {}) if late else record for record in records]
    values = [source.get(key) for source in sources]
    points = np.array([np.nan if value is None else value for value in values], np.float64)
    if np.isfinite(points).any():
        steps = [record["step"] for record in records]
        marker = "o" if np.isfinite(points).sum() == 1 else None  # one point makes no line
        axes.plot(steps, points, style, color=colour, label=label, alpha=alpha, marker=marker)


def _finish(
    axes: Axes, records: Records, ylabel: str, *, bottom: float | None = None, top: float | None = None
) -> None:
    frozen = records[-1]["frozen_at"]
    if frozen is not None:
        axes.axvline(frozen, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="step of the optimizer", ylabel=ylabel)
    axes.set_xlim(0, max(records[-1]["step"], 1))
    axes.set_ylim(bottom=bottom, top=top)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
