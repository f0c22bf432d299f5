"""What the papers found, as data: each figure of the report, how to read it, and each qualitative claim.

Figures of arXiv 2602.07026 (sec. 6, app. D-G) at d = 1280, and of arXiv 2605.07825 (sec. 3, app. B.2) where
said. Thresholds turn words such as "near" and "weak" into a test that can fail; they are this project's and
stand beside each claim. Claims about training need a training run, claims about accuracy a probe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from revision_ray.report.verdict import Metric, Section, shown, strategy

IMAGE = "image"
REALIGN_PAPER, ANISO_PAPER = "arXiv 2602.07026", "arXiv 2605.07825"
_OF_ANISO = f"The paper's figure is from {ANISO_PAPER}."

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

# Rows of the papers' diagnostics that need whole experiments of their own.
STUDIES = (
    ("Sample efficiency", "held-out gap against N, 5 trials", "flat after about 10,000 rows a side"),
    ("Accumulator error", "mean in float32 minus mean in float64", "9.6e-8 against 1e-15"),
    ("Domain transfer", "held-out gap by statistics' and evaluation's domain", "in-domain much lower"),
    ("Caption length", "rank, trace, raw gap by length", "long captions raise the raw gap by about 30 %"),
)


Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PaperClaim:
    """`needs`: name of a figure to (strategy or "image", metric, part of its cell)."""

    text: str
    criterion: str
    needs: Mapping[str, tuple[str, str, str]]
    holds: Callable[[Values], bool]
    reason: str
    paper: str = ""


def _of(name: str, metric: str, part: str = "value") -> tuple[str, str, str]:
    return (name, metric, part)


CLAIMS = (
    PaperClaim(
        text="Texts and images lie in regions that are systematically offset.",
        criterion="raw gap more than 3 sampling floors",
        needs={"gap": _of("none", "modality_gap"), "floor": _of("none", "sampling_floor")},
        holds=lambda v: v["gap"] > 3 * v["floor"],
        reason="A temperature that is learnt from a high value can close the gap in training.",
        paper="0.39",
    ),
    PaperClaim(
        text="What is left of a pair without the mean is anisotropic, not noise of equal size everywhere.",
        criterion="A_r at least 3 and d_eff/d at most 0.5",
        needs={"A_r": _of("none", "residual_anisotropy"), "d_eff/d": _of("none", "effective_dimension")},
        holds=lambda v: v["A_r"] >= 3 and v["d_eff/d"] <= 0.5,
        reason="An encoder of few dimensions uses most of them.",
        paper="28.6; 0.284",
    ),
    PaperClaim(
        text="Residuals are strongly anisotropic within U and within V.",
        criterion="effective condition numbers of at least 10",
        needs={"κ on U": _of("none", "kappa_u"), "κ on V": _of("none", "kappa_v")},
        holds=lambda v: min(v["κ on U"], v["κ on V"]) >= 10,
        reason="U takes the directions of large variance, of which a small encoder has few and even ones.",
    ),
    PaperClaim(
        text="Part of the mean gap lies outside the principal subspace.",
        criterion="‖γ‖ more than 3 sampling floors",
        needs={
            "‖γ‖": _of("none", "gamma"),
            "‖β‖": _of("none", "beta"),
            "floor": _of("none", "sampling_floor"),
        },
        holds=lambda v: v["‖γ‖"] > 3 * v["floor"],
        reason="With few dimensions U takes nearly all of them.",
    ),
    PaperClaim(
        text="That part is nearly orthogonal to the direction in which V varies most.",
        criterion="angle of at least 80 degrees",
        needs={"angle": _of("none", "gamma_angle"), "by chance": _of("none", "gamma_angle", "by_chance")},
        holds=lambda v: v["angle"] >= 80,
        reason="In a V of few dimensions a random direction is far from orthogonal, too.",
        paper="near 90",
    ),
    PaperClaim(
        text="Residuals in V hardly depend on those in U.",
        criterion="explained variance of at most 0.1 beyond chance",
        needs={
            "R²": _of("none", "coupling_explained"),
            "by chance": _of("none", "coupling_explained", "by_chance"),
        },
        holds=lambda v: v["R²"] - v["by chance"] <= 0.1,
        reason="The frame diagonalises the sum of both covariances, not that of the pairs' differences.",
    ),
    PaperClaim(
        text="Taking out the mean leaves most of the distance between a text and its image.",
        criterion="residual ratio of at least 0.7",
        needs={"ratio": _of("none", "residual_ratio")},
        holds=lambda v: v["ratio"] >= 0.7,
        reason="Where pairs are matched well the mean is most of what separates them.",
        paper="0.89",
    ),
    PaperClaim(
        text="Both clouds share their dominant directions and the decay of their spectra.",
        criterion="O_q at least twice chance, C_λ at least 0.7",
        needs={
            "O_q": _of("none", "subspace_overlap"),
            "by chance": _of("none", "subspace_overlap", "by_chance"),
            "C_λ": _of("none", "spectral_correlation"),
        },
        holds=lambda v: v["O_q"] >= 2 * v["by chance"] and v["C_λ"] >= 0.7,
        reason="A weak encoder has learnt little that both sides express.",
        paper="0.441 (chance 0.100); 0.845",
    ),
    PaperClaim(
        text="The covariances nearly agree even before alignment; the mean is what differs.",
        criterion="covariance gap of at most 0.2",
        needs={"G_Σ": _of("none", "covariance_gap"), "G_μ": _of("none", "modality_gap")},
        holds=lambda v: v["G_Σ"] <= 0.2,
        reason="Small encoders trained for minutes match pairs by few directions, and spread the two sides "
        "differently in all others. It is what gaussian_ot and blockwise can mend and ReAlign cannot.",
        paper="0.066; 0.392",
    ),
    PaperClaim(
        text="Images vary in more directions than short captions.",
        criterion="effective rank of images above that of texts",
        needs={"images": _of("image", "effective_rank"), "texts": _of("none", "effective_rank")},
        holds=lambda v: v["images"] > v["texts"],
        reason="It depends on the data: rendered scenes vary in less than photographs do.",
        paper="57.5; 41.0",
    ),
    PaperClaim(
        text="The spectrum of images falls more steeply than that of texts.",
        criterion="α of images above α of texts",
        needs={"images": _of("image", "spectrum_exponent"), "texts": _of("none", "spectrum_exponent")},
        holds=lambda v: v["images"] > v["texts"],
        reason="The exponent is over ranks 10 to min(256, d - 1), which is most of a small encoder's tail.",
        paper="1.83; 1.33",
    ),
    PaperClaim(
        text="Normalisation moves the mean as the second-order formula says (Phantom Drift).",
        criterion="cosine of at least 0.95, relative error of at most 0.2",
        needs={"cosine": _of("realign", "drift_cosine"), "error": _of("realign", "drift_error")},
        holds=lambda v: v["cosine"] >= 0.95 and v["error"] <= 0.2,
        reason="The formula is an expansion in the spread over the mean's length, which is not small here.",
    ),
    PaperClaim(
        text="Each step of ReAlign lowers the gap: Anchor, Trace, Centroid.",
        criterion="in this order, on the rows of the fit (others show no order below their sampling floor)",
        needs={n: _of(n, "fit_gap") for n in ("anchor", "anchor_trace", "realign")},
        holds=lambda v: v["anchor"] > v["anchor_trace"] > v["realign"],
        reason="What normalisation does to the mean depends on the texts' shape.",
        paper="0.3918 to 2.64×10⁻⁴",
    ),
    PaperClaim(
        text="ReAlign leaves less of the gap than C3.",
        criterion="in this order, on the rows of the fit",
        needs={n: _of(n, "fit_gap") for n in ("c3", "realign")},
        holds=lambda v: v["realign"] < v["c3"],
        reason="C3 has no centroid step, so what normalisation does to the mean stays.",
        paper="0.0023; 2.64×10⁻⁴",
    ),
    PaperClaim(
        text="ReAlign keeps the spectrum of the texts.",
        criterion="α changes by at most 0.1",
        needs={n: _of(n, "spectrum_exponent") for n in ("none", "realign")},
        holds=lambda v: abs(v["realign"] - v["none"]) <= 0.1,
        reason="Normalisation takes variance out of the direction of the mean.",
        paper="1.33; 1.33",
    ),
    PaperClaim(
        text="C3's isotropic noise flattens the spectrum.",
        criterion="α falls by at least 0.05",
        needs={n: _of(n, "spectrum_exponent") for n in ("none", "c3")},
        holds=lambda v: v["none"] - v["c3"] >= 0.05,
        reason="How much depends on sigma and on the dimension; the paper names no sigma.",
        paper="1.33; 1.06",
    ),
    PaperClaim(
        text="ReAlign comes nearer to the angles within images than C3.",
        criterion="lower angular JS divergence",
        needs={n: _of(n, "angular_js") for n in ("none", "c3", "realign")},
        holds=lambda v: v["realign"] < v["c3"],
        reason="Noise can happen to supply the spread that texts lack.",
        paper="C3 0.19; ReAlign 0.0067",
    ),
    PaperClaim(
        text="ReAlign mixes neighbours more than C3, and C3 more than nothing.",
        criterion="in this order",
        needs={n: _of(n, "mixing_rate") for n in ("none", "c3", "realign")},
        holds=lambda v: v["realign"] > v["c3"] > v["none"],
        reason="Neighbours separate by differences of shape, which neither removes.",
        paper="0.32 %, 1.31 %, 4.35 %",
    ),
    PaperClaim(
        text="ReAlign keeps neighbourhoods.",
        criterion="overlap of at least 0.8",
        needs={"overlap": _of("realign", "neighbourhood_overlap")},
        holds=lambda v: v["overlap"] >= 0.8,
        reason="A long way to move relative to the spread bends the sphere under the texts.",
        paper="0.873",
    ),
    PaperClaim(
        text="Block-wise whitening destroys neighbourhoods.",
        criterion="at most half of ReAlign's overlap",
        needs={n: _of(n, "neighbourhood_overlap") for n in ("blockwise", "realign")},
        holds=lambda v: v["blockwise"] <= v["realign"] / 2,
        reason="With shrinkage (0.1 here) whitening is mild, and small dimensions are estimated well.",
        paper="0.101; 0.873",
    ),
)

# What the paper claims of models that were trained: by the probe's loss, lower is better.
PROBE_CLAIMS = (
    ("C3 trains better than no alignment, ReAlign better than C3.", ("none", "c3", "realign")),
    ("Each step of ReAlign trains better than the one before.", ("anchor", "anchor_trace", "realign")),
    ("Block-wise whitening trains worse than ReAlign.", ("blockwise", "realign")),
)

ELSEWHERE = (
    "While an encoder trains, gradients stay within U up to the rotation of the basis (leak_ref against "
    "sin θ), the bias in V hardly drifts, and residual and gradient spectra correlate (ρ_eig): see the "
    "monitor of jobs/train_encoder.py.",
    "Statistics settle at about 10,000 rows a side, belong to a domain, and want float64; longer captions "
    "raise the raw gap: see jobs/study.py.",
)


def judge(runs: Sequence[Mapping[str, Any]], probes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every claim with our figures over all `runs` (encoders), and what they say about it.

    `probes`: the probe's rows of each run, or None.
    """
    rows = [_judged(claim, runs) for claim in CLAIMS]
    return rows + [_judged_by_probe(text, order, probes) for text, order in PROBE_CLAIMS]


