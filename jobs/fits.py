"""The domain registry: list fits, show one, find those nearest to a sample of embeddings, export, import."""

from revision_ray.align.fits import VERBS, FitsJob, run_fits
from revision_ray.core.config import run_job

if __name__ == "__main__":
    run_job(FitsJob, run_fits, flags={"--json": "json=true"}, verbs=VERBS)
