"""Chain the other jobs in one YAML: plan, run, resume."""

from .job import PipelineJob, run_pipeline

__all__ = [
    "PipelineJob",
    "run_pipeline",
]
