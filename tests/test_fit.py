"""The fit through its job: the reference's figures, the same bits on any cluster, appended, sampled."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from embedding_stores import ENCODER, cloud, unit, write_store
from threadpoolctl import threadpool_limits

from revision_ray.align import apply, fit, map_reduce
from revision_ray.align.alignment import TENSORS, TEXT_MOMENTS, Alignment, load_alignment, load_moments
from revision_ray.align.apply import AlignJob
from revision_ray.align.fit import FitJob
from revision_ray.align.map_reduce import draw_sample, store_moments
from revision_ray.align.moments import merged
from revision_ray.core import config, storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, OutputError
from revision_ray.data import imports, shards
from revision_ray.data.imports import ImportJob
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import open_stores, read_rejected

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
# The reference rounds its two means to float32 before it uses them (golden data's README): 1e-6.
REFERENCE = 1e-6


def job_of(texts, images, output, **settings) -> FitJob:
    return FitJob(texts=texts, images=images, output=str(output), **settings)


def fitted(texts, images, output, **settings) -> Alignment:
    fit.run_fit(job_of(texts, images, output, **settings))
    return load_alignment(str(output))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """9000 texts in 3 shards of 2 row groups."""
    return write_store(tmp_path_factory.mktemp("texts"), cloud(9000, 12, "text"), rows_per_shard=3000)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("images")
    return write_store(folder, cloud(5000, 12, "image"), "image", rows_per_shard=2500)


@pytest.fixture(scope="module")
def whole(cluster, texts, images, tmp_path_factory) -> tuple[Alignment, str]:
    """ReAlign of all texts and images, and where it is."""
    output = str(tmp_path_factory.mktemp("whole") / "fit")
    return fitted(texts, images, output), output


# --- the reference ----------------------------------------------------------------------------------------


def write_pickles(path: Path, rows_ND: np.ndarray, key: str) -> str:
    content = [{"id": f"{row:05d}", "embed": rows_ND[row], key: f"row {row}"} for row in range(len(rows_ND))]
    path.write_bytes(pickle.dumps(content))
    return str(path)


def check_golden(golden: dict[str, np.ndarray], alignment: str, aligned: str) -> None:
    found = load_alignment(alignment)
    for name, value in (
        ("mu_text", found.text_centroid),
        ("mu_image", found.image_centroid),
        ("mu_prime", found.drifted_centroids[0]),
        ("scale", found.affine.scale),
        ("trace_text", found.text_trace),
        ("trace_image", found.image_trace),
    ):
        np.testing.assert_allclose(value, golden[name], rtol=0, atol=REFERENCE, err_msg=name)
    rows = {}
    for group in open_stores([aligned], "text").row_groups:
        ids = shards.read_columns(group.uri, ["id"], group.index)["id"].to_pylist()
        rows |= dict(zip(ids, shards.read_embeddings(group.uri, group.index), strict=True))
    found_ND = np.stack([rows[f"{row:05d}"] for row in range(len(rows))])
    np.testing.assert_allclose(found_ND, golden["aligned"], rtol=0, atol=REFERENCE)


def on_the_command_line(name: str, *arguments: str) -> str:
    """Standard output of a job in a process of its own on this session's Ray."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fit_on_the_command_line(job: FitJob) -> str:
    return on_the_command_line("fit", f"texts=[{job.texts}]", f"images={job.images}", f"output={job.output}")


@pytest.mark.parametrize(
    ("name", "run_fit"),
    [("reference_realign", fit.run_fit), ("reference_realign_unnormalised", fit_on_the_command_line)],
    ids=["function", "command"],
)
def test_the_reference_is_matched_through_the_jobs(cluster, tmp_path, name, run_fit):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    stores = {}
    for modality, key in (("text", "caption"), ("image", "image_path")):
        source = write_pickles(tmp_path / f"{modality}.pkl", golden[modality], key)
        stores[modality] = str(tmp_path / modality)
        imports.run_import(ImportJob(input=source, output=stores[modality], modality=modality))
    said = run_fit(job_of(stores["text"], stores["image"], tmp_path / "fit"))
    assert f"realign fitted on {len(golden['text']):,} texts and {len(golden['image']):,} images" in said
    apply.run_align(
        AlignJob(texts=stores["text"], alignment=str(tmp_path / "fit"), output=str(tmp_path / "aligned"))
    )
    check_golden(golden, str(tmp_path / "fit"), str(tmp_path / "aligned"))


