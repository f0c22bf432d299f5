"""Log lines: of a person's and of a collector's format, with run and stage, and without any secret."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from revision_ray.core import logs
from revision_ray.core import observe as progress_module
from revision_ray.core.observe import progress
from revision_ray.train import entry, worker

ROOT = Path(__file__).parents[1]
SECRET = "c0ffee" * 6


@pytest.fixture
def lines(monkeypatch):
    """What is logged, as `set_up` writes it; the process's own handlers and run are back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()

    def start(log_format: str) -> io.StringIO:
        monkeypatch.setenv(logs.FORMAT_VARIABLE, log_format)
        logs.set_up(stream=stream)
        return stream

    # basicConfig(force=True) closes what it replaces; pytest's own handlers stay open.
    root.handlers[:] = []
    yield start
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_collector_gets_one_object_a_line_with_run_and_stage(lines):
    stream = lines("json")
    log = logging.getLogger("revision_ray.somewhere")
    with logs.working_for("fit", "s3://bucket/fits/photographs"):
        log.info("two\nlines of %s", "text", extra={"figures": {"done": 3}})
        try:
            raise ValueError("what went wrong")
        except ValueError:
            log.exception("it failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "two\nlines of text"
    assert first["figures"] == {"done": 3}
    assert (first["level"], first["stage"], first["logger"]) == ("INFO", "fit", "revision_ray.somewhere")
    assert first["run"] == logs.run_id("s3://bucket/fits/photographs")
    assert first["time"].endswith("Z")
    assert "ValueError: what went wrong" in second["exception"]


def test_a_stage_ends_with_its_context():
    before = logs.current()
    with logs.working_for("pipeline", "runs/all"):
        outer = logs.current()
        with logs.working_for("fit", "runs/all/fit"):
            assert logs.current() == logs.RunContext(id=logs.run_id("runs/all/fit"), stage="fit")
        assert logs.current() == outer
    assert logs.current() == before


def worked_for(fallback: str) -> logs.RunContext:
    worker.set_up(fallback, "runs/elsewhere", rank=0, num_cpus=torch.get_num_threads())
    return logs.current()


@pytest.mark.parametrize("stage", ["finetune_without", ""])
def test_a_training_worker_works_for_what_its_driver_works_for(cluster, lines, monkeypatch, stage):
    lines("text")
    monkeypatch.setattr(logs, "_current", logs.RunContext(stage=stage, id="mine" if stage else ""))
    call = entry.loop(worked_for, "finetune")
    monkeypatch.setattr(logs, "_current", logs.RunContext(stage="of another process"))
    run = call["train_loop_per_worker"](call["train_loop_config"])
    assert run == logs.RunContext(
        stage=stage or "finetune", id="mine" if stage else logs.run_id("runs/elsewhere")
    )


def test_a_person_gets_plain_text(lines):
    stream = lines("text")
    logging.getLogger("revision_ray.somewhere").info("read %d rows", 7)
    assert stream.getvalue().endswith(" INFO read 7 rows\n")


def test_progress_ends_with_its_figures_and_says_nothing_twice(lines, monkeypatch):
    clock = iter(range(0, 1000, 20))  # a line is due at every step
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stream = lines("json")
    with progress("train", 500, "steps", counted=False, already_done=400) as shown:
        shown.advance(60, "loss 3")
        shown.advance(40, "loss 2")
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in said] == [
        "train: 460 of 500 steps, 40.0 s, 1.5/s, loss 3",
        "train: 500 of 500 steps, 80.0 s, 1.2/s, loss 2",
    ]
    assert [line["figures"]["done"] for line in said] == [460, 500]


def test_progress_says_how_far_it_came_when_it_ends_between_lines(lines):
    stream = lines("text")
    with progress("train", 500, "steps", counted=False) as shown:
        shown.advance(60, "loss 3")
    assert "train: 60 of 500 steps" in stream.getvalue()
    assert stream.getvalue().endswith(", loss 3\n")


