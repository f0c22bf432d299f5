"""Steps are a function of data, seed and step alone; joins, alignment and mixtures are what they say."""

import gzip
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ray
from embedding_stores import ENCODER, cloud, unit, write_part, write_store
from tiny_language_model import tiny_tokenizer
from tokenizers import AddedToken

from revision_ray.align import fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.fit import FitJob
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError
from revision_ray.data import shards
from revision_ray.data.conversations import ConversationSource
from revision_ray.data.shards import EncoderIdentity, Manifest
from revision_ray.data.store import RowGroup, open_stores, read_rejected
from revision_ray.train import ingest
from revision_ray.train.ingest import (
    PreparationSetup,
    PreparedStep,
    WorkerShare,
    conversation_source,
    decode,
    inspect,
    prepare,
    steps,
)
from revision_ray.train.joined import (
    AMBIGUOUS,
    MISSING,
    WAYS,
    build_index,
    join,
    key_hashes,
    open_joined,
    read_joined,
)
from revision_ray.train.samples import Formatter, padding_share
from revision_ray.train.sources import (
    MixturePart,
    StepOrder,
    StepPlan,
    joined_stores_source,
    repeats_of_weights,
    text_source,
)

DIM, NUM_TEXTS = 8, 500
TEXT_ND = cloud(NUM_TEXTS, DIM, "text")
IMAGE_ND = cloud(300, DIM, "image")
ORDER = StepOrder(global_batch_size=32, batches_per_window=4, seed=3)


# --- the plan ---------------------------------------------------------------------------------------------


def epoch_rows(plan: StepPlan, epoch: int) -> list[list[tuple[int, int]]]:
    """(row group, row) of every batch of an epoch."""
    batches = []
    for part in plan.windows(epoch * plan.steps_per_epoch, plan.steps_per_epoch):
        window = plan.window(part.epoch, part.index)
        lengths = (window.groups * 31 + window.rows * 7) % 101
        for batch in plan.batches(window, lengths)[part.first_batch : part.stop_batch]:
            batches.append(list(zip(window.groups[batch].tolist(), window.rows[batch].tolist(), strict=True)))
    return batches


SIZES = (100, 7, 64, 100, 31, 1, 90)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("batches_per_window", [1, 3, 1000])
def test_an_epoch_sees_every_row_once(by_length, batches_per_window):
    order = StepOrder(
        global_batch_size=16, batches_per_window=batches_per_window, seed=1, group_by_length=by_length
    )
    plan = StepPlan([MixturePart(num_rows=SIZES)], order)
    everything = sorted((group, row) for group, rows in enumerate(SIZES) for row in range(rows))
    first, second = epoch_rows(plan, 0), epoch_rows(plan, 1)
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == everything
        assert {len(batch) for batch in batches[:-1]} == {16}
        assert len(batches) == plan.steps_per_epoch
    assert first != second
    assert first == epoch_rows(StepPlan([MixturePart(num_rows=SIZES)], order), 0)


def test_repeats_count_and_broken_ones_draw_anew():
    parts = [
        MixturePart(num_rows=(50, 30), repeat=2),
        MixturePart(num_rows=(100, 60), repeat=0.25),
        MixturePart(num_rows=(9,), repeat=0),
        MixturePart(num_rows=(40,), repeat=1.75),
    ]
    plan = StepPlan(parts, StepOrder(global_batch_size=10, batches_per_window=5))
    assert plan.num_rows == 160 + 40 + 70
    drawn = []
    for epoch in (0, 1):
        seen = Counter(row for batch in epoch_rows(plan, epoch) for row in batch)
        assert all(seen[group, row] == 2 for group, rows in ((0, 50), (1, 30)) for row in range(rows))
        quarter = {row: count for row, count in seen.items() if row[0] in (2, 3)}
        assert len(quarter) == 40
        assert set(quarter.values()) == {1}
        drawn.append(set(quarter))
        assert Counter(seen[5, row] for row in range(40)) == {1: 10, 2: 30}
    assert drawn[0] != drawn[1]


