"""Stage 2: tune projector and language model on conversations about images; see configs/finetune*.yaml."""

from revision_ray import config
from revision_ray.train import run
from revision_ray.train.run import FinetuneJob


def main(job: FinetuneJob) -> str:
    if job.inspect:
        return run.inspect(job)
    figures = run.finetune(job)
    return run.describe("stage 2", figures, job.output)


if __name__ == "__main__":
    config.run_job(FinetuneJob, main, flags={"--inspect": "inspect=4"})
