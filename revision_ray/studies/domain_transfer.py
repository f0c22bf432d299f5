"""Study of domain transfer: the held-out gap of each domain with the statistics of another. Ray.

arXiv 2602.07026, app. E.3.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from revision_ray.align.alignment import gap_floor
from revision_ray.align.map_reduce import checked_moments
from revision_ray.align.moments import modality_gap
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core.errors import DataError
from revision_ray.report import plots
from revision_ray.studies.inputs import StudyStores, fit_rest, num_rows


def run(domains: Mapping[str, StudyStores], strategy: StrategyConfig) -> dict[str, Any]:
    """Measure the held-out gap of each domain with the statistics of each domain.

    `gap[s][e]` is that of texts and images of domain e, with the statistics of domain s; `raw` is the gap of
    each domain without alignment.

    Raises:
        DataError: the domains' stores are of different encoders.
    """
    _check_encoders(domains)
    names = list(domains)
    images = {
        e: checked_moments(at.images, f"{e}: images", sample=at.heldout_images) for e, at in domains.items()
    }
    texts = {
        e: checked_moments(at.texts, f"{e}: texts", sample=at.heldout_texts) for e, at in domains.items()
    }
    gaps, floors = [], []
    for fitted_on in names:
        affine = fit_rest(domains[fitted_on], strategy).affine
        row = []
        for measured_on in names:
            at = domains[measured_on]
            name = f"{fitted_on} on {measured_on}"
            aligned = checked_moments(at.texts, name, affine=affine, sample=at.heldout_texts)
            row.append(modality_gap(aligned, images[measured_on]))
            if measured_on == fitted_on:
                image = images[measured_on]
                floors.append(gap_floor(aligned.trace, aligned.count, image.trace, image.count))
        gaps.append(row)
    return {
        "strategy": strategy.strategy,
        "domains": names,
        "gap": gaps,
        "raw": [modality_gap(texts[name], images[name]) for name in names],
        "floor": floors,
        "num_heldout_texts": [num_rows(domains[name].heldout_texts) for name in names],
        "num_heldout_images": [num_rows(domains[name].heldout_images) for name in names],
    }


def _check_encoders(domains: Mapping[str, StudyStores]) -> None:
    encoders = {(at.texts.encoder.fingerprint, at.texts.embedding_dim) for at in domains.values()}
    if len(encoders) > 1:
        listed = ", ".join(f"{name}: {at.texts.encoder.name}" for name, at in domains.items())
        raise DataError(f"domains: the stores come from different encoders ({listed}); embed all with one")


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    names = result["domains"]
    columns = [f"gap on {name}" for name in names]
    named = [(f"statistics of {name}", row) for name, row in zip(names, result["gap"], strict=True)]
    named += [("no alignment", result["raw"]), ("sampling floor", result["floor"])]
    return [{"": name, **dict(zip(columns, row, strict=True))} for name, row in named]


def reading(result: dict[str, Any]) -> str:
    size = range(len(result["domains"]))
    inside = [result["gap"][i][i] for i in size]
    outside = [result["gap"][i][j] for i in size for j in size if i != j]
    return (
        f"Held-out gap of {result['strategy']}: {min(inside):.2g} to {max(inside):.2g} with statistics of "
        f"the domain itself, {min(outside):.2g} to {max(outside):.2g} with those of another."
    )


def figure(result: dict[str, Any]) -> Figure:
    names = result["domains"]
    rows = np.array([*result["gap"], result["raw"]])
    size = (2.6 + 1.1 * len(names), 1.6 + 0.6 * len(rows))
    drawing, grid = plots.new_grid(width=size[0], height=size[1])
    axes = grid[0, 0]
    axes.grid(False)
    image = axes.imshow(np.log10(rows), cmap="Blues", aspect="auto")
    middle = np.log10(rows).mean()
    for (y, x), value in np.ndenumerate(rows):
        colour = "white" if np.log10(value) > middle else "black"
        axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(rows)), [*names, "(no alignment)"])
    axes.axhline(len(names) - 0.5, color="white", linewidth=4)
    axes.set(xlabel="measured on held-out rows of", ylabel="statistics of")
    axes.set_title(f"modality gap after {result['strategy']}\n(Euclidean; darker is larger)")
    axes.tick_params(length=0)
    image.set_clim(np.log10(rows).min() - 0.3, np.log10(rows).max() + 0.1)
    return drawing
