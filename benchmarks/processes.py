"""Servers in processes of their own, for as long as they are needed."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).parents[1]
START_S, STOP_S = 180, 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(arguments: Sequence[str], port: int, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of the server that `arguments` start in a process of its own; it ends with the context."""
    log = folder / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"} | environment,
            stdout=output,
            stderr=output,
        )
    try:
        asyncio.run(_healthy(process, port, log))
        yield f"http://127.0.0.1:{port}"
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in psutil.wait_procs(started, 5)[1]:
            left.kill()


async def _healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    ends = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < ends and process.poll() is None:
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError(f"{process.args}: no server came up\n{log.read_text()[-4000:]}")