def test_a_drawn_part_is_uniform():
    counts = np.zeros(200)
    for seed in range(300):
        plan = StepPlan(
            [MixturePart(num_rows=(150, 50), repeat=0.3)], StepOrder(global_batch_size=60, seed=seed)
        )
        for group, row in epoch_rows(plan, 0)[0]:
            counts[150 * group + row] += 1
    # 300 draws at 0.3 have a standard deviation of 7.9; the mean of the 50 rows of group 1, of about 1.
    assert abs(counts[150:].mean() - 90) < 5
    assert np.abs(counts - 90).max() < 45


def test_a_run_can_start_at_any_step():
    plan = StepPlan([MixturePart(num_rows=SIZES)], StepOrder(global_batch_size=16, batches_per_window=3))
    per_epoch = plan.steps_per_epoch
    every = [
        (part.epoch, part.index, batch)
        for part in plan.windows(0, 3 * per_epoch)
        for batch in range(part.first_batch, part.stop_batch)
    ]
    assert len(every) == 3 * per_epoch
    for start in range(3 * per_epoch):
        parts = list(plan.windows(start, min(5, 3 * per_epoch - start)))
        found = [(p.epoch, p.index, batch) for p in parts for batch in range(p.first_batch, p.stop_batch)]
        assert found == every[start : start + 5]
        assert plan.window(parts[0].epoch, parts[0].index).first_step + parts[0].first_batch == start


def test_grouping_by_length_narrows_batches_and_shuffles_them():
    sizes, lengths = (2048,), np.random.default_rng(0).integers(1, 1000, 2048)
    plan = StepPlan(
        [MixturePart(num_rows=sizes)],
        StepOrder(global_batch_size=32, batches_per_window=64, group_by_length=True),
    )
    window = plan.window(0, 0)
    means = [lengths[batch].mean() for batch in plan.batches(window, lengths)]
    spreads = [np.ptp(lengths[batch]) for batch in plan.batches(window, lengths)]
    assert max(spreads) < 60  # of 1000, in 64 batches
    assert means != sorted(means)


def test_weights_become_repeats():
    assert repeats_of_weights([100, 300], [1, 1]) == [2.0, pytest.approx(2 / 3)]
    assert repeats_of_weights([100, 300], [0.25, 0.75]) == [1.0, 1.0]
    with pytest.raises(ConfigError, match="zero"):
        repeats_of_weights([1], [0])
    with pytest.raises(ConfigError, match="no rows"):
        repeats_of_weights([0, 5], [1, 1])


def test_no_rows_and_impossible_orders_are_refused():
    with pytest.raises(DataError, match="no rows"):
        StepPlan([MixturePart(num_rows=(5, 5), repeat=0)], ORDER)
    with pytest.raises(ConfigError, match="global_batch_size"):
        StepOrder(global_batch_size=0)
    with pytest.raises(ConfigError, match="seed"):
        StepOrder(seed=-1)


# --- texts, aligned as they are read ----------------------------------------------------------------------


def texts_of(count: int) -> list[str]:
    """Captions of very different lengths."""
    lengths = np.random.default_rng(1).lognormal(2, 0.8, count).astype(int) + 1
    return [" ".join(["red", "dog", "a", "picture"][n % 4] for n in range(length)) for length in lengths]


def write_texts(folder: Path, encoder: EncoderIdentity = ENCODER) -> str:
    ids, texts = [f"t{row}" for row in range(NUM_TEXTS)], texts_of(NUM_TEXTS)
    entries = []
    for start in range(0, NUM_TEXTS, 90):
        part = slice(start, start + 90)
        name = f"part-{start:04d}.parquet"
        entries.append(write_part(folder / name, TEXT_ND[part], ids[part], "text", encoder, texts[part]))
    manifest = Manifest(
        modality="text", embedding_dim=DIM, dtype="float16", num_rows=NUM_TEXTS, num_rejected=0,
        num_truncated=0, domain="tests", encoder=encoder, shards=tuple(entries),
    )  # fmt: skip
    storage.write_json(str(folder / shards.MANIFEST), asdict(manifest))
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_store(tmp_path_factory.mktemp("images"), IMAGE_ND, "image", rows_per_shard=70)


@pytest.fixture(scope="module")
def alignment(cluster, texts, images, tmp_path_factory) -> str:
    output = str(tmp_path_factory.mktemp("fit") / "realign")
    fit.run_fit(FitJob(texts=texts, images=images, output=output, strategy="realign"))
    return output


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return Formatter(tokenizer, 2)


