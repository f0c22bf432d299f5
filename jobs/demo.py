"""The main job on the miniature world: render, train an encoder, embed, fit step by step, align."""

from dataclasses import dataclass, field

from revision_ray import cluster, config, storage
from revision_ray.align import apply, fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.strategies import StrategyName
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.train.encoder import EncoderTraining, train_encoder


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """Run the whole way on a small world, printing the modality gap before and after each step."""

    output: str = config.MISSING
    """Directory of everything that the demo makes; what is there is reused."""
    world: DatasetConfig = field(default_factory=DatasetConfig)
    """What is rendered."""
    training: EncoderTraining = field(default_factory=EncoderTraining)
    """How the dual encoder is trained."""
    images: EmbedJob = config.MISSING
    """How the images for the statistics are embedded."""
    texts: EmbedJob = config.MISSING
    """How the texts for the statistics are embedded; no text describes one of the images."""
    strategies: list[StrategyName] = field(default_factory=lambda: ["none", "realign"])
    """What is fitted and compared."""


def main(job: DemoJob) -> str:
    cluster.connect()
    render(job.world)
    metrics, _ = train_encoder(job.training)
    embed.run(job.images)
    embed.run(job.texts)
    for name in job.strategies:
        output = storage.join(job.output, "fits", name)
        texts, images = job.texts.output, job.images.output
        fit.run(fit.FitJob(strategy=name, texts=texts, images=images, output=output))
    alignment = storage.join(job.output, "fits", "realign")
    aligned = storage.join(job.output, "aligned")
    apply.run(apply.AlignJob(texts=job.texts.output, alignment=alignment, output=aligned))
    return table(job, metrics["heldout"])


def table(job: DemoJob, heldout: dict) -> str:
    """What the demo showed, for a person."""
    fits = {name: load_alignment(storage.join(job.output, "fits", name)) for name in job.strategies}
    first = next(iter(fits.values()))
    lines = [
        f"Encoder trained from scratch: R@1 of {heldout['num_pairs']} held-out pairs "
        f"{heldout['image_to_text_r1']:.2f} image to text, {heldout['text_to_image_r1']:.2f} text to image.",
        f"Fitted on {first.num_texts:,} texts and {first.num_images:,} images, none of them a pair.",
        f"Traces: images {first.image_trace:.3f}, texts {first.text_trace:.3f}.",
        "",
        f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}",
    ]
    for name, fitted in fits.items():
        gap = fitted.modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    return "\n".join([*lines, "", f"Everything is in {storage.absolute(job.output)}"])


if __name__ == "__main__":
    config.run_job(DemoJob, main)
