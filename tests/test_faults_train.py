"""Stages 1 and 2 when machines, workers, drivers and storage fail: the outcome is that of a calm run."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import (
    Driver,
    Machines,
    Strike,
    Work,
    kill_a_machine,
    kill_a_worker,
    kill_and_submit_again,
    machines,
    refuse_writes,
    sabotage,
    slow_a_machine,
)
from training_data import write_training_data

from revision_ray.core import storage
from revision_ray.core.config import to_yaml
from revision_ray.train.models import Architecture
from revision_ray.train.settings import Checkpoints, Logging, Optimisation, Training, Workers
from revision_ray.train.stages import FinetuneJob, PretrainJob, finetune, pretrain

MACHINES = 2
ROWS, STEPS = 320, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(MACHINES) as started:
        yield started


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory) -> Path:
    """Texts, images, a fit, a language model, and conversations about the images."""
    folder = tmp_path_factory.mktemp("training")
    write_training_data(folder, ROWS, ROWS)
    return folder


def training(output: str) -> dict[str, Any]:
    """Two workers, each of which needs a machine for itself."""
    return {
        "output": output,
        "num_workers": MACHINES,
        "batches_per_window": 4,
        "optimisation": Optimisation(
            global_batch_size=ROWS // STEPS, micro_batch_size=4, learning_rate=3e-3, warmup_fraction=0.1
        ),
        "workers": Workers(cpus_per_worker=0.75),
        "checkpoints": Checkpoints(every_steps=4),
        "logging": Logging(every_steps=1, sample_steps=[], tensorboard=False),
    }


@dataclass(frozen=True)
class Stage:
    """A stage of training as the tests take it."""

    name: str
    job: Callable[[Path, str], Training]
    run: Callable[[Any], object]


def stage_one(world: Path, output: str) -> PretrainJob:
    return PretrainJob(
        data=[str(world / "texts")],
        alignment=str(world / "fit"),
        model=str(world / "language_model"),
        max_length=32,
        architecture=Architecture(num_visual_tokens=2, projector_hidden_size=24),
        **training(output),
    )


def stage_two(world: Path, output: str) -> FinetuneJob:
    return FinetuneJob(
        data=[str(world / "data.jsonl")],
        images=[str(world / "images")],
        model=str(world / "calm-pretrain/model"),
        max_length=64,
        **training(output),
    )


STAGES = {
    stage.name: stage
    for stage in (Stage("pretrain", stage_one, pretrain), Stage("finetune", stage_two, finetune))
}


def metrics(output: str) -> bytes:
    uri = storage.join(output, "metrics.jsonl")
    return storage.read_bytes(uri) if storage.exists(uri) else b""


def num_steps(output: str) -> int:
    """Steps of a run that are in its metrics."""
    return metrics(output).count(b"\n")


def outcome(output: str) -> tuple[list[tuple[int, float]], bytes]:
    """The losses of all steps, each once, and the weights."""
    lines = [json.loads(line) for line in metrics(output).splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found, storage.read_bytes(storage.join(output, "model/model.safetensors"))


Calm = Callable[[str], float]


@pytest.fixture(scope="module")
def calm(cluster, world) -> Calm:
    """Seconds that a stage takes undisturbed; its output is WORLD/calm-STAGE."""
    taken: dict[str, float] = {}

    def seconds(name: str) -> float:
        if name == "finetune":
            seconds("pretrain")
        if name not in taken:
            stage = STAGES[name]
            work = Work(lambda: stage.run(stage.job(world, f"{world}/calm-{name}")))
            work.wait()
            taken[name] = work.seconds
        return taken[name]

    return seconds


def disturbed(name: str, world: Path, calm: Calm, note, output: str, *strikes: Strike) -> None:
    """A stage that meets each of `strikes` in another part of all but its last steps."""
    calm_seconds = calm(name)
    stage = STAGES[name]
    job = stage.job(world, output)
    chance, part = random.Random(name), (STEPS - 4) // len(strikes)
    points = [chance.randrange(part * number + 1, part * (number + 1)) for number in range(len(strikes))]
    recovery = sabotage(lambda: stage.run(job), lambda: num_steps(output), *zip(points, strikes, strict=True))
    assert outcome(output) == outcome(f"{world}/calm-{name}")
    note(recovery, calm_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_a_worker_and_a_machine_are_killed(whole, world, calm, note, name):
    """A stage that loses a worker and then a machine has the losses and weights of a calm one."""
    chance = random.Random(name)
    strikes = [kill(whole, "RayTrainWorker", chance) for kill in (kill_a_worker, kill_a_machine)]
    disturbed(name, world, calm, note, f"{world}/killed-{name}", *strikes)


@pytest.mark.slow
def test_the_driver_is_killed_and_submitted_again(whole, world, calm, note):
    """Stage 2 whose driver is killed, submitted again, has the losses and weights of a calm one.

    test_train_run.py shows the same of stage 1."""
    calm_seconds = calm("finetune")
    output = f"{world}/driver"
    (world / "driver.yaml").write_text(to_yaml(STAGES["finetune"].job(world, output)))
    recovery = kill_and_submit_again(
        lambda: Driver(whole, "finetune", str(world / "driver.yaml")),
        lambda: num_steps(output),
        random.Random(0).randrange(1, STEPS - 4),
    )
    assert outcome(output) == outcome(f"{world}/calm-finetune")
    note(recovery, calm_seconds)


@pytest.mark.slow
def test_a_machine_is_slow(whole, world, calm, note):
    """Stage 1 with a machine that runs three tenths of the time has the losses and weights of a calm one."""
    strike = slow_a_machine(whole, random.Random(0), share=0.3)
    disturbed("pretrain", world, calm, note, f"{world}/slow", strike)


@pytest.mark.slow
def test_storage_refuses_writes_for_a_while(whole, world, calm, faltering_s3, note):
    """Stage 1 whose S3 refuses all writes for 12 s has the losses and weights of a calm one.

    S3's client tries for six seconds by itself."""
    before = faltering_s3.refused
    strike = refuse_writes(faltering_s3, seconds=12)
    disturbed("pretrain", world, calm, note, faltering_s3.uri("refusing"), strike)
    assert faltering_s3.refused > before
