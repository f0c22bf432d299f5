"""Study of repeated centroid steps: the gap after each step, on rows of the fit and on others. Ray.

arXiv 2602.07026 sec. 4.3 takes one step.
"""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from revision_ray.align.alignment import gap_floor
from revision_ray.align.map_reduce import checked_moments, draw_sample
from revision_ray.align.moments import modality_gap
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core.errors import ConfigError
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREY, ORANGE
from revision_ray.studies.inputs import StudyStores, fit_rest, num_rows


@dataclass(frozen=True, kw_only=True)
class CentroidSteps:
    """Settings of the study of centroid steps after Anchor and Trace."""

    steps: int = 6
    """Number of steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"centroid_steps: steps is {self.steps}; expected 1 or more")


def run(stores: StudyStores, settings: CentroidSteps, seed: int) -> dict[str, Any]:
    """Measure the gap after 0 to `steps` centroid steps, on the rows of the fit and on held-out rows."""
    fitted = fit_rest(stores, StrategyConfig(strategy="anchor_trace", seed=seed))
    rest = draw_sample(stores.texts, stores.texts.num_rows, seed, stores.heldout_texts)
    image = checked_moments(stores.images, "held-out images", sample=stores.heldout_images)
    affine = fitted.affine
    on_fit, held_out, floor = [], [], 0.0
    for step in range(settings.steps + 1):
        aligned = checked_moments(stores.texts, f"step {step}", affine=affine, sample=rest)
        unseen = checked_moments(stores.texts, "held-out texts", affine=affine, sample=stores.heldout_texts)
        on_fit.append(modality_gap(aligned, fitted.image))
        held_out.append(modality_gap(unseen, image))
        floor = gap_floor(unseen.trace, unseen.count, image.trace, image.count)
        affine = affine.with_centroid_step(fitted.image.centroid - aligned.centroid)
    return {
        "num_texts": fitted.text.count,
        "num_images": fitted.image.count,
        "num_heldout_texts": num_rows(stores.heldout_texts),
        "num_heldout_images": num_rows(stores.heldout_images),
        "steps": list(range(settings.steps + 1)),
        "gap_on_fit": on_fit,
        "gap_held_out": held_out,
        "floor": floor,
    }


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"centroid steps": step, "gap on the fit's rows": on_fit, "held-out gap": held_out,
         "sampling floor": result["floor"]}
        for step, on_fit, held_out in zip(
            result["steps"], result["gap_on_fit"], result["gap_held_out"], strict=True
        )
    ]  # fmt: skip


def reading(result: dict[str, Any]) -> str:
    return (
        f"Steps bring the gap on the fit's own {result['num_texts']:,} texts from "
        f"{result['gap_on_fit'][0]:.2g} to {result['gap_on_fit'][-1]:.2g}; on held-out rows it goes from "
        f"{result['gap_held_out'][0]:.2g} to {result['gap_held_out'][-1]:.2g}, where chance alone leaves "
        f"{result['floor']:.2g}."
    )


def figure(result: dict[str, Any]) -> Figure:
    drawing, grid = plots.new_grid()
    axes = grid[0, 0]
    axes.plot(result["steps"], result["gap_on_fit"], marker="o", color=BLUE, label="rows of the fit")
    axes.plot(result["steps"], result["gap_held_out"], marker="s", color=ORANGE, label="held-out rows")
    axes.axhline(result["floor"], color=GREY, linestyle=":", label="floor of the held-out rows")
    axes.set_yscale("log")
    axes.set_xticks(result["steps"])
    axes.set_xlabel("centroid steps after Anchor and Trace")
    axes.set_ylabel("modality gap\n(Euclidean, unit embeddings)")
    axes.legend()
    return drawing
