"""Faults for real clusters: machines that can be killed, storage that falters, and strikes at a point of a
job's progress."""

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs as pafs
import pytest
import ray
import shared_cluster
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from ray import cloudpickle
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from werkzeug.serving import WSGIRequestHandler, make_server

from revision_ray.core import storage

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this folder

ROOT = Path(__file__).parents[1]

PATIENCE_SECONDS = 900.0  # of waits that end at once where nothing is wrong; the machine may be loaded


class Machines:
    """A Ray cluster of several raylets: a head, which holds the driver and takes no work, and workers."""

    def __init__(self, count: int, cpus: float = 1.0, object_store_memory: int = 200_000_000) -> None:
        # A Unix socket path may have 107 bytes, and Ray puts about 70 of its own below this folder.
        self.folder = tempfile.mkdtemp(prefix="rv", dir="/tmp")
        self._count = count
        self._settings = {"num_cpus": cpus, "object_store_memory": object_store_memory}
        # Ray notes the address of a Cluster as the machine's current one, in this folder, which has to exist.
        Path(self.folder, "ray").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", self.folder)
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": object_store_memory,
                    "temp_dir": self.folder,
                },
            )
        self.nodes = [self.add() for _ in range(count)]
        ray.init(address=self._cluster.address, logging_level=logging.WARNING, log_to_driver=False)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        """One more machine, as an autoscaler would start it."""
        return self._cluster.add_node(**self._settings)

    def replenish(self) -> None:
        """As many machines as in the beginning: those that a test killed are replaced."""
        while len(self.nodes) < self._count:
            self.nodes.append(self.add())

    def kill(self, node: Any) -> None:
        """The machine's raylet is gone, by SIGKILL, and its workers and objects with it."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def workers(self, node: Any, title: str = "ray::") -> list[psutil.Process]:
        """Processes of `node` whose title says `title`: an actor's class, or the task at work."""
        found = []
        raylets = [each.process.pid for each in node.all_processes["raylet"]]
        for process in [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]:
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def machines(count: int, **settings: Any) -> Iterator[Machines]:
    with shared_cluster.aside():
        started = Machines(count, **settings)
        try:
            yield started
        finally:
            started.close()


@dataclass
class Work:
    """A job in a thread of this process."""

    job: Callable[[], Any]
    seconds: float = float("nan")
    _error: BaseException | None = None
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._begun = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            self.job()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - self._begun

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert self.done, "the job hangs"
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Recovery:
    """What a fault cost."""

    first_signs: list[float]
    """Seconds from each fault to the next sign of progress."""
    seconds: float
    """The whole job, the faults in it."""


def wait_until(met: Callable[[], Any], work: Work) -> Any:
    """The first true value of `met`, while the job works."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := met()):
        if work.done:
            work.wait()
            raise AssertionError("the job ended before the fault: it is too short for this test")
        assert time.monotonic() < deadline, "the job makes no progress"
        time.sleep(0.005)
    return value


Strike = Callable[[Work], None]


def sabotage(job: Callable[[], Any], progress: Callable[[], int], *strikes: tuple[int, Strike]) -> Recovery:
    """The job runs to its end; each strike is done to it when its progress has reached the number before."""
    work = Work(job)
    first_signs = []
    for at, strike in strikes:
        wait_until(lambda at=at: progress() >= at, work)
        struck, before = time.monotonic(), progress()
        strike(work)
        while progress() <= before and not work.done:
            assert time.monotonic() < struck + PATIENCE_SECONDS, "no progress after the fault"
            time.sleep(0.005)
        first_signs.append(time.monotonic() - struck)
    work.wait()
    return Recovery(first_signs=first_signs, seconds=work.seconds)


def report(test: Any, recovery: Recovery, calm: float) -> None:
    """What faults cost, beside the seconds of a calm run, in the output of the test."""
    first_signs = ", ".join(f"{value:.1f}" for value in recovery.first_signs)
    print(
        f"RECOVERY {test.name}: first signs after {first_signs} s, "
        f"all in {recovery.seconds:.1f} s, undisturbed {calm:.1f} s"
    )


# --- strikes ----------------------------------------------------------------------------------------------


def kill_a_machine(cluster: Machines, title: str, chance: random.Random) -> Strike:
    """One of the machines where `title` is at work dies, and another one comes, as from an autoscaler."""

    def strike(work: Work) -> None:
        busy = wait_until(lambda: [node for node in cluster.nodes if cluster.workers(node, title)], work)
        cluster.kill(chance.choice(busy))
        cluster.replenish()

    return strike


def kill_a_worker(cluster: Machines, title: str, chance: random.Random) -> Strike:
    """One of the worker processes that are at `title` dies."""

    def strike(work: Work) -> None:
        at_work = wait_until(
            lambda: [process for node in cluster.nodes for process in cluster.workers(node, title)], work
        )
        chance.choice(at_work).kill()

    return strike


def num_spilled() -> int:
    """Bytes that the cluster's object stores have moved to disk so far."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.spilled_bytes_total


class Tenant:
    """Another program on a machine, which holds a part of its object store and does not let go."""

    def __init__(self, num_bytes: int) -> None:
        self._held = ray.put(np.ones(num_bytes, np.uint8))
        self._view = ray.get(self._held)  # in use: cannot be moved to disk

    def holds(self) -> int:
        return self._view.nbytes


