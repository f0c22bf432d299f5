"""The papers' qualitative claims as data, and whether measured figures support them.

Each claim has numerical conditions that turn words such as "near" and "weak" into a test that can fail. The
thresholds are this project's; the report shows them beside the claim.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from revision_ray.report.metrics import IMAGE, METRICS, find_strategy, shown

PROBE_LOSS = "probe_loss"  # the metric of a claim about the cross-modal probe's rows
_RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class Condition(NamedTuple):
    """`figure` `relation` `threshold` + `factor` * `other`; without `other`, the plain threshold."""

    figure: str
    relation: str
    threshold: float = 0.0
    factor: float = 1.0
    other: str = ""


@dataclass(frozen=True, kw_only=True)
class PaperClaim:
    """A claim of the papers.

    `needs`: the figures of the claim by the name they are shown with, each as "STRATEGY.METRIC" or
    "STRATEGY.METRIC.PART" (a part of the figure's cell; "image" is a strategy here). The claim holds if all
    conditions of `holds` are met. `reason`: why an encoder may not show it.
    """

    text: str
    criterion: str
    needs: Mapping[str, str]
    holds: tuple[Condition, ...]
    reason: str
    paper: str = ""


def _falling(*names: str) -> tuple[Condition, ...]:
    """Each figure is larger than the next."""
    return tuple(Condition(one, ">", other=other) for one, other in pairwise(names))


CLAIMS = (
    PaperClaim(
        text="Texts and images lie in regions that are systematically offset.",
        criterion="raw gap more than 3 sampling floors",
        needs={"gap": "none.modality_gap", "floor": "none.sampling_floor"},
        holds=(Condition("gap", ">", factor=3, other="floor"),),
        reason="A temperature that is learnt from a high value can close the gap in training.",
        paper="0.39",
    ),
    PaperClaim(
        text="What is left of a pair without the mean is anisotropic, not noise of equal size everywhere.",
        criterion="A_r at least 3 and d_eff/d at most 0.5",
        needs={"A_r": "none.residual_anisotropy", "d_eff/d": "none.effective_dimension"},
        holds=(Condition("A_r", ">=", 3), Condition("d_eff/d", "<=", 0.5)),
        reason="An encoder of few dimensions uses most of them.",
        paper="28.6; 0.284",
    ),
    PaperClaim(
        text="Residuals are strongly anisotropic within U and within V.",
        criterion="effective condition numbers of at least 10",
        needs={"κ on U": "none.kappa_u", "κ on V": "none.kappa_v"},
        holds=(Condition("κ on U", ">=", 10), Condition("κ on V", ">=", 10)),
        reason="U takes the directions of large variance, of which a small encoder has few and even ones.",
    ),
    PaperClaim(
        text="Part of the mean gap lies outside the principal subspace.",
        criterion="‖γ‖ more than 3 sampling floors",
        needs={"‖γ‖": "none.gamma", "‖β‖": "none.beta", "floor": "none.sampling_floor"},
        holds=(Condition("‖γ‖", ">", factor=3, other="floor"),),
        reason="With few dimensions U takes nearly all of them.",
    ),
    PaperClaim(
        text="That part is nearly orthogonal to the direction in which V varies most.",
        criterion="angle of at least 80 degrees",
        needs={"angle": "none.gamma_angle", "by chance": "none.gamma_angle.by_chance"},
        holds=(Condition("angle", ">=", 80),),
        reason="In a V of few dimensions a random direction is far from orthogonal, too.",
        paper="near 90",
    ),
    PaperClaim(
        text="Residuals in V hardly depend on those in U.",
        criterion="explained variance of at most 0.1 beyond chance",
        needs={"R²": "none.coupling_explained", "by chance": "none.coupling_explained.by_chance"},
        holds=(Condition("R²", "<=", 0.1, other="by chance"),),
        reason="The frame diagonalises the sum of both covariances, not that of the pairs' differences.",
    ),
    PaperClaim(
        text="Taking out the mean leaves most of the distance between a text and its image.",
        criterion="residual ratio of at least 0.7",
        needs={"ratio": "none.residual_ratio"},
        holds=(Condition("ratio", ">=", 0.7),),
        reason="Where pairs are matched well the mean is most of what separates them.",
        paper="0.89",
    ),
    PaperClaim(
        text="Both clouds share their dominant directions and the decay of their spectra.",
        criterion="O_q at least twice chance, C_λ at least 0.7",
        needs={
            "O_q": "none.subspace_overlap",
            "by chance": "none.subspace_overlap.by_chance",
            "C_λ": "none.spectral_correlation",
        },
        holds=(Condition("O_q", ">=", factor=2, other="by chance"), Condition("C_λ", ">=", 0.7)),
        reason="A weak encoder has learnt little that both sides express.",
        paper="0.441 (chance 0.100); 0.845",
    ),
    PaperClaim(
        text="The covariances nearly agree even before alignment; the mean is what differs.",
        criterion="covariance gap of at most 0.2",
        needs={"G_Σ": "none.covariance_gap", "G_μ": "none.modality_gap"},
        holds=(Condition("G_Σ", "<=", 0.2),),
        reason="Small encoders trained for minutes match pairs by few directions, and spread the two sides "
        "differently in all others. It is what gaussian_ot and blockwise can mend and ReAlign cannot.",
        paper="0.066; 0.392",
    ),
    PaperClaim(
        text="Images vary in more directions than short captions.",
        criterion="effective rank of images above that of texts",
        needs={"images": "image.effective_rank", "texts": "none.effective_rank"},
        holds=_falling("images", "texts"),
        reason="It depends on the data: rendered scenes vary in less than photographs do.",
        paper="57.5; 41.0",
    ),
    PaperClaim(
        text="The spectrum of images falls more steeply than that of texts.",
        criterion="α of images above α of texts",
        needs={"images": "image.spectrum_exponent", "texts": "none.spectrum_exponent"},
        holds=_falling("images", "texts"),
        reason="The exponent is over ranks 10 to min(256, d - 1), which is most of a small encoder's tail.",
        paper="1.83; 1.33",
    ),
    PaperClaim(
        text="Normalisation moves the mean as the second-order formula says (Phantom Drift).",
        criterion="cosine of at least 0.95, relative error of at most 0.2",
        needs={"cosine": "realign.drift_cosine", "error": "realign.drift_error"},
        holds=(Condition("cosine", ">=", 0.95), Condition("error", "<=", 0.2)),
        reason="The formula is an expansion in the spread over the mean's length, which is not small here.",
    ),
    PaperClaim(
        text="Each step of ReAlign lowers the gap: Anchor, Trace, Centroid.",
        criterion="in this order, on the rows of the fit (others show no order below their sampling floor)",
        needs={n: f"{n}.fit_gap" for n in ("anchor", "anchor_trace", "realign")},
        holds=_falling("anchor", "anchor_trace", "realign"),
        reason="What normalisation does to the mean depends on the texts' shape.",
        paper="0.3918 to 2.64×10⁻⁴",
    ),
    PaperClaim(
        text="ReAlign leaves less of the gap than C3.",
        criterion="in this order, on the rows of the fit",
        needs={n: f"{n}.fit_gap" for n in ("c3", "realign")},
        holds=_falling("c3", "realign"),
        reason="C3 has no centroid step, so what normalisation does to the mean stays.",
        paper="0.0023; 2.64×10⁻⁴",
    ),
    PaperClaim(
        text="ReAlign keeps the spectrum of the texts.",
        criterion="α changes by at most 0.1",
        needs={n: f"{n}.spectrum_exponent" for n in ("none", "realign")},
        holds=(
            Condition("realign", "<=", 0.1, other="none"),
            Condition("realign", ">=", -0.1, other="none"),
        ),
        reason="Normalisation takes variance out of the direction of the mean.",
        paper="1.33; 1.33",
    ),
    PaperClaim(
        text="C3's isotropic noise flattens the spectrum.",
        criterion="α falls by at least 0.05",
        needs={n: f"{n}.spectrum_exponent" for n in ("none", "c3")},
        holds=(Condition("c3", "<=", -0.05, other="none"),),
        reason="How much depends on sigma and on the dimension; the paper names no sigma.",
        paper="1.33; 1.06",
    ),
    PaperClaim(
        text="ReAlign comes nearer to the angles within images than C3.",
        criterion="lower angular JS divergence",
        needs={n: f"{n}.angular_js" for n in ("none", "c3", "realign")},
        holds=_falling("c3", "realign"),
        reason="Noise can happen to supply the spread that texts lack.",
        paper="C3 0.19; ReAlign 0.0067",
    ),
    PaperClaim(
        text="ReAlign mixes neighbours more than C3, and C3 more than nothing.",
        criterion="in this order",
        needs={n: f"{n}.mixing_rate" for n in ("none", "c3", "realign")},
        holds=_falling("realign", "c3", "none"),
        reason="Neighbours separate by differences of shape, which neither removes.",
        paper="0.32 %, 1.31 %, 4.35 %",
    ),
    PaperClaim(
        text="ReAlign keeps neighbourhoods.",
        criterion="overlap of at least 0.8",
        needs={"overlap": "realign.neighbourhood_overlap"},
        holds=(Condition("overlap", ">=", 0.8),),
        reason="A long way to move relative to the spread bends the sphere under the texts.",
        paper="0.873",
    ),
    PaperClaim(
        text="Block-wise whitening destroys neighbourhoods.",
        criterion="at most half of ReAlign's overlap",
        needs={n: f"{n}.neighbourhood_overlap" for n in ("blockwise", "realign")},
        holds=(Condition("blockwise", "<=", factor=0.5, other="realign"),),
        reason="With shrinkage (0.1 here) whitening is mild, and small dimensions are estimated well.",
        paper="0.101; 0.873",
    ),
    # What the paper claims of trained models is judged by the probe's loss, where lower is better.
    *(
        PaperClaim(
            text=text,
            criterion="cross-modal probe: lower loss on real images, in this order",
            needs={name: f"{name}.{PROBE_LOSS}" for name in order},
            holds=_falling(*order),
            reason="A head on few attributes is another task than a language model, and seeds differ, too.",
        )
        for text, order in (
            ("C3 trains better than no alignment, ReAlign better than C3.", ("none", "c3", "realign")),
            (
                "Each step of ReAlign trains better than the one before.",
                ("anchor", "anchor_trace", "realign"),
            ),
            ("Block-wise whitening trains worse than ReAlign.", ("blockwise", "realign")),
        )
    ),
)

ELSEWHERE = (
    "While an encoder trains, gradients stay within U up to the rotation of the basis (leak_ref against "
    "sin θ), the bias in V hardly drifts, and residual and gradient spectra correlate (ρ_eig): see the "
    "monitor of jobs/train_encoder.py.",
    "Statistics settle at about 10,000 rows a side, belong to a domain, and want float64; longer captions "
    "raise the raw gap: see jobs/study.py.",
)

# Rows of the papers' diagnostics that need whole experiments of their own.
STUDIES = (
    ("Sample efficiency", "held-out gap against N, 5 trials", "flat after about 10,000 rows a side"),
    ("Accumulator error", "mean in float32 minus mean in float64", "9.6e-8 against 1e-15"),
    ("Domain transfer", "held-out gap by statistics' and evaluation's domain", "in-domain much lower"),
    ("Caption length", "rank, trace, raw gap by length", "long captions raise the raw gap by about 30 %"),
)


def judge(
    runs: Sequence[Mapping[str, Any]], probes: Sequence[Sequence[Mapping[str, Any]] | None]
) -> list[dict[str, Any]]:
    """Judge every claim on all `runs` (encoders); `probes` holds the rows of each run's probe, or None."""
    return [_judge_claim(claim, runs, probes) for claim in CLAIMS]


def holds(claim: PaperClaim, values: Mapping[str, float]) -> bool:
    """Return whether the figures `values`, by name, meet all conditions of the claim."""
    return all(
        _RELATIONS[c.relation](values[c.figure], c.threshold + (c.factor * values[c.other] if c.other else 0))
        for c in claim.holds
    )


def _judge_claim(
    claim: PaperClaim, runs: Sequence[Mapping[str, Any]], probes: Sequence[Any]
) -> dict[str, Any]:
    measured = [
        {name: _look_up(run, probe, place) for name, place in claim.needs.items()}
        for run, probe in zip(runs, probes, strict=True)
    ]
    complete = [
        {name: value for name, (value, _) in values.items() if value is not None} for values in measured
    ]
    complete = [values for values in complete if len(values) == len(claim.needs)]
    verdicts = [holds(claim, values) for values in complete]
    supported = "cannot be told"
    if verdicts:
        supported = "yes" if all(verdicts) else "partly" if any(verdicts) else "no"
    figures = []
    for name, place in claim.needs.items() if complete else ():
        numbers = [values[name] for values in complete]
        metric = METRICS.get(place.split(".")[1])
        figures.append(
            {"name": name, "values": numbers, "mean": sum(numbers) / len(numbers), "low": min(numbers),
             "high": max(numbers), "percent": metric is not None and metric.percent}
        )  # fmt: skip
    return {
        "claim": claim.text,
        "criterion": claim.criterion,
        "paper": claim.paper,
        "figures": figures,
        "supported": supported,
        "num_supporting": sum(verdicts),
        "num_runs": len(verdicts),
        "reason": "" if all(verdicts) else claim.reason,
        "missing": "" if complete else next(note for value, note in measured[0].values() if value is None),
    }


def _look_up(run: Mapping[str, Any], probe: Any, place: str) -> tuple[float | None, str]:
    """Return the value of a figure, or None and why it was not measured."""
    name, metric, *part = place.split(".")
    if metric == PROBE_LOSS:
        losses = {row["strategy"]: row["loss"] for row in probe or ()}
        return losses.get(name), "needs a cross-modal probe of these strategies (probe=)"
    entry = run["image"] if name == IMAGE else find_strategy(run, name)
    if entry is None:
        return None, f"needs a fit of {name}"
    cell = entry["figures"].get(metric, {})
    return cell.get(part[0] if part else "value"), cell.get("note", "not measured")


def text_of(figures: Sequence[Mapping[str, Any]]) -> str:
    """Write figures as "gap 0.554 (0.541 to 0.560); floor 0.0073": means, and ranges of several runs."""
    parts = []
    for figure in figures:
        value = shown(figure["mean"], figure["percent"])
        if len(figure["values"]) > 1:
            value += (
                f" ({shown(figure['low'], figure['percent'])} to {shown(figure['high'], figure['percent'])})"
            )
        parts.append(f"{figure['name']} {value}")
    return "; ".join(parts)