@pytest.mark.slow
def test_the_jobs_do_the_same_from_the_command_line(cluster, tmp_path):
    """Import, fit and align from the command line give the figures of the reference."""
    golden = dict(np.load(GOLDEN / "reference_realign_unnormalised.npz"))
    folders = [str(tmp_path / name) for name in ("text", "image", "fit", "aligned")]
    text, image, alignment, aligned = folders
    write_pickles(tmp_path / "text.pkl", golden["text"], "caption")
    write_pickles(tmp_path / "image.pkl", golden["image"], "image_path")
    on_the_command_line("import_reference", f"input={tmp_path}/text.pkl", f"output={text}", "modality=text")
    on_the_command_line(
        "import_reference", f"input={tmp_path}/image.pkl", f"output={image}", "modality=image"
    )
    said = on_the_command_line(
        "fit", f"texts=[{text}]", f"images={image}", f"output={alignment}", "strategy=realign"
    )
    assert f"fit: {alignment}" in said
    on_the_command_line("align", f"texts={text}", f"alignment={alignment}", f"output={aligned}")
    check_golden(golden, alignment, aligned)


def test_a_wrong_command_line_is_answered_and_nothing_is_written(tmp_path):
    arguments = ["texts=a", "images=b", f"output={tmp_path}/fit"]
    for argument, answer in (
        ("stratgy=realign", "strategy"),
        ("strategy=realing", "realign"),
        ("noise=0.1", "noise has no effect on realign"),
        ("max_rows=0", "max_rows is 0"),
    ):
        with pytest.raises(ConfigError, match=answer):
            config.load(FitJob, [*arguments, argument])
    command = [sys.executable, str(ROOT / "jobs/fit.py"), *arguments, "stratgy=realign"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ConfigError: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "fit").exists()


# --- exactness --------------------------------------------------------------------------------------------


def test_the_fit_is_two_pass_float64_numpy(whole, texts, images):
    found, _ = whole
    text_ND, image_ND = unit(cloud(9000, 12, "text")), unit(cloud(5000, 12, "image"))
    mu_y, mu_x = text_ND.mean(0), image_ND.mean(0)
    t_y = np.mean(np.sum((text_ND - mu_y) ** 2, axis=1))
    t_x = np.mean(np.sum((image_ND - mu_x) ** 2, axis=1))
    scale = np.sqrt(t_x / (t_y + 1e-10))
    drifted_ND = unit(mu_x + scale * (text_ND - mu_y))
    aligned_ND = unit(drifted_ND - drifted_ND.mean(0) + mu_x)
    for value, expected in (
        (found.text_centroid, mu_y),
        (found.image_centroid, mu_x),
        (found.text_trace, t_y),
        (found.image_trace, t_x),
        (found.affine.scale, scale),
        (found.drifted_centroids[0], drifted_ND.mean(0)),
        (found.modality_gap.before, np.linalg.norm(mu_x - mu_y)),
        (found.modality_gap.after, np.linalg.norm(mu_x - aligned_ND.mean(0))),
    ):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    assert found.modality_gap.after <= np.linalg.norm(mu_x - drifted_ND.mean(0))  # prop. B.19
    assert (found.num_texts, found.num_images, found.domain) == (9000, 5000, "tests")
    assert (found.text_encoder, found.image_encoder) == (ENCODER, ENCODER)


