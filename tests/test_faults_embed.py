"""Embedding when machines, workers, drivers and storage fail: the rows are those of a calm run, each once."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import (
    Driver,
    Machines,
    Strike,
    Work,
    first_reads,
    kill_a_machine,
    kill_a_worker,
    kill_and_submit_again,
    machines,
    num_spilled,
    refuse_writes,
    sabotage,
    slow_a_machine,
    stall_until_stores_spill,
    tenants,
)
from PIL import Image
from tiny_encoder import WORDS, write_encoder

from revision_ray.core import storage
from revision_ray.core.config import to_yaml
from revision_ray.data import shards
from revision_ray.data.shards import read_manifest
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.encode.pipeline import Resources

OBJECT_STORE = 100_000_000  # bytes on each machine
FILES, ROWS_PER_FILE, ROWS_PER_SHARD = 6, 160, 16
NUM_SHARDS = FILES * ROWS_PER_FILE // ROWS_PER_SHARD
# Ray Data puts stages that ask for the same into one process: these are apart, as with GPUs.
RESOURCES = Resources(cpus_per_actor=0.5, cpus_per_task=0.25, max_actors=2)
MACHINES = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(MACHINES, object_store_memory=OBJECT_STORE) as started:
        yield started


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
        texts=str(texts),
        encoder=encoder,
        output=str(output),
        rows_per_shard=ROWS_PER_SHARD,
        resources=RESOURCES,
    )


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


Calm = tuple[dict[str, bytes], float]  # rows of an undisturbed run, and the seconds that it took


def undisturbed(job: EmbedJob, num_rows: int) -> Calm:
    work = Work(lambda: embed.run_embed(job))
    work.wait()
    rows = rows_of(job.output)
    assert len(rows) == num_rows
    return rows, work.seconds


def disturbed(job: EmbedJob, calm: Calm, note, *strikes: tuple[int, Strike]) -> None:
    """A job in this process that meets each strike when it has written so many shards."""
    recovery = sabotage(lambda: embed.run_embed(job), num_shards(job.output), *strikes)
    assert rows_of(job.output) == calm[0]
    note(recovery, calm[1])


def somewhere(chance: random.Random) -> int:
    """A number of shards in the first half of the job."""
    return chance.randrange(1, NUM_SHARDS // 2)


@pytest.fixture(scope="module")
def calm(cluster, encoder, captions, tmp_path_factory) -> Calm:
    output = tmp_path_factory.mktemp("calm") / "store"
    return undisturbed(embed_job(encoder, captions, output), FILES * ROWS_PER_FILE)


@pytest.mark.slow
def test_a_machine_is_killed(whole, encoder, captions, calm, tmp_path, note):
    """An embed job that loses a machine writes every row of a calm one, once."""
    chance = random.Random(0)
    strike = kill_a_machine(whole, "Encode", chance)
    disturbed(embed_job(encoder, captions, tmp_path / "store"), calm, note, (somewhere(chance), strike))


@pytest.mark.slow
def test_a_worker_of_each_stage_is_killed(whole, encoder, captions, calm, tmp_path, note):
    """An embed job that loses a worker of each of its stages writes every row of a calm one, once."""
    chance = random.Random(0)
    points = {"Prepare": 0, "Encode": chance.randrange(1, 15), "Write": chance.randrange(15, 30)}
    # Preparing runs ahead of the rest, and is done early.
    strikes = [(at, kill_a_worker(whole, title, chance)) for title, at in points.items()]
    disturbed(embed_job(encoder, captions, tmp_path / "store"), calm, note, *strikes)


@pytest.mark.slow
def test_a_machine_is_slow(whole, encoder, captions, calm, tmp_path, note):
    """An embed job with a machine that runs a fifth of the time writes every row of a calm one, once."""
    chance = random.Random(0)
    strike = slow_a_machine(whole, chance, share=0.2)
    disturbed(embed_job(encoder, captions, tmp_path / "store"), calm, note, (somewhere(chance), strike))


@pytest.mark.slow
def test_the_driver_is_killed_and_submitted_again(whole, encoder, captions, calm, tmp_path, note):
    """An embed job whose driver is killed, submitted again, ends with every row of a calm one, once."""
    job = embed_job(encoder, captions, tmp_path / "store")
    (tmp_path / "job.yaml").write_text(to_yaml(job))
    recovery = kill_and_submit_again(
        lambda: Driver(whole, "embed", str(tmp_path / "job.yaml")),
        num_shards(job.output),
        somewhere(random.Random(0)),
    )
    assert rows_of(job.output) == calm[0]
    note(recovery, calm[1])


@pytest.mark.slow
def test_storage_falters(whole, faltering_s3, encoder, captions, calm, note):
    """An embed job whose S3 refuses reads, and all writes for 12 s, writes every row of a calm one, once.

    S3's client tries for six seconds by itself. Each file refuses its first two reads."""
    job = embed_job(encoder, faltering_s3.put_files(captions, "captions"), faltering_s3.uri("store"))
    refused: list[int] = []

    def refuse(work: Work) -> None:
        refused.append(faltering_s3.refused)
        refuse_writes(faltering_s3, seconds=12)(work)

    with faltering_s3.refusing(first_reads(2)):
        disturbed(job, calm, note, (somewhere(random.Random(0)), refuse))
    assert refused[0] >= 2, "reads were refused"
    assert faltering_s3.refused > refused[0], "writes were refused"


# --- object stores that spill -----------------------------------------------------------------------------

IMAGES, IMAGES_PER_SHARD, PIXELS = 640, 32, 224  # a unit of prepared images takes 4.8 MB


@pytest.fixture(scope="module")
def image_job(tmp_path_factory) -> Callable[[Path], EmbedJob]:
    """A job that embeds images to a folder."""
    folder = tmp_path_factory.mktemp("images")
    encoder = write_encoder(tmp_path_factory.mktemp("encoder"), image_size=PIXELS)
    for number in range(IMAGES):
        Image.new("RGB", (24, 24), (number % 256, number // 256, 99)).save(folder / f"{number:04}.png")
    return lambda output: EmbedJob(
        images=str(folder),
        encoder=EncoderConfig(kind="open_clip", model=encoder),
        output=str(output),
        rows_per_shard=IMAGES_PER_SHARD,
        # A second actor, which starts later, would do the work of one that stands still.
        resources=replace(RESOURCES, max_actors=1),
    )


@pytest.mark.slow
def test_object_stores_spill(whole, image_job, tmp_path, note):
    """An embed job whose object stores spill writes every row of a calm one, once.

    Encoding stands still, and prepared pixels are more than object stores have room for."""
    calm = undisturbed(image_job(tmp_path / "calm"), IMAGES)
    before = num_spilled()
    with tenants(whole, OBJECT_STORE * 7 // 10):
        # At once: later on too little is left to pile up.
        disturbed(image_job(tmp_path / "store"), calm, note, (0, stall_until_stores_spill(whole, "Encode")))
    assert num_spilled() > before
