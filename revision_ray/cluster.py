"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayError
from threadpoolctl import threadpool_limits

from revision_ray.errors import RevisionError


def connect() -> None:
    """Ray runs in this process: the cluster a job was submitted to, else RAY_ADDRESS's, else a local one."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        ray.init(address=address, logging_level=logging.WARNING, include_dashboard=False)
    else:
        ray.init(address=address, logging_level=logging.WARNING)


@contextmanager
def data_context(target_block_bytes: int | None = None) -> Iterator[DataContext]:
    """Ray Data's settings for what runs inside; the former ones are back afterwards.

    Ray Data's own progress bars are off: jobs show theirs (`revision_ray.progress`).
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise an error of ours reaches the driver as text inside one of Ray's: see `user_errors`.
    context.raise_original_map_exception = True
    if target_block_bytes is not None:
        context.target_max_block_size = target_block_bytes
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns of the bars that are off on purpose.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    with DataContext.current(context):
        yield context


@contextmanager
def pipeline_rows(dataset: ray.data.Dataset) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of a pipeline with actors, which hold no CPU or GPU any more when this is left.

    Ray ends an actor with the last handle to it. After an error these handles lie in reference cycles that
    Python may not look at for minutes, while the next pipeline waits for the actors' resources.
    """
    try:
        with closing(iter(dataset.iter_rows())) as rows:  # type: ignore[type-var]  (a generator)
            yield rows
    finally:
        gc.collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS works on one thread: sums then have one order, and tasks do not fight over cores."""
    with threadpool_limits(1):
        yield


@contextmanager
def user_errors() -> Iterator[None]:
    """An error of ours from a task or an actor is raised here as itself, without Ray's traces."""
    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RevisionError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from None
