"""Embedding and fits when machines, workers, drivers and storage fail: the outcome is that of a calm run."""

import json
import os
import random
from collections.abc import Callable, Iterator
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
    Storage,
    Work,
    first_reads,
    kill_a_machine,
    kill_a_worker,
    kill_and_submit_again,
    machines,
    refuse_writes,
    report,
    sabotage,
    slow_a_machine,
)
from tiny_encoder import WORDS, write_encoder

from revision_ray import storage
from revision_ray.align import fit, map_reduce
from revision_ray.align.alignment import IMAGE_MOMENTS, TEXT_MOMENTS, load_alignment
from revision_ray.align.fit import FitJob
from revision_ray.data import shards
from revision_ray.data.shards import read_manifest
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.encode.pipeline import Resources

MACHINES = 2
OBJECT_STORE = 100_000_000
FILES, ROWS_PER_FILE, ROWS_PER_SHARD = 6, 160, 16
NUM_SHARDS = FILES * ROWS_PER_FILE // ROWS_PER_SHARD


@pytest.fixture(scope="module")
def store() -> Iterator[Storage]:
    """A server of objects. Its keys are in the environment, which machines hand on to their workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        started = Storage()
        yield started
        started.close()


@pytest.fixture(scope="module")
def cluster(store):
    with machines(MACHINES, object_store_memory=OBJECT_STORE) as started:
        yield started


@pytest.fixture
def whole(cluster) -> Machines:
    """The cluster with all its machines."""
    cluster.replenish(MACHINES)
    return cluster


# --- embed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> EncoderConfig:
    return EncoderConfig(kind="open_clip", model=write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    generator = np.random.default_rng(0)
    for number in range(FILES):
        rows = [
            {"id": f"t{number}-{row}", "text": " ".join(generator.choice(WORDS, generator.integers(1, 9)))}
            for row in range(ROWS_PER_FILE)
        ]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def embed_job(encoder: EncoderConfig, texts: Any, output: Any) -> EmbedJob:
    return EmbedJob(
        texts=str(texts), encoder=encoder, output=str(output), rows_per_shard=ROWS_PER_SHARD,
        resources=Resources(cpus_per_actor=0.5, cpus_per_task=0.5, max_actors=2),
    )  # fmt: skip


def num_shards(output: Any) -> Callable[[], int]:
    return lambda: len(storage.list_files(str(output), "part-*"))


def rows_of(uri: Any) -> dict[str, bytes]:
    """The bytes of every row of a store by id; fails where an id occurs twice."""
    found: dict[str, bytes] = {}
    for shard in read_manifest(str(uri)).shards:
        path = storage.join(str(uri), shard.name)
        ids = shards.read_columns(path, ["id"]).column("id").to_pylist()
        assert not found.keys() & set(ids)
        found |= dict(zip(ids, map(bytes, shards.read_embeddings(path)), strict=True))
    return found


@pytest.fixture(scope="module")
def calm_store(cluster, encoder, captions, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """Rows of an undisturbed run, and how long it took."""
    output = tmp_path_factory.mktemp("calm") / "store"
    work = Work(lambda: embed.run(embed_job(encoder, captions, output)))
    work.wait()
    rows = rows_of(output)
    assert len(rows) == FILES * ROWS_PER_FILE
    return rows, work.seconds


@pytest.fixture
def note(request) -> Callable[[Recovery, float], None]:
    """Writes down what a fault cost, beside the seconds of the calm run."""
    return partial(report, request.node)


def disturbed_embed(encoder, captions, calm_store, output, note, chance, strike) -> None:
    """An embed job in this process that meets `strike` somewhere in its first half."""
    calm, calm_seconds = calm_store
    recovery = sabotage(
        lambda: embed.run(embed_job(encoder, captions, output)),
        num_shards(output),
        chance.randrange(1, NUM_SHARDS // 2),
        strike,
    )
    assert rows_of(output) == calm
    note(recovery, calm_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_machine_is_killed_during_embed(whole, encoder, captions, calm_store, tmp_path, note, seed):
    chance = random.Random(seed)
    strike = kill_a_machine(whole, "Encode", chance)
    disturbed_embed(encoder, captions, calm_store, tmp_path / "store", note, chance, strike)


# --- fit --------------------------------------------------------------------------------------------------

DIM, TEXT_SHARDS, IMAGE_SHARDS, ROWS = 256, 160, 80, 250


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    """Texts and images in many small shards, so that there are many tasks."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        "texts": write_store(folder / "texts", cloud(TEXT_SHARDS * ROWS, DIM, "text"), rows_per_shard=ROWS),
        "images": write_store(
            folder / "images", cloud(IMAGE_SHARDS * ROWS, DIM, "image"), "image", rows_per_shard=ROWS
        ),
    }


def fit_job(stores: dict[str, str], output: Any) -> FitJob:
    return FitJob(
        texts=stores["texts"],
        images=stores["images"],
        output=str(output),
        strategy="gaussian_ot",
        centroid_steps=2,
    )


