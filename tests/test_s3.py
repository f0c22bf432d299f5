"""The whole way with everything on S3: the outcome is that of local disks, and nothing half is ever seen."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from safetensors.torch import load as tensors_of
from tiny_encoder import write_encoder
from tiny_language_model import write_language_model

from revision_ray.align import apply
from revision_ray.align import fit as fitting
from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import AlignJob
from revision_ray.align.fit import FitJob
from revision_ray.core import config, storage
from revision_ray.data.store import open_stores
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.encode.pipeline import Resources
from revision_ray.evaluate import evaluation
from revision_ray.evaluate.evaluation import EvaluateJob
from revision_ray.miniature import dataset, render
from revision_ray.miniature.dataset import ConversationsJob, DatasetConfig
from revision_ray.train import export
from revision_ray.train.export_job import export_checkpoint
from revision_ray.train.models import Architecture, load_model
from revision_ray.train.settings import Checkpoints, Logging, Optimisation, Workers
from revision_ray.train.stages import FinetuneJob, PretrainJob, finetune, pretrain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
Place = Callable[[str], str]
STEPS = 6


def encoder(place: Place) -> EncoderConfig:
    return EncoderConfig(kind="open_clip", model=place("encoder"))


def embed_job(place: Place, side: str) -> EmbedJob:
    rows = {"images": 16, "texts": 64}[side]
    return EmbedJob(
        **{side: place(f"world/{side}")},  # type: ignore[arg-type]
        output=place(side),
        encoder=encoder(place),
        rows_per_shard=rows,
        resources=Resources(cpus_per_actor=0.5, max_actors=1),
    )


SETTINGS: dict[str, Any] = {
    "max_length": 48,
    "batches_per_window": 3,
    "optimisation": Optimisation(
        global_batch_size=16, micro_batch_size=16, max_steps=STEPS, num_epochs=9, learning_rate=3e-3
    ),
    "workers": Workers(cpus_per_worker=0.5),
    "checkpoints": Checkpoints(every_steps=2),
    "logging": Logging(every_steps=1, sample_steps=[], tensorboard=True),
}


def stage_one(place: Place) -> PretrainJob:
    return PretrainJob(
        data=[place("texts")],
        heldout=[place("texts")],
        alignment=place("fit"),
        model=place("language_model"),
        image_tower=encoder(place),
        output=place("pretrain"),
        architecture=Architecture(num_visual_tokens=2, projector_hidden_size=24),
        **SETTINGS,
    )


def prepare(place: Place) -> None:
    """World, stores, fit, aligned texts and questions stand."""
    render.run_render(
        DatasetConfig(
            output=place("world"),
            num_pairs=4,
            num_heldout=6,
            num_images=48,
            num_texts=200,
            rows_per_file=40,
            cpus_per_task=0.5,
        )
    )
    for side in ("images", "texts"):
        embed.run_embed(embed_job(place, side))
    fitting.run_fit(FitJob(texts=place("texts"), images=place("images"), output=place("fit")))
    apply.run_align(AlignJob(texts=place("texts"), alignment=place("fit"), output=place("aligned")))
    dataset.run_conversations(
        ConversationsJob(world=place("world"), num_samples=40, output=place("questions"))
    )


def finish(place: Place) -> None:
    """Stage 2 on what stage 1 left, answers, and exported models."""
    finetune(
        FinetuneJob(
            data=[place("questions/conversations.jsonl")],
            images=[place("images")],
            model=place("pretrain/model"),
            output=place("finetune"),
            **SETTINGS,
        )
    )
    evaluation.run_evaluate(
        EvaluateJob(
            model=place("finetune/model"),
            benchmarks=["miniature"],
            data={"miniature": place("world")},
            output=place("evaluate"),
            num_pictures=2,
            max_new_tokens=4,
            cpus_per_actor=0.5,
        )
    )
    export_checkpoint(place("pretrain"), "start", place("start"))
    export_checkpoint(place("pretrain"), "best", place("best"))
    export_checkpoint(place("finetune"), None, place("model"))


def put_models(folder: Path, place: Place) -> None:
    """What one has before: an encoder and a language model."""
    write_encoder(folder / "encoder")
    write_language_model(folder / "language_model")
    for name in ("encoder", "language_model"):
        for path in (folder / name).iterdir():
            storage.write_bytes(place(f"{name}/{path.name}"), path.read_bytes())


@pytest.fixture(scope="module")
def local(cluster, tmp_path_factory) -> Place:
    """The way on local disks, undisturbed."""
    folder = tmp_path_factory.mktemp("local")

    def place(key: str) -> str:
        return str(folder / key)

    put_models(tmp_path_factory.mktemp("models"), place)
    prepare(place)
    pretrain(stage_one(place))
    finish(place)
    return place


@pytest.fixture(scope="module")
def remote(cluster, bucket, tmp_path_factory) -> Iterator[Place]:
    """The way on S3 up to stage 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVISION_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        put_models(tmp_path_factory.mktemp("models"), bucket)
        prepare(bucket)
        yield bucket


def rows(uri: str) -> dict[str, tuple]:
    """What a store holds, by id."""
    found = {}
    for part, _ in storage.list_files(uri, "part-*.parquet"):
        table = pq.read_table(io.BytesIO(storage.read_bytes(part)))
        names = [name for name in ("embedding", "text", "truncated") if name in table.column_names]
        for row in table.to_pylist():
            found[row["id"]] = tuple(row[name] for name in names)
    return found


def losses(uri: str) -> list[tuple[int, float | None, float | None]]:
    lines = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
    return [(line["step"], line.get("loss"), line.get("heldout_loss")) for line in lines]


def tensors(uri: str) -> dict[str, torch.Tensor]:
    return tensors_of(storage.read_bytes(uri))


