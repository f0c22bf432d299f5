"""Stage 2: tune projector and language model on conversations about images; see configs/finetune*.yaml."""

from revision_ray.core import config
from revision_ray.train import stages
from revision_ray.train.stages import FinetuneJob


def main(job: FinetuneJob) -> str:
    if job.inspect:
        return stages.inspect(job)
    figures = stages.finetune(job)
    return stages.describe("stage 2", figures, job.output)


if __name__ == "__main__":
    config.run_job(FinetuneJob, main, flags={"--inspect": "inspect=4"})
