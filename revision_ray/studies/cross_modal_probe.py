"""Cross-modal probe of each strategy: heads learn from aligned texts and are tested on real images. Ray.

The mathematics is in `geometry/probe.py`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from matplotlib.figure import Figure

from revision_ray.align import apply, fit
from revision_ray.align.alignment import Alignment, load_alignment
from revision_ray.align.map_reduce import checked_moments
from revision_ray.align.maps import Affine
from revision_ray.align.strategies import STRATEGIES, StrategyConfig
from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data.store import Store
from revision_ray.geometry import probe
from revision_ray.geometry.probe import ProbeScores
from revision_ray.report import plots
from revision_ray.report.plots import BLUE, GREY, ORANGE
from revision_ray.studies.inputs import LabelledRows, RowLabels, derived_seed, gathered, labelled_rows, remote

log = logging.getLogger(__name__)

# Each seed draws its training rows from this many times as many, where there are so many.
_POOL = 4


@dataclass(frozen=True, kw_only=True)
class CrossModalProbe:
    """Settings of the cross-modal probe."""

    num_train: int = 4096
    """Labelled texts that a head learns from (and labelled images, for the upper bound)."""
    num_test: int = 2000
    """At most this many labelled held-out images that it is tested on."""
    num_seeds: int = 5
    """Draws of training rows; every strategy gets the same draws."""
    attributes: list[str] = field(default_factory=list)
    """Attributes to probe; by default all of the labels."""
    c3_noise: float = 0.3
    """Length of C3's noise beside a row of length 1: sigma sqrt(d)."""
    gaussian_ot_noise: float = 0.2
    """Length of the noise of gaussian_ot_noise."""

    def __post_init__(self) -> None:
        for name, least in (("num_train", 20), ("num_test", 2), ("num_seeds", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"probe.{name} is {getattr(self, name)}; expected {least} or more")


@dataclass(frozen=True, kw_only=True)
class ProbeRows:
    """Training and test rows of the heads. No text and no training image belongs to a test image."""

    texts: LabelledRows
    images: LabelledRows
    test: LabelledRows
    labels: RowLabels


def strategies(settings: CrossModalProbe, embedding_dim: int, seed: int) -> dict[str, StrategyConfig]:
    """Return the strategies to probe, by the name of their results."""
    plain = {
        name: StrategyConfig(strategy=name, seed=seed)
        for name in STRATEGIES
        if name not in ("mean_shift", "c3")  # rows off the unit sphere; c3 has a setting of its own
    }
    c3 = StrategyConfig(strategy="c3", noise=settings.c3_noise / math.sqrt(embedding_dim), seed=seed)
    noisy = StrategyConfig(strategy="gaussian_ot", noise=settings.gaussian_ot_noise, seed=seed)
    return {**plain, "c3": c3, "gaussian_ot_noise": noisy}


def fitted_maps(texts: Store, images: Store, configs: Mapping[str, StrategyConfig]) -> dict[str, Affine]:
    """Fit each strategy to all rows of both stores, which need not be paired."""
    text = checked_moments(texts, "texts", second=True)
    image = checked_moments(images, "images", second=True)
    return {
        name: fit.fit_alignment(texts, images, text, image, config).affine for name, config in configs.items()
    }


def given_maps(uris: Sequence[str], texts: Store) -> dict[str, Alignment]:
    """Load finished fits, by the name of their directory with "given_" before it.

    Raises:
        AlignmentError: a fit is missing, or not for these texts.
    """
    given = {}
    for uri in uris:
        alignment = load_alignment(uri)
        apply.check_store(texts, alignment, False)
        name = "given_" + storage.name_of(storage.absolute(uri))
        if name in given:
            raise ConfigError(f"alignments: two fits have the name {name.removeprefix('given_')}; rename one")
        given[name] = alignment
    return given


def probe_rows(
    texts: Store,
    images: Store,
    heldout: Store | None,
    labels: RowLabels,
    settings: CrossModalProbe,
    seed: int,
) -> ProbeRows:
    """Draw labelled texts to learn from, images to test on, and images for the upper bound.

    Without `heldout`, the test images are taken out of `images`.

    Raises:
        DataError: there are fewer labelled rows than the settings need.
    """
    most = _POOL * settings.num_train
    test = labelled_rows(heldout or images, labels, settings.num_test, seed)
    # Texts and images of test scenes are left out of training, so draw more rows.
    learnt = labelled_rows(texts, labels, most + len(test), seed).without(test.ids).lowest(most)
    pictured = labelled_rows(images, labels, most + len(test), seed).without(test.ids).lowest(most)
    for name, rows, store in (("texts", learnt, texts), ("images", pictured, images)):
        if len(rows) < settings.num_train:
            raise DataError(
                f"{', '.join(store.uris)}: {len(rows)} {name} have labels (and are no test image's), "
                f"probe.num_train is {settings.num_train}; label more, or set probe.num_train={len(rows)}"
            )
    if len(test) < 2:
        raise DataError(f"{', '.join((heldout or images).uris)}: {len(test)} images have labels to test on")
    probe.check_labels(labels.attributes, learnt.codes_NA, test.codes_NA, "texts", "test images")
    return ProbeRows(texts=learnt, images=pictured, test=test, labels=labels)


def tested(
    rows: ProbeRows, maps: Mapping[str, Affine | None], settings: CrossModalProbe, seed: int
) -> dict[str, ProbeScores]:
    """Train and test heads for each map and seed, one Ray task each; for the map None, on images."""
    shared = ray.put(rows)
    work = remote(_one_seed)
    seeds = [derived_seed(seed, 7, number) for number in range(settings.num_seeds)]
    scores = gathered(
        [work(shared, affine, settings.num_train, each) for affine in maps.values() for each in seeds]
    )
    parts = [scores[at : at + len(seeds)] for at in range(0, len(scores), len(seeds))]
    return {name: ProbeScores.of(part) for name, part in zip(maps, parts, strict=True)}


def _one_seed(
    rows: ProbeRows, affine: Affine | None, num_train: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    source = rows.images if affine is None else rows.texts
    drawn = np.random.default_rng(seed).choice(len(source), num_train, replace=False)
    chosen = source.taken(np.sort(drawn))
    train_ND = chosen.rows_ND if affine is None else affine.apply(chosen.rows_ND, chosen.ids)[0]
    return probe.scores(
        train_ND, chosen.codes_NA, rows.test.rows_ND, rows.test.codes_NA, rows.labels.num_classes, seed
    )


def run(
    texts: Store,
    images: Store,
    heldout: Store | None,
    alignments: Sequence[str],
    labels: RowLabels,
    settings: CrossModalProbe,
    seed: int,
) -> dict[str, Any]:
    """Measure accuracy and negative log-likelihood on real images for each strategy and each given fit.

    Raises:
        DataError: there are too few labelled rows, or an attribute has one class.
        AlignmentError: a given fit is not for these stores.
    """
    rows = probe_rows(texts, images, heldout, labels, settings, seed)
    given = {name: alignment.affine for name, alignment in given_maps(alignments, texts).items()}
    configs = strategies(settings, texts.embedding_dim, seed)
    maps = {**fitted_maps(texts, images, configs), **given}
    scored = tested(rows, {**maps, "": None}, settings, seed)
    upper_bound = scored.pop("")
    if heldout is None:
        log.warning("no heldout_images: the statistics of the fits count the test images, too")
    names = labels.attributes
    return {
        "attributes": names,
        "classes": labels.classes,
        "strategies": {name: probe.summary(scores, names, seed) for name, scores in scored.items()},
        "against_none": {
            name: probe.difference(scores, scored["none"], seed)
            for name, scores in scored.items()
            if name != "none"
        },
        "upper_bound": probe.summary(upper_bound, names, seed),
        "chance": probe.chance(rows.texts.codes_NA, rows.test.codes_NA, labels.num_classes),
        "num_train": settings.num_train,
        "num_test": len(rows.test),
        "num_seeds": settings.num_seeds,
        "test_images_held_out": heldout is not None,
        "verdict": probe.verdict(scored, upper_bound, names, seed),
    }


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    best_first = sorted(result["strategies"].items(), key=lambda item: item[1]["nll"]["mean"])
    lines = [*best_first, ("images (upper bound)", result["upper_bound"])]
    rows = [
        {"head trained on": name, "accuracy": figures["accuracy"]["mean"],
         "95 % interval": _range(figures["accuracy"]), "nll, nats": figures["nll"]["mean"],
         "95 % interval ": _range(figures["nll"]), "nll in hindsight": probe.best_penalty(figures)["nll"],
         **{each: figures["per_attribute"][each]["accuracy"]["mean"] for each in result["attributes"]}}
        for name, figures in lines
    ]  # fmt: skip
    chance = result["chance"]
    return [*rows, {"head trained on": "chance", "accuracy": chance["accuracy"], "nll, nats": chance["nll"]}]


def _range(interval: Mapping[str, float]) -> str:
    return f"[{interval['low']:.3f}, {interval['high']:.3f}]"


def reading(result: dict[str, Any]) -> str:
    return (
        f"Heads learn {', '.join(result['attributes'])} from {result['num_train']:,} texts and are asked "
        f"about {result['num_test']:,} real images, {result['num_seeds']} draws of texts. {result['verdict']}"
    )


def figure(result: dict[str, Any]) -> Figure:
    named = sorted(result["strategies"].items(), key=lambda item: -item[1]["nll"]["mean"])
    named.append(("images (upper bound)", result["upper_bound"]))
    drawing, grid = plots.new_grid(columns=2, width=7.4, height=1.3 + 0.3 * len(named))
    for axes, (key, label) in zip(
        grid[0],
        (
            ("nll", "negative log-likelihood on real images (nats)"),
            ("accuracy", "accuracy on real images (%)"),
        ),
        strict=True,
    ):
        scale = 100.0 if key == "accuracy" else 1.0
        for place, (name, figures) in enumerate(named):
            middle, low, high = (scale * figures[key][part] for part in ("mean", "low", "high"))
            colour = GREY if name.startswith("images (") else BLUE
            axes.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], marker="o", color=colour, capsize=3
            )
            if key == "nll":
                best = min(each["nll"] for each in figures["by_penalty"])
                axes.plot(best, place, "|", color=ORANGE, markersize=9, markeredgewidth=1.5)
        axes.set_xlabel(label)
        if key == "nll":
            axes.set_xscale("log")
            plots.label_decades(axes.xaxis)
        axes.set_yticks(range(len(named)), [name for name, _ in named] if key == "nll" else [])
        axes.set_ylim(-0.6, len(named) - 0.4)
    grid[0, 0].set_ylabel("head trained on")
    for look, colour, label in (
        ("o", BLUE, "penalty chosen on held-out text, 95 % interval"),
        ("|", ORANGE, "penalty chosen in hindsight on the images"),
    ):
        grid[0, 0].plot([], [], look, color=colour, markeredgewidth=1.5, label=label)
    drawing.legend(loc="outside upper center", ncols=2)
    return drawing
