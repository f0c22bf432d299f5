"""Faults for real clusters: machines that can be killed, and a saboteur that strikes at a point of a job's way."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

PATIENCE_SECONDS = 300.0  # of waits that end at once where nothing is wrong; the machine may be loaded


class Machines:
    """A Ray cluster of several raylets: a head, which holds the driver and takes no work, and workers."""

    def __init__(self, count: int, cpus: float = 1.0, object_store_memory: int = 200_000_000) -> None:
        # A Unix socket path may have 107 bytes, and Ray puts about 70 of its own below this folder.
        self.folder = tempfile.mkdtemp(prefix="rv", dir="/tmp")
        self._settings = {"num_cpus": cpus, "object_store_memory": object_store_memory}
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
        ray.init(address=self._cluster.address, logging_level="WARNING", log_to_driver=False)

    @property
    def address(self) -> str:
        return self._cluster.address

    def add(self) -> Any:
        """One more machine, as an autoscaler would start it."""
        return self._cluster.add_node(**self._settings)

    def replenish(self, count: int) -> None:
        """As many machines as in the beginning: those that a test killed are replaced."""
        while len(self.nodes) < count:
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

    first_sign: float
    """Seconds from the fault to the next sign of progress."""
    seconds: float
    """The whole job, the fault in it."""


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


def sabotage(
    job: Callable[[], Any], progress: Callable[[], int], at: int, strike: Callable[[Work], None]
) -> Recovery:
    """The job runs to its end; when its progress has reached `at`, `strike` is done to it."""
    work = Work(job)
    wait_until(lambda: progress() >= at, work)
    struck, before = time.monotonic(), progress()
    strike(work)
    while progress() <= before and not work.done:
        assert time.monotonic() < struck + PATIENCE_SECONDS, "no progress after the fault"
        time.sleep(0.005)
    first_sign = time.monotonic() - struck
    work.wait()
    return Recovery(first_sign=first_sign, seconds=work.seconds)


def shards_of(output: Path) -> int:
    return len(list(output.glob("part-*")))
