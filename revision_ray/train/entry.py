"""The way of a task to Ray Train's workers, past its controller.

The controller unpickles the training function and its configuration. Of modules that import torch,
transformers and DeepSpeed it would load all three, ten seconds in which nothing else happens. So it gets a
name and a reference. Import nothing heavy here.
"""

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from revision_ray.core import logs
from revision_ray.core.errors import RevisionError, user_error


def scaling(num_workers: int, gpus_per_worker: int | None, cpus_per_worker: float) -> ScalingConfig:
    """The workers and what each asks of the cluster: GPUs as said, else one where the cluster has enough."""
    gpus = gpus_per_worker
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) >= num_workers)
    resources = {"CPU": cpus_per_worker, **({"GPU": 1.0} if gpus else {})}
    return ScalingConfig(num_workers=num_workers, use_gpu=bool(gpus), resources_per_worker=resources)


def fitted(trainer: DataParallelTrainer) -> dict[str, Any]:
    """What the first worker returned, once the run of `trainer` has ended.

    Ray Train takes Ctrl-C for the end of a run that went well, exit code 0, and leaves its handler behind.

    Raises:
        KeyboardInterrupt: the run was interrupted.
        RevisionError: what the user gave made a worker fail.
        TrainingFailedError: a worker failed more often than the trainer allows.
    """
    former = signal.getsignal(signal.SIGINT)
    try:
        with _own_address():
            figures = trainer.fit().return_value
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    except TrainingFailedError as error:
        if (cause := user_error(error)) is None:
            raise
        raise cause from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, former)
    assert isinstance(figures, dict)
    return figures


@contextmanager
def _own_address() -> Iterator[None]:
    """Tell the actors of Ray Train which Ray they belong to.

    The one that frees a dead controller's workers asks the Ray that RAY_ADDRESS names, else any Ray of its
    machine. Another one does not know the controller, or refuses, and a trace ends in the job's log.
    """
    former = os.environ.get("RAY_ADDRESS")
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if former is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = former


def loop(function: Callable[[Any], dict[str, Any]], task: Any) -> dict[str, Any]:
    """Arguments of a TorchTrainer each of whose workers returns `function(task)`; a module's function."""
    return {
        "train_loop_per_worker": _call,
        # In a list: Ray would resolve a reference that stands by itself.
        "train_loop_config": {
            "module": function.__module__,
            "function": function.__name__,
            "task": [ray.put(task)],
            "run": logs.current(),
        },
    }


def _call(config: dict[str, Any]) -> dict[str, Any]:
    logs.work_as(config["run"])
    function = getattr(importlib.import_module(config["module"]), config["function"])
    try:
        return function(ray.get(config["task"][0]))
    except RevisionError:
        if not logs.shows_traces():
            # Ray Train would write its trace; the driver says it in a line, the controller's log file has it.
            logging.getLogger("ray.train.v2._internal.util").addFilter(lambda record: False)
        raise
