"""Study of C3's noise: gap, spectrum, mixing and (with labels) the probe against the noise's length. Ray.

arXiv 2602.07026 (table of spectra) finds that the noise flattens the spectrum; it names no sigma.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from revision_ray.align.map_reduce import UniformSample, checked_moments, draw_sample, moments_here
from revision_ray.align.maps import Affine
from revision_ray.align.moments import modality_gap
from revision_ray.align.strategies import StrategyConfig, fit_c3
from revision_ray.core.errors import ConfigError
from revision_ray.geometry import neighbours, probe, spectra
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREY
from revision_ray.studies.cross_modal_probe import CrossModalProbe, ProbeRows, tested
from revision_ray.studies.inputs import (
    StudyStores,
    derived_seed,
    fit_rest,
    gathered,
    num_rows,
    remote,
    sample_rows,
    spectrum,
)


@dataclass(frozen=True, kw_only=True)
class C3Sigma:
    """Settings of the study of C3's noise."""

    lengths: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2])
    """Lengths of the noise, sigma sqrt(d); rows have length 1."""
    k: int = 20
    """Neighbours for the mixing rate."""
    neighbour_rows: int = 2000
    """Held-out rows a side for the mixing rate, at most."""
    num_seeds: int = 3
    """Draws of training rows for the probe."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise ConfigError(f"c3_sigma: lengths are {self.lengths}; expected numbers of 0 or more")
        if min(self.k, self.num_seeds - 1, self.neighbour_rows) < 1:
            raise ConfigError(
                f"c3_sigma: k is {self.k}, neighbour_rows {self.neighbour_rows}, num_seeds {self.num_seeds}; "
                "expected 1, 1 and 2 or more"
            )


def run(
    stores: StudyStores, settings: C3Sigma, rows: ProbeRows | None, probe_settings: CrossModalProbe, seed: int
) -> dict[str, Any]:
    """Measure the held-out texts for each length of the noise, and the probe if `rows` is given."""
    fitted = fit_rest(stores, StrategyConfig(strategy="anchor", seed=seed))
    image = checked_moments(stores.images, "held-out images", second=True, sample=stores.heldout_images)
    dim = stores.texts.embedding_dim
    sigmas = [length / math.sqrt(dim) for length in settings.lengths]
    maps = [fit_c3(fitted.text, fitted.image, noise=sigma) for sigma in sigmas]
    few = _few(stores, settings.neighbour_rows, seed)
    measure = remote(_figures)
    measured = gathered([measure(stores, affine, few, settings.k) for affine in maps])
    curves = {
        "gap": [modality_gap(text, image) for text, _ in measured],
        "alpha": [spectra.spectrum_exponent(spectrum(text)) for text, _ in measured],
        "mixing_rate": [mixing for _, mixing in measured],
    }
    sizes = [num_rows(sample) for sample in few]
    return {
        "lengths": settings.lengths,
        "sigmas": sigmas,
        **curves,
        "image_alpha": spectra.spectrum_exponent(spectrum(image)),
        "mixing_rate_by_chance": neighbours.mixing_rate_by_chance(sizes[1], sizes[0]),
        "k": settings.k,
        "num_heldout_texts": num_rows(stores.heldout_texts),
        "num_heldout_images": num_rows(stores.heldout_images),
        "num_neighbour_rows": sizes,
        "probe": None if rows is None else _probed(rows, maps, settings, probe_settings, seed),
    }


def _few(stores: StudyStores, most: int, seed: int) -> tuple[UniformSample, UniformSample]:
    """Draw equally many rows of both sides that no fit uses."""
    size = min(most, num_rows(stores.heldout_texts), num_rows(stores.heldout_images))
    samples = []
    for place, (store, held) in enumerate(
        ((stores.texts, stores.heldout_texts), (stores.images, stores.heldout_images))
    ):
        fitted = draw_sample(store, store.num_rows, seed, held)
        samples.append(draw_sample(store, size, derived_seed(seed, 3, place), fitted))
    return samples[0], samples[1]


def _figures(
    stores: StudyStores, affine: Affine, few: tuple[UniformSample, UniformSample], k: int
) -> tuple[Any, float]:
    """Return second moments of the mapped held-out texts, and their mixing rate with images."""
    text, _ = moments_here(stores.texts, affine=affine, second=True, sample=stores.heldout_texts)
    ids, rows_ND = sample_rows(stores.texts, few[0])
    _, image_ND = sample_rows(stores.images, few[1])
    union_ND = np.concatenate([image_ND, affine.apply(rows_ND, ids)[0]])
    near_NK = neighbours.nearest_others(union_ND, k)
    return text, float(neighbours.cross_modal_shares(near_NK, len(image_ND)).mean())


def _probed(
    rows: ProbeRows, maps: list[Affine], settings: C3Sigma, probe_settings: CrossModalProbe, seed: int
) -> list[dict[str, Any]]:
    fewer = CrossModalProbe(
        num_train=probe_settings.num_train, num_test=probe_settings.num_test, num_seeds=settings.num_seeds
    )
    scored = tested(rows, {str(place): affine for place, affine in enumerate(maps)}, fewer, seed)
    summaries = [probe.summary(scores, rows.labels.attributes, seed) for scores in scored.values()]
    return [{"accuracy": summary["accuracy"], "nll": summary["nll"]} for summary in summaries]


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            "noise length": length,
            "sigma": sigma,
            "held-out gap": distance,
            "alpha": alpha,
            "mixing rate": mixing,
        }
        for length, sigma, distance, alpha, mixing in zip(
            *(result[key] for key in ("lengths", "sigmas", "gap", "alpha", "mixing_rate")), strict=True
        )
    ]
    for row, probed in zip(rows, result["probe"] or [], strict=bool(result["probe"])):
        row |= {"probe accuracy": probed["accuracy"]["mean"], "probe nll, nats": probed["nll"]["mean"]}
    return rows


def reading(result: dict[str, Any]) -> str:
    text = (
        f"Noise takes alpha of the texts from {result['alpha'][0]:.2f} to {result['alpha'][-1]:.2f} (images "
        f"{result['image_alpha']:.2f}) and the mixing rate from {100 * result['mixing_rate'][0]:.1f} % to "
        f"{100 * result['mixing_rate'][-1]:.1f} % (by chance {100 * result['mixing_rate_by_chance']:.0f} %)."
    )
    if not result["probe"]:
        return text
    losses = [probed["nll"]["mean"] for probed in result["probe"]]
    best = losses.index(min(losses))
    return (
        f"{text} The probe's negative log-likelihood is lowest, {losses[best]:.3f} nats, at noise of length "
        f"{result['lengths'][best]:g}; without noise it is {losses[0]:.3f}."
    )


def figure(result: dict[str, Any]) -> Figure:
    panels = [
        ("gap", "modality gap of held-out rows\n(Euclidean)", 1.0, None),
        ("alpha", "spectrum exponent alpha", 1.0, ("images", result["image_alpha"])),
        ("mixing_rate", f"kNN mixing rate (%), k = {result['k']}", 100.0, None),
    ]
    drawing, grid = plots.new_grid(columns=2, rows=2, width=6.6, height=5.2)
    for axes, (key, label, scale, line) in zip(grid.flat, panels, strict=False):
        axes.plot(result["lengths"], scale * np.array(result[key]), marker="o", color=BLUE)
        if line:
            axes.axhline(line[1], color=GREY, linestyle=":", label=line[0])
            axes.legend()
        axes.set_ylabel(label)
    last = grid.flat[3]
    if result["probe"]:
        plots.draw_intervals(last, result["lengths"], [probed["nll"] for probed in result["probe"]])
        last.set_ylabel("probe on real images:\nnegative log-likelihood (nats)")
    else:
        last.set_axis_off()
        last.text(0.5, 0.5, "no labels, no probe", ha="center", color=GREY)
    for axes in grid.flat:
        axes.set_xlabel("length of the noise, sigma sqrt(d)")
    return drawing
