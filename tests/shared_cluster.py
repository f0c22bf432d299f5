"""The one Ray of a test session, which steps aside for tests that need a cluster of their own."""

import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def running() -> Iterator[None]:
    """A private two-CPU Ray with one gigabyte of object store."""
    _start()
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(_folder(), ignore_errors=True)


@contextmanager
def aside() -> Iterator[None]:
    """A process has one Ray: the session's, where it runs, ends, and is started again afterwards."""
    runs = ray.is_initialized()
    ray.shutdown()
    try:
        yield
    finally:
        if runs:
            _start()


@functools.cache
def _folder() -> str:
    # A Unix socket path may have 107 bytes, and Ray puts about 70 of its own below this folder.
    return tempfile.mkdtemp(prefix="rv", dir="/tmp")


def _start() -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=1_000_000_000,
        logging_level=logging.WARNING,
        _temp_dir=_folder(),
        # Workers beyond one a CPU are ended when idle; tests take fractions, and each start costs seconds.
        _system_config={"num_workers_soft_limit": 8},
    )
