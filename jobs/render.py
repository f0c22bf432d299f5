"""Render the miniature world: pairs for an encoder, held-out pairs, unpaired images and texts, questions."""

from revision_ray.core.config import run_job
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import run_render

if __name__ == "__main__":
    run_job(DatasetConfig, run_render)