def local_steps(
    source, formatter, order: StepOrder, share: WorkerShare, start: int, stop: int
) -> list[PreparedStep]:
    """What `steps` gives, without Ray."""
    plan = ingest.plan_of(source, order)
    work = PreparationSetup(source=source, formatter=formatter, plan=plan, share=share)
    found = []
    for part in plan.windows(start, stop - start):
        window = plan.window(part.epoch, part.index)
        for number, payload in prepare(work, window, part.first_batch, part.stop_batch):
            found.append(decode(window.first_step + number, window.epoch, payload, pad_id=0))
    return found


def ids(step: PreparedStep) -> list[str]:
    return [row_id for batch in step.micro_batches for row_id in batch.ids]


def same(one: PreparedStep, other: PreparedStep) -> bool:
    """Equal to the bit, micro batch by micro batch."""
    names = ("input_ids", "labels", "attention_mask", "image_embeds")
    return (one.step, one.epoch, len(one.micro_batches)) == (
        other.step,
        other.epoch,
        len(other.micro_batches),
    ) and all(
        a.ids == b.ids and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
    )


@pytest.mark.parametrize("by_length", [False, True])
def test_workers_and_micro_batches_have_no_say_in_what_a_step_sees(alignment, texts, formatter, by_length):
    source = text_source([texts], alignment)
    order = StepOrder(global_batch_size=32, batches_per_window=4, seed=3, group_by_length=by_length)
    assert ingest.steps_per_epoch(source, order) == 16
    expected = [sorted(ids(step)) for step in local_steps(source, formatter, order, WorkerShare(), 0, 32)]
    for epoch in (expected[:16], expected[16:]):
        assert sorted(row_id for step in epoch for row_id in step) == sorted(
            f"t{n}" for n in range(NUM_TEXTS)
        )
    assert expected[:16] != expected[16:]
    for num_workers, micro_batch_size in ((2, 8), (3, 5), (4, 1)):
        ranks = [
            local_steps(
                source, formatter, order,
                WorkerShare(rank=rank, num_workers=num_workers, micro_batch_size=micro_batch_size), 0, 32,
            )
            for rank in range(num_workers)
        ]  # fmt: skip
        for number, step in enumerate(zip(*ranks, strict=True)):
            assert sorted(row_id for share in step for row_id in ids(share)) == expected[number]
            assert {share.step for share in step} == {number}
            assert {share.num_samples for share in step} == {len(expected[number])}
            counts = [len(share.micro_batches) for share in step]
            assert max(counts) - min(counts) <= (number % 16 == 15)  # only a smaller last step may run short
            assert all(len(b.ids) <= micro_batch_size for share in step for b in share.micro_batches)


def test_a_run_that_starts_at_a_step_goes_on_to_the_bit(alignment, texts, formatter):
    source, share = text_source([texts], alignment), WorkerShare(rank=1, num_workers=2)
    unbroken = local_steps(source, formatter, ORDER, share, 0, 20)
    for start in (1, 3, 4, 15, 16, 18):
        resumed = local_steps(source, formatter, ORDER, share, start, 20)
        assert len(resumed) == 20 - start
        assert all(same(a, b) for a, b in zip(resumed, unbroken[start:], strict=True))


def test_rows_are_aligned_as_the_fit_aligns_them(alignment, texts, formatter):
    affine = load_alignment(alignment).affine
    aligned_ND, _ = affine.apply(TEXT_ND)
    by_id = {f"t{row}": aligned_ND[row] for row in range(NUM_TEXTS)}
    captions = dict(zip(by_id, texts_of(NUM_TEXTS), strict=True))
    for step in local_steps(text_source([texts], alignment), formatter, ORDER, WorkerShare(), 0, 16):
        for batch in step.micro_batches:
            expected = np.stack([by_id[row_id] for row_id in batch.ids])
            # The same row in another place of a chunk: the last bit of a sum may round otherwise.
            np.testing.assert_allclose(batch.image_embeds.numpy(), expected, atol=1.2e-7)
            for row, row_id in enumerate(batch.ids):
                kept = batch.input_ids[row][batch.labels[row] != -100].tolist()
                assert formatter.tokenizer.decode(kept) == f"{captions[row_id]} <|eot_id|>"


