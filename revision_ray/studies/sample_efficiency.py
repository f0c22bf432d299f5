"""Study of sample efficiency: the held-out gap against the number of rows of the fit. Ray.

arXiv 2602.07026, app. E.1.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from revision_ray.align.alignment import gap_floor, sampling_floor
from revision_ray.align.map_reduce import checked_moments, moments_here
from revision_ray.align.strategies import STRATEGIES, StrategyConfig
from revision_ray.core.errors import ConfigError
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREY, ORANGE
from revision_ray.studies.inputs import (
    StudyStores,
    derived_seed,
    fit_here,
    gathered,
    num_rows,
    remote,
    sizes_for,
)

SIZES = [100, 500, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000]
"""Rows a side of the paper's fits."""


@dataclass(frozen=True, kw_only=True)
class SampleEfficiency:
    """Settings of the study of sample efficiency: fits on few and many rows, measured on held-out rows."""

    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    """Rows a side of a fit; limited to the rows of the stores."""
    trials: int = 5
    """Fits of each size, each on another sample."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 2 or self.trials < 2:
            raise ConfigError(
                f"sample_efficiency: sizes are {self.sizes} and trials {self.trials}; expected sizes of 2 or "
                "more, and 2 trials or more (their spread is reported)"
            )


def run(
    stores: StudyStores, strategy: StrategyConfig, settings: SampleEfficiency, seed: int
) -> dict[str, Any]:
    """Measure mean and standard deviation of the held-out gap for each size, with one Ray task a fit.

    `expected` is what sampling alone predicts: sqrt(sum of T (1/N + 1/M) over both sides) for N rows of the
    fit and M held-out rows. It is given for strategies that end in a centroid step; others have a bias.

    Raises:
        DataError: there are fewer rows than the smallest size.
    """
    sizes = sizes_for(settings.sizes, stores.num_rest, "sample_efficiency")
    image = checked_moments(stores.images, "held-out images", sample=stores.heldout_images)
    fitted = remote(_heldout_gap)
    places = [(size, trial) for size in sizes for trial in range(settings.trials)]
    results = gathered(
        [
            fitted(stores, strategy, size, derived_seed(seed, size, trial), image.centroid)
            for size, trial in places
        ]
    )
    gaps = np.array([gap for gap, _ in results]).reshape(len(sizes), settings.trials)
    text = results[-1][1]  # aligned held-out texts, from a fit on the most rows
    expected = [
        math.hypot(*(sampling_floor(side.trace, side.count, size) for side in (text, image)))
        for size in sizes
    ]
    return {
        "strategy": strategy.strategy,
        "num_heldout_texts": num_rows(stores.heldout_texts),
        "num_heldout_images": num_rows(stores.heldout_images),
        "sizes": sizes,
        "gaps": gaps.tolist(),
        "mean": gaps.mean(1).tolist(),
        "sd": gaps.std(1, ddof=1).tolist(),
        "expected": expected if STRATEGIES[strategy.strategy].centroid_step else None,
        "floor": gap_floor(text.trace, text.count, image.trace, image.count),
    }


def _heldout_gap(
    stores: StudyStores, strategy: StrategyConfig, size: int, seed: int, image_centroid_D: np.ndarray
) -> tuple[float, Any]:
    affine = fit_here(stores, strategy, size, seed).affine
    text, _ = moments_here(stores.texts, affine=affine, sample=stores.heldout_texts)
    return float(np.linalg.norm(text.centroid - image_centroid_D)), text


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    expected = result["expected"] or [None] * len(result["sizes"])
    return [
        {"rows a side": size, "held-out gap": mean, "s.d.": sd, "expected from sampling": predicted,
         "sampling floor": result["floor"]}
        for size, mean, sd, predicted in zip(
            result["sizes"], result["mean"], result["sd"], expected, strict=True
        )
    ]  # fmt: skip


def reading(result: dict[str, Any]) -> str:
    return (
        f"The gap that {result['strategy']} leaves on rows that its fit did not see, by rows a side of the "
        f"fit ({len(result['gaps'][0])} trials). On average no fit gets below {result['floor']:.2g}: by that "
        f"{result['num_heldout_texts']:,} texts and {result['num_heldout_images']:,} images differ by chance."
    )


def figure(result: dict[str, Any]) -> Figure:
    drawing, grid = plots.new_grid()
    axes = grid[0, 0]
    mean, spread = np.array(result["mean"]), np.array(result["sd"])
    for trial in np.array(result["gaps"]).T:
        axes.plot(result["sizes"], trial, ".", color=BLUE, alpha=0.3, markersize=4, linewidth=0)
    label = f"{result['strategy']}, mean and s.d. of {len(result['gaps'][0])} trials"
    axes.errorbar(result["sizes"], mean, spread, color=BLUE, marker="o", capsize=3, label=label)
    if result["expected"]:
        axes.plot(
            result["sizes"],
            result["expected"],
            "--",
            color=ORANGE,
            label="expected from sampling alone (r.m.s.)",
        )
    axes.axhline(result["floor"], color=GREY, linestyle=":", label="floor of the held-out rows")
    axes.set_yscale("log")
    plots.label_decades(axes.yaxis)
    plots.label_sizes(axes, result["sizes"])
    axes.set_xlabel("rows of the fit, each side")
    axes.set_ylabel("modality gap of held-out rows\n(Euclidean, unit embeddings)")
    axes.legend()
    return drawing
