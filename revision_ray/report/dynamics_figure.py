"""The figure of gap dynamics in training, drawn from dynamics.jsonl: Figure 1 of arXiv 2602.07026."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from revision_ray.core import storage
from revision_ray.core.errors import DataError
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREEN, GREY, ORANGE, RED

Records = Sequence[dict[str, Any]]


def read_records(uri: str) -> list[dict[str, Any]]:
    """Read the records of a dynamics.jsonl, in the order of steps.

    Raises:
        DataError: the file is missing, has no records, or a line is not a record.
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
                f"{uri}: line {number} is not a record of gap dynamics; name the dynamics.jsonl that "
                "jobs/train_encoder.py writes"
            )
        records.append(record)
    if not records:
        raise DataError(f"{uri}: holds no records; train with monitor.every_steps above 0")
    return sorted(records, key=lambda record: record["step"])


def draw_file(records_uri: str, output: str) -> list[str]:
    """Draw the records at `records_uri`; write OUTPUT.png and OUTPUT.svg and return both URIs."""
    images = draw(read_records(records_uri))
    uris = [f"{output}.{form}" for form in images]
    for uri, content in zip(uris, images.values(), strict=True):
        storage.write_bytes(uri, content)
    return uris


def draw(records: Records) -> dict[str, bytes]:
    """Return the files of the figure of `records`, {"png": bytes, "svg": bytes}."""
    return plots.image_files(lambda: _draw_panels(records))


def _draw_panels(records: Records) -> Figure:
    figure, grid = plots.new_grid(3, 3, width=13.5, height=10.5)
    for axes, panel in zip(grid.flat, _PANELS, strict=True):
        panel(axes, records)
    figure.suptitle(_title(records), fontsize=11, x=0.01, ha="left")
    return figure


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


def _drift(axes: Axes, records: Records) -> None:
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


def _spectra(axes: Axes, records: Records) -> None:
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
    _biases, _leak, _drift, _condition, _rho, _angle, _traces, _spectra, _loss,
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
    """Draw `key` over steps, with gaps where it is None; `late`: of the averaged covariances."""
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
