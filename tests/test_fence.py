"""One writer to an output: who is refused, who takes over, and that never two hold it, on disk and on S3."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from revision_ray.core import artifact, storage
from revision_ray.core.errors import DataError

HOLDER = """
import sys, time
from revision_ray.core import artifact

with artifact.writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""

# Holds the output and says by which claim, then waits.
SILENT = """
import signal, sys, threading
from pathlib import Path
from revision_ray.core import artifact

signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
artifact.SECONDS_BETWEEN_BEATS = 0.05
with artifact.writing(sys.argv[1]):
    (claim,) = (Path(sys.argv[1]) / artifact.FOLDER).iterdir()
    print(claim.name, flush=True)
    threading.Event().wait(600)
"""

# Each contender holds the output for a moment and says when, by one clock for all.
CONTENDER = """
import sys, time
from revision_ray.core import artifact
from revision_ray.core.errors import DataError

time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with artifact.writing(sys.argv[1]):
        start = time.monotonic()
        time.sleep(0.3)
        print(start, time.monotonic())
except DataError as error:
    assert "another job writes there" in str(error), error
"""


def start(code: str, *argv: str) -> subprocess.Popen:
    """A process of its own that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/out until it is killed."""
    output = str(tmp_path / "out")
    process = start(HOLDER, output)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process, output
    process.kill()
    process.wait()


def foreign_claim(output: Path, **settings) -> Path:
    """A claim as a process on another machine would have written it just now."""
    place = output / artifact.FOLDER / "foreign"
    place.parent.mkdir(parents=True, exist_ok=True)
    who = {"id": place.name, "held": True, "host": "elsewhere/1", "pid": 7, "process": "1"}
    place.write_text(json.dumps({**who, "since": time.time(), "took": [], **settings}))
    return place


def test_a_second_writer_is_refused_and_told_who_writes(holder):
    process, output = holder
    who = rf"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(DataError, match=who), artifact.writing(output):
        pass
    assert process.poll() is None
    (claim,) = (Path(output) / artifact.FOLDER).iterdir()
    assert json.loads(claim.read_text())["pid"] == process.pid, "the refused one has withdrawn"


def test_other_outputs_are_free(holder, tmp_path):
    with artifact.writing(str(tmp_path / "other")):
        pass


def test_after_a_kill_the_next_one_goes_on_at_once(holder):
    process, output = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = time.monotonic()
    with artifact.writing(output):
        assert time.monotonic() - begun < artifact.SECONDS_TO_LIVE / 2


def test_nothing_is_left_behind(tmp_path):
    output = tmp_path / "deep" / "out"
    with artifact.writing(str(output)):
        assert storage.list_files(str(output), recursive=True) == [], "no listing shows a claim"
    assert not output.exists()
    output.mkdir()
    with artifact.writing(str(output)):
        (output / "result").write_text("kept")
    assert os.listdir(output) == ["result"]


def test_an_error_inside_gives_the_output_free(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), artifact.writing(str(tmp_path / "out")):
            raise ZeroDivisionError


def test_a_writer_elsewhere_that_gives_signs_of_life_is_let_be(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SECONDS_BETWEEN_BEATS", 0.4)
    claim = foreign_claim(tmp_path / "out")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.4):
            os.utime(claim)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with (
            pytest.raises(DataError, match="process 7 on elsewhere"),
            artifact.writing(str(tmp_path / "out")),
        ):
            pass
    finally:
        done.set()
        heart.join()
    assert claim.exists()


def test_a_writer_elsewhere_that_gives_none_is_followed(tmp_path, monkeypatch):
    """A job that died with its machine and was submitted again goes on, after as long as a claim lives."""
    monkeypatch.setattr(artifact, "SECONDS_BETWEEN_BEATS", 0.4)
    monkeypatch.setattr(artifact, "SECONDS_TO_LIVE", 2.0)
    claim = foreign_claim(tmp_path / "out")
    begun = time.monotonic()
    with artifact.writing(str(tmp_path / "out")):
        assert time.monotonic() - begun > 1.9
        assert not claim.exists()


