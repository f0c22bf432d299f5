"""Aligned rows, in a pipeline and on disk, are the fitted map's own, and no others are made."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from embedding_stores import ENCODER, cloud, write_store

from revision_ray.align import apply, fit
from revision_ray.align.alignment import Alignment, load_alignment
from revision_ray.align.apply import AlignJob, AlignRows, aligned_rows
from revision_ray.align.fit import FitJob
from revision_ray.align.strategies import STRATEGIES
from revision_ray.core.errors import AlignmentError, DataError, OutputError
from revision_ray.data import shards
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import open_stores, read_group, read_rejected

TEXT_ND = cloud(3000, 10, "text")
IDS = [f"text{row}" for row in range(3000)]
# The same row in another place of a chunk: a matrix product may round its last bit otherwise (float32, to 1).
LAST_BIT = 1.2e-7


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    return write_store(tmp_path_factory.mktemp("texts"), TEXT_ND, rows_per_shard=1100)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_store(tmp_path_factory.mktemp("images"), cloud(2000, 10, "image"), "image")


@pytest.fixture(scope="module")
def fits(cluster, texts, images, tmp_path_factory):
    """Where a fit of each strategy is; made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("fits"), {}

    def of(strategy: str) -> str:
        if strategy not in made:
            made[strategy] = str(folder / strategy)
            fit.run_fit(FitJob(texts=texts, images=images, output=made[strategy], strategy=strategy))  # type: ignore[arg-type]
        return made[strategy]

    return of


def align(texts: str, alignment: str, output: Path, **settings) -> str:
    return apply.run_align(AlignJob(texts=texts, alignment=alignment, output=str(output), **settings))


def stored(uri: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for group in open_stores([uri], "text").row_groups:
        ids = shards.read_columns(group.uri, ["id"], group.index)["id"].to_pylist()
        found |= dict(zip(ids, read_group(group, 10), strict=True))
    return found


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("part-*")}


def expected(alignment: Alignment) -> dict[str, np.ndarray]:
    return dict(zip(IDS, alignment.affine.apply(TEXT_ND, IDS)[0], strict=True))


def check_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    stacked = [np.stack([rows[row_id] for row_id in wanted]) for rows in (found, wanted)]
    np.testing.assert_allclose(*stacked, rtol=0, atol=tolerance)


# --- in a pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["realign", "c3"])
def test_rows_in_a_pipeline_are_those_of_the_map(fits, texts, strategy):
    alignment = load_alignment(fits(strategy))
    rows = aligned_rows(open_stores([texts], "text"), alignment, ["text"]).take_all()
    assert {row["embedding"].dtype for row in rows} == {np.dtype(np.float32)}
    assert {row["text"] for row in rows} == {f"a text named {row_id}" for row_id in IDS}
    check_equal({row["id"]: row["embedding"] for row in rows}, expected(alignment), LAST_BIT)


def test_any_batches_of_any_pipeline_are_aligned_alike(fits):
    """Noise too: it is the row's, whatever batch and order the row comes in."""
    affine = load_alignment(fits("c3")).affine
    order = np.random.default_rng(0).permutation(3000)
    table = {"id": np.array(IDS)[order], "embedding": TEXT_ND[order].astype(np.float32), "kept": order}
    batches = [{name: column[start : start + 170] for name, column in table.items()}
               for start in range(0, 3000, 170)]  # fmt: skip
    found = [AlignRows(affine)(batch) for batch in batches]
    assert np.concatenate([batch["kept"] for batch in found]).tolist() == order.tolist()
    rows = np.concatenate([batch["embedding"] for batch in found])
    np.testing.assert_allclose(rows, affine.apply(TEXT_ND, IDS)[0][order], rtol=0, atol=LAST_BIT)


def test_rows_without_a_direction_stay_in_a_pipeline_as_nan(fits):
    batch = {"id": np.array(["a", "b"]), "embedding": np.stack([TEXT_ND[0], np.zeros(10, np.float16)])}
    found = AlignRows(load_alignment(fits("realign")).affine)(batch)["embedding"]
    assert np.isnan(found).any(axis=1).tolist() == [False, True]


