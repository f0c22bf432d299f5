"""An error that a user can mend ends a job with one line, wherever it was raised; traces are for our own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from tiny_encoder import write_encoder
from training_data import write_training_data

from revision_ray.core import errors
from revision_ray.core.cluster import refusing_late, user_errors
from revision_ray.core.errors import ConfigError, DataError, user_error

ROOT = Path(__file__).parents[1]
FAULT = DataError("a.json: broken at byte 5; restore it")


def of_a_task(cause: Exception) -> Exception:
    """As `ray.get` raises it: an instance of the cause's class as well."""
    return RayTaskError("read", "Traceback ...", cause).as_instanceof_cause()


def of_a_worker(cause: Exception) -> Exception:
    return WorkerGroupError("rank 1", {1: UserExceptionWithTraceback(cause, "Traceback ...")})


def of_a_constructor() -> Exception:
    """Ray keeps the text alone."""
    error = ActorDiedError()
    error.error_msg = (
        "The actor died\n  File x\nrevision_ray.core.errors.ConfigError: weights: damaged; save them again"
    )
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (FAULT, FAULT),
        (of_a_task(FAULT), FAULT),
        (of_a_task(of_a_task(FAULT)), FAULT),
        (of_a_worker(FAULT), FAULT),
        (of_a_worker(of_a_task(FAULT)), FAULT),
        (ControllerError(of_a_task(FAULT)), FAULT),
        (of_a_constructor(), ConfigError("weights: damaged; save them again")),
        (
            DataError("broken\nFailed to apply UDF transform after 1/1 attempts.\nTo change"),
            DataError("broken"),
        ),
        (KeyError("ours"), None),
        (of_a_task(KeyError("ours")), None),
        (of_a_worker(AssertionError("ours")), None),
        (ValueError("revision_ray.core.errors.DataError: text of a user"), None),
    ],
)
def test_the_error_of_the_users_is_found_behind_rays(raised, expected):
    found = user_error(raised)
    assert type(found) is type(expected)
    assert str(found) == str(expected)


def test_a_bug_that_a_users_error_led_to_stays_a_bug():
    bug = KeyError("ours")
    bug.__cause__ = FAULT
    assert user_error(bug) is None


def test_only_the_users_error_is_raised_without_rays_wrapping():
    with pytest.raises(DataError, match=r"a\.json: broken") as caught, user_errors():
        raise of_a_task(FAULT)
    assert type(caught.value) is DataError
    with pytest.raises(RayTaskError), user_errors():
        raise of_a_task(KeyError("ours"))


@refusing_late
class Loading:
    def __init__(self, fails: type[Exception] | None) -> None:
        if fails:
            raise fails("weights: damaged")

    def __call__(self, batch: int) -> int:
        return batch + 1


def test_a_constructor_refuses_late_and_fails_at_once():
    assert Loading(None)(1) == 2
    late = Loading(DataError)
    with pytest.raises(DataError, match="weights"):
        late(1)
    with pytest.raises(KeyError):
        Loading(KeyError)


def run(job: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A job on the cluster of the tests."""
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *argv],
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].partition(": ")[0] in errors.__dict__
    assert message in lines[-1]
    assert message not in "\n".join(lines[:-1])
    for trace in ("Traceback", "  File ", "RayTaskError", "ray::"):
        assert trace not in done.stderr + done.stdout


def test_one_line_ends_a_job_whose_task_failed(cluster, tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    whole = json.dumps([{"id": str(number), "text": f"word{number}"} for number in range(6)])
    (tmp_path / "captions.json").write_text(whole[:-9])
    done = run(
        "embed",
        f"texts={tmp_path / 'captions.json'}",
        f"encoder.model={encoder}",
        f"output={tmp_path / 'out'}",
    )
    assert_one_line(done, "captions.json: malformed JSON")


@pytest.mark.slow
def test_one_line_ends_a_job_whose_actor_cannot_start(cluster, tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    weights = tmp_path / "encoder" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "texts.jsonl").write_text('{"text": "word1"}\n')
    done = run(
        "embed",
        f"texts={tmp_path / 'texts.jsonl'}",
        f"encoder.model={encoder}",
        f"output={tmp_path / 'out'}",
    )
    assert_one_line(done, "open_clip_model.safetensors: cannot be loaded")


@pytest.mark.slow
def test_one_line_ends_a_job_whose_training_worker_failed(cluster, tmp_path):
    """An error of the user's that a training worker raises ends the job with one line and no trace."""
    write_training_data(tmp_path, 48, 8)
    weights = tmp_path / "language_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-400])
    done = run(
        "pretrain",
        f"data=[{tmp_path / 'texts'}]",
        f"alignment={tmp_path / 'fit'}",
        f"model={tmp_path / 'language_model'}",
        f"output={tmp_path / 'out'}",
        "num_workers=1",
        "workers.cpus_per_worker=0.5",
        "workers.max_failures=0",
    )
    assert_one_line(done, "language_model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("fit", ["texts={broken}", "images={broken}"], "part-00000.parquet"),
        ("align", ["texts={broken}", "alignment={nowhere}"], "alignment.json"),
        ("report", ["texts={broken}", "images={broken}", "alignments=[{nowhere}]"], "part-00000.parquet"),
        ("study", ["texts={broken}", "images={broken}"], "part-00000.parquet"),
        ("import_reference", ["input={broken}", "modality=text"], "no pickles"),
        ("evaluate", ["model={nowhere}", "benchmarks=[pope]", "data={{pope: {nowhere}}}"], "nowhere"),
        ("serve", ["model={nowhere}"], "nowhere"),
        ("export", ["run={nowhere}"], "nowhere"),
        ("train_encoder", ["data=[{nowhere}]", "heldout=[{nowhere}]"], "nowhere"),
        ("finetune", ["data=[{nowhere}]", "images=[{broken}]", "model={nowhere}"], "part-00000"),
        ("fits", ["show", "a", "registry={nowhere}"], "nowhere"),
        ("pipeline", ["{nowhere}"], "nowhere"),
    ],
)
def test_one_line_ends_every_job(cluster, tmp_path, job, arguments, message):
    """Every job says in one line what is wrong with its input, with exit code 2."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "part-00000.parquet").write_bytes(b"PAR1 not Parquet PAR1")
    places = {"broken": broken, "nowhere": tmp_path / "nowhere"}
    output = [] if job in ("serve", "fits", "pipeline") else [f"output={tmp_path / 'out'}"]
    done = run(job, *(argument.format(**places) for argument in arguments), *output)
    assert_one_line(done, message)