def bits_of(output: Any) -> tuple[str, bytes, bytes]:
    """All that a fit says, and the moments that it keeps."""
    kept = [storage.read_bytes(storage.join(str(output), name)) for name in (TEXT_MOMENTS, IMAGE_MOMENTS)]
    return load_alignment(str(output)).content_hash, kept[0], kept[1]


@pytest.fixture
def results(monkeypatch) -> list[int]:
    """Grows with every partial result that reaches the driver."""
    arrived: list[int] = []
    run = map_reduce._run

    def watched(groups, work):
        for result in run(groups, work):
            arrived.append(result["num_rows"])
            yield result

    monkeypatch.setattr(map_reduce, "_run", watched)
    return arrived


@pytest.fixture(scope="module")
def calm_fit(cluster, stores, tmp_path_factory) -> tuple[tuple[str, bytes, bytes], float]:
    output = tmp_path_factory.mktemp("calm") / "fit"
    work = Work(lambda: fit.run(fit_job(stores, output)))
    work.wait()
    return bits_of(output), work.seconds


# Results of an undisturbed fit: a task for every 16 row groups, in one pass over images and four over texts.
NUM_RESULTS = IMAGE_SHARDS // 16 + 4 * (TEXT_SHARDS // 16)


def disturbed_fit(stores, calm_fit, output, results, note, chance, strike) -> None:
    calm, calm_seconds = calm_fit
    recovery = sabotage(
        lambda: fit.run(fit_job(stores, output)),
        lambda: len(results),
        chance.randrange(0, NUM_RESULTS * 3 // 4),
        strike,
    )
    assert len(results) == NUM_RESULTS
    assert bits_of(output) == calm
    note(recovery, calm_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_machine_is_killed_during_a_fit(whole, stores, calm_fit, tmp_path, results, note, seed):
    chance = random.Random(seed)
    strike = kill_a_machine(whole, "_partial_moments", chance)
    disturbed_fit(stores, calm_fit, tmp_path / "fit", results, note, chance, strike)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_worker_is_killed_during_a_fit(whole, stores, calm_fit, tmp_path, results, note, seed):
    chance = random.Random(seed)
    strike = kill_a_worker(whole, "_partial_moments", chance)
    disturbed_fit(stores, calm_fit, tmp_path / "fit", results, note, chance, strike)


@pytest.mark.slow
def test_a_slow_machine_during_a_fit(whole, stores, calm_fit, tmp_path, results, note):
    chance = random.Random(0)
    strike = slow_a_machine(whole, chance)
    disturbed_fit(stores, calm_fit, tmp_path / "fit", results, note, chance, strike)


def num_read(folder: str) -> int:
    """Shards that were read since `never_read`."""
    return sum(path.stat().st_atime_ns > 0 for path in Path(folder).glob("part-*"))


def never_read(folder: str) -> None:
    for path in Path(folder).glob("part-*"):
        os.utime(path, ns=(0, path.stat().st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_driver_of_a_fit_is_killed_and_submitted_again(whole, stores, calm_fit, tmp_path, note, seed):
    """A fit keeps nothing before its end, so it begins anew."""
    calm, calm_seconds = calm_fit
    output = tmp_path / "fit"
    arguments = [f"{key}={value}" for key, value in stores.items()]
    arguments += [f"output={output}", "strategy=gaussian_ot", "centroid_steps=2"]

    def submit() -> Driver:
        for folder in stores.values():
            never_read(folder)
        return Driver(whole, "fit", *arguments)

    recovery = kill_and_submit_again(
        submit,
        lambda: sum(map(num_read, stores.values())),
        random.Random(seed).randrange(1, TEXT_SHARDS),
    )
    assert bits_of(output) == calm
    note(recovery, calm_seconds)


def put_files(store: Storage, folder: Path, key: str) -> str:
    for path in folder.iterdir():
        if path.is_file():
            storage.write_bytes(store.uri(f"{key}/{path.name}"), path.read_bytes())
    return store.uri(key)


@pytest.mark.slow
def test_every_read_fails_twice_during_a_fit(whole, store, stores, calm_fit, tmp_path, note):
    remote = {key: put_files(store, Path(folder), key) for key, folder in stores.items()}
    store.refuses, before = first_reads(2), store.refused
    work = Work(lambda: fit.run(fit_job(remote, tmp_path / "fit")))
    work.wait()
    store.refuses = lambda method, path: False
    assert bits_of(tmp_path / "fit") == calm_fit[0]
    assert store.refused >= before + 2 * (TEXT_SHARDS + IMAGE_SHARDS)
    note(Recovery(first_sign=float("nan"), seconds=work.seconds), calm_fit[1])


@pytest.mark.slow
def test_storage_that_refuses_writes_for_a_while_at_the_end_of_a_fit(
    whole, store, stores, calm_fit, results, note
):
    """A fit writes when its last result is there; then nothing can be written for 12 seconds."""
    calm, calm_seconds = calm_fit
    output = store.uri("fit-refused")
    before = store.refused
    recovery = sabotage(
        lambda: fit.run(fit_job(stores, output)),
        lambda: len(results),
        NUM_RESULTS,
        refuse_writes(store, seconds=12),
    )
    assert store.refused > before
    assert bits_of(output) == calm
    note(recovery, calm_seconds)