def test_a_writer_elsewhere_that_is_long_dead_is_followed_at_once(tmp_path):
    claim = foreign_claim(tmp_path / "out")
    old = time.time() - artifact.SECONDS_TO_LIVE - 1
    os.utime(claim, (old, old))
    with artifact.writing(str(tmp_path / "out")):
        assert not claim.exists()


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    claim = foreign_claim(tmp_path / "out")
    content = {**json.loads(claim.read_text()), "host": artifact._place(), "pid": os.getpid()}
    claim.write_text(json.dumps(content))
    with artifact.writing(str(tmp_path / "out")):
        assert not claim.exists()


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_writer_that_was_taken_over_is_stopped(tmp_path, disposition):
    """It was silent, say suspended, for longer than a claim lives; its next beat finds its claim gone. Jobs
    that a script runs in the background ignore SIGINT."""
    output = tmp_path / "out"
    writer = start(SILENT, str(output), disposition.name)
    assert writer.stdout
    claim = output / artifact.FOLDER / writer.stdout.readline().strip()
    foreign_claim(output, took=[claim.name])
    claim.unlink()  # which a beat at this moment may write again
    _, said = writer.communicate(timeout=120)
    assert writer.returncode == 1
    assert "DataError" in said
    assert "has taken its output over" in said, "its wait is interrupted"


def test_a_claim_stays_young_while_its_writer_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SECONDS_BETWEEN_BEATS", 0.05)
    with artifact.writing(str(tmp_path / "out")):
        (claim,) = (tmp_path / "out" / artifact.FOLDER).iterdir()
        first = claim.stat().st_mtime_ns
        for _ in range(200):
            if claim.stat().st_mtime_ns > first:
                return
            time.sleep(0.05)
    raise AssertionError("no beat in ten seconds")


def check_that_never_two_hold(output: str, num_processes: int) -> None:
    """Processes that ask at the same moment: their times of holding do not overlap, and one at least held."""
    at = str(time.time() + 3)
    contenders = [start(CONTENDER, output, at) for _ in range(num_processes)]
    said = [contender.communicate(timeout=600) for contender in contenders]
    assert [contender.returncode for contender in contenders] == [0] * num_processes, said
    held = sorted(tuple(map(float, line.split())) for line, _ in said if line)
    assert held
    for (_, end), (begin, _) in pairwise(held):
        assert end <= begin


@pytest.mark.slow
def test_of_many_at_once_never_two_hold_it(tmp_path):
    """Of six processes that ask for one output at once, never two hold it."""
    check_that_never_two_hold(str(tmp_path / "out"), 6)


# --- every job --------------------------------------------------------------------------------------------

JOB = '''
from dataclasses import dataclass

from revision_ray.core.config import MISSING, run_job


@dataclass(frozen=True, kw_only=True)
class Job:
    """Writes, or shows."""

    output: str = MISSING
    """Where."""
    inspect: int = 0
    """Only show."""


if __name__ == "__main__":
    run_job(Job, lambda job: "shown" if job.inspect else "written", flags={"--inspect": "inspect=4"})
'''


@pytest.fixture
def job(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)

    def run(*argv: str) -> tuple[int, str, str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, str(script), *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_second_job_to_one_output_exits_two_and_one_that_shows_does_not(holder, job):
    process, output = holder
    code, said, errors = job(f"output={output}")
    assert (code, said) == (2, "")
    assert errors.startswith(f"DataError: {output}: another job writes there (process {process.pid} on ")
    assert errors.count("\n") == 1
    assert job(f"output={output}", "--inspect") == (0, "shown\n", "")
    process.kill()
    process.wait()
    code, said, _ = job(f"output={output}")
    assert (code, said) == (0, "written\n")


# --- object storage ---------------------------------------------------------------------------------------


def test_on_s3_a_second_writer_is_refused_and_a_killed_one_followed(bucket):
    output = bucket("runs/out")
    process = start(HOLDER, output)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=rf"process {process.pid} on"), artifact.writing(output):
        pass
    process.kill()
    process.wait()
    with artifact.writing(output):
        storage.write_bytes(storage.join(output, "part"), b"x")
    files = storage.list_files(output, recursive=True)
    assert [storage.name_of(uri) for uri, _ in files] == ["part"]


def test_on_s3_of_many_at_once_never_two_hold_it(bucket):
    check_that_never_two_hold(bucket("runs/many"), 4)