def test_a_run_is_its_output_and_names_nothing_secret():
    uri = f"s3://key:{SECRET}@bucket/runs/fit?region=us-west-2"
    assert logs.run_id("runs/fit") == logs.run_id("runs/fit/")
    assert logs.run_id(uri) != logs.run_id("s3://bucket/other/fit")
    assert logs.run_id(uri).startswith("fit-")
    for secret in (uri, f"s3://key:{SECRET}@bucket"):
        assert SECRET not in logs.run_id(secret)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://key:{SECRET}@bucket/x: no such file", "s3://***@bucket/x: no such file"),
        (f"s3://b/x?region=r&secret_key={SECRET}&a=1", "s3://b/x?region=r&secret_key=***&a=1"),
        (f"https://h/x?X-Amz-Signature={SECRET}", "https://h/x?X-Amz-Signature=***"),
        (f"Bearer {SECRET} refused", "Bearer *** refused"),
        ("token at /home/ray/.ray/auth_token", "token at /home/ray/.ray/auth_token"),
        (
            "none of it is secret: 3 tokens, user@example.org",
            "none of it is secret: 3 tokens, user@example.org",
        ),
    ],
)
def test_secrets_do_not_pass(text, shown):
    environment = {
        "RAY_AUTH_TOKEN": SECRET,
        "RAY_AUTH_TOKEN_PATH": "/home/ray/.ray/auth_token",
        "AWS_ACCESS_KEY_ID": "none",
        "HOME": "3 tokens",
    }
    assert logs.without_secrets(text, environment) == shown


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_line_of_either_format_holds_a_secret(lines, monkeypatch, log_format):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    stream = lines(log_format)
    log = logging.getLogger("revision_ray.somewhere")
    try:
        raise OSError(f"401 for Authorization: Bearer {SECRET}")
    except OSError:
        log.exception("cannot reach s3://user:%s@bucket", SECRET)
    assert "***" in stream.getvalue()
    assert SECRET not in stream.getvalue()


JOB = """
import logging
from dataclasses import dataclass
from revision_ray.core.config import run_job
from revision_ray.core.errors import DataError

@dataclass(frozen=True, kw_only=True)
class Job:
    "A job."
    output: str = ""
    "Where."
    refused: str = ""
    "A place that is."
    crashes: str = ""
    "A place that nobody expected."
    result: str = ""
    "What is said at the end."

def run(job):
    logging.getLogger("revision_ray.x").info("at work")
    if job.refused:
        raise DataError(f"{job.refused}: refused")
    if job.crashes:
        raise OSError(f"{job.crashes}: crashed")
    return f"done: {job.result}"

run_job(Job, run)
"""


@pytest.fixture
def run(tmp_path):
    """A job named `sample` in a process of its own."""
    path = tmp_path / "sample.py"
    path.write_text(JOB)

    def start(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(path), *arguments],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", logs.FORMAT_VARIABLE: "json"},
            capture_output=True,
            text=True,
        )

    return start


def test_a_job_says_its_name_and_run(run):
    result = run("output=runs/sample")
    assert result.returncode == 0, result.stderr
    (line,) = (json.loads(line) for line in result.stderr.splitlines())
    assert (line["stage"], line["message"]) == ("sample", "at work")
    assert line["run"].startswith("sample-")


def test_an_error_message_of_a_job_holds_no_secret(run):
    result = run(f"refused=s3://key:{SECRET}@bucket/x")
    assert result.returncode == 2
    assert SECRET not in result.stderr
    assert "s3://***@bucket/x: refused" in result.stderr


def test_neither_a_crash_nor_a_result_of_a_job_holds_a_secret(run):
    crashed = run(f"crashes=s3://key:{SECRET}@bucket/x")
    assert crashed.returncode == 1
    assert "Traceback" in crashed.stderr
    assert "OSError: s3://***@bucket/x: crashed" in crashed.stderr
    result = run(f"result=s3://key:{SECRET}@bucket/x")
    assert result.stdout == "done: s3://***@bucket/x\n"
    assert SECRET not in crashed.stderr + crashed.stdout + result.stderr
