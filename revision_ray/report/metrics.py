"""The figures of the report: title, definition, the papers' value, and how numbers are written.

The papers' values are those of arXiv 2602.07026 (sec. 6, app. D-G) at d = 1280, and of arXiv 2605.07825
(sec. 3, app. B.2) where the note says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE = "image"
REALIGN_PAPER, ANISO_PAPER = "arXiv 2602.07026", "arXiv 2605.07825"
_OF_ANISO = f"The paper's figure is from {ANISO_PAPER}."


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the report's tables. `paper`: the papers' value by strategy, or by "image"."""

    key: str
    title: str
    definition: str
    better: str = ""  # "low", "high", or empty if neither is better
    percent: bool = False
    paired: bool = False
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_note: str = ""
    symbol: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table of the report: the metrics that answer one question."""

    title: str
    explanation: str
    metrics: tuple[Metric, ...]


SECTIONS = (
    Section(
        title="How far apart texts and images are",
        explanation="Zero, or an even mix, would mean that nothing tells an aligned text from an image.",
        metrics=(
            Metric(
                key="modality_gap",
                title="Modality gap",
                symbol="G_μ",
                definition="Euclidean distance from the mean aligned text to the mean image; all rows have "
                "length 1, so 2 is the most there can be.",
                better="low",
                paper={"none": 0.3918, "c3": 0.0023, "realign": 2.64e-4},
                paper_note="The paper's are of Bunny captions; raw 0.4276 on DenseFusion, about 0.51 for "
                "long captions; ReAlign 1.39×10⁻⁴ at 100 k rows.",
            ),
            Metric(
                key="fit_gap",
                title="Gap on the fit's own rows",
                definition="The same on the rows that were fitted, as the fit says: it flatters.",
                better="low",
            ),
            Metric(
                key="sampling_floor",
                title="Sampling floor of the gap",
                definition="The gap that two samples of this size would show if their populations had none. "
                "On rows outside the fit a gap below it cannot be told from zero.",
            ),
            Metric(
                key="covariance_gap",
                title="Covariance gap",
                symbol="G_Σ",
                definition="Frobenius norm of the difference of the covariances, over the image's.",
                better="low",
                paper={"none": 0.066},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="angular_js",
                title="Angular JS divergence",
                definition="Jensen-Shannon divergence, in nats (at most 0.693), between the histograms of "
                "pairwise cosines within aligned texts and within images.",
                better="low",
                paper={"c3": 0.19, "realign": 0.0067},
            ),
            Metric(
                key="mixing_rate",
                title="kNN mixing rate",
                definition="Of the k nearest neighbours in both sets together, the share from the other "
                "modality. About 50 % would be a perfect mix.",
                better="high",
                percent=True,
                paper={"none": 0.0032, "c3": 0.0131, "realign": 0.0435},
            ),
            Metric(
                key="origin_entropy_text",
                title="Neighbour origin entropy, texts",
                symbol="M_k^Z",
                definition="Entropy of where an aligned text's k neighbours come from, text or image, over "
                "its maximum: 0 all of one kind, 1 half and half.",
                better="high",
                paper={"realign": 0.357},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="origin_entropy_image",
                title="Neighbour origin entropy, images",
                symbol="M_k^X",
                definition="The same for the neighbours of images.",
                better="high",
                paper={"realign": 0.305},
                paper_note=_OF_ANISO,
            ),
        ),
    ),
    Section(
        title="What alignment keeps of the texts",
        explanation="A map that closes the gap by scrambling meaning is of no use. These compare every text "
        "with itself before alignment.",
        metrics=(
            Metric(
                key="neighbourhood_overlap",
                title="Neighbourhood overlap",
                symbol="Ω_k",
                definition="Share of a text's k nearest texts that are still among its k nearest afterwards.",
                better="high",
                percent=True,
                paper={"blockwise": 0.101, "realign": 0.873},
            ),
            Metric(
                key="displacement_cosine",
                title="Cosine with itself before",
                symbol="Φ",
                definition="Mean cosine between a text before and after.",
                better="high",
                paper={"realign": 0.923},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="cosine_correlation",
                title="Correlation of pairwise cosines",
                symbol="Ψ",
                definition="Correlation, over pairs of texts, of their cosine before and after.",
                better="high",
                paper={"realign": 0.836},
                paper_note=_OF_ANISO,
            ),
        ),
    ),
    Section(
        title="The shape of each cloud",
        explanation="Compare every strategy with the image column: that is the shape to match. Eigenvalues "
        "are those of the centred covariance.",
        metrics=(
            Metric(
                key="trace",
                title="Trace",
                symbol="T",
                definition="Mean squared distance of a row to its own centroid.",
            ),
            Metric(
                key="spectrum_exponent",
                title="Spectrum exponent",
                symbol="α",
                definition="How steeply eigenvalues fall with their rank: minus the slope in a log-log plot "
                "(ranks 10 to min(256, d - 1)). 0 is flat.",
                paper={"none": 1.33, "c3": 1.06, "realign": 1.33, IMAGE: 1.83},
            ),
            Metric(
                key="effective_rank",
                title="Effective rank",
                definition="Number of directions that carry the variance: exponential of the spectrum's "
                "entropy, at most d.",
                paper={"none": 41.0, IMAGE: 57.5},
                paper_note="The paper's texts are short captions; long ones have 52.9.",
            ),
            Metric(
                key="condition_number",
                title="Condition number",
                definition="Largest over smallest eigenvalue.",
                paper={"none": 1.1e3},
            ),
            Metric(
                key="spectral_correlation",
                title="Spectral correlation with images",
                symbol="C_λ",
                definition="Pearson correlation of the logarithms of the two spectra.",
                better="high",
                paper={"none": 0.845},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="subspace_overlap",
                title="Subspace overlap with images",
                symbol="O_q",
                definition="Share of the span of the q leading image directions that the q leading text "
                "directions cover; q/d by chance.",
                better="high",
                paper={"none": 0.441},
                paper_note=f"{_OF_ANISO} It has q = 128, by chance 0.100.",
            ),
        ),
    ),
    Section(
        title="What is left between a text and its own image",
        explanation="From rows that belong together. The mean difference is taken out first; what remains "
        "of each pair is the residual.",
        metrics=(
            Metric(
                key="pair_cosine",
                title="Cosine of a matching pair",
                definition="Mean cosine between an aligned text and its image.",
                better="high",
                paired=True,
            ),
            Metric(
                key="residual_ratio",
                title="Residual ratio",
                definition="Mean distance of a pair after the mean difference is taken out, over before. "
                "1 means that a shift of the mean achieves nothing.",
                paired=True,
                paper={"none": 0.89},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="residual_anisotropy",
                title="Residual anisotropy",
                symbol="A_r",
                definition="Largest eigenvalue of the residual's covariance over their mean. 1 is isotropic.",
                paired=True,
                paper={"none": 28.6},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="effective_dimension",
                title="Effective dimension of the residual",
                symbol="d_eff/d",
                definition="Squared trace over the sum of squared eigenvalues, over d. 1 is isotropic.",
                paired=True,
                paper={"none": 0.284},
                paper_note=_OF_ANISO,
            ),
            Metric(
                key="directions_for_90",
                title="Directions that hold 90 % of the residual",
                definition="Smallest K with E(K) of at least 0.9, out of d.",
                paired=True,
            ),
        ),
    ),
    Section(
        title="The gap in a fixed frame: Δ = β + γ + δ + ζ",
        explanation="U is spanned by the leading directions of both covariances together, V is the rest. "
        "The mean difference has a part in each (β in U, γ in V), and so has what is left of every pair "
        "(δ, ζ).",
        metrics=(
            Metric(
                key="beta",
                title="Mean gap within U",
                symbol="‖β‖",
                definition="Length of the principal mean bias.",
            ),
            Metric(
                key="gamma",
                title="Mean gap within V",
                symbol="‖γ‖",
                definition="Length of the passive orthogonal bias.",
            ),
            Metric(
                key="delta_trace",
                title="Residual energy within U",
                symbol="tr Cov δ",
                definition="Mean squared length of δ.",
                paired=True,
            ),
            Metric(
                key="zeta_trace",
                title="Residual energy within V",
                symbol="tr Cov ζ",
                definition="Mean squared length of ζ.",
                paired=True,
            ),
            Metric(
                key="squared_distance",
                title="Mean squared distance of a pair",
                symbol="E‖Δ‖²",
                definition="The sum ‖β‖² + ‖γ‖² + tr Cov δ + tr Cov ζ, over the pairs.",
                paired=True,
            ),
            Metric(
                key="kappa_u",
                title="Effective condition number of δ",
                symbol="κ_eff on U",
                definition="Largest over smallest eigenvalue of Cov δ, of those that hold the stated share.",
                paired=True,
            ),
            Metric(
                key="kappa_v",
                title="Effective condition number of ζ",
                symbol="κ_eff on V",
                definition="The same for Cov ζ.",
                paired=True,
            ),
            Metric(
                key="gamma_angle",
                title="Angle of γ to the leading direction in V",
                definition="Degrees, 0 to 90; near 90 the bias lies where the residual hardly varies.",
                paired=True,
                paper={"none": 90.0},
                paper_note="The paper says “near 90 degrees”.",
            ),
            Metric(
                key="coupling_norm",
                title="U-V coupling, spectral norm",
                definition="Of the ridge regression of ζ on δ.",
                paired=True,
            ),
            Metric(
                key="coupling_explained",
                title="U-V coupling, explained variance",
                symbol="R²",
                definition="Share of ζ's variance that δ explains.",
                paired=True,
            ),
            Metric(
                key="identity_error",
                title="Largest error of the identities",
                definition="β + γ = m; δ and ζ have mean zero and are orthogonal; energies add up. A check.",
                paired=True,
            ),
        ),
    ),
    Section(
        title="Phantom drift",
        explanation="Scaling rows back to length 1 moves their mean although nobody asked for it. The "
        "second-order formula (paper, sec. 3.4) says how far and where to; the centroid step undoes it.",
        metrics=(
            Metric(
                key="drift_measured",
                title="Drift, measured",
                definition="Length of E[z/‖z‖] - μ/‖μ‖, with z the rows before they are scaled back.",
            ),
            Metric(
                key="drift_predicted",
                title="Drift, second order",
                definition="Length of the predicted vector.",
            ),
            Metric(
                key="drift_cosine",
                title="Cosine of both",
                definition="1: the direction is predicted exactly.",
                better="high",
            ),
            Metric(
                key="drift_error",
                title="Relative error",
                definition="Length of the difference over the measured length.",
                better="low",
            ),
        ),
    ),
)

METRICS = {metric.key: metric for section in SECTIONS for metric in section.metrics}


def find_strategy(measured: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the first column of this strategy."""
    return next((entry for entry in measured["strategies"] if entry["strategy"] == name), None)


def value_of(entry: Mapping[str, Any], key: str) -> float | None:
    """Return the value of the figure `key` of a strategy; None if it was not measured."""
    return entry["figures"].get(key, {}).get("value")


def shown(value: float | None, percent: bool = False) -> str:
    """Format a figure with three significant digits, very small and large ones with a power of ten."""
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
    """Format a figure of the papers with the digits that they give."""
    if percent:
        return f"{100 * value:g} %"
    if abs(value) >= 1e-3:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.10e}".split("e")
    return f"{float(mantissa):g}×10{_superscript(int(exponent))}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
