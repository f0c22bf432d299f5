"""The demo's first half: a world, an encoder with a gap, and what each strategy leaves of it."""

from dataclasses import dataclass, field
from typing import Any

from revision_ray import config, storage
from revision_ray.align import apply, fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.strategies import StrategyName
from revision_ray.encode import embed
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.train.encoder import EncoderTraining, train_encoder


@dataclass(frozen=True, kw_only=True)
class GapDemo:
    """Unpaired images and texts of a small world, and the modality gap before and after each step."""

    world: DatasetConfig = field(default_factory=DatasetConfig)
    """What is rendered."""
    training: EncoderTraining = field(default_factory=EncoderTraining)
    """How the dual encoder is trained."""
    images: embed.EmbedJob = config.MISSING
    """How the images for the statistics are embedded."""
    texts: embed.EmbedJob = config.MISSING
    """How the texts for the statistics are embedded; none of them describes one of the images."""
    strategies: list[StrategyName] = field(default_factory=lambda: ["none", "realign"])
    """What is fitted and compared; the last one aligns the texts."""


def show_gap(demo: GapDemo, output: str) -> str:
    """World, encoder, stores and fits stand below `output`; the table of gaps."""
    render(demo.world)
    metrics, _ = train_encoder(demo.training)
    embed.run(demo.images)
    embed.run(demo.texts)
    texts, images = demo.texts.output, demo.images.output
    lines = [f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}"]
    for name in demo.strategies:
        fit.run(fit.FitJob(strategy=name, texts=texts, images=images, output=fit_of(output, name)))
        gap = load_alignment(fit_of(output, name)).modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    chosen, aligned = fit_of(output, demo.strategies[-1]), storage.join(output, "aligned")
    apply.run(apply.AlignJob(texts=texts, alignment=chosen, output=aligned))
    return f"{_encoder(metrics)}\n{_fitted(chosen)}\n\n" + "\n".join(lines)


def fit_of(output: str, strategy: str) -> str:
    return storage.join(output, "fits", strategy)


def _encoder(metrics: dict[str, Any]) -> str:
    r1 = [metrics["heldout"][key] for key in ("image_to_text_r1", "text_to_image_r1")]
    return (
        f"Encoder trained from scratch: R@1 of 1000 held-out pairs {r1[0]:.2f} image to text, "
        f"{r1[1]:.2f} text to image."
    )


def _fitted(chosen: str) -> str:
    found = load_alignment(chosen)
    return f"Fitted on {found.num_texts:,} texts and {found.num_images:,} images that no text describes."
