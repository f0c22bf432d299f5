"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError, RayError
from threadpoolctl import threadpool_limits

from revision_ray.core import logs
from revision_ray.core.errors import ClusterError, RevisionError, user_error


def connect() -> None:
    """Ray runs in this process: the cluster a job was submitted to, else RAY_ADDRESS's, else a local one.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer or lets nobody in.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if not logs.shows_traces():
        keep_traces_in_files()
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        ray.init(address=address, logging_level=logging.WARNING, include_dashboard=False)
        return
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ClusterError(
            f"RAY_ADDRESS={address}: {said}; start a head there, give its token (RAY_AUTH_TOKEN_PATH), or "
            "unset RAY_ADDRESS to work on this machine alone; jobs/doctor.py examines a cluster"
        ) from error


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
    except (RayError, RevisionError) as error:
        cause = user_error(error)
        if cause is None or cause is error:
            raise
        raise cause from None


def refusing_late(stage: Any) -> Any:
    """A class of actors whose constructor's error of the user's is raised by the first call instead.

    Ray would start the actor again, write the trace to the driver's console, and keep the error's text alone.
    """

    def start(self: Any, *args: Any) -> None:
        self.refusal = None
        try:
            construct(self, *args)
        except RevisionError as error:
            self.refusal = error

    def work(self: Any, batch: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return call(self, batch)

    construct, call = vars(stage)["__init__"], vars(stage)["__call__"]
    stage.__init__, stage.__call__ = (
        functools.update_wrapper(start, construct),
        functools.update_wrapper(work, call),
    )
    return stage


def keep_traces_in_files() -> None:
    """Ray Data writes the traces of what it raises to its log files, and no longer to the console as well.

    The error that it raises says the same. Where it is a user's, one line is all that a person wants to see.
    """
    for name in _TELLTALES:
        logging.getLogger(name).addFilter(_hidden)


# What Ray Data logs from here, it raises afterwards.
_TELLTALES = (
    "ray.data.exceptions",
    "ray.data._internal.execution.streaming_executor_state",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
)


def _hidden(record: logging.LogRecord) -> bool:
    # Ray Data's own mark for lines that belong to its files alone.
    record.hide = record.levelno >= logging.ERROR or bool(record.exc_info) or getattr(record, "hide", False)
    return True
