"""The embed job on real encoders and real Ray: what it writes, and what survives bad input and kills."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from tiny_encoder import CONTEXT, WORDS, write_encoder

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError, OutputError
from revision_ray.data import shards
from revision_ray.data.finish import read_footers
from revision_ray.data.shards import read_manifest
from revision_ray.encode import embed, pipeline
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.encode.pipeline import Resources

ROOT = Path(__file__).parents[1]
SMALL = Resources(cpus_per_actor=0.5, cpus_per_task=0.5, max_actors=1)
# One layer in float32, summed in batches of other sizes: a few roundings; float16 storage adds 2^-11 of 1.
FLOAT16 = 5e-4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return EncoderConfig(kind="open_clip", model=write_encoder(tmp_path_factory.mktemp("encoder")))


def write_texts(path: Path, number: int, seed: int = 0, prefix: str = "t") -> Path:
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for row in range(number):
            text = " ".join(generator.choice(WORDS, generator.integers(1, 8)))
            file.write(json.dumps({"id": f"{prefix}{row}", "text": f"{text} {WORDS[row % 60]}"}) + "\n")
    return path


def write_images(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    for row in range(number):
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:04d}.png")
    return folder


def job_of(encoder, output, **settings) -> EmbedJob:
    defaults = {"encoder": encoder, "output": str(output), "rows_per_shard": 64, "resources": SMALL}
    return EmbedJob(**(defaults | settings))


def rows_of(uri) -> dict[str, np.ndarray]:
    """Every row of a store by id; fails where an id occurs twice."""
    found: dict[str, np.ndarray] = {}
    for shard in read_manifest(str(uri)).shards:
        path = storage.join(str(uri), shard.name)
        ids = shards.read_columns(path, ["id"]).column("id").to_pylist()
        assert not found.keys() & set(ids)
        found |= dict(zip(ids, shards.read_embeddings(path), strict=True))
    return found


def stamps(output) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(output).glob("part-*")}


def test_texts_are_embedded_as_the_tower_does_and_truncation_is_counted(cluster, encoder, tmp_path):
    source = write_texts(tmp_path / "texts.jsonl", 200)
    with source.open("a") as file:
        file.write(json.dumps({"id": "long", "text": " ".join(WORDS)}) + "\n")
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source), domain="words"))
    manifest = read_manifest(str(tmp_path / "store"))
    assert (manifest.num_rows, manifest.num_rejected, manifest.num_truncated) == (201, 0, 1)
    assert (manifest.domain, manifest.embedding_dim) == ("words", 16)
    assert manifest.encoder.fingerprint == backend(encoder).fingerprint(encoder)
    records = [json.loads(line) for line in source.read_text().splitlines()]
    module = backend(encoder)
    tokens = module.text_preparer(encoder)([record["text"] for record in records])
    expected = module.text_tower(encoder).encode([token.ids for token in tokens])
    found = rows_of(tmp_path / "store")
    assert list(found) != []
    assert len(tokens[-1].ids) == CONTEXT
    stacked = np.stack([found[record["id"]] for record in records]).astype(np.float32)
    np.testing.assert_allclose(stacked, expected, atol=FLOAT16)
    np.testing.assert_allclose(np.linalg.norm(stacked, axis=1), 1, atol=2 * FLOAT16)


def test_one_folder_of_tables_coco_and_compressed_files_is_one_store(cluster, encoder, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_texts(tmp_path / "plain.jsonl", 30)
    (folder / "a.jsonl.zst").write_bytes(
        pa.compress((tmp_path / "plain.jsonl").read_bytes(), "zstd", asbytes=True)
    )
    (folder / "b.csv").write_text(f'id,caption\nb0,"{WORDS[0]}, {WORDS[1]}"\n')
    annotations = [{"id": 5, "image_id": 1, "caption": WORDS[2]}]
    (folder / "c.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": annotations}))
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder)))
    embed.run_embed(job_of(encoder, tmp_path / "plain", texts=str(tmp_path / "plain.jsonl")))
    found, plain = rows_of(tmp_path / "store"), rows_of(tmp_path / "plain")
    assert found.keys() == plain.keys() | {"b0", "5"}
    for row_id, row_D in plain.items():
        np.testing.assert_allclose(found[row_id], row_D, atol=FLOAT16)


def test_images_are_embedded_as_the_tower_does_and_bad_ones_are_listed(cluster, encoder, tmp_path):
    folder = write_images(tmp_path / "images", 70)
    whole = (folder / "0000.png").read_bytes()
    (folder / "bad_empty.jpg").write_bytes(b"")
    (folder / "bad_text.png").write_text("no image")
    (folder / "bad_cut.png").write_bytes(whole[: len(whole) // 2])
    job = job_of(encoder, tmp_path / "store", images=str(folder), dtype="float32", rows_per_shard=32)
    with pytest.raises(DataError, match=r"3 of 73 rows were rejected.*max_rejected_fraction"):
        embed.run_embed(job)
    before = stamps(tmp_path / "store")
    embed.run_embed(
        job_of(
            encoder,
            tmp_path / "store",
            images=str(folder),
            dtype="float32",
            rows_per_shard=32,
            max_rejected_fraction=0.1,
        )
    )
    assert stamps(tmp_path / "store") == before  # nothing was encoded again
    found = rows_of(tmp_path / "store")
    assert sorted(found) == [f"{row:04d}" for row in range(70)]
    module = backend(encoder)
    prepare = module.image_preparer(encoder)
    pixels = np.stack([prepare(Image.open(folder / f"{name}.png").convert("RGB")) for name in sorted(found)])
    expected = module.image_tower(encoder).encode(pixels)
    # float32 through one layer in batches of other sizes
    np.testing.assert_allclose(np.stack([found[name] for name in sorted(found)]), expected, atol=3e-6)
    rejected = [row for footer in read_footers(str(tmp_path / "store")).values() for row in footer.rejected]
    assert sorted(row.id for row in rejected) == ["bad_cut", "bad_empty", "bad_text"]
    assert all(row.reason and row.uri.startswith(str(folder)) for row in rejected)


def test_a_second_run_encodes_nothing_and_new_files_add_shards(cluster, encoder, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_texts(folder / "a.jsonl", 150)
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder)))
    before = stamps(tmp_path / "store")
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder)))
    assert stamps(tmp_path / "store") == before
    write_texts(folder / "b.jsonl", 70, seed=1, prefix="b")
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder)))
    after = stamps(tmp_path / "store")
    assert before.items() < after.items()
    assert len(rows_of(tmp_path / "store")) == 220


@pytest.mark.slow
def test_an_image_folder_that_grew_adds_shards_of_the_new_files_only(cluster, encoder, tmp_path):
    """An image folder that grew adds shards of its new files only."""
    folder = write_images(tmp_path / "images", 40)
    embed.run_embed(job_of(encoder, tmp_path / "store", images=str(folder), rows_per_shard=16))
    before = stamps(tmp_path / "store")
    Image.new("RGB", (32, 32), "red").save(folder / "0000a.png")  # sorts into the first slice
    embed.run_embed(job_of(encoder, tmp_path / "store", images=str(folder), rows_per_shard=16))
    after = stamps(tmp_path / "store")
    assert before.items() < after.items()
    assert len(after) == len(before) + 1
    assert len(rows_of(tmp_path / "store")) == 41


@pytest.mark.slow
def test_a_source_that_changed_is_refused(cluster, encoder, tmp_path):
    """A source that changed since it was embedded is refused."""
    source = write_texts(tmp_path / "texts.jsonl", 100)
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source)))
    write_texts(source, 101)
    with pytest.raises(DataError, match="has changed since it was embedded"):
        embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source)))


@pytest.mark.slow
def test_another_encoder_or_setting_is_refused(cluster, encoder, tmp_path):
    """A store is not gone on with by another encoder or setting, nor a folder that is no store."""
    source = write_texts(tmp_path / "texts.jsonl", 10)
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source)))
    other = EncoderConfig(kind="open_clip", model=write_encoder(tmp_path / "other", seed=1))
    with pytest.raises(OutputError, match="encoder"):
        embed.run_embed(job_of(other, tmp_path / "store", texts=str(source)))
    with pytest.raises(OutputError, match="dtype"):
        embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source), dtype="float32"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt: does not belong to an embedding store"):
        embed.run_embed(job_of(encoder, tmp_path / "full", texts=str(source)))


def test_missing_and_empty_sources_leave_no_store(cluster, encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in ("nowhere.jsonl", "empty"):
        with pytest.raises(DataError, match=source):
            embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(tmp_path / source)))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ConfigError, match="either images or texts"):
        job_of(encoder, tmp_path / "store")


def test_bad_texts_are_counted_and_nothing_else_is_lost(cluster, encoder, tmp_path):
    source = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": f"t{row}", "text": WORDS[row % 60]}).encode() for row in range(90)]
    lines += [b'{"id": "empty", "text": ""}', b'{"id": "cut", "tex', b'{"id": "bytes", "text": "\xff\xfe"}']
    lines += [json.dumps({"id": "huge", "text": "word1 " * 20_000}).encode()]
    source.write_bytes(b"\n".join(lines) + b"\n")
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(source), max_rejected_fraction=0.1))
    manifest = read_manifest(str(tmp_path / "store"))
    assert (manifest.num_rows, manifest.num_rejected, manifest.num_truncated) == (91, 3, 1)
    assert set(rows_of(tmp_path / "store")) == {f"t{row}" for row in range(90)} | {"huge"}


def run_and_kill(command: list[str], output: Path, at: int) -> None:
    """The job is started and its driver killed when `at` shards stand; its Ray is gone when this returns."""
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while len(stamps(output)) < at and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "the job ended before it could be killed"
    family = process.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    for orphan in alive:
        orphan.kill()


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(cluster, encoder, tmp_path):
    """An embed job killed three times encodes no shard twice and ends with the rows of a calm one."""
    source = write_texts(tmp_path / "texts.jsonl", 6000)
    output = tmp_path / "store"
    command = [
        sys.executable, "jobs/embed.py", "configs/embed.yaml", f"texts={source}", f"output={output}",
        f"encoder.model={encoder.model}", "rows_per_shard=64", "resources.max_actors=1",
        "resources.cpus_per_actor=0.5", "resources.cpus_per_task=0.5",
    ]  # fmt: skip
    kept: dict[str, tuple[int, int]] = {}
    for at in (1, 9, 40):
        run_and_kill(command, output, at)
        assert kept.items() <= stamps(output).items()  # what stood was not encoded again
        kept = stamps(output)
        assert not (output / shards.MANIFEST).exists()
    embed.run_embed(job_of(encoder, output, texts=str(source)))
    assert kept.items() <= stamps(output).items()
    embed.run_embed(job_of(encoder, tmp_path / "calm", texts=str(source)))
    calm, store = rows_of(tmp_path / "calm"), rows_of(output)
    assert calm.keys() == store.keys()
    assert len(store) == 6000
    assert all(np.array_equal(calm[name], store[name]) for name in calm)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_what_was_written_is_kept(cluster, encoder, tmp_path, small_disk):
    """A full disk is said, and with room the embed job goes on from what it wrote."""
    source = write_texts(tmp_path / "texts.jsonl", 6000)
    with pytest.raises(DataError, match="no space left"):
        embed.run_embed(job_of(encoder, small_disk / "store", texts=str(source)))
    assert not list(small_disk.glob("**/.tmp-*"))
    kept = stamps(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    embed.run_embed(job_of(encoder, small_disk / "store", texts=str(source)))
    assert kept
    assert kept.items() <= stamps(small_disk / "store").items()
    assert len(rows_of(small_disk / "store")) == 6000


@pytest.mark.slow
def test_duplicate_ids_are_numbered_or_rejected(cluster, encoder, tmp_path):
    """Duplicate ids are numbered or rejected, as is set."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"id": "x", "text": "word1"}\n{"id": "y", "text": "word2"}\n')
    (folder / "b.jsonl").write_text('{"id": "x", "text": "word1"}\n{"id": "y", "text": "word3"}\n')
    with pytest.raises(DataError, match="duplicate id"):
        embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder)))
    embed.run_embed(job_of(encoder, tmp_path / "store", texts=str(folder), max_rejected_fraction=0.5))
    assert len(rows_of(tmp_path / "store")) == 3  # x, the same text numbered, y; the other y is listed
    assert read_manifest(str(tmp_path / "store")).num_rejected == 1
    embed.run_embed(job_of(encoder, tmp_path / "all", texts=str(folder), duplicate_ids="number"))
    assert len(rows_of(tmp_path / "all")) == 4


def test_groups_hold_their_size_and_the_last_is_marked():
    assert list(pipeline._grouped(range(5), 2)) == [(0, False, [0, 1]), (1, False, [2, 3]), (2, True, [4])]
    assert list(pipeline._grouped(range(4), 2)) == [(0, False, [0, 1]), (1, True, [2, 3])]
    assert list(pipeline._grouped([], 2)) == [(0, True, [])]
