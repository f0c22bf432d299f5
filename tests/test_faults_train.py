"""Stages 1 and 2 when machines, workers and drivers die: the outcome is that of a calm run."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_stores import cloud, write_store
from faults import (
    Driver,
    Machines,
    Recovery,
    Work,
    kill_a_machine,
    kill_a_worker,
    kill_and_submit_again,
    machines,
    report,
    sabotage,
)
from tiny_language_model import WORDS, write_language_model

from revision_ray.align.fit import FitJob
from revision_ray.align.fit import run as fit
from revision_ray.config import to_yaml
from revision_ray.train.models import Architecture
from revision_ray.train.run import FinetuneJob, PretrainJob, finetune, pretrain
from revision_ray.train.settings import Checkpoints, Logging, Optimisation, Training, Workers

MACHINES = 2
DIM, ROWS, STEPS = 16, 320, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(MACHINES) as started:
        yield started


@pytest.fixture
def whole(cluster) -> Machines:
    """The cluster with all its machines."""
    cluster.replenish(MACHINES)
    return cluster


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory) -> Path:
    """Texts, images, a fit, a language model, and conversations about the images."""
    folder = tmp_path_factory.mktemp("training")
    generator = np.random.default_rng(0)
    captions = [" ".join(generator.choice(WORDS[:-1], generator.integers(2, 9))) for _ in range(ROWS)]
    texts = write_store(folder / "texts", cloud(ROWS, DIM, "text"), rows_per_shard=80, texts=captions)
    images = write_store(folder / "images", cloud(ROWS, DIM, "image"), "image")
    fit(FitJob(texts=texts, images=images, output=str(folder / "fit")))
    records = [
        {
            "id": f"c{number}",
            "image": f"image{number}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{captions[number]}"},
                {"from": "gpt", "value": captions[(7 * number) % ROWS]},
            ],
        }
        for number in range(ROWS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_language_model(folder / "language_model")
    return folder


def training(world: Path, output: str) -> dict:
    """Two workers, each of which needs a machine for itself."""
    return {
        "output": str(world / output),
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
        **training(world, output),
    )


def stage_two(world: Path, output: str) -> FinetuneJob:
    return FinetuneJob(
        data=[str(world / "data.jsonl")],
        images=[str(world / "images")],
        model=str(world / "calm-pretrain/model"),
        max_length=64,
        **training(world, output),
    )


STAGES = {
    stage.name: stage
    for stage in (Stage("pretrain", stage_one, pretrain), Stage("finetune", stage_two, finetune))
}


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def num_steps(output: Path) -> Callable[[], int]:
    """Steps of a run that are in its metrics."""
    metrics = output / "metrics.jsonl"
    return lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0


def outcome(output: Path) -> tuple[list[tuple[int, float]], bytes]:
    """The losses of all steps, each once, and the weights."""
    found = losses(output)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found, (output / "model/model.safetensors").read_bytes()


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
            work = Work(lambda: stage.run(stage.job(world, f"calm-{name}")))
            work.wait()
            taken[name] = work.seconds
        return taken[name]

    return seconds


@pytest.fixture
def note(request) -> Callable[[Recovery, float], None]:
    """Writes down what a fault cost, beside the seconds of the calm run."""
    return partial(report, request.node)


def disturbed(name: str, world: Path, calm: Calm, note, chance: random.Random, output: str, strike) -> None:
    """A stage that meets `strike` somewhere before its last steps."""
    calm_seconds = calm(name)
    stage = STAGES[name]
    job = stage.job(world, output)
    recovery = sabotage(
        lambda: stage.run(job), num_steps(world / output), chance.randrange(1, STEPS - 4), strike
    )
    assert outcome(world / output) == outcome(world / f"calm-{name}")
    note(recovery, calm_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_a_machine_is_killed(whole, world, calm, note, name):
    chance = random.Random(0)
    strike = kill_a_machine(whole, "RayTrainWorker", chance)
    disturbed(name, world, calm, note, chance, f"machine-{name}", strike)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_a_worker_is_killed(whole, world, calm, note, name):
    chance = random.Random(name)
    strike = kill_a_worker(whole, "RayTrainWorker", chance)
    disturbed(name, world, calm, note, chance, f"worker-{name}", strike)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_the_driver_is_killed_and_submitted_again(whole, world, calm, note, name):
    calm_seconds = calm(name)
    output = world / f"driver-{name}"
    (world / f"{name}.yaml").write_text(to_yaml(STAGES[name].job(world, output.name)))
    recovery = kill_and_submit_again(
        lambda: Driver(whole, name, str(world / f"{name}.yaml")),
        num_steps(output),
        random.Random(name).randrange(1, STEPS - 4),
    )
    assert outcome(output) == outcome(world / f"calm-{name}")
    note(recovery, calm_seconds)
