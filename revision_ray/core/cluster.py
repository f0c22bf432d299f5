"""Connect a job to its Ray cluster, and set up Ray Data, threads and errors for it."""

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
    """Connect this process to the cluster of RAY_ADDRESS, or start Ray on this machine if that is unset.

    Does nothing where Ray is initialized already.

    Raises:
        ClusterError: the cluster of RAY_ADDRESS does not answer, or refuses the connection.
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
    """Set Ray Data's options for the pipelines run inside; restore the former ones afterwards.

    Ray Data's own progress bars are off, because jobs show their own (`core.observe.progress`).
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise a RevisionError reaches the driver only as text inside an error of Ray: see `user_errors`.
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
    """Iterate over the rows of a pipeline with actors, and release the actors' CPUs and GPUs on exit.

    Ray stops an actor when the last handle to it is gone. After an error the handles are in reference cycles,
    which Python may not collect for minutes, while the next pipeline waits for the actors' resources.
    """
    try:
        with closing(iter(dataset.iter_rows())) as rows:  # type: ignore[type-var]  (a generator)
            yield rows
    finally:
        gc.collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to one thread, so that the order of sums is fixed and tasks do not compete for cores."""
    with threadpool_limits(1):
        yield


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise a RevisionError of a task or an actor as itself, without Ray's traces."""
    try:
        yield
    except (RayError, RevisionError) as error:
        cause = user_error(error)
        if cause is None or cause is error:
            raise
        raise cause from None


def refusing_late(stage: Any) -> Any:
    """Change an actor class so that a RevisionError of its constructor is raised by its first call instead.

    Otherwise Ray restarts the actor, writes the trace to the driver's console, and keeps only the error's
    text.
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
    """Make Ray Data write traces of its errors to its log files only, and not to the console.

    The raised error says the same, and for a user's error one line on the console is enough.
    """
    for name in _TELLTALES:
        logging.getLogger(name).addFilter(_hidden)


# Loggers of Ray Data whose logged errors are also raised.
_TELLTALES = (
    "ray.data.exceptions",
    "ray.data._internal.execution.streaming_executor_state",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
)


def _hidden(record: logging.LogRecord) -> bool:
    # Ray Data's own attribute for records that go to its log files only.
    record.hide = record.levelno >= logging.ERROR or bool(record.exc_info) or getattr(record, "hide", False)
    return True
