"""A world's files written by Ray tasks, one for each part."""

import dataclasses

import ray

from revision_ray.core import config, storage
from revision_ray.core.cluster import connect, user_errors
from revision_ray.core.observe import progress
from revision_ray.core.stage import StageKind, StageWork, reads_keys
from revision_ray.miniature import dataset
from revision_ray.miniature.dataset import DatasetConfig


def run_render(job: DatasetConfig) -> str:
    """The world stands at the job's output, beside its settings."""
    connect()
    rendered = render(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "render.yaml"))
    return f"{'rendered' if rendered else 'already there'}: {job.output}"


def render(settings: DatasetConfig) -> bool:
    """The dataset stands at its output; False when it stood there already and nothing was rendered.

    Raises:
        DataError: the output holds another dataset, foreign files, or refuses to be written.
    """
    settings = dataclasses.replace(settings, output=storage.absolute(settings.output))
    if dataset.finished(settings):
        return False
    planned = dataset.parts(settings)
    write = ray.remote(num_cpus=settings.cpus_per_task)(dataset.write_part)
    running = {write.remote(settings, part): part for part in planned}
    entries = []
    with progress("render", sum(part.num_rows for part in planned), "scenes") as shown:
        while running:
            done, _ = ray.wait(list(running))
            for task in done:
                with user_errors():
                    entries += ray.get(task)
                shown.advance(running.pop(task).num_rows)
    dataset.write_manifest(settings, entries)
    return True


def _rows_at(job: DatasetConfig, uri: str) -> int | None:
    return getattr(job, f"num_{storage.name_of(uri)}", None)


STAGE = StageKind(
    name="render",
    job=DatasetConfig,
    run=run_render,
    reads=reads_keys(),
    proof="manifest.json",
    work=lambda _, stage: StageWork(rows=sum(_rows_at(stage.job, split) or 0 for split in dataset.SPLITS)),
    rows_at=_rows_at,
)