def test_lengths_save_padding(alignment, texts, formatter):
    source = text_source([texts], alignment)

    def share_of_padding(by_length: bool, micro_batch_size: int) -> float:
        order = StepOrder(global_batch_size=32, batches_per_window=16, group_by_length=by_length)
        found = local_steps(source, formatter, order, WorkerShare(micro_batch_size=micro_batch_size), 0, 16)
        return padding_share([batch for step in found for batch in step.micro_batches])

    one_batch = share_of_padding(False, 32)  # nothing sorted: 61 percent; dealt 18, grouped 4
    assert share_of_padding(False, 4) < 0.5 * one_batch
    assert share_of_padding(True, 4) < 0.5 * share_of_padding(False, 4)


def test_another_encoder_and_an_empty_store_are_refused(alignment, tmp_path):
    other = write_texts(tmp_path / "other", EncoderIdentity(name="other", fingerprint="0" * 64))
    with pytest.raises(AlignmentError, match="other"):
        text_source([other], alignment)
    assert text_source([other], alignment, allow_other_encoder=True).num_rows == NUM_TEXTS
    empty = write_store(tmp_path / "empty", np.empty((0, DIM), np.float16))
    with pytest.raises(DataError, match="empty"):
        text_source([empty], alignment)


def test_unusable_samples_are_listed_with_their_cause(alignment, tmp_path, formatter):
    rows_ND = TEXT_ND[:60].copy()
    rows_ND[7] = np.nan
    store = write_store(tmp_path / "bad", rows_ND)
    short = Formatter(formatter.tokenizer, 2, max_length=6)
    (step,) = local_steps(
        text_source([store], alignment), short, StepOrder(global_batch_size=64), WorkerShare(), 0, 1
    )
    # "a text named text12" has five word-level tokens with the end, and two of the image.
    assert Counter(cause for _, cause, _ in step.rejected) == {"too_long": 59, "missing_embedding": 1}
    assert step.micro_batches == []
    assert ("text7", "missing_embedding") in {(row_id, cause) for row_id, cause, _ in step.rejected}
    cut = Formatter(formatter.tokenizer, 2, max_length=6, on_too_long="truncate")
    (step,) = local_steps(
        text_source([store], alignment), cut, StepOrder(global_batch_size=64), WorkerShare(), 0, 1
    )
    assert len(ids(step)) == len(step.truncated) == 59
    assert step.num_samples == 60


def test_samples_can_be_looked_at(alignment, texts, formatter):
    shown = inspect(text_source([texts], alignment), formatter, ORDER, 3)
    assert len(shown) == 3
    for line in shown:
        row_id, _, said = line.partition(": ")
        assert said.endswith(f"<image>x2[[{texts_of(NUM_TEXTS)[int(row_id[1:])]} <|eot_id|>]]")


# --- through Ray Data -------------------------------------------------------------------------------------


def test_the_streams_of_two_workers_are_the_same_steps(alignment, texts, formatter):
    source = text_source([texts], alignment)

    def stream(rank: int) -> list[PreparedStep]:
        share = WorkerShare(rank=rank, num_workers=2, micro_batch_size=8, num_tasks=1)
        return list(steps(source, formatter, ORDER, share, start_step=2, num_steps=20))

    # A tenth of a CPU is left for the tasks of both.
    first = ray.remote(stream).options(num_cpus=1.9).remote(0)
    second = stream(1)  # at the same time, in this process
    for rank, found in enumerate([ray.get(first), second]):
        share = WorkerShare(rank=rank, num_workers=2, micro_batch_size=8)
        expected = local_steps(source, formatter, ORDER, share, 2, 20)
        assert [step.step for step in found] == list(range(2, 20))
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_a_stream_that_is_left_leaves_no_task_behind(alignment, texts, formatter):
    stream = steps(text_source([texts], alignment), formatter, ORDER, WorkerShare(), num_steps=100_000)
    assert next(stream).step == 0
    assert next(stream).step == 1
    stream.close()  # type: ignore[attr-defined]
    patience = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < patience
        time.sleep(0.1)


def test_a_shard_that_was_replaced_stops_the_run_by_name(alignment, tmp_path, formatter):
    store = write_texts(tmp_path / "texts")
    source = text_source([store], alignment)
    write_part(tmp_path / "texts" / "part-0000.parquet", TEXT_ND[90:180], [f"x{n}" for n in range(90)])
    with pytest.raises(DataError, match=r"part-0000\.parquet.*replaced"):
        list(steps(source, formatter, ORDER, WorkerShare(), num_steps=16))


