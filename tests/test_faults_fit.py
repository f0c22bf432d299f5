"""Fits when machines, workers, drivers and storage fail: the outcome is that of a calm run, to the bit."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedding_stores import cloud, write_store
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
    refuse_writes,
    sabotage,
    slow_a_machine,
)

from revision_ray.align import fit, map_reduce
from revision_ray.align.alignment import IMAGE_MOMENTS, TEXT_MOMENTS, load_alignment
from revision_ray.align.fit import FitJob
from revision_ray.core import storage
from revision_ray.data.shards import Modality

MACHINES = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(MACHINES) as started:
        yield started


DIM, TEXT_SHARDS, IMAGE_SHARDS, ROWS = 256, 160, 80, 250


def write_stores(folder: Path, text_shards: int, image_shards: int) -> dict[str, str]:
    """Texts and images in many small shards, so that there are many tasks."""
    sizes: list[tuple[str, Modality, int]] = [
        ("texts", "text", text_shards),
        ("images", "image", image_shards),
    ]
    return {
        name: write_store(folder / name, cloud(num * ROWS, DIM, modality), modality, rows_per_shard=ROWS)
        for name, modality, num in sizes
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    return write_stores(tmp_path_factory.mktemp("stores"), TEXT_SHARDS, IMAGE_SHARDS)


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
    work = Work(lambda: fit.run_fit(fit_job(stores, output)))
    work.wait()
    return bits_of(output), work.seconds


# Results of an undisturbed fit: a task for every 16 row groups, in one pass over images and four over texts.
NUM_RESULTS = IMAGE_SHARDS // 16 + 4 * (TEXT_SHARDS // 16)


def disturbed_fit(stores, calm_fit, output, results, note, chance, *strikes: Strike) -> None:
    """A fit that meets each of `strikes` in another part of its first three quarters."""
    calm, calm_seconds = calm_fit
    part = NUM_RESULTS * 3 // 4 // len(strikes)
    points = [chance.randrange(part * number, part * (number + 1)) for number in range(len(strikes))]
    recovery = sabotage(
        lambda: fit.run_fit(fit_job(stores, output)), lambda: len(results), *zip(points, strikes, strict=True)
    )
    assert len(results) == NUM_RESULTS
    assert bits_of(output) == calm
    note(recovery, calm_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_machine_and_a_worker_are_killed_during_a_fit(
    whole, stores, calm_fit, tmp_path, results, note, seed
):
    """A fit that loses a worker and then a machine has the bits of a calm one."""
    chance = random.Random(seed)
    strikes = [kill(whole, "_partial_moments", chance) for kill in (kill_a_worker, kill_a_machine)]
    disturbed_fit(stores, calm_fit, tmp_path / "fit", results, note, chance, *strikes)


@pytest.mark.slow
def test_a_slow_machine_during_a_fit(whole, stores, calm_fit, tmp_path, results, note):
    """A machine that runs a tenth of the time changes no bit of a fit."""
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
def test_the_driver_of_a_fit_is_killed_and_submitted_again(whole, stores, calm_fit, tmp_path, note):
    """A fit whose driver is killed, submitted again, begins anew and has the same bits."""
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
        random.Random(0).randrange(1, TEXT_SHARDS),
    )
    assert bits_of(output) == calm
    note(recovery, calm_seconds)


@pytest.mark.slow
def test_every_read_fails_twice_during_a_fit(whole, faltering_s3, tmp_path):
    """A fit of stores on S3, each file of which refuses its first two reads, has the same bits."""
    stores = write_stores(tmp_path, text_shards=20, image_shards=10)
    fit.run_fit(fit_job(stores, tmp_path / "calm"))
    remote = {key: faltering_s3.put_files(Path(folder), key) for key, folder in stores.items()}
    before = faltering_s3.refused
    with faltering_s3.refusing(first_reads(2)):
        work = Work(lambda: fit.run_fit(fit_job(remote, tmp_path / "fit")))
        work.wait()
    assert bits_of(tmp_path / "fit") == bits_of(tmp_path / "calm")
    assert faltering_s3.refused >= before + 2 * 30


@pytest.mark.slow
def test_storage_that_refuses_writes_for_a_while_at_the_end_of_a_fit(
    whole, faltering_s3, stores, calm_fit, results, note
):
    """A fit whose S3 refuses writes for 12 s when its last result is there has the same bits."""
    calm, calm_seconds = calm_fit
    output = faltering_s3.uri("fit-refused")
    before = faltering_s3.refused
    recovery = sabotage(
        lambda: fit.run_fit(fit_job(stores, output)),
        lambda: len(results),
        (NUM_RESULTS, refuse_writes(faltering_s3, seconds=12)),
    )
    assert faltering_s3.refused > before
    assert bits_of(output) == calm
    note(recovery, calm_seconds)
