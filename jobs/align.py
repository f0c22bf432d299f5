"""Write an aligned copy of a text store."""

from revision_ray.align.apply import AlignJob, run_align
from revision_ray.core.config import run_job

if __name__ == "__main__":
    run_job(AlignJob, run_align)