# --- joined stores ----------------------------------------------------------------------------------------


def asked(name: str, image: str | None, question: str = "what colour ?") -> dict:
    turns = [
        {"from": "human", "value": ("<image>\n" if image else "") + question},
        {"from": "gpt", "value": f"red {name}"},
    ]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


def write_jsonl(path: Path, records: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """An image store whose rows have URIs: /data/DIR/N.jpg, under the id DIR/N."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"{'ab'[n % 2]}/{n // 2}" for n in range(100)]
    uris = [f"/data/{name}.jpg" for name in names]
    entry = write_part(folder / "part-0.parquet", IMAGE_ND[:100], names, "image", texts=uris)
    manifest = Manifest(
        modality="image", embedding_dim=DIM, dtype="float16", num_rows=100, num_rejected=0,
        num_truncated=0, domain="tests", encoder=ENCODER, shards=(entry,),
    )  # fmt: skip
    storage.write_json(str(folder / shards.MANIFEST), asdict(manifest))
    return str(folder)


def joined_rows(store) -> dict[str, np.ndarray]:
    """id -> embeddings (I, D) of every row of a joined store."""
    found = {}
    for shard in store.shards:
        for group in range(len(shard.row_group_rows)):
            table = read_joined(storage.join(store.uri, shard.name), group, ["id", "embeddings"])
            for row in table.to_pylist():
                found[row["id"]] = np.frombuffer(row["embeddings"], "<f4").reshape(-1, DIM)
    return found


def image_index(folder: Path, rows: list[tuple[str, str]]):
    """The index of a store of these (id, URI)."""
    ids, uris = [row_id for row_id, _ in rows], [uri for _, uri in rows]
    folder.mkdir()
    write_part(folder / "part-0.parquet", IMAGE_ND[: len(rows)], ids, "image", texts=uris)
    group = RowGroup(uri=str(folder / "part-0.parquet"), shard_hash="", index=0, num_rows=len(rows))
    return build_index([key_hashes(group)])


FOLDER = [
    ("a/3", "/data/a/3.jpg"),
    ("b/3", "/data/b/3.PNG"),
    ("7", "/data/a/7.jpeg"),
    ("u.8", "s3://k/u.8.webp"),
]
RECORDS = [
    ("x1", "/recs/img/1.png"),
    ("x2", "/recs/img/1.png"),
    ("x3", "/else/9.png"),
    ("free", "t.parquet:row 3"),
]


@pytest.mark.parametrize(
    ("rows", "image", "place", "way"),
    [
        (FOLDER, "a/3.jpg", 0, "path"), (FOLDER, "a/3", 0, "id"), (FOLDER, "./a/3.jpg", 0, "path"),
        (FOLDER, "a\\3.jpg", 0, "path"), (FOLDER, "a/x/../3.jpg", 0, "path"), (FOLDER, "a/3.JPEG", 0, "path"),
        (FOLDER, "b/3.png", 1, "path"), (FOLDER, "/data/b/3.PNG", 1, "uri"), (FOLDER, "7.jpg", 2, "path"),
        (FOLDER, "u.8.webp", 3, "path"), (FOLDER, "s3://k/u.8.webp", 3, "uri"),
        # Another file of the same name: another ending, another folder.
        (FOLDER, "a/3.png", MISSING, "file name"), (FOLDER, "c/3.jpg", MISSING, "file name"),
        (FOLDER, "gqa/7.jpg", MISSING, "file name"), (FOLDER, "3.jpg", MISSING, "file name"),
        (FOLDER, "zzz.jpg", MISSING, ""),
        # Rows of records: their id is not made of the path, and may share the file.
        (RECORDS, "img/1.png", 0, "uri"), (RECORDS, "x2", 1, "id"), (RECORDS, "../else/9.png", 2, "uri"),
        (RECORDS, "9.png", MISSING, ""), (RECORDS, "free.jpg", 3, "path"), (RECORDS, "free", 3, "id"),
        ([("d", ""), ("d", "")], "d", AMBIGUOUS, "id"), ([("d", ""), ("d", "")], "d.jpg", AMBIGUOUS, "path"),
    ],
)  # fmt: skip
def test_an_image_is_the_file_that_the_record_names_or_missing(rows, image, place, way, tmp_path):
    index = image_index(tmp_path / "store", rows)
    found = index.find([image], "/recs")
    assert found.places.tolist() == [place]
    if place != MISSING:
        assert WAYS[found.ways[0]] == way
    assert (found.rivals[0, 0] >= 0) == (place == AMBIGUOUS or (place == MISSING and bool(way)))
    by_name = index.find([image], "/recs", by_name=True)
    if place == MISSING and way:
        several = found.rivals[0, 1] != MISSING
        assert by_name.places.tolist() == [AMBIGUOUS if several else found.rivals[0, 0]]
    else:
        assert by_name.places.tolist() == [place]


def test_the_folder_of_a_record_decides_before_ids(tmp_path):
    """Two folders were embedded one by one, and hold files of the same names."""
    index = image_index(tmp_path / "store", [("1", "/data/coco/1.jpg"), ("1-2", "/data/gqa/1.jpg")])
    assert index.find(["1.jpg"], "/data/gqa").places.tolist() == [1]
    assert index.find(["1.jpg"], "/data/coco").places.tolist() == [0]


def test_images_are_found_by_id_ending_uri_or_name(cluster, pictures, tmp_path):
    records = [
        asked("by-id", "a/3"),
        asked("by-ending", "b/3.jpg"),
        asked("by-uri", "/data/a/4.jpg"),
        asked("nothing", None),
        {**asked("two", "a/5.jpg", "<image> which ?"), "image": ["a/5.jpg", "b/5.jpg"]},
    ]
    source = ConversationSource(uri=write_jsonl(tmp_path / "c.jsonl", records))
    store = join(source, open_stores([pictures], "image"), str(tmp_path / "cache"))
    found, rows_ND = joined_rows(store), unit(IMAGE_ND)
    expected = {"by-id": [6], "by-ending": [7], "by-uri": [8], "nothing": [], "two": [10, 11]}
    assert set(found) == set(expected)
    for name, rows in expected.items():
        # float32 rounds unit rows to 6e-8.
        np.testing.assert_allclose(found[name], rows_ND[rows], atol=1e-7)
    assert (store.num_rows, store.rejected, store.embedding_dim) == (5, {}, DIM)


def test_a_root_makes_uris_and_a_bare_name_needs_to_be_the_only_one(cluster, pictures, images, tmp_path):
    uri = write_jsonl(tmp_path / "c.jsonl", [asked("x", "7.jpg")])
    below = ConversationSource(uri=uri, image_root="/data/b")
    found = joined_rows(join(below, open_stores([pictures], "image"), str(tmp_path / "cache")))
    np.testing.assert_allclose(found["x"], unit(IMAGE_ND)[[15]], atol=1e-7)
    with pytest.raises(DataError, match="several rows of the image store go by that name"):
        join(ConversationSource(uri=uri), open_stores([pictures], "image"), str(tmp_path / "other"))


def test_file_names_match_only_where_a_setting_says_so_and_tell_images_apart(
    cluster, pictures, images, tmp_path
):
    def joined(records: list[dict], match_images="file_name", stores=images):
        uri = write_jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", records)
        source = ConversationSource(uri=uri, match_images=match_images)
        return conversation_source([source], [stores], str(tmp_path / "cache"))

    elsewhere = [asked("x", "some/where/image7.png"), asked("y", "image8.jpg")]
    with pytest.raises(DataError, match=r"where/image7\.png.*'image7' has the same file name.*match_images"):
        joined(elsewhere, "exact")
    source = joined(elsewhere)
    assert source.num_rows == 2
    (found,) = source.embeddings(0, np.array([0]))
    np.testing.assert_allclose(found, unit(IMAGE_ND)[[7]], atol=1e-7)
    # Two rows of the store, two paths of records, also in two parts of a mixture.
    with pytest.raises(DataError, match="several rows of the image store go by that name: 'a/7' and 'b/7'"):
        joined([asked("x", "c/7.jpg")], stores=pictures)
    for others in (["some/other/image7.png"], ["image7.jpg"]):
        with pytest.raises(DataError, match=r"some/where/image7\.png.*image7.*same file name"):
            joined([*elsewhere, *(asked("z", other) for other in others)])
    parts = [
        ConversationSource(uri=write_jsonl(tmp_path / f"{name}.jsonl", [asked("x", f"{name}/image7.jpg")]),
                           match_images="file_name")
        for name in ("coco", "gqa")
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"coco/image7\.jpg.*gqa/image7\.jpg"):
        conversation_source(parts, [images], str(tmp_path / "cache"))


def test_what_has_no_embedding_is_listed_and_too_many_fail(cluster, pictures, tmp_path):
    records = [asked(f"r{n}", f"a/{n}.jpg") for n in range(45)]
    records += [asked("lost", "zzz.jpg"), {**asked("bad", "a/1.jpg"), "image": None}]
    uri = write_jsonl(tmp_path / "c.jsonl", records)
    with open(uri, "a") as file:
        file.write("{broken\n")
    source, stores = ConversationSource(uri=uri), open_stores([pictures], "image")
    with pytest.raises(DataError, match=r"3 of 48 records cannot be used.*missing_embedding") as caught:
        join(source, stores, str(tmp_path / "cache"))
    listed = str(caught.value).partition("the list is in ")[2].partition(";")[0]
    causes = {row.id: row.reason.partition(":")[0] for row in read_rejected(listed) if len(row.id) < 10}
    assert causes == {"lost": "missing_embedding", "bad": "bad_conversation"}
    # The same shards serve once more of that is tolerated.
    folder = Path(listed).parent
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    store = join(source, stores, str(tmp_path / "cache"), max_rejected_fraction=0.1)
    assert store.rejected == {"missing_embedding": 1, "bad_conversation": 1, "unreadable_record": 1}
    assert {path: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before
    assert store.num_rows == 45


def test_an_interrupted_join_goes_on_and_other_data_are_another_store(
    cluster, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr("revision_ray.train.joined._BYTES_PER_SPLIT", 2000)
    uri = write_jsonl(tmp_path / "c.jsonl", [asked(f"r{n}", f"a/{n}.jpg") for n in range(50)])
    stores = open_stores([pictures], "image")
    store = join(ConversationSource(uri=uri), stores, str(tmp_path / "cache"))
    parts = sorted(Path(store.uri).glob("part-*"))
    assert len(parts) > 3
    content, kept = parts[1].read_bytes(), parts[2].stat().st_mtime_ns
    parts[1].unlink()
    (Path(store.uri) / shards.MANIFEST).unlink()
    with pytest.raises(DataError, match="unfinished"):
        open_joined(store.uri)
    assert join(ConversationSource(uri=uri), stores, str(tmp_path / "cache")) == store
    assert parts[1].read_bytes() == content
    assert parts[2].stat().st_mtime_ns == kept
    with open(uri, "a") as file:
        file.write(json.dumps(asked("more", "b/1")) + "\n")
    more = join(ConversationSource(uri=uri), stores, str(tmp_path / "cache"))
    assert more.uri != store.uri
    assert more.num_rows == 51


def test_captions_beside_real_images_are_stage_one_too(cluster, pictures, formatter, tmp_path):
    captions = [{"image": f"a/{n}.jpg", "caption": f"a red dog {n}"} for n in range(30)]
    captions += [{"id": f"b/{n}", "text": "blue"} for n in range(20)]
    part = ConversationSource(uri=write_jsonl(tmp_path / "c.jsonl", captions))
    source = conversation_source([part], [pictures], str(tmp_path / "cache"), kind="captions")
    (step,) = local_steps(source, formatter, StepOrder(global_batch_size=64), WorkerShare(), 0, 1)
    assert len(ids(step)) == 50
    rows = {f"a/{n}.jpg": 2 * n for n in range(30)} | {f"b/{n}": 2 * n + 1 for n in range(20)}
    for batch in step.micro_batches:
        expected = unit(IMAGE_ND)[[rows[row_id] for row_id in batch.ids]]
        np.testing.assert_allclose(batch.image_embeds.numpy(), expected, atol=1e-7)
        assert (batch.input_ids[:, :2] == formatter.image_token_id).all()


def test_captions_of_coco_and_of_tables_are_stage_one_too(cluster, pictures, tmp_path):
    images = [{"id": n, "file_name": f"a/{n}.jpg"} for n in range(10)]
    annotations = [{"id": 100 + n, "image_id": n % 10, "caption": f"a red dog {n}"} for n in range(20)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    table = "file_name,text\n" + "".join(f"a/{n}.jpg,a dog {n}\n" for n in range(10))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(table.encode()))
    for name, num_rows in (("coco.json", 20), ("t.csv.gz", 10)):
        part = ConversationSource(uri=str(tmp_path / name))
        source = conversation_source([part], [pictures], str(tmp_path / "cache"), kind="captions")
        assert source.num_rows == num_rows
        embeds = source.embeddings(0, np.arange(10))
        np.testing.assert_allclose(np.concatenate(embeds), unit(IMAGE_ND)[0:20:2], atol=1e-7)


def test_a_mixture_repeats_its_parts_and_mixes_text_alone_in(cluster, pictures, formatter, tmp_path):
    write_jsonl(tmp_path / "a" / "seen.jsonl", [asked(f"seen{n}", f"a/{n}.jpg") for n in range(20)])
    write_jsonl(tmp_path / "told.jsonl", [asked(f"told{n}", None) for n in range(40)])
    entries = {
        "seen": {"root": "/data", "annotation": "a/seen.jsonl", "repeat_time": 2, "length": 20},
        "told": {"root": "", "annotation": "told.jsonl", "repeat_time": 0.5, "length": 40},
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    meta = ConversationSource(uri=str(tmp_path / "meta.json"))
    cache = str(tmp_path / "cache")
    source = conversation_source([meta], [pictures], cache)
    assert source.num_rows == 60
    found = local_steps(
        source, formatter, StepOrder(global_batch_size=25, batches_per_window=2), WorkerShare(), 0, 3
    )
    counts = Counter(row_id for step in found for row_id in ids(step))
    assert {counts[f"seen{n}"] for n in range(20)} == {2}
    told = [counts[f"told{n}"] for n in range(40)]
    assert sum(told) == 20
    assert max(told) == 1
    for batch in (batch for step in found for batch in step.micro_batches):
        rows = [2 * int(row_id[4:]) for row_id in batch.ids if row_id.startswith("seen")]
        np.testing.assert_allclose(batch.image_embeds.numpy(), unit(IMAGE_ND)[rows], atol=1e-7)
    parts = [
        ConversationSource(uri=str(tmp_path / "a" / "seen.jsonl"), weight=3.0),
        ConversationSource(uri=str(tmp_path / "told.jsonl"), weight=1.0),
    ]
    weighed = conversation_source(parts, [pictures], cache)
    assert [part.epoch_rows for part in weighed.parts] == [45, 15]
    assert weighed.content_hash != source.content_hash
    with pytest.raises(ConfigError, match="give all of them one"):
        conversation_source(
            [*parts[:1], ConversationSource(uri=str(tmp_path / "told.jsonl"))], [pictures], cache
        )


def test_text_alone_needs_no_images_and_stores_of_other_encoders_do_not_mix(
    cluster, pictures, formatter, tmp_path
):
    told = ConversationSource(uri=write_jsonl(tmp_path / "t.jsonl", [asked(f"t{n}", None) for n in range(9)]))
    source = conversation_source([told], [], str(tmp_path / "cache"))
    (step,) = local_steps(source, formatter, StepOrder(global_batch_size=9), WorkerShare(), 0, 1)
    assert sorted(ids(step)) == [f"t{n}" for n in range(9)]
    assert all(len(batch.image_embeds) == 0 for batch in step.micro_batches)
    other = write_store(
        tmp_path / "i", IMAGE_ND, "image", encoder=EncoderIdentity(name="x", fingerprint="1" * 64)
    )
    seen = ConversationSource(uri=write_jsonl(tmp_path / "s.jsonl", [asked("s", "image3")]))
    there = ConversationSource(uri=write_jsonl(tmp_path / "p.jsonl", [asked("p", "a/3")]))
    stores = [
        join(seen, open_stores([other], "image"), str(tmp_path / "cache")),
        join(there, open_stores([pictures], "image"), str(tmp_path / "cache")),
    ]
    with pytest.raises(DataError, match="a mixture needs one encoder"):
        joined_stores_source(stores, [1.0, 1.0])
