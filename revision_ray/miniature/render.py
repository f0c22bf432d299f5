"""A world's files written by Ray tasks, one for each part."""

import dataclasses

import ray
from ray.exceptions import RayTaskError

from revision_ray import storage
from revision_ray.errors import DataError
from revision_ray.miniature import dataset
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.progress import progress


def render(config: DatasetConfig) -> bool:
    """The dataset stands at its output; False when it stood there already and nothing was rendered.

    Raises:
        DataError: the output holds another dataset, foreign files, or refuses to be written.
    """
    config = dataclasses.replace(config, output=storage.absolute(config.output))
    if dataset.finished(config):
        return False
    planned = dataset.parts(config)
    write = ray.remote(num_cpus=config.cpus_per_task)(dataset.write_part)
    running = {write.remote(config, part): part for part in planned}
    entries = []
    with progress("render", sum(part.num_rows for part in planned), "scenes") as shown:
        while running:
            done, _ = ray.wait(list(running))
            for task in done:
                try:
                    entries += ray.get(task)
                except RayTaskError as error:
                    if isinstance(error.cause, DataError):
                        raise error.cause from error
                    raise
                shown.advance(running.pop(task).num_rows)
    dataset.write_manifest(config, entries)
    return True
