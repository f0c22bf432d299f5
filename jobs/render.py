"""Render the miniature world: pairs for an encoder, held-out pairs, unpaired images and texts, questions."""

from revision_ray import cluster, config, storage
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render


def main(job: DatasetConfig) -> str:
    cluster.connect()
    rendered = render(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "render.yaml"))
    return f"{'rendered' if rendered else 'already there'}: {job.output}"


if __name__ == "__main__":
    config.run_job(DatasetConfig, main)