def test_a_store_that_the_fit_is_not_for_is_refused(fits, texts, images, tmp_path):
    alignment = load_alignment(fits("realign"))
    foreign = write_store(
        tmp_path / "foreign", TEXT_ND[:30], encoder=EncoderIdentity(name="b", fingerprint="b" * 64)
    )
    store = open_stores([foreign], "text")
    with pytest.raises(
        AlignmentError, match=r"foreign: was made by encoder b \(bbbbbbbbbbbb\), the fit by encoder"
    ):
        aligned_rows(store, alignment)
    with pytest.raises(AlignmentError, match="allow_other_encoder=true"):
        align(foreign, fits("realign"), tmp_path / "aligned")
    assert aligned_rows(store, alignment, allow_other_encoder=True).count() == 30
    align(foreign, fits("realign"), tmp_path / "aligned", allow_other_encoder=True)
    assert open_stores([str(tmp_path / "aligned")], "text").num_rows == 30

    narrow = write_store(tmp_path / "narrow", TEXT_ND[:30, :8])
    for override in (False, True):  # the dimension cannot be overridden
        with pytest.raises(AlignmentError, match=r"narrow: embedding_dim is 8, the fit's is 10"):
            aligned_rows(open_stores([narrow], "text"), alignment, allow_other_encoder=override)

    bare = tmp_path / "bare"
    bare.mkdir()
    rows = pa.array(TEXT_ND[:30].astype(np.float32).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": IDS[:30], "embedding": rows}), bare / "rows.parquet")
    with pytest.raises(AlignmentError, match="was made by an unknown encoder"):
        align(str(bare), fits("realign"), tmp_path / "of bare")


def test_image_embeddings_are_never_aligned(fits, images, tmp_path):
    """Sec. 4: real images go into the model as they are."""
    before = stamps(Path(images))
    with pytest.raises(DataError, match="holds image embeddings, expected text"):
        align(images, fits("realign"), tmp_path / "aligned")
    assert stamps(Path(images)) == before
    assert not (tmp_path / "aligned").exists()


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_aligned_store_holds_what_the_map_makes(fits, texts, tmp_path, strategy):
    alignment = load_alignment(fits(strategy))
    said = align(texts, fits(strategy), tmp_path / "aligned")
    assert said == f"3,000 texts aligned by {strategy}\nstore: {tmp_path / 'aligned'}"
    check_equal(stored(str(tmp_path / "aligned")), expected(alignment), LAST_BIT)
    store = open_stores([str(tmp_path / "aligned")], "text")
    assert (store.alignment, store.encoder, store.domain) == (alignment.content_hash, ENCODER, "tests")
    table = shards.read_columns(store.row_groups[0].uri, ["id", "text", "truncated"])
    assert table["text"].to_pylist()[0] == f"a text named {table['id'].to_pylist()[0]}"
    with pytest.raises(AlignmentError, match="these rows are aligned already"):
        align(str(tmp_path / "aligned"), fits(strategy), tmp_path / "twice")


def test_the_gap_that_the_fit_states_is_that_of_the_aligned_store(fits, texts, images, tmp_path):
    alignment = load_alignment(fits("realign"))
    align(texts, fits("realign"), tmp_path / "aligned")
    rows_ND = np.stack(list(stored(str(tmp_path / "aligned")).values())).astype(np.float64)
    gap = np.linalg.norm(rows_ND.mean(0) - alignment.image_centroid)
    # The stored rows are rounded to float32: 3e-8 each, less in the mean.
    assert gap == pytest.approx(alignment.modality_gap.after, abs=1e-8)
    assert alignment.modality_gap.after < alignment.modality_gap.before / 10


def test_only_shards_that_are_missing_are_written(fits, texts, tmp_path):
    output = tmp_path / "aligned"
    align(texts, fits("realign"), output)
    before, content = stamps(output), {path.name: path.read_bytes() for path in output.glob("part-*")}
    victim = sorted(before)[1]
    (output / victim).unlink()
    (output / "manifest.json").unlink()
    align(texts, fits("realign"), output)
    after = stamps(output)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {victim}
    assert (output / victim).read_bytes() == content[victim]


def test_shards_that_are_added_to_the_texts_are_added_to_the_aligned_store(fits, tmp_path):
    texts, output = tmp_path / "texts", tmp_path / "aligned"
    write_store(texts, TEXT_ND[:1000], rows_per_shard=500)
    align(str(texts), fits("realign"), output)
    before = stamps(output)
    write_store(texts, TEXT_ND[:2000], rows_per_shard=500)
    align(str(texts), fits("realign"), output)
    assert before.items() <= stamps(output).items()
    wanted = expected(load_alignment(fits("realign")))
    check_equal(stored(str(output)), {row_id: wanted[row_id] for row_id in IDS[:2000]}, LAST_BIT)
    write_store(texts, TEXT_ND[1000:], rows_per_shard=500)  # other rows under the same names
    with pytest.raises(DataError, match="was made from a shard that the text store no longer holds"):
        align(str(texts), fits("realign"), output)


def test_the_list_layout_is_read_by_other_tools(fits, texts, tmp_path):
    align(texts, fits("realign"), tmp_path / "aligned", layout="list")
    wanted = expected(load_alignment(fits("realign")))
    paths = sorted((tmp_path / "aligned").glob("part-*"))
    field = pq.read_schema(paths[0]).field("embedding")
    assert field.type == pa.list_(pa.float32(), 10)
    found: dict[str, np.ndarray] = {}
    for path in paths:
        frame = pq.read_table(path).to_pandas()
        found |= dict(zip(frame["id"], frame["embedding"], strict=True))
    check_equal(found, wanted, LAST_BIT)
    check_equal(stored(str(tmp_path / "aligned")), wanted, LAST_BIT)  # and by our own reader
    rows = ray.data.read_parquet([str(path) for path in paths]).take(3)
    assert all(np.allclose(row["embedding"], wanted[row["id"]], rtol=0, atol=LAST_BIT) for row in rows)


def test_half_floats_on_request(fits, texts, tmp_path):
    align(texts, fits("realign"), tmp_path / "aligned", dtype="float16")
    found = stored(str(tmp_path / "aligned"))
    assert found["text0"].dtype == np.float16
    check_equal(found, expected(load_alignment(fits("realign"))), 2.5e-4)  # half a unit of float16 below 1


def test_rows_without_a_direction_are_listed_and_the_others_kept(fits, tmp_path):
    rows_ND = TEXT_ND[:2500].copy()
    rows_ND[7], rows_ND[2400, 2] = 0, np.nan
    texts = write_store(tmp_path / "texts", rows_ND, rows_per_shard=2300)
    with pytest.raises(DataError, match=r"2 of 2500 rows were rejected .*max_rejected_fraction=0.0001"):
        align(texts, fits("realign"), tmp_path / "aligned", max_rejected_fraction=0.0001)
    align(texts, fits("realign"), tmp_path / "aligned")
    wanted = expected(load_alignment(fits("realign")))
    kept = {row_id: wanted[row_id] for row_id in IDS[:2500] if row_id not in ("text7", "text2400")}
    check_equal(stored(str(tmp_path / "aligned")), kept, LAST_BIT)
    listed = {
        row.id: (row.reason, row.uri) for row in read_rejected(str(tmp_path / "aligned/rejected.parquet"))
    }
    assert listed == {
        "text7": ("zero vector", f"{texts}/part-000000.parquet:row group 0, row 7"),
        "text2400": ("NaN", f"{texts}/part-002300.parquet:row group 0, row 100"),
    }


def test_an_output_of_another_fit_or_layout_or_of_something_else_is_refused(fits, texts, tmp_path):
    align(texts, fits("none"), tmp_path / "aligned")
    before = stamps(tmp_path / "aligned")
    for alignment, settings, key in (("anchor", {}, "alignment"), ("none", {"layout": "list"}, "layout")):
        with pytest.raises(OutputError, match=rf"{key} was .*name another output"):
            align(texts, fits(alignment), tmp_path / "aligned", **settings)
    assert stamps(tmp_path / "aligned") == before
    with pytest.raises(OutputError, match="does not belong to an embedding store"):
        align(texts, fits("none"), Path(texts))
    with pytest.raises(AlignmentError, match="no fit there"):
        align(texts, str(tmp_path / "nowhere"), tmp_path / "other")
