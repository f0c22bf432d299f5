"""Study of the long-caption paradox: rank, trace, raw gap and truncation by length of the caption. Ray.

arXiv 2602.07026, app. G: embeddings of longer captions spread over more dimensions, and yet the raw gap grows
and the trained model gets worse. A text encoder of short context also cuts them off. With labels, the
cross-modal probe stands in for the trained model.

Shapes: N rows, D embedding dim.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from revision_ray.align import moments
from revision_ray.align.map_reduce import UniformSample, checked_moments, draw_sample, read_sampled
from revision_ray.align.moments import Moments, gap_standard_error, modality_gap
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data import shards
from revision_ray.data.store import RowGroup, Store, shares
from revision_ray.geometry import probe, spectra
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, ORANGE
from revision_ray.studies.cross_modal_probe import CrossModalProbe, fitted_maps, probe_rows, tested
from revision_ray.studies.inputs import GROUPS_PER_TASK, RowLabels, derived_seed, gathered, remote, spectrum

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionLength:
    """Settings of the study of caption length: bins of texts by their number of words."""

    bins: int = 4
    """Bins of about equally many texts; fewer if many texts have the same length."""
    edges: list[int] | None = None
    """Instead: the fewest words of the second bin, the third, ..."""

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"caption_length: bins is {self.bins}; expected 2 or more")
        if self.edges is not None and (not self.edges or self.edges != sorted(set(self.edges))):
            raise ConfigError(f"caption_length: edges are {self.edges}; expected ascending numbers of words")


def has_texts(store: Store) -> bool:
    """Return whether the store has the texts themselves, not just their embeddings."""
    return "text" in shards.column_names(store.row_groups[0].uri)


def check_texts(store: Store, name: str) -> None:
    """Check that the store has the texts themselves.

    Raises:
        DataError: the store has no column `text`.
    """
    if not has_texts(store):
        raise DataError(
            f"{name}: {', '.join(store.uris)} has no column text, which caption_length measures; embed the "
            "texts with jobs/embed.py, or leave this study out"
        )


@dataclass(frozen=True, kw_only=True)
class ProbeInputs:
    """Inputs of the probe of each store of `lengths`."""

    heldout: Store | None
    labels: RowLabels
    settings: CrossModalProbe
    strategy: StrategyConfig


def run(
    texts: Store,
    images: Store,
    lengths: Mapping[str, Store],
    settings: CaptionLength,
    probing: ProbeInputs | None,
    seed: int,
) -> dict[str, Any]:
    """Measure each length bin of `texts`, and equally many texts of each store of `lengths`.

    With `probing`, the probe also tests heads trained on each of these stores, aligned.

    Raises:
        DataError: a store has no texts, or all texts have one length.
    """
    for name, store in {"texts": texts, **lengths}.items():
        check_texts(store, name)
    image = checked_moments(images, "images")
    edges = settings.edges or _quantile_edges(_word_counts(texts), settings.bins)
    bins = [_figures(_range(part), part, image) for part in _by_length(texts, None, edges)]
    equal = min((store.num_rows for store in lengths.values()), default=0)
    stores = []
    for place, (name, store) in enumerate(lengths.items()):
        sample = draw_sample(store, equal, derived_seed(seed, place))
        (part,) = _by_length(store, sample, [])
        probed = None if probing is None else _probed(name, store, images, probing, seed)
        stores.append({**_figures(name, part, image), "probe": probed})
    return {"num_images": image.count, "image_trace": image.trace, "bins": bins, "stores": stores}


def _probed(name: str, store: Store, images: Store, probing: ProbeInputs, seed: int) -> dict[str, Any] | None:
    """Return accuracy and nll of the probe; None, with a warning, if too few texts have labels."""
    settings, labels = probing.settings, probing.labels
    try:
        rows = probe_rows(store, images, probing.heldout, labels, settings, seed)
    except DataError as error:
        log.warning("caption_length: no probe of %s: %s", name, error)
        return None
    maps = fitted_maps(store, images, {name: probing.strategy})
    scores = probe.summary(tested(rows, maps, settings, seed)[name], labels.attributes, seed)
    return {key: scores[key] for key in ("accuracy", "nll", "per_attribute")}


@dataclass
class _Part:
    """Sums over the texts of one length bin. `num_truncated` is None if the store does not record it."""

    moments: Moments
    fewest: int = 0
    most: int = 0
    num_words: int = 0
    num_truncated: int | None = 0

    def merge(self, other: "_Part") -> None:
        if other.moments.count:
            filled = self.moments.count > 0
            self.fewest = min(self.fewest, other.fewest) if filled else other.fewest
            self.most = max(self.most, other.most)
        self.moments.merge(other.moments)
        self.num_words += other.num_words
        if self.num_truncated is None or other.num_truncated is None:
            self.num_truncated = None
        else:
            self.num_truncated += other.num_truncated


def _range(part: _Part) -> str:
    return f"{part.fewest} words" if part.fewest == part.most else f"{part.fewest} to {part.most} words"


def _figures(name: str, part: _Part, image: Moments) -> dict[str, Any]:
    count = part.moments.count
    if not spectrum(part.moments).any():
        raise DataError(
            f"caption_length: all {count} texts of {name} have one and the same embedding; the encoder does "
            "not tell them apart, or cuts them off before they differ"
        )
    error = gap_standard_error(part.moments, image)
    return {
        "name": name,
        "num_texts": count,
        "mean_words": part.num_words / count,
        "effective_rank": spectra.effective_rank(spectrum(part.moments)),
        "trace": part.moments.trace,
        "raw_gap": modality_gap(part.moments, image),
        "raw_gap_standard_error": error if math.isfinite(error) else None,
        "truncated": None if part.num_truncated is None else part.num_truncated / count,
    }


def _word_counts(store: Store) -> Counter[int]:
    """Count the texts by their number of words."""
    count = remote(_count_words)
    return sum(gathered([count(share) for share in shares(store.row_groups, GROUPS_PER_TASK)]), Counter())


def _count_words(groups: Sequence[RowGroup]) -> Counter[int]:
    return Counter(number for group in groups for number in _words(group).tolist())


def _words(group: RowGroup) -> np.ndarray:
    """Return the number of words (N,) of each text of the row group."""
    texts = shards.read_columns(group.uri, ["text"], group.index)["text"].to_pylist()
    return np.array([len((text or "").split()) for text in texts], np.int64)


def _quantile_edges(counts: Mapping[int, int], bins: int) -> list[int]:
    """Return the fewest words of each bin but the first, so that bins are about equally full."""
    words = sorted(counts)
    if len(words) < 2:
        raise DataError(f"caption_length: every text has {words[0]} words; give texts of different lengths")
    reached = np.cumsum([counts[number] for number in words])
    at = np.searchsorted(reached, reached[-1] * np.arange(1, bins) / bins) + 1
    return sorted({words[place] for place in at if place < len(words)})


def _by_length(store: Store, sample: UniformSample | None, edges: Sequence[int]) -> list[_Part]:
    """Sum up the texts of each bin; return the bins that have texts, ascending."""
    groups = [group for group in store.row_groups if sample is None or sample.size(group)]
    add_up = remote(_sum_by_length)
    totals = _empty(edges, store.embedding_dim)
    tasks = [add_up(s, sample, list(edges), store.embedding_dim) for s in shares(groups, GROUPS_PER_TASK)]
    for parts in gathered(tasks):
        for total, part in zip(totals, parts, strict=True):
            total.merge(part)
    return [total for total in totals if total.moments.count]


def _empty(edges: Sequence[int], dim: int) -> list[_Part]:
    return [_Part(Moments.zeros(dim, second=True)) for _ in range(len(edges) + 1)]


def _sum_by_length(
    groups: Sequence[RowGroup], sample: UniformSample | None, edges: Sequence[int], dim: int
) -> list[_Part]:
    totals = _empty(edges, dim)
    for group in groups:
        block_ND, positions_N = read_sampled(group, sample, dim)
        words_N = _words(group)[positions_N]
        truncated_N = _truncated(group, positions_N)
        bin_N = np.searchsorted(np.asarray(edges), words_N, side="right")
        for place in np.unique(bin_N):
            chosen = bin_N == place
            sums, _ = moments.of_block(
                block_ND[chosen], second=True, offset=moments.bucket_offset(group.shard_hash, group.index)
            )
            totals[place].merge(
                _Part(
                    sums,
                    fewest=int(words_N[chosen].min()),
                    most=int(words_N[chosen].max()),
                    num_words=int(words_N[chosen].sum()),
                    num_truncated=None if truncated_N is None else int(truncated_N[chosen].sum()),
                )
            )
    return totals


def _truncated(group: RowGroup, positions_N: np.ndarray) -> np.ndarray | None:
    if "truncated" not in shards.column_names(group.uri):
        return None
    column = shards.read_columns(group.uri, ["truncated"], group.index)["truncated"].to_pylist()
    return np.array(column, bool)[positions_N]


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"texts": row["name"], "number": row["num_texts"], "mean words": row["mean_words"],
         "effective rank": row["effective_rank"], "trace": row["trace"], "raw gap": row["raw_gap"],
         "s.e.": row["raw_gap_standard_error"], "truncated": row["truncated"], **_probe_columns(row)}
        for row in [*result["bins"], *result["stores"]]
    ]  # fmt: skip


def _probe_columns(row: Mapping[str, Any]) -> dict[str, float]:
    scores = row.get("probe") or {}
    return {f"probe {key}": scores[key]["mean"] for key in ("accuracy", "nll") if scores}


def reading(result: dict[str, Any]) -> str:
    """Say how rank and raw gap change with length; the paper's paradox is that both rise."""
    rows = result["stores"] if len(result["stores"]) > 1 else result["bins"]
    short, long = min(rows, key=lambda row: row["mean_words"]), max(rows, key=lambda row: row["mean_words"])
    change = 100 * (long["raw_gap"] / short["raw_gap"] - 1)
    cut = long["truncated"]
    return (
        f"From {short['mean_words']:.0f} to {long['mean_words']:.0f} words the raw gap changes by "
        f"{change:+.0f} % ({short['raw_gap']:.3f} to {long['raw_gap']:.3f}; the paper: about +30 %), the "
        f"effective rank from {short['effective_rank']:.1f} to {long['effective_rank']:.1f}."
        + ("" if cut is None else f" The encoder cut off {100 * cut:.0f} % of the longest.")
        + _probe_reading(short, long)
    )


