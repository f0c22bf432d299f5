"""Embed images or texts into an embedding store."""

from revision_ray.core.config import run_job
from revision_ray.encode.embed import EmbedJob, run_embed

if __name__ == "__main__":
    run_job(EmbedJob, run_embed)
