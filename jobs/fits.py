"""The domain registry: list fits, show one, find those nearest to a sample of embeddings, export, import."""

from revision_ray.config import run_job
from revision_ray.geometry.fits import VERBS, FitsJob, run

if __name__ == "__main__":
    run_job(FitsJob, run, flags={"--json": "json=true"}, verbs=VERBS)
