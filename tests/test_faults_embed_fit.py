"""Embedding and fits when machines, workers, drivers and storage fail: the outcome is that of a calm run."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from faults import Machines, Recovery, Work, machines, sabotage, shards_of, wait_until
from tiny_encoder import WORDS, write_encoder

from revision_ray import storage
from revision_ray.data import shards
from revision_ray.data.shards import read_manifest
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.encode.pipeline import Resources

MACHINES = 2
FILES, ROWS_PER_FILE, ROWS_PER_SHARD = 6, 160, 16
NUM_SHARDS = FILES * ROWS_PER_FILE // ROWS_PER_SHARD


@pytest.fixture(scope="module")
def cluster():
    with machines(MACHINES) as started:
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


def embed_job(encoder: EncoderConfig, captions: Path, output: Path) -> EmbedJob:
    resources = Resources(cpus_per_actor=0.5, cpus_per_task=0.5, max_actors=2)
    return EmbedJob(
        texts=str(captions), encoder=encoder, output=str(output), rows_per_shard=ROWS_PER_SHARD,
        resources=resources,
    )  # fmt: skip


def rows_of(uri: Path) -> dict[str, bytes]:
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


def note(record_property, recovery: Recovery, calm: float) -> None:
    record_property("first_sign_seconds", round(recovery.first_sign, 1))
    record_property("seconds", round(recovery.seconds, 1))
    record_property("calm_seconds", round(calm, 1))
    print(f"first sign after {recovery.first_sign:.1f} s, all {recovery.seconds:.1f} s, calm {calm:.1f} s")


def kill_a_machine_at_work(cluster: Machines, title: str, chance: random.Random):
    """Strike: one of the machines where `title` is at work is killed, another one started."""

    def strike(work: Work) -> None:
        busy = wait_until(lambda: [node for node in cluster.nodes if cluster.workers(node, title)], work)
        cluster.kill(chance.choice(busy))
        cluster.replenish(MACHINES)

    return strike


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_raylet_killed_during_embed(whole, encoder, captions, calm_store, tmp_path, seed, record_property):
    calm, calm_seconds = calm_store
    chance = random.Random(seed)
    output = tmp_path / "store"
    recovery = sabotage(
        lambda: embed.run(embed_job(encoder, captions, output)),
        lambda: shards_of(output),
        chance.randrange(1, NUM_SHARDS // 2),
        kill_a_machine_at_work(whole, "Encode", chance),
    )
    assert rows_of(output) == calm
    note(record_property, recovery, calm_seconds)
