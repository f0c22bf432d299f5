"""The paper's qualitative claims one by one: our figures, and whether they support the claim.

Thresholds turn words such as "near" and "weak" into something that can fail; they are ours and stand beside
each claim. Claims about training need a training run, claims about accuracy a probe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from revision_ray.geometry.metric import shown
from revision_ray.geometry.paper import METRICS
from revision_ray.geometry.verdict import strategy

Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Claim:
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
    Claim(
        text="Texts and images lie in regions that are systematically offset.",
        criterion="raw gap more than 3 sampling floors",
        needs={"gap": _of("none", "modality_gap"), "floor": _of("none", "sampling_floor")},
        holds=lambda v: v["gap"] > 3 * v["floor"],
        reason="A temperature that is learnt from a high value can close the gap in training.",
        paper="0.39",
    ),
    Claim(
        text="What is left of a pair without the mean is anisotropic, not noise of equal size everywhere.",
        criterion="A_r at least 3 and d_eff/d at most 0.5",
        needs={"A_r": _of("none", "residual_anisotropy"), "d_eff/d": _of("none", "effective_dimension")},
        holds=lambda v: v["A_r"] >= 3 and v["d_eff/d"] <= 0.5,
        reason="An encoder of few dimensions uses most of them.",
        paper="28.6; 0.284",
    ),
    Claim(
        text="Residuals are strongly anisotropic within U and within V.",
        criterion="effective condition numbers of at least 10",
        needs={"κ on U": _of("none", "kappa_u"), "κ on V": _of("none", "kappa_v")},
        holds=lambda v: min(v["κ on U"], v["κ on V"]) >= 10,
        reason="U takes the directions of large variance, of which a small encoder has few and even ones.",
    ),
    Claim(
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
    Claim(
        text="That part is nearly orthogonal to the direction in which V varies most.",
        criterion="angle of at least 80 degrees",
        needs={"angle": _of("none", "gamma_angle"), "by chance": _of("none", "gamma_angle", "by_chance")},
        holds=lambda v: v["angle"] >= 80,
        reason="In a V of few dimensions a random direction is far from orthogonal, too.",
        paper="near 90",
    ),
    Claim(
        text="Residuals in V hardly depend on those in U.",
        criterion="explained variance of at most 0.1 beyond chance",
        needs={
            "R²": _of("none", "coupling_explained"),
            "by chance": _of("none", "coupling_explained", "by_chance"),
        },
        holds=lambda v: v["R²"] - v["by chance"] <= 0.1,
        reason="The frame diagonalises the sum of both covariances, not that of the pairs' differences.",
    ),
    Claim(
        text="Taking out the mean leaves most of the distance between a text and its image.",
        criterion="residual ratio of at least 0.7",
        needs={"ratio": _of("none", "residual_ratio")},
        holds=lambda v: v["ratio"] >= 0.7,
        reason="Where pairs are matched well the mean is most of what separates them.",
        paper="0.89",
    ),
    Claim(
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
    Claim(
        text="The covariances nearly agree even before alignment; the mean is what differs.",
        criterion="covariance gap of at most 0.2",
        needs={"G_Σ": _of("none", "covariance_gap"), "G_μ": _of("none", "modality_gap")},
        holds=lambda v: v["G_Σ"] <= 0.2,
        reason="Small encoders trained for minutes match pairs by few directions, and spread the two sides "
        "differently in all others. It is what gaussian_ot and blockwise can mend and ReAlign cannot.",
        paper="0.066; 0.392",
    ),
    Claim(
        text="Images vary in more directions than short captions.",
        criterion="effective rank of images above that of texts",
        needs={"images": _of("image", "effective_rank"), "texts": _of("none", "effective_rank")},
        holds=lambda v: v["images"] > v["texts"],
        reason="It depends on the data: rendered scenes vary in less than photographs do.",
        paper="57.5; 41.0",
    ),
    Claim(
        text="The spectrum of images falls more steeply than that of texts.",
        criterion="α of images above α of texts",
        needs={"images": _of("image", "spectrum_exponent"), "texts": _of("none", "spectrum_exponent")},
        holds=lambda v: v["images"] > v["texts"],
        reason="The exponent is over ranks 10 to min(256, d - 1), which is most of a small encoder's tail.",
        paper="1.83; 1.33",
    ),
    Claim(
        text="Normalisation moves the mean as the second-order formula says (Phantom Drift).",
        criterion="cosine of at least 0.95, relative error of at most 0.2",
        needs={"cosine": _of("realign", "drift_cosine"), "error": _of("realign", "drift_error")},
        holds=lambda v: v["cosine"] >= 0.95 and v["error"] <= 0.2,
        reason="The formula is an expansion in the spread over the mean's length, which is not small here.",
    ),
    Claim(
        text="Each step of ReAlign lowers the gap: Anchor, Trace, Centroid.",
        criterion="in this order, on the rows of the fit (others show no order below their sampling floor)",
        needs={n: _of(n, "fit_gap") for n in ("anchor", "anchor_trace", "realign")},
        holds=lambda v: v["anchor"] > v["anchor_trace"] > v["realign"],
        reason="What normalisation does to the mean depends on the texts' shape.",
        paper="0.3918 to 2.64×10⁻⁴",
    ),
    Claim(
        text="ReAlign leaves less of the gap than C3.",
        criterion="in this order, on the rows of the fit",
        needs={n: _of(n, "fit_gap") for n in ("c3", "realign")},
        holds=lambda v: v["realign"] < v["c3"],
        reason="C3 has no centroid step, so what normalisation does to the mean stays.",
        paper="0.0023; 2.64×10⁻⁴",
    ),
    Claim(
        text="ReAlign keeps the spectrum of the texts.",
        criterion="α changes by at most 0.1",
        needs={n: _of(n, "spectrum_exponent") for n in ("none", "realign")},
        holds=lambda v: abs(v["realign"] - v["none"]) <= 0.1,
        reason="Normalisation takes variance out of the direction of the mean.",
        paper="1.33; 1.33",
    ),
    Claim(
        text="C3's isotropic noise flattens the spectrum.",
        criterion="α falls by at least 0.05",
        needs={n: _of(n, "spectrum_exponent") for n in ("none", "c3")},
        holds=lambda v: v["none"] - v["c3"] >= 0.05,
        reason="How much depends on sigma and on the dimension; the paper names no sigma.",
        paper="1.33; 1.06",
    ),
    Claim(
        text="ReAlign comes nearer to the angles within images than C3.",
        criterion="lower angular JS divergence",
        needs={n: _of(n, "angular_js") for n in ("none", "c3", "realign")},
        holds=lambda v: v["realign"] < v["c3"],
        reason="Noise can happen to supply the spread that texts lack.",
        paper="C3 0.19; ReAlign 0.0067",
    ),
    Claim(
        text="ReAlign mixes neighbours more than C3, and C3 more than nothing.",
        criterion="in this order",
        needs={n: _of(n, "mixing_rate") for n in ("none", "c3", "realign")},
        holds=lambda v: v["realign"] > v["c3"] > v["none"],
        reason="Neighbours separate by differences of shape, which neither removes.",
        paper="0.32 %, 1.31 %, 4.35 %",
    ),
    Claim(
        text="ReAlign keeps neighbourhoods.",
        criterion="overlap of at least 0.8",
        needs={"overlap": _of("realign", "neighbourhood_overlap")},
        holds=lambda v: v["overlap"] >= 0.8,
        reason="A long way to move relative to the spread bends the sphere under the texts.",
        paper="0.873",
    ),
    Claim(
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


def _judged(claim: Claim, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _missing(claim: Claim, run: Mapping[str, Any]) -> str:
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
