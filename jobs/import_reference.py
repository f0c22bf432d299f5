"""Turn the reference code's pickled embeddings into an embedding store."""

from revision_ray.core.config import run_job
from revision_ray.data.imports import ImportJob, run_import

if __name__ == "__main__":
    run_job(ImportJob, run_import)