@contextmanager
def tenants(cluster: Machines, num_bytes: int) -> Iterator[None]:
    """Every machine's object store has `num_bytes` less."""
    actors: list[Any] = [
        ray.remote(Tenant)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
        .remote(num_bytes)
        for node in cluster.nodes
    ]
    try:
        assert ray.get([actor.holds.remote() for actor in actors]) == [num_bytes] * len(actors)
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def stall_until_stores_spill(cluster: Machines, title: str) -> Strike:
    """What is at `title` stands still and its input piles up until object stores move some of it to disk."""

    def strike(work: Work) -> None:
        before = num_spilled()
        stalled = wait_until(
            lambda: [process for node in cluster.nodes for process in cluster.workers(node, title)], work
        )
        for process in stalled:
            process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: num_spilled() > before, work)
        finally:
            for process in stalled:
                process.send_signal(signal.SIGCONT)

    return strike


def slow_a_machine(cluster: Machines, chance: random.Random, share: float = 0.1) -> Strike:
    """One machine's workers run for `share` of the time only, from now to the end of the job."""

    def strike(work: Work) -> None:
        node = chance.choice(cluster.nodes)

        def hamper() -> None:
            while not work.done:
                for sign, seconds in ((signal.SIGSTOP, 0.5 * (1 - share)), (signal.SIGCONT, 0.5 * share)):
                    for process in cluster.workers(node):
                        with contextlib.suppress(psutil.Error):
                            process.send_signal(sign)
                    time.sleep(seconds)

        threading.Thread(target=hamper, daemon=True).start()

    return strike


class Driver:
    """A job of jobs/ in a process of its own, its driver, on the cluster."""

    def __init__(self, cluster: Machines, name: str, *arguments: str) -> None:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
        # Not a pipe: a killed driver's would be held open by nobody, but a full one would stop it.
        self.log = Path(tempfile.mkstemp(prefix="driver", dir=cluster.folder)[1])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.log.read_text()[-3000:]

    def close(self) -> None:
        """The driver is gone, by SIGKILL where it still runs."""
        self.process.kill()
        self.process.wait()


def kill_and_submit_again(submit: Callable[[], Driver], progress: Callable[[], int], at: int) -> Recovery:
    """The driver is killed when the job's progress has reached `at`; a second submission ends it."""
    begun = time.monotonic()
    with closing(submit()) as first:
        deadline = begun + PATIENCE_SECONDS
        while progress() < at:
            assert first.process.poll() is None, (
                f"it ended before it could be killed: {first.log.read_text()[-3000:]}"
            )
            assert time.monotonic() < deadline, "the job makes no progress"
            time.sleep(0.005)
    struck, before = time.monotonic(), progress()
    with closing(submit()) as second:
        while progress() <= before and second.process.poll() is None:
            assert time.monotonic() < struck + PATIENCE_SECONDS, "no progress after the fault"
            time.sleep(0.01)
        first_sign = time.monotonic() - struck
        second.wait()
    return Recovery(first_signs=[first_sign], seconds=time.monotonic() - begun)


# --- storage ----------------------------------------------------------------------------------------------


class Storage:
    """An S3-compatible server on loopback, which answers 503 to the requests that `refuses` picks."""

    def __init__(self) -> None:
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.refused = 0
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        options = f"endpoint_override=127.0.0.1:{self._server.server_port}&scheme=http&region=us-east-1"
        pafs.FileSystem.from_uri(f"s3://?{options}&allow_bucket_creation=true")[0].create_dir("revision")
        self._options = options

    def uri(self, key: str) -> str:
        return f"s3://revision/{key}?{self._options}"

    def put_files(self, folder: Path, key: str) -> str:
        """The URI of a copy of the files of `folder`."""
        for path in folder.iterdir():
            if path.is_file():
                storage.write_bytes(self.uri(f"{key}/{path.name}"), path.read_bytes())
        return self.uri(key)

    @contextmanager
    def refusing(self, refuses: Callable[[str, str], bool]) -> Iterator[None]:
        self.refuses = refuses
        try:
            yield
        finally:
            self.refuses = lambda method, path: False

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        if not self.refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            return self._s3(environ, start)
        self.refused += 1
        if int(environ.get("CONTENT_LENGTH") or 0) or environ.get("wsgi.input_terminated"):
            environ["wsgi.input"].read()
        body = (
            b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
        )
        start("503 Slow Down", [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
        return [body]

    def close(self) -> None:
        self._server.shutdown()


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


def first_reads(count: int) -> Callable[[str, str], bool]:
    """The first `count` reads of every object."""
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def refuses(method: str, path: str) -> bool:
        if method != "GET" or path.count("/") < 2:  # a listing
            return False
        with lock:
            seen[path] = seen.get(path, 0) + 1
            return seen[path] <= count

    return refuses


def refuse_writes(storage: Storage, seconds: float) -> Strike:
    """For `seconds` from now on nothing can be written."""

    def strike(work: Work) -> None:
        end = time.monotonic() + seconds
        storage.refuses = lambda method, path: method in ("PUT", "POST") and time.monotonic() < end

    return strike
