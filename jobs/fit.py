"""Fit an alignment from unpaired text and image stores."""

from revision_ray.align.fit import FitJob, run_fit
from revision_ray.core.config import run_job

if __name__ == "__main__":
    run_job(FitJob, run_fit)
