"""A head node in processes of its own, as `ray job submit` meets one."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


class Head:
    """A head node in processes of its own, with token authentication, and the line that submits to it."""

    def __init__(
        self, folder: Path, *options: str, cpus: int = 2, environment: dict[str, str] | None = None,
        gcs_port: int = 0,
    ):  # fmt: skip
        self.folder = folder
        token_path = folder / "token"
        token_path.write_text(secrets.token_hex(32))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.without_token = {**clean, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
        self.with_token = {
            **self.without_token,
            "RAY_AUTH_MODE": "token",
            **(environment or {}),
            "RAY_AUTH_TOKEN_PATH": str(token_path),
        }
        gcs, client, dashboard, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        # Worker ports are below the system's own range, from which free_ports takes the others.
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs_port or gcs}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *("--dashboard-host=127.0.0.1", "--object-store-memory=200000000"),
            *("--min-worker-port=20000", "--max-worker-port=20999"),
            *options,
        ]
        self.log = folder / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.with_token, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        for _ in range(240):
            if self.process.poll() is not None:
                break
            try:
                if self.nodes():
                    return
            except (OSError, KeyError, TypeError):  # no dashboard yet, or one that has not heard of the node
                pass
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that live, as the dashboard's state API describes them."""
        answer = self.json("/api/v0/nodes?detail=1&limit=1000")
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def get(self, path: str, environment: dict[str, str]) -> int:
        return self._ask(path, environment)[0]

    def _ask(self, path: str, environment: dict[str, str]) -> tuple[int, Any]:
        request = urllib.request.Request(self.address + path)
        if "RAY_AUTH_TOKEN_PATH" in environment:
            token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=30) as response:
            body = response.read()
            is_json = "json" in response.headers.get("Content-Type", "")
            return response.status, json.loads(body) if is_json else body

    def json(self, path: str) -> Any:
        """What the dashboard answers to one who has the token."""
        return self._ask(path, self.with_token)[1]

    def submit(
        self,
        working_dir: Path,
        *entrypoint: str,
        environment: dict[str, str] | None = None,
        submission_id: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        named = ["--submission-id", submission_id] if submission_id else []
        options = ["--working-dir", ".", *named, "--", *entrypoint]
        return self._ray_job("submit", *options, folder=working_dir, environment=environment)

    def run(self, verb: str, *options: str, folder: Path) -> str:
        """What `ray job VERB` says; it succeeds."""
        done = self._ray_job(verb, *options, folder=folder)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def status(self, submission_id: str) -> str:
        return self.json(f"/api/jobs/{submission_id}")["status"]

    def _ray_job(
        self, verb: str, *options: str, folder: Path, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "ray"), "job", verb, "--address", self.address, *options],
            env=environment or self.with_token,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )

    def end(self) -> None:
        """Every process that this head started has ended; other Rays of the machine are left alone."""
        # By the folder too, which their command lines name: a start that failed may have left its first ones.
        roots = [each for each in psutil.process_iter() if self._is_mine(each)]
        below = [child for root in roots if root.is_running() for child in root.children(recursive=True)]
        family = list({*roots, *below})
        self.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.pid == self.process.pid or any(
                str(self.folder) in word for word in process.cmdline()
            )
        except psutil.Error:  # it has ended meanwhile
            return False


@contextmanager
def running(start: Callable[[], Head]) -> Iterator[Head]:
    """A head that `start` starts, until this is left. Ray gives it half a minute; where a busy machine needs
    more it is started anew."""
    head = start()
    for _ in range(3):
        try:
            head.wait_until_ready()
            break
        except TimeoutError:
            head.end()
            head = start()
    try:
        head.wait_until_ready()
        yield head
        assert head.process.poll() is None, f"the head has ended by itself:\n{head.log.read_text()[-3000:]}"
    finally:
        head.end()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's Unix sockets below it may have 107 bytes in all."""
    folder = Path(tempfile.mkdtemp(prefix="rv", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_of_checkout(folder: Path) -> Path:
    """The files that a clone has and a job needs."""
    for name in ("revision_ray", "jobs", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder
