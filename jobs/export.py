"""Write the model of any checkpoint of a pretrain or finetune run as a transformers folder."""

from dataclasses import dataclass

from revision_ray import config
from revision_ray.train import export_job


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Export a checkpoint. A run exports its last one by itself, to OUTPUT/model."""

    run: str = config.MISSING
    """Output of jobs/pretrain.py or jobs/finetune.py."""
    checkpoint: str | None = None
    """Name of a folder in RUN/checkpoints, or best: of the lowest held-out loss. The latest if not given."""
    output: str = config.MISSING
    """Directory of the model."""


def main(job: ExportJob) -> str:
    return f"model: {export_job.export_checkpoint(job.run, job.checkpoint, job.output)}"


if __name__ == "__main__":
    config.run_job(ExportJob, main)
