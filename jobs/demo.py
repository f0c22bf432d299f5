"""The main job on the miniature world: render, train an encoder, embed, fit step by step, align."""

from dataclasses import dataclass, field

from revision_ray import cluster, config, storage
from revision_ray.align import apply, fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.strategies import StrategyName
from revision_ray.encode import embed
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.train.encoder import EncoderTraining, train_encoder


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """Run the whole way on a small world, and print the modality gap before and after each step."""

    output: str = config.MISSING
    """Directory of everything that the demo makes; what is there is reused."""
    world: DatasetConfig = field(default_factory=DatasetConfig)
    """What is rendered."""
    training: EncoderTraining = field(default_factory=EncoderTraining)
    """How the dual encoder is trained."""
    images: embed.EmbedJob = config.MISSING
    """How the images for the statistics are embedded."""
    texts: embed.EmbedJob = config.MISSING
    """How the texts for the statistics are embedded; none of them describes one of the images."""
    strategies: list[StrategyName] = field(default_factory=lambda: ["none", "realign"])
    """What is fitted and compared."""


def main(job: DemoJob) -> str:
    cluster.connect()
    render(job.world)
    metrics, _ = train_encoder(job.training)
    embed.run(job.images)
    embed.run(job.texts)
    texts, images, fits = job.texts.output, job.images.output, storage.join(job.output, "fits")
    lines = [f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}"]
    for name in job.strategies:
        output = storage.join(fits, name)
        fit.run(fit.FitJob(strategy=name, texts=texts, images=images, output=output))
        gap = load_alignment(output).modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    chosen, aligned = storage.join(fits, job.strategies[-1]), storage.join(job.output, "aligned")
    apply.run(apply.AlignJob(texts=texts, alignment=chosen, output=aligned))
    r1 = [metrics["heldout"][key] for key in ("image_to_text_r1", "text_to_image_r1")]
    first = load_alignment(chosen)
    return f"""
Encoder trained from scratch: R@1 of 1000 held-out pairs {r1[0]:.2f} image to text, {r1[1]:.2f} text to image.
Fitted on {first.num_texts:,} texts and {first.num_images:,} images that no text describes.\n
{chr(10).join(lines)}\n
Everything is in {storage.absolute(job.output)}"""


if __name__ == "__main__":
    config.run_job(DemoJob, main)