def _judged(claim: PaperClaim, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [{name: _look_up(run, *place) for name, place in claim.needs.items()} for run in runs]
    whole = [{name: value for name, value in values.items() if value is not None} for values in found]
    complete = [values for values in whole if len(values) == len(claim.needs)]
    figures = [
        {"name": name, **_span([values[name] for values in complete]), "percent": METRICS[place[1]].percent}
        for name, place in claim.needs.items()
    ]
    return {
        "claim": claim.text,
        "criterion": claim.criterion,
        "paper": claim.paper,
        "figures": figures if complete else [],
        **_outcome([claim.holds(values) for values in complete], claim.reason),
        "missing": "" if complete else _missing(claim, runs[0]),
    }


def _look_up(run: Mapping[str, Any], name: str, metric: str, part: str) -> float | None:
    entry = run["image"] if name == "image" else strategy(run, name)
    return None if entry is None else entry["figures"].get(metric, {}).get(part)


def _missing(claim: PaperClaim, run: Mapping[str, Any]) -> str:
    for name, metric, part in claim.needs.values():
        entry = run["image"] if name == "image" else strategy(run, name)
        if entry is None:
            return f"needs a fit of {name}"
        if entry["figures"].get(metric, {}).get(part) is None:
            return entry["figures"].get(metric, {}).get("note", "not measured")
    return ""


def _span(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"values": [], "mean": None}
    return {
        "values": list(values),
        "mean": sum(values) / len(values),
        "low": min(values),
        "high": max(values),
    }


def _outcome(held: Sequence[bool], reason: str) -> dict[str, Any]:
    if not held:
        return {"supported": "cannot be told", "num_supporting": 0, "num_runs": 0, "reason": ""}
    words = "yes" if all(held) else "no" if not any(held) else "partly"
    return {
        "supported": words,
        "num_supporting": sum(held),
        "num_runs": len(held),
        "reason": "" if all(held) else reason,
    }


def _judged_by_probe(text: str, order: Sequence[str], probes: Sequence[Any]) -> dict[str, Any]:
    found = [{row["strategy"]: row["loss"] for row in probe} for probe in probes if probe]
    complete = [losses for losses in found if set(order) <= set(losses)]
    held = [all(a[x] > a[y] for x, y in pairwise(order)) for a in complete]
    reason = "A head on few attributes is another task than a language model, and seeds differ, too."
    return {
        "claim": text,
        "criterion": "cross-modal probe: lower loss on real images, in this order",
        "paper": "",
        "figures": [{"name": n, **_span([a[n] for a in complete]), "percent": False} for n in order]
        if complete
        else [],
        **_outcome(held, reason),
        "missing": "" if complete else "needs a cross-modal probe of these strategies (probe=)",
    }


def text_of(figures: Sequence[Mapping[str, Any]]) -> str:
    """ "gap 0.554 (0.541 to 0.560); floor 0.0073": means, and ranges where there are several runs."""
    parts = []
    for figure in figures:
        value = shown(figure["mean"], figure["percent"])
        if len(figure["values"]) > 1:
            value += (
                f" ({shown(figure['low'], figure['percent'])} to {shown(figure['high'], figure['percent'])})"
            )
        parts.append(f"{figure['name']} {value}")
    return "; ".join(parts)
