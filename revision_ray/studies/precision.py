"""Study of accumulator precision: means in float32 and float64 against an exact mean. Ray.

arXiv 2602.07026, app. E.2. Shapes: N rows, D embedding dim.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from revision_ray.align import moments
from revision_ray.align.maps import chunks
from revision_ray.align.moments import Moments
from revision_ray.core.errors import ConfigError
from revision_ray.data.store import RowGroup, Store, read_group
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREEN, ORANGE
from revision_ray.studies.inputs import gathered, remote, sizes_for
from revision_ray.studies.sample_efficiency import SIZES


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Settings of the study of precision: means of the first N texts, summed row by row."""

    sizes: list[int] = field(default_factory=lambda: [*SIZES, 1_000_000])
    """Numbers of rows N; limited to the rows of the store."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"precision: sizes are {self.sizes}; expected 1 or more rows")


def run(texts: Store, settings: Precision) -> dict[str, Any]:
    """Measure the error of the mean of the first N rows of the store for each size, in one Ray task.

    A floating-point sum depends on its order, so it is not split into tasks.

    Raises:
        DataError: the store has fewer rows than the smallest size.
    """
    sizes = sizes_for(settings.sizes, texts.num_rows, "precision")
    (errors,) = gathered([remote(_of_groups)(texts.row_groups, texts.embedding_dim, sizes)])
    return {"sizes": sizes, **errors}


def _of_groups(
    groups: Sequence[RowGroup], embedding_dim: int, sizes: Sequence[int]
) -> dict[str, list[float]]:
    return mean_errors((read_group(group, embedding_dim) for group in groups), sizes)


def mean_errors(blocks: Iterable[np.ndarray], sizes: Sequence[int]) -> dict[str, list[float]]:
    """Return the Euclidean errors of the mean of the first N unit rows, for each N of `sizes` (ascending).

    Keys: `float32_minus_float64` (the paper's figure), and against the exact mean `float32`, `float64` (both
    summed row after row) and `moments` (this library's accumulator). The exact sum is carried as an
    unevaluated sum of two float64 (Knuth's two-sum), good to about 2^-100. Memory does not depend on N.
    """
    errors: dict[str, list[float]] = {
        name: [] for name in ("float32_minus_float64", "float32", "float64", "moments")
    }
    remaining = iter(sizes)
    size = next(remaining)
    count, total = 0, None
    single_D = double_D = high_D = low_D = np.empty(0)
    for rows_ND, block_ND in _cut(blocks, sizes):
        if total is None:
            dim = rows_ND.shape[1]
            total = Moments.zeros(dim)
            single_D = np.zeros(dim, np.float32)
            double_D, high_D, low_D = np.zeros((3, dim))
        for row_D in rows_ND:
            single_D = single_D + row_D.astype(np.float32)
            double_D = double_D + row_D
            # Two-sum: high + row is rounded to `high`, and what rounding took away goes to `low`.
            rounded_D = high_D + row_D
            taken_D = rounded_D - high_D
            low_D = low_D + ((high_D - (rounded_D - taken_D)) + (row_D - taken_D))
            high_D = rounded_D
        total.merge(moments.of_block(block_ND)[0])
        count += len(rows_ND)
        if count == size:
            exact_D = (high_D + low_D) / count
            of = {
                "float32": single_D.astype(np.float64) / count,
                "float64": double_D / count,
                "moments": total.centroid,
            }
            for name, mean_D in of.items():
                errors[name].append(float(np.linalg.norm(mean_D - exact_D)))
            errors["float32_minus_float64"].append(float(np.linalg.norm(of["float32"] - of["float64"])))
            size = next(remaining, 0)
            if not size:
                break
    return errors


def _cut(blocks: Iterable[np.ndarray], sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut the blocks into pieces that end at the sizes; yield each as float64 unit rows and as stored.

    Rows without a direction are left out.
    """
    count, ends = 0, list(sizes)
    for block_ND in blocks:
        invalid: list[int] = []
        unit = [chunk.unit_rows() for chunk in chunks(block_ND, invalid)]
        unit_ND = np.concatenate(unit) if unit else np.empty(block_ND.shape)
        kept_ND = np.delete(block_ND, invalid, axis=0)
        start = 0
        while start < len(unit_ND) and ends:
            stop = min(len(unit_ND), start + ends[0] - count)
            yield unit_ND[start:stop], kept_ND[start:stop]
            count += stop - start
            start = stop
            if count == ends[0]:
                ends.pop(0)


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"rows": size, "|float32 - float64|": difference, "float32 error": single, "float64 error": double,
         "this library's error": ours}
        for size, difference, single, double, ours in zip(
            result["sizes"], result["float32_minus_float64"], result["float32"], result["float64"],
            result["moments"], strict=True,
        )
    ]  # fmt: skip


def reading(result: dict[str, Any]) -> str:
    last = {name: result[name][-1] for name in ("float32", "float64", "moments")}
    return (
        f"Error of the mean of {result['sizes'][-1]:,} unit rows against an exact sum: {last['float32']:.1e} "
        f"when summed row by row in float32, {last['float64']:.1e} in float64, {last['moments']:.1e} in this "
        "library's accumulator."
    )


def figure(result: dict[str, Any]) -> Figure:
    drawing, grid = plots.new_grid()
    axes = grid[0, 0]
    for name, label, colour, mark in (
        ("float32", "float32, row by row", ORANGE, "o"),
        ("float64", "float64, row by row", BLUE, "s"),
        ("moments", "this library", GREEN, "^"),
    ):
        # A logarithmic axis has no zero: an error of none is shown at the resolution of float64.
        values = np.maximum(result[name], np.finfo(np.float64).eps / 16)
        axes.plot(result["sizes"], values, marker=mark, color=colour, label=label)
    axes.set_yscale("log")
    plots.label_sizes(axes, result["sizes"])
    axes.set(xlabel="rows summed", ylabel="error of the mean\n(Euclidean norm, against an exact sum)")
    axes.legend(loc="center right")
    return drawing
