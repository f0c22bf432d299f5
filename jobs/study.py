"""Studies of a modality gap, on stores of your own or on the miniature world."""

from revision_ray.core.config import run_job
from revision_ray.miniature.study import MiniatureStudyJob, run_miniature_study

if __name__ == "__main__":
    run_job(MiniatureStudyJob, run_miniature_study)