def names_in(uri: str) -> set[str]:
    return {storage.name_of(each) for each, _ in storage.list_files(uri)}


def assert_equal_tensors(one: str, other: str) -> None:
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_world_stores_and_fit_are_those_of_local_disks(local, remote):
    """World, stores and fit on S3 are those of local disks."""
    worlds = [storage.read_json(place("world/manifest.json")) for place in (local, remote)]
    assert worlds[0] == worlds[1]
    for store, num_rows in (("images", 48), ("texts", 200), ("aligned", 200)):
        expected = rows(local(store))
        assert len(expected) == num_rows
        assert rows(remote(store)) == expected, store
        assert storage.read_json(remote(f"{store}/manifest.json"))["num_rows"] == num_rows
    assert_equal_tensors(remote("fit/alignment.safetensors"), local("fit/alignment.safetensors"))


@pytest.fixture(scope="module")
def trained(remote, tmp_path_factory) -> Place:
    """The way on S3 to its end; the job of stage 1 was killed with all of its Ray on the way."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.yaml").write_text(config.to_yaml(stage_one(remote)))
    process = subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", str(folder / "job.yaml")],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        for _ in range(4000):
            snapshots = storage.list_files(remote("pretrain/checkpoints"), "*snapshot.json")
            committed = any(b"checkpoint-" in storage.read_bytes(uri) for uri, _ in snapshots)
            if committed or process.poll() is not None:
                break
            time.sleep(0.3)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not storage.exists(remote("pretrain/results.json"))
    pretrain(stage_one(remote))
    finish(remote)
    return remote


def test_a_killed_stage_one_goes_on_and_everything_ends_the_same(local, trained):
    """With all on S3, a killed stage 1 goes on, and models and answers are those of local disks."""
    for stage in ("pretrain", "finetune"):
        found = losses(trained(f"{stage}/metrics.jsonl"))
        assert found == losses(local(f"{stage}/metrics.jsonl"))
        assert found[-1][0] == STEPS
        assert storage.list_files(trained(f"{stage}/tensorboard"), "events*")
    for model in ("pretrain/model", "finetune/model", "start", "best", "model"):
        assert_equal_tensors(trained(f"{model}/model.safetensors"), local(f"{model}/model.safetensors"))
        names = [
            {storage.name_of(uri) for uri, _ in storage.list_files(place(model))}
            for place in (local, trained)
        ]
        assert names[0] == names[1]
    results = [storage.read_json(place("evaluate/results.json")) for place in (local, trained)]
    assert results[0] == results[1]


def test_a_model_on_s3_loads_and_is_the_one_of_the_local_disk(local, trained):
    """A model on S3 loads with equal weights and is copied again only where it changed."""
    found, expected = (
        load_model(place("model"), dtype=torch.float32, attention=None)[0] for place in (local, trained)
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    copies = [storage.local_copy(trained("model")) for _ in range(2)]
    assert copies[0] == copies[1]
    storage.write_bytes(trained("model/added.txt"), b"")
    assert storage.local_copy(trained("model")) != copies[0], "what has changed is copied again"


def test_finished_stages_on_s3_are_kept(trained):
    """A finished stage on S3 is kept as it is."""
    before = {uri: info.mtime_ns for uri, info in storage.list_files(trained("pretrain"), recursive=True)}
    assert pretrain(stage_one(trained))["num_steps"] == STEPS
    after = {uri: info.mtime_ns for uri, info in storage.list_files(trained("pretrain"), recursive=True)}
    assert after == before


# --- nothing half is seen ---------------------------------------------------------------------------------


@contextmanager
def looked_at(look: Callable[[], bool]) -> Iterator[list[bool]]:
    """`look` is called all the time that this is open; it says whether the thing is there, and raises where
    that is not whole."""
    seen: list[bool] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set() and not errors:
            try:
                seen.append(look())
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]
    seen.append(look())
    assert not seen[0]
    assert seen[-1]


def assert_last(uri: str, marker: str) -> None:
    """No file of the folder is younger than the one that says that all are there. The server's own clock is
    asked: a listing has whole seconds."""
    bucket_name, _, prefix = storage.resolve(uri)[1].partition("/")
    keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket_name].keys
    times = {name: keys[name].last_modified for name in keys if name.startswith(f"{prefix}/")}
    assert len(times) > 1
    assert max(times, key=times.__getitem__) == f"{prefix}/{marker}", times


def test_a_store_a_fit_and_a_model_appear_whole(trained, bucket):
    """Stores, fits and models on S3 appear whole or not at all."""

    def store() -> bool:
        if not storage.exists(bucket("again/texts/manifest.json")):
            return False
        opened = open_stores([bucket("again/texts")], "text")
        assert len(rows(bucket("again/texts"))) == opened.num_rows == 200
        return True

    def fit() -> bool:
        if not storage.exists(bucket("again/fit/alignment.json")):
            return False
        return load_alignment(bucket("again/fit")).strategy.strategy == "realign"

    def model() -> bool:
        if not storage.exists(bucket("again/model/config.json")):
            return False
        load_model(bucket("again/model"), dtype=torch.float32, attention=None)
        return True

    with looked_at(store):
        embed.run_embed(
            embed_job(lambda key: bucket(f"again/{key}") if key == "texts" else trained(key), "texts")
        )
    with looked_at(fit):
        fitting.run_fit(FitJob(texts=trained("texts"), images=trained("images"), output=bucket("again/fit")))
    assert_last(bucket("again/texts"), "manifest.json")
    assert_last(bucket("again/fit"), "alignment.json")
    made, processor = load_model(trained("start"), dtype=torch.float32, attention=None)
    with looked_at(model):
        export.write(made, processor, bucket("again/model"))
    assert_last(bucket("again/model"), "config.json")