def _probe_reading(short: Mapping[str, Any], long: Mapping[str, Any]) -> str:
    if not (short.get("probe") and long.get("probe")):
        return ""
    one, other = short["probe"], long["probe"]
    return (
        f" Heads that learnt from them, aligned, are right about {100 * one['accuracy']['mean']:.1f} % and "
        f"{100 * other['accuracy']['mean']:.1f} % of real images ({one['nll']['mean']:.3f} and "
        f"{other['nll']['mean']:.3f} nats)."
    )


def figure(result: dict[str, Any]) -> Figure:
    groups = [group for group in (result["bins"], result["stores"]) if group]
    names = ("bins of one store", "stores: " + ", ".join(row["name"] for row in result["stores"]))
    truncated = any(row["truncated"] is not None for row in result["bins"] + result["stores"])
    columns = [("raw_gap", "raw modality gap\n(Euclidean)"), ("effective_rank", "effective rank"),
              ("trace", "trace")]  # fmt: skip
    probed = any(row["probe"] for row in result["stores"])
    columns += [("truncated", "cut off by the encoder\n(% of texts)")] if truncated else []
    panels = len(columns) + probed
    drawing, grid = plots.new_grid(columns=panels, width=2.3 * panels, height=3.3)
    for axes, (key, label) in zip(grid[0], columns, strict=False):
        for rows, colour, name in zip(groups, (BLUE, ORANGE), names, strict=False):
            scale = 100.0 if key == "truncated" else 1.0
            known = [row for row in rows if row[key] is not None]
            x, y = [row["mean_words"] for row in known], [scale * row[key] for row in known]
            errors = [row["raw_gap_standard_error"] or 0.0 for row in known] if key == "raw_gap" else None
            axes.errorbar(x, y, errors, marker="o", color=colour, capsize=2, label=name)
        axes.set_ylabel(label)
        axes.margins(x=0.1, y=0.15)
    if probed:
        _probed_stores(grid[0, -1], [row for row in result["stores"] if row["probe"]])
    for axes in grid[0]:
        axes.set_xlabel("words (mean)")
    if len(groups) > 1:
        drawing.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawing


def _probed_stores(axes: Axes, stores: Sequence[dict[str, Any]]) -> None:
    accuracies = [row["probe"]["accuracy"] for row in stores]
    plots.draw_intervals(axes, [row["mean_words"] for row in stores], accuracies, scale=100)
    axes.set_ylabel("probe on real images:\naccuracy (%)")
    axes.margins(x=0.1, y=0.15)
