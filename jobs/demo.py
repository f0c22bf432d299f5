"""The whole way on the miniature world: the gap before and after alignment, and a model that answers."""

from dataclasses import dataclass, field

from revision_ray import cluster, config, storage
from revision_ray.demo.answers import MODEL, AnswersDemo, show_answers
from revision_ray.demo.gap import GapDemo, show_gap


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """Run the whole way on a small world: print the modality gap before and after each step, and what a model
    that was pretrained on aligned text alone answers about images."""

    output: str = config.MISSING
    """Directory of everything that the demo makes; what is there is reused."""
    gap: GapDemo = field(default_factory=GapDemo)
    """World, encoder, fits."""
    answers: AnswersDemo = field(default_factory=AnswersDemo)
    """Language model, stage 1, stage 2, evaluation."""


def main(job: DemoJob) -> str:
    cluster.connect()
    gap = show_gap(job.gap, job.output)
    answers = show_answers(job.answers, job.gap.world, job.output)
    place = storage.absolute(job.output)
    return f"\n{gap}\n\n{answers}\n\nEverything is in {place}, the model in {storage.join(place, MODEL)}"


if __name__ == "__main__":
    config.run_job(DemoJob, main)
