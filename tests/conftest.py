"""One small Ray cluster for every test that needs one."""

import collections
import contextlib
import functools
import logging
import os
import secrets
import uuid

# Without a token given to it, Ray writes one into the home directory. It reads these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# For the S3 servers of the tests, before a cluster starts that has them; nobody's own are used.
os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "none"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

import pyarrow.fs as pafs
import pytest
import shared_cluster

pytest_plugins = ["progress", "pytester"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where nothing may be skipped (.ci/run), a test that skips itself has failed."""
    report = (yield).get_result()
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("REVISION_RAY_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: every test must run here; {report.longrepr[2]}"


def pytest_terminal_summary(terminalreporter):
    """Say in a line for each reason how many tests were skipped, and what they want."""
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, number in reasons.items():
        terminalreporter.write_line(f"{number} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def cluster():
    """A private two-CPU Ray with one gigabyte of object store, shut down when the session ends."""
    with shared_cluster.running():
        yield


@pytest.fixture(scope="module")
def faltering_s3():
    """An S3-compatible server on loopback that refuses what it is told to refuse (faults.Storage)."""
    import faults  # takes seconds

    with contextlib.closing(faults.Storage()) as started:
        yield started


@pytest.fixture
def whole(cluster):
    """A cluster of the module's own (faults.Machines), with all its machines."""
    cluster.replenish()
    return cluster


@pytest.fixture
def note(request):
    """Writes down what a fault cost, beside the seconds of an undisturbed run."""
    import faults  # takes seconds

    return functools.partial(faults.report, request.node)


@pytest.fixture(scope="session")
def s3_options():
    """The query of URIs that lie on an S3-compatible server on loopback, of this session alone."""
    from moto.server import ThreadedMotoServer  # takes seconds

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_options):
    """A bucket of the module's own: the function that names a key of it as a URI."""
    name = f"revision-{uuid.uuid4().hex[:8]}"
    pafs.FileSystem.from_uri(f"s3://?{s3_options}&allow_bucket_creation=true")[0].create_dir(name)
    return lambda key: f"s3://{name}/{key}?{s3_options}"
