"""One small Ray cluster for every test that needs one."""

import logging
import os
import secrets
import shutil
import tempfile

# Without a token given to it, Ray writes one into the home directory. It reads these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import ray


@pytest.fixture(scope="session")
def cluster():
    """A private two-CPU Ray with one gigabyte of object store, shut down when the session ends."""
    # A Unix socket path may have 107 bytes, and Ray puts about 70 of its own below this folder.
    folder = tempfile.mkdtemp(prefix="rv", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=1_000_000_000,
        logging_level=logging.WARNING,
        _temp_dir=folder,
        # Workers beyond one a CPU are ended when idle; tests take fractions, and each start costs seconds.
        _system_config={"num_workers_soft_limit": 8},
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