@pytest.mark.parametrize(("tasks_per_cpu", "most"), [(3, 64), (1, 2), (1, 64)])
def test_the_share_of_a_task_changes_no_bit(cluster, texts, monkeypatch, tasks_per_cpu, most):
    """One, two or three row groups, of any shards, meet in a task as the cluster's size has it."""
    store = open_stores([texts], "text")
    assert len(store.row_groups) == 6
    monkeypatch.setattr(map_reduce, "_FEWEST_CPUS", 1)
    monkeypatch.setattr(map_reduce, "_TASKS_PER_CPU", tasks_per_cpu)
    monkeypatch.setattr(map_reduce, "_MOST_ROW_GROUPS_PER_TASK", most)
    backwards = replace(store, row_groups=store.row_groups[::-1])
    found, _ = store_moments(backwards, "texts", second=True)
    # On the driver, one row group after the other: no Ray at all.
    alone = merged(
        [
            map_reduce.moments.of_block(
                shards.read_embeddings(group.uri, group.index),
                second=True,
                offset=map_reduce.moments.bucket_offset(group.shard_hash, group.index),
            )[0]
            for group in store.row_groups
        ],
        12,
        second=True,
    )
    alone.shard_hashes = store.shard_hashes
    assert found.to_bytes() == alone.to_bytes()


def test_the_same_shards_under_other_names_give_the_same_fit(whole, texts, images, tmp_path):
    """A listing in another order, other directories, other sources: the content alone decides."""
    (tmp_path / "moved").mkdir()
    for number, path in enumerate(sorted(Path(texts).glob("part-*"), reverse=True)):
        (tmp_path / "moved" / f"x{number}.parquet").write_bytes(path.read_bytes())
    found = fitted(str(tmp_path / "moved"), images, tmp_path / "fit", allow_other_encoder=True)
    assert found.content_hash == whole[0].content_hash
    assert found.modality_gap == whole[0].modality_gap


def test_threads_of_the_driver_change_no_bit(cluster, texts, images, tmp_path):
    """Eigenvectors are computed on the driver, which may have any number of BLAS threads."""
    hashes = set()
    for threads in (1, 2):
        with threadpool_limits(threads):
            settings = {"strategy": "gaussian_ot", "drift_rows": 500}
            hashes.add(fitted(texts, images, tmp_path / f"{threads}", **settings).content_hash)
    assert len(hashes) == 1


