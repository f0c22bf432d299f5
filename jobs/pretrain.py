"""Stage 1: train a projector on aligned text alone, the language model frozen; see configs/pretrain*.yaml."""

from revision_ray.core import config
from revision_ray.train import stages
from revision_ray.train.stages import PretrainJob


def main(job: PretrainJob) -> str:
    if job.inspect:
        return stages.inspect(job)
    figures = stages.pretrain(job)
    return stages.describe("stage 1", figures, job.output)


if __name__ == "__main__":
    config.run_job(PretrainJob, main, flags={"--inspect": "inspect=4"})
