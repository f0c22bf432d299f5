"""Ask a model the questions of benchmarks and report accuracy beside its controls."""

from revision_ray.core.config import run_job
from revision_ray.evaluate.evaluation import EvaluateJob, run_evaluate

if __name__ == "__main__":
    run_job(EvaluateJob, run_evaluate)