def ray_workers() -> list[psutil.Process]:
    """Worker processes of this session's own Ray that compute moments at this moment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::Map(_partial" in " ".join([*process.cmdline(), process.name()]):
                found.append(process)
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


def test_a_killed_worker_changes_no_bit(cluster, tmp_path):
    block_ND = cloud(40_000, 256, "text")
    uri = write_store(tmp_path / "store", block_ND, rows_per_shard=5_000)
    store = open_stores([uri], "text")
    expected, _ = store_moments(store, "undisturbed", second=True)
    found: list[bytes] = []
    thread = threading.Thread(
        target=lambda: found.append(store_moments(store, "disturbed", second=True)[0].to_bytes())
    )
    thread.start()
    killed = 0
    while thread.is_alive() and killed < 2:
        for process in ray_workers()[:1]:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    thread.join(timeout=120)
    assert killed > 0, "no worker was caught at work: the store is too small for this test"
    assert found == [expected.to_bytes()]


def fit_on_cpus(cpus: int, *arguments: str) -> None:
    """Run jobs/fit.py in a process of its own, with a Ray of so many CPUs."""
    program = (
        "import ray, runpy, sys; "
        f"ray.init(num_cpus={cpus}, include_dashboard=False, object_store_memory=10**8, "
        "_temp_dir=sys.argv[1]); "
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="rv", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", program, folder, str(ROOT / "jobs/fit.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_two_and_four_workers_give_the_same_bits(cluster, texts, images, tmp_path):
    """A fit has the same bits on one, two and four CPUs."""
    fit.run_fit(job_of(texts, images, tmp_path / "fit2", strategy="gaussian_ot", centroid_steps=2, noise=0.1))
    settings = ["strategy=gaussian_ot", "centroid_steps=2", "noise=0.1"]
    for cpus in (1, 4):
        output = tmp_path / f"fit{cpus}"
        fit_on_cpus(cpus, f"texts={texts}", f"images={images}", f"output={output}", *settings)
    hashes = [
        (load_alignment(str(output)).content_hash, (output / TEXT_MOMENTS).read_bytes())
        for output in (tmp_path / f"fit{cpus}" for cpus in (1, 2, 4))
    ]
    assert hashes[0] == hashes[1] == hashes[2]


# --- appending --------------------------------------------------------------------------------------------


def test_a_fit_and_what_is_appended_is_the_fit_of_all(cluster, images, tmp_path):
    rows_ND = cloud(6000, 12, "text", seed=5)
    ids = [str(row) for row in range(6000)]
    one = write_store(tmp_path / "one", rows_ND[:3500], rows_per_shard=1500, ids=ids[:3500])
    two = write_store(tmp_path / "two", rows_ND[3500:], rows_per_shard=1500, ids=ids[3500:])
    settings = {"strategy": "gaussian_ot", "centroid_steps": 2}
    fitted(one, images, tmp_path / "first", **settings)
    grown = fitted(two, None, tmp_path / "grown", append_to=str(tmp_path / "first"))
    both = fitted([two, one], images, tmp_path / "both", **settings)
    assert grown.content_hash == both.content_hash
    assert grown.strategy == both.strategy
    np.testing.assert_array_equal(grown.drifted_centroids, both.drifted_centroids)
    assert grown.modality_gap == both.modality_gap
    for grown_moments, moments in zip(
        load_moments(str(tmp_path / "grown")), load_moments(str(tmp_path / "both")), strict=True
    ):
        assert grown_moments.to_bytes() == moments.to_bytes()
    # What is contained already is not counted again.
    again = fitted([one, two], images, tmp_path / "again", append_to=str(tmp_path / "grown"))
    assert (again.num_texts, again.content_hash) == (6000, both.content_hash)


def test_appending_reads_no_old_shard_for_the_moments(cluster, images, tmp_path, monkeypatch):
    one = write_store(tmp_path / "one", cloud(2000, 12, "text"))
    two = write_store(tmp_path / "two", cloud(900, 12, "text", seed=1), ids=[f"n{row}" for row in range(900)])
    fitted(one, images, tmp_path / "first")
    read: list[tuple[str, int]] = []
    original = map_reduce.store_moments

    def watched(store, name, **settings):
        read.append((name, store.num_rows))
        return original(store, name, **settings)

    monkeypatch.setattr(fit, "store_moments", watched)
    fitted(two, None, tmp_path / "grown", append_to=str(tmp_path / "first"))
    assert read == [("texts", 900), ("mu' step 1", 2900), ("gap after", 2900)]


def test_appending_keeps_the_rejected_rows_of_before(cluster, images, tmp_path):
    parts = []
    for number in range(2):
        rows_ND = cloud(1000, 12, "text", seed=number)
        rows_ND[number] = np.nan
        ids = [f"{number}-{row}" for row in range(1000)]
        parts.append(write_store(tmp_path / str(number), rows_ND, ids=ids))
    fitted(parts[0], images, tmp_path / "first")
    grown = fitted(parts[1], None, tmp_path / "grown", append_to=str(tmp_path / "first"))
    assert (grown.num_texts, grown.inputs.num_rejected_texts) == (1998, 2)
    listed = read_rejected(str(tmp_path / "grown" / "rejected.parquet"))
    assert [row.id for row in listed] == ["0-0", "1-1"]
    # The share counts among the rows that are new, however many good ones were there before.
    few_ND = cloud(100, 12, "text", seed=9)
    few_ND[:1] = 0
    few = write_store(tmp_path / "few", few_ND, ids=[f"few{row}" for row in range(100)])
    with pytest.raises(DataError, match=r"1 of 100 rows were rejected \(1 x zero vector"):
        fitted(few, None, tmp_path / "failed", append_to=str(tmp_path / "first"))


def test_what_cannot_be_appended_is_refused(whole, texts, images, tmp_path):
    with pytest.raises(AlignmentError, match=r"was fitted with .*realign.*leave the strategy out"):
        fitted(texts, None, tmp_path / "a", append_to=whole[1], strategy="gaussian_ot")
    with pytest.raises(AlignmentError, match="append_to and max_rows do not go together"):
        fitted(texts, None, tmp_path / "b", append_to=whole[1], max_rows=100)
    with pytest.raises(AlignmentError, match=r"nowhere: no fit there"):
        fitted(texts, None, tmp_path / "c", append_to=str(tmp_path / "nowhere"))
    assert not any(tmp_path.iterdir())


def test_shards_that_a_former_fit_counts_must_still_be_there(cluster, images, tmp_path):
    store = write_store(tmp_path / "store", cloud(800, 12, "text"))
    fitted(store, images, tmp_path / "first", strategy="none")
    write_store(tmp_path / "store", cloud(800, 12, "text", seed=1))
    more = write_store(tmp_path / "more", cloud(300, 12, "text", seed=2))
    with pytest.raises(AlignmentError, match=r"2 shards that the former fit counts are no longer in"):
        fitted(more, None, tmp_path / "second", append_to=str(tmp_path / "first"))


# --- samples ----------------------------------------------------------------------------------------------


def test_mu_prime_from_a_sample_is_within_its_standard_error(whole, texts, images, tmp_path):
    full, _ = whole
    estimate = fitted(texts, images, tmp_path / "fit", drift_rows=1500)
    np.testing.assert_array_equal(estimate.text_centroid, full.text_centroid)
    distance = np.linalg.norm(estimate.drifted_centroids - full.drifted_centroids)
    # A root mean square distance over 12 dimensions: 2.5 times that is beyond chance.
    assert 0 < distance < 2.5 * estimate.drifted_centroid_standard_error
    stated = np.sqrt((1 - np.sum(estimate.drifted_centroids[0] ** 2)) / 1499)
    assert estimate.drifted_centroid_standard_error == pytest.approx(stated, rel=1e-9)


def test_max_rows_takes_that_many_rows_by_the_seed(cluster, texts, images, tmp_path):
    first = fitted(texts, images, tmp_path / "a", max_rows=6000, seed=4)
    assert (first.num_texts, first.num_images) == (6000, 5000)  # of the images there are no more
    assert fitted(texts, images, tmp_path / "b", max_rows=6000, seed=4).content_hash == first.content_hash
    other = fitted(texts, images, tmp_path / "c", max_rows=6000, seed=5, strategy="anchor")
    assert (other.text_centroid != first.text_centroid).all()
    np.testing.assert_array_equal(other.image_centroid, first.image_centroid)


def test_a_sample_is_uniform(tmp_path):
    """Every row as likely as any other, and no two of them bound to each other, over seeds; no Ray needed."""
    rows_ND = cloud(300, 4, "text")
    store = open_stores([write_store(tmp_path / "store", rows_ND, rows_per_shard=90)], "text")
    drawn = np.zeros((600, 300))
    place = {group: sum(g.num_rows for g in store.row_groups[:n]) for n, group in enumerate(store.row_groups)}
    for seed in range(600):
        sample = draw_sample(store, 75, seed)
        assert sample is not None
        for group in store.row_groups:
            if (group.shard_hash, group.index) in sample.rows:
                _, positions_N = map_reduce.read_sampled(group, sample, 4)
                drawn[seed, place[group] + positions_N] = 1
    assert (drawn.sum(1) == 75).all()
    share = drawn.mean(0)
    # A quarter, to sqrt(0.25 * 0.75 / 600) = 0.018 each; the extremes of 300 lie within four of those.
    assert np.abs(share - 0.25).max() < 0.075
    assert share.std() == pytest.approx(0.0177, rel=0.2)
    # The number from a shard varies as it does without replacement: no stratum has a fixed share.
    first = drawn[:, :90].sum(1)
    expected = 75 * 0.3 * 0.7 * (300 - 75) / 299
    assert first.var() == pytest.approx(expected, rel=0.25)


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_rows_are_listed_with_reason_id_and_place_and_nothing_else_is_lost(cluster, images, tmp_path):
    rows_ND = cloud(3000, 12, "text").astype(np.float32)
    rows_ND[5], rows_ND[2500, 3], rows_ND[2999] = np.nan, -np.inf, 0
    store = write_store(tmp_path / "store", rows_ND, rows_per_shard=2500)
    with pytest.raises(DataError, match=r"3 of 3000 rows were rejected \(.*rejected.parquet.*mend the input"):
        fitted(store, images, tmp_path / "fit", max_rejected_fraction=0.0005)
    assert not (tmp_path / "fit" / "alignment.json").exists()
    found = fitted(store, images, tmp_path / "fit")  # the default lets one in a thousand pass
    assert (found.num_texts, found.inputs.num_rejected_texts, found.inputs.num_rejected_images) == (
        2997,
        3,
        0,
    )
    good_ND = np.delete(rows_ND, [5, 2500, 2999], axis=0)
    np.testing.assert_allclose(found.text_centroid, unit(good_ND).mean(0), rtol=0, atol=1e-12)
    listed = {row.id: (row.reason, row.uri) for row in read_rejected(str(tmp_path / "fit/rejected.parquet"))}
    assert {row_id: reason for row_id, (reason, _) in listed.items()} == {
        "text5": "NaN", "text2500": "infinite", "text2999": "zero vector",
    }  # fmt: skip
    assert listed["text5"][1] == f"{store}/part-000000.parquet:row group 0, row 5"
    assert listed["text2999"][1] == f"{store}/part-002500.parquet:row group 0, row 499"


def test_bare_parquet_of_mixed_rows_is_fitted_with_warnings(cluster, images, tmp_path, caplog):
    """Nulls, null numbers and other dimensions in list columns, whole-number ids, an unknown encoder."""
    rows_ND = cloud(600, 12, "text").astype(float)
    rows: list = rows_ND.tolist()
    rows[3], rows[4][2], rows[250:410] = None, None, [[1.0, 2.0, 3.0]] * 160
    (tmp_path / "bare").mkdir()
    table = pa.table({"id": list(range(600)), "embedding": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "bare" / "rows.parquet", row_group_size=200)
    settings = {"max_rejected_fraction": 0.5, "strategy": "c3", "noise": 0.1}
    with pytest.raises(AlignmentError, match="allow_other_encoder=true"):
        fitted(str(tmp_path / "bare"), images, tmp_path / "fit", **settings)
    found = fitted(str(tmp_path / "bare"), images, tmp_path / "fit", allow_other_encoder=True, **settings)
    assert "its encoder is unknown" in caplog.text
    assert "only 438 text rows: statistics settle at about 10000" in caplog.text
    assert (found.num_texts, found.inputs.num_rejected_texts) == (438, 162)
    good_ND = np.delete(rows_ND, [3, 4, *range(250, 410)], axis=0)
    np.testing.assert_allclose(
        found.text_centroid, unit(good_ND.astype(np.float32)).mean(0), rtol=0, atol=1e-12
    )
    reasons = {row.id: row.reason for row in read_rejected(str(tmp_path / "fit/rejected.parquet"))}
    assert (reasons["3"], reasons["4"], reasons["300"]) == ("null", "null", "dimension 3, expected 12")


def test_stores_that_do_not_belong_together_are_refused(cluster, texts, images, tmp_path, caplog):
    with pytest.raises(DataError, match=r"holds image embeddings, expected text; are the two swapped"):
        fitted(images, texts, tmp_path / "fit")
    with pytest.raises(AlignmentError, match="images: name an image store"):
        fitted(texts, None, tmp_path / "fit")
    wide = write_store(tmp_path / "wide", cloud(50, 16, "image"), "image")
    with pytest.raises(AlignmentError, match=r"texts have dimension 12, images 16"):
        fitted(texts, wide, tmp_path / "fit")
    foreign = EncoderIdentity(name="b", fingerprint="b" * 64)
    other = write_store(
        tmp_path / "other", cloud(500, 12, "image"), "image", encoder=foreign, domain="medical"
    )
    with pytest.raises(AlignmentError, match=r"images by .*bbbb.*allow_other_encoder=true"):
        fitted(texts, other, tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
    found = fitted(texts, other, tmp_path / "fit", allow_other_encoder=True, strategy="none")
    assert (found.image_encoder, found.domain) == (foreign, "medical,tests")
    assert "texts are of domain 'tests', images of 'medical'" in caplog.text
    named = fitted(texts, other, tmp_path / "named", allow_other_encoder=True, strategy="none", domain="x")
    assert named.domain == "x"


def test_an_aligned_store_is_not_fitted_again(whole, texts, images, tmp_path):
    apply.run_align(AlignJob(texts=texts, alignment=whole[1], output=str(tmp_path / "aligned")))
    with pytest.raises(AlignmentError, match="is aligned already; fit on the store that it was made from"):
        fitted(str(tmp_path / "aligned"), images, tmp_path / "fit")


def test_rows_that_do_not_vary_or_are_all_bad_make_no_fit(cluster, images, tmp_path):
    still = write_store(tmp_path / "still", np.tile(cloud(1, 12, "text"), (300, 1)))
    with pytest.raises(AlignmentError, match="all 300 text embeddings are equal"):
        fitted(still, images, tmp_path / "a")
    bad = write_store(tmp_path / "bad", np.zeros((300, 12), np.float16))
    with pytest.raises(AlignmentError, match="no rows were counted"):
        fitted(bad, images, tmp_path / "b", max_rejected_fraction=1.0)


def test_a_damaged_or_missing_shard_is_an_error_from_the_task(cluster, texts, images, tmp_path):
    copy = tmp_path / "texts"
    copy.mkdir()
    for path in Path(texts).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    victim = copy / "part-003000.parquet"
    other = (copy / "part-006000.parquet").read_bytes()
    for content, message in ((None, "no such file"), (other, "was replaced"), (b"PAR1", "not a readable")):
        victim.unlink(missing_ok=True)
        if content is not None:
            victim.write_bytes(content)
        with pytest.raises(DataError, match=rf"part-003000.parquet: .*{message}"):
            fitted(str(copy), images, tmp_path / "fit")
    assert not (tmp_path / "fit" / "alignment.json").exists()


# --- the artifact -----------------------------------------------------------------------------------------


def test_a_fit_is_loaded_as_it_was_saved(whole, texts, images):
    found, uri = whole
    assert load_alignment(uri).document() == found.document()
    document = storage.read_json(f"{uri}/alignment.json")
    assert document["modality_gap"]["before"] == found.modality_gap.before
    assert document["standard_errors"]["modality_gap_before"] > 0
    assert document["text_encoder"]["fingerprint"] == ENCODER.fingerprint
    text, image = load_moments(uri)
    assert (text.count, image.count) == (9000, 5000)
    assert text.shard_hashes == open_stores([texts], "text").shard_hashes
    assert (Path(uri) / "config.yaml").exists()


def test_the_same_fit_is_reused_and_another_is_refused(whole, texts, images, tmp_path, caplog):
    _, uri = whole
    before = (Path(uri) / "alignment.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert "realign fitted on 9,000 texts" in fit.run_fit(job_of(texts, images, uri))
    assert "holds this fit already" in caplog.text
    for settings in ({"strategy": "anchor"}, {"seed": 1}, {"max_rows": 10}, {"domain": "other"}):
        with pytest.raises(OutputError, match=rf"{uri}: .*{next(iter(settings))} was .*is now"):
            fit.run_fit(job_of(texts, images, uri, **settings))
    with pytest.raises(OutputError, match="texts was "):
        fit.run_fit(job_of([texts, write_store(tmp_path / "more", cloud(20, 12, "text"))], images, uri))
    assert (Path(uri) / "alignment.json").stat().st_mtime_ns == before


def test_a_store_that_has_grown_is_not_answered_with_the_old_fit(cluster, images, tmp_path):
    store = write_store(tmp_path / "store", cloud(1400, 12, "text"))
    fitted(store, images, tmp_path / "fit", strategy="none")
    write_store(tmp_path / "store", cloud(2100, 12, "text"))  # the first two shards are the same
    with pytest.raises(OutputError, match=r"shards of .*store were added or replaced.*append_to="):
        fitted(store, images, tmp_path / "fit", strategy="none")
    grown = fitted(store, None, tmp_path / "grown", append_to=str(tmp_path / "fit"))
    assert grown.num_texts == 2100


def test_a_fit_does_not_write_into_what_is_not_a_fit(cluster, texts, images, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    for output in (str(tmp_path / "home"), texts):
        with pytest.raises(OutputError, match=r"does not belong to a fit; name another output"):
            fitted(texts, images, output)


@pytest.mark.parametrize("name", [TENSORS, TEXT_MOMENTS])
def test_a_flipped_byte_in_a_fit_is_noticed(whole, texts, images, tmp_path, name):
    copy = tmp_path / "fit"
    for path in Path(whole[1]).rglob("*.*"):
        target = copy / path.relative_to(whole[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    content = bytearray((copy / name).read_bytes())
    content[-5] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(AlignmentError, match=rf"{name} does not match alignment.json; make the fit again"):
        fitted(texts, None, tmp_path / "grown", append_to=str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99, this version reads 1"),
        ({"scale": 1.0}, "does not match"),
        ({"modality_gap": None}, "the fit is damaged"),
    ],
    ids=str,
)
def test_a_changed_document_is_noticed(whole, tmp_path, change, message):
    for name in ("alignment.json", TENSORS):
        (tmp_path / name).write_bytes((Path(whole[1]) / name).read_bytes())
    document = json.loads((tmp_path / "alignment.json").read_text()) | change
    (tmp_path / "alignment.json").write_text(json.dumps(document))
    with pytest.raises(AlignmentError, match=message):
        load_alignment(str(tmp_path))
    (tmp_path / TENSORS).unlink()
    with pytest.raises(AlignmentError, match=r"no fit there|format_version"):
        load_alignment(str(tmp_path))


def test_a_fit_of_one_row_states_no_error_as_null(cluster, images, tmp_path):
    one = write_store(tmp_path / "one", cloud(1, 12, "text"))
    found = fitted(one, images, tmp_path / "fit", strategy="anchor")
    assert np.isnan(found.modality_gap.before_standard_error)
    document = json.loads((tmp_path / "fit/alignment.json").read_text(), parse_constant=pytest.fail)
    assert document["standard_errors"]["modality_gap_before"] is None
    assert document["standard_errors"]["text_centroid"] is None


@pytest.mark.parametrize("name", ["max_rows", "drift_rows"])
def test_a_number_of_rows_below_one_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0; expected 1 or more"):
        FitJob(texts="a", images="b", output="c", **{name: 0})


def test_the_driver_gets_sums_whatever_the_number_of_rows(cluster, texts):
    """What a task returns is as large for 2048 rows as for 3000: sums, never rows."""
    store = open_stores([texts], "text")
    sizes = set()
    for groups in (store.row_groups[:1], store.row_groups):
        results = list(map_reduce._run(groups, map_reduce.partial(
            map_reduce._partial_moments, affine=None, second=False, sample=None, embedding_dim=12
        )))  # fmt: skip
        sizes |= {len(result["moments"]) for result in results}
    assert len(sizes) == 1
    assert max(sizes) < 5000  # 16 buckets x 12 dimensions x 16 bytes, and a header
    assert ray.is_initialized()
