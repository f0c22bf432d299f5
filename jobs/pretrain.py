"""Stage 1: train a projector on aligned text alone, the language model frozen; see configs/pretrain*.yaml."""

from revision_ray import config
from revision_ray.train import run
from revision_ray.train.run import PretrainJob


def main(job: PretrainJob) -> str:
    if job.inspect:
        return run.inspect(job)
    figures = run.pretrain(job)
    return run.describe("stage 1", figures, job.output)


if __name__ == "__main__":
    config.run_job(PretrainJob, main, flags={"--inspect": "inspect=4"})
