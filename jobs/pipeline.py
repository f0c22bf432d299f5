"""Run a chain of stages from one YAML, from where it was left; see configs/pipeline.yaml, demo.yaml."""

from revision_ray.core.config import run_job
from revision_ray.pipeline.job import PipelineJob, run_pipeline

if __name__ == "__main__":
    flags = {"--from": "from_stage={}", "--only": "only=[{}]", "--dry-run": "dry_run=true"}
    run_job(PipelineJob, run_pipeline, flags=flags)
