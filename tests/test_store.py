"""Embedding stores: what is written is read, foreign Parquet is taken, damage is noticed."""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from embedding_stores import ENCODER, cloud, write_part, write_store

from revision_ray.core import storage
from revision_ray.core.errors import DataError, OutputError
from revision_ray.data import finish, shards
from revision_ray.data.finish import FinishSettings, claim, finish_store, read_footers
from revision_ray.data.shards import EmbeddingTable, EncoderIdentity, Rejected
from revision_ray.data.store import (
    check_rejected,
    open_stores,
    read_group,
    read_group_ids,
    read_rejected,
    write_rejected,
)

ROWS_ND = cloud(5000, 6, "text")


def parquet(path: Path, embedding: pa.Array, ids: list | None = None) -> str:
    """A Parquet file as other tools write it: no footer of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = list(range(len(embedding))) if ids is None else ids
    pq.write_table(pa.table({"id": pa.array(ids), "embedding": embedding}), path, row_group_size=100)
    return str(path)


def all_rows(uri: str) -> np.ndarray:
    store = open_stores([uri], "text")
    return np.concatenate([read_group(group, store.embedding_dim) for group in store.row_groups])


# --- what is written is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shard_is_read_as_it_was_written(tmp_path, dtype):
    rows_ND = ROWS_ND.astype(dtype)
    uri = write_store(tmp_path / "store", rows_ND, rows_per_shard=5000)
    store = open_stores([uri], "text")
    assert [group.num_rows for group in store.row_groups] == [2048, 2048, 904]
    for group, start in zip(store.row_groups, (0, 2048, 4096), strict=True):
        block_ND = read_group(group, 6)
        assert block_ND.dtype == dtype
        assert not block_ND.flags.owndata
        np.testing.assert_array_equal(block_ND, rows_ND[start : start + 2048])
        assert read_group_ids(group)[:2] == [f"text{start}", f"text{start + 1}"]
    assert (store.num_rows, store.embedding_dim, store.encoder, store.domain) == (5000, 6, ENCODER, "tests")


def test_the_list_layout_is_a_list_of_floats_for_other_tools(tmp_path):
    entry = write_part(tmp_path / "binary.parquet", ROWS_ND[:300], [str(row) for row in range(300)])
    footer = shards.read_footer(str(tmp_path / "binary.parquet"))
    rows = EmbeddingTable(
        ids=[str(row) for row in range(300)],
        embedding_ND=ROWS_ND[:300],
        columns={
            name: shards.read_columns(str(tmp_path / "binary.parquet"), [name])[name].combine_chunks()
            for name in ("text", "truncated")
        },
    )
    listed = shards.write_shard(str(tmp_path / "list.parquet"), rows, footer, "list")
    assert listed.content_hash == entry.content_hash  # the content is the same, its layout is not
    frame = pq.read_table(tmp_path / "list.parquet").to_pandas()
    np.testing.assert_array_equal(np.stack(frame["embedding"]), ROWS_ND[:300].astype(np.float32))
    np.testing.assert_array_equal(
        shards.read_embeddings(str(tmp_path / "list.parquet"), 0), ROWS_ND[:300].astype(np.float32)
    )


def test_the_content_hash_is_of_rows_ids_and_texts(tmp_path):
    ids = [str(row) for row in range(50)]
    same = write_part(tmp_path / "a.parquet", ROWS_ND[:50], ids).content_hash
    assert write_part(tmp_path / "b.parquet", ROWS_ND[:50], ids).content_hash == same
    others = [
        write_part(tmp_path / "c.parquet", ROWS_ND[1:51], ids),
        write_part(tmp_path / "d.parquet", ROWS_ND[:50], [*ids[:-1], "x"]),
        write_part(tmp_path / "e.parquet", ROWS_ND[:50], ids, texts=["other"] * 50),
    ]
    assert len({same, *(entry.content_hash for entry in others)}) == 4


def test_stores_join_and_a_shard_in_both_is_read_once(tmp_path, caplog):
    one = write_store(tmp_path / "one", ROWS_ND[:2000], domain="a")
    two = write_store(tmp_path / "two", ROWS_ND[:3000], domain="b")
    store = open_stores([one, two], "text")
    # Shards of 700: two whole ones are in both; the third of `one` is shorter, so it is another shard.
    assert store.num_rows == 2000 + 3000 - 1400
    assert store.domain == "a,b"
    assert "occur in more than one place" in caplog.text
    assert open_stores([two, one], "text").row_groups[0].shard_hash == store.row_groups[0].shard_hash


# --- Parquet of other tools -------------------------------------------------------------------------------


def foreign_columns() -> dict[str, pa.Array]:
    wide_ND = ROWS_ND[:250].astype(np.float32)
    flat = pa.array(wide_ND.reshape(-1))
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(wide_ND)
    return {
        "fixed_size_list": pa.FixedSizeListArray.from_arrays(flat, 6),
        "half_fixed_size_list": pa.FixedSizeListArray.from_arrays(pa.array(ROWS_ND[:250].reshape(-1)), 6),
        "list": pa.array(wide_ND.tolist(), pa.list_(pa.float32())),
        "large_list": pa.array(wide_ND.tolist(), pa.large_list(pa.float64())),
        "half_list": pa.array(list(ROWS_ND[:250]), pa.list_(pa.float16())),
        "tensor": tensor,
    }


@pytest.mark.parametrize("kind", list(foreign_columns()))
def test_a_bare_directory_of_parquet_files_is_a_store_of_an_unknown_encoder(tmp_path, caplog, kind):
    parquet(tmp_path / "mine" / "rows.parquet", foreign_columns()[kind])
    with caplog.at_level(logging.WARNING):
        store = open_stores([str(tmp_path / "mine")], "text")
    assert "its encoder is unknown" in caplog.text
    assert (store.embedding_dim, store.num_rows, store.encoder) == (6, 250, EncoderIdentity())
    np.testing.assert_array_equal(all_rows(str(tmp_path / "mine")), ROWS_ND[:250].astype(np.float64))
    assert read_group_ids(store.row_groups[1])[:2] == ["100", "101"]  # whole numbers are ids too


def test_a_tensor_column_that_ray_wrote_is_taken(cluster, tmp_path):
    data = ray.data.from_numpy(ROWS_ND[:200].astype(np.float32)).rename_columns({"data": "embedding"})
    data.add_column("id", lambda frame: [f"r{i}" for i in range(len(frame))]).write_parquet(
        str(tmp_path / "ray")
    )
    np.testing.assert_array_equal(all_rows(str(tmp_path / "ray")), ROWS_ND[:200].astype(np.float32))


def test_null_rows_null_numbers_and_rows_of_another_length_are_nan_and_described(tmp_path):
    rows: list = ROWS_ND[:8].astype(float).tolist()
    rows[1], rows[2], rows[3][4], rows[5] = None, [1.0, 2.0], None, [0.0] * 6
    rows[6][0], rows[7][0] = float("nan"), float("inf")
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32())):
        uri = parquet(tmp_path / str(kind) / "rows.parquet", pa.array(rows, kind))
        found_ND = shards.read_embeddings(uri, 0)
        assert np.isnan(found_ND[[1, 2]]).all()
        assert np.isnan(found_ND).any(axis=1).tolist() == [False, True, True, True, False, False, True, False]
        assert shards.describe_rows(uri, 0, [1, 2, 3, 5, 6, 7], 6) == [
            "null", "dimension 2, expected 6", "null", "zero vector", "NaN", "infinite",
        ]  # fmt: skip
    fixed = [None if row is None or len(row) != 6 else row for row in rows]
    uri = parquet(tmp_path / "fixed" / "rows.parquet", pa.array(fixed, pa.list_(pa.float32(), 6)))
    assert np.isnan(shards.read_embeddings(uri, 0)).any(axis=1).tolist() == [
        False, True, True, True, False, False, True, False,
    ]  # fmt: skip


def test_rows_of_the_stores_dimension_are_kept_where_most_of_a_row_group_has_another(tmp_path):
    rows = [
        *ROWS_ND[:100].astype(float).tolist(),
        *[[1.0, 2.0]] * 60,
        *ROWS_ND[160:200].astype(float).tolist(),
    ]
    parquet(tmp_path / "mixed" / "rows.parquet", pa.array(rows, pa.list_(pa.float32())))
    good_N = ~np.isnan(all_rows(str(tmp_path / "mixed"))).any(axis=1)
    assert good_N.tolist() == [True] * 100 + [False] * 60 + [True] * 40


def test_the_dimension_is_that_of_the_first_rows_that_hold_any(tmp_path):
    rows = [None] * 100 + ROWS_ND[:20].tolist()
    parquet(tmp_path / "late" / "rows.parquet", pa.array(rows, pa.list_(pa.float32())))
    assert open_stores([str(tmp_path / "late")], "text").embedding_dim == 6
    parquet(tmp_path / "never" / "rows.parquet", pa.array([None] * 5, pa.list_(pa.float32())))
    with pytest.raises(DataError, match="nothing but nulls"):
        open_stores([str(tmp_path / "never")], "text")


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (pa.array(["a", "b"]), r"column embedding is string; expected"),
        (pa.array([[1, 2], [3, 4]]), r"column embedding is list<.*int64>; expected"),
        (pa.array([b"1234", b"5678"], pa.binary(4)), r"fixed_size_binary\[4\] without this project's footer"),
    ],
    ids=["text", "integers", "binary"],
)
def test_a_column_that_cannot_be_read_for_certain_is_refused(tmp_path, embedding, message):
    parquet(tmp_path / "odd" / "rows.parquet", embedding)
    with pytest.raises(DataError, match=message):
        open_stores([str(tmp_path / "odd")], "text")


def test_shards_without_their_manifest_keep_their_identity(tmp_path):
    """A shard copied out of a store is that shard still: a fit that counts it does not count it again."""
    uri = write_store(tmp_path / "store", ROWS_ND[:1400])
    known = open_stores([uri], "text").shard_hashes
    (tmp_path / "store" / "manifest.json").unlink()
    assert open_stores([uri], "text").shard_hashes == known


# --- what is refused --------------------------------------------------------------------------------------


def test_a_directory_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no manifest.json and no Parquet files there"):
        open_stores([str(tmp_path / "empty")], "text")
    with pytest.raises(DataError, match=r"no manifest.json and no Parquet files there"):
        open_stores([str(tmp_path / "nowhere")], "text")
    with pytest.raises(DataError, match="no image store was given"):
        open_stores([], "image")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match=r"unfinished.*run jobs/embed.py on it again"):
        open_stores([str(tmp_path / "begun")], "text")
    parquet(tmp_path / "other" / "rows.parquet", pa.array([[1.0]]))
    pq.write_table(pa.table({"embedding": [[1.0]]}), tmp_path / "other" / "rows.parquet")
    with pytest.raises(DataError, match=r"needs also \['id'\]"):
        open_stores([str(tmp_path / "other")], "text")


def test_the_other_modality_dimension_encoder_or_alignment_is_refused(tmp_path):
    texts = write_store(tmp_path / "texts", ROWS_ND[:50])
    images = write_store(tmp_path / "images", ROWS_ND[:50], "image")
    with pytest.raises(DataError, match=r"holds image embeddings, expected text; are the two swapped"):
        open_stores([images], "text")
    narrow = write_store(tmp_path / "narrow", ROWS_ND[:50, :4])
    with pytest.raises(DataError, match=r"narrow: embedding_dim is 4, .*texts has 6"):
        open_stores([texts, narrow], "text")
    foreign = write_store(
        tmp_path / "foreign", ROWS_ND[:40], encoder=EncoderIdentity(name="b", fingerprint="b")
    )
    with pytest.raises(DataError, match="embed both with one encoder"):
        open_stores([texts, foreign], "text")
    document = json.loads(Path(texts, "manifest.json").read_text()) | {"alignment": "abc"}
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="one is aligned by a fit that the other is not"):
        open_stores([texts, str(tmp_path / "aligned")], "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99, this version reads 1"),
        ({"shards": None}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"num_rows": 0, "num_rejected": 4}, r"store is empty \(4 rows were rejected"),
    ],
    ids=str,
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, change, message):
    uri = write_store(tmp_path / "store", ROWS_ND[:50])
    manifest = Path(uri, "manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(DataError, match=message):
        open_stores([uri], "text")


def test_a_missing_shortened_or_replaced_shard_is_noticed(tmp_path):
    uri = write_store(tmp_path / "store", ROWS_ND[:2100], rows_per_shard=2100)
    shard = next(tmp_path.glob("store/part-*"))
    whole, group = shard.read_bytes(), open_stores([uri], "text").row_groups[1]
    cases = {
        "no such file": None,
        "not a readable Parquet file": whole[:-300],
        "cannot be read as the manifest lists it": shorter(tmp_path, ROWS_ND[:100]),
        "it was replaced": shorter(tmp_path, ROWS_ND[1:2101]),
    }
    for message, content in cases.items():
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_group(group, 6)
    shard.write_bytes(whole)
    with pytest.raises(DataError, match=r"row group 1 has 52 rows, listed were 53"):
        read_group(replace(group, num_rows=53), 6)


def shorter(folder: Path, rows_ND: np.ndarray) -> bytes:
    write_part(folder / "another.parquet", rows_ND, [str(row) for row in range(len(rows_ND))])
    return (folder / "another.parquet").read_bytes()


def test_a_footer_that_is_not_ours_is_refused(tmp_path):
    uri = parquet(tmp_path / "rows.parquet", pa.array([[1.0]]))
    with pytest.raises(DataError, match="is not a shard of an embedding store"):
        shards.read_footer(uri)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a shard of an embedding store"):
        shards.read_footer(str(tmp_path / "cut.parquet"))


# --- the end of a job -------------------------------------------------------------------------------------

FINISH = FinishSettings(domain="tests", layout="binary", max_rejected_fraction=0.5, duplicate_ids="reject")


def stored(output: Path) -> dict[str, str]:
    """Text by id of every row of the store; fails where an id occurs twice."""
    found = []
    for shard in shards.read_manifest(str(output)).shards:
        table = shards.read_columns(str(output / shard.name), ["id", "text"])
        found += list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert max(Counter(row_id for row_id, _ in found).values()) == 1
    return dict(found)


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("part-*")}


@pytest.fixture
def repeated(tmp_path) -> Path:
    """Two shards: id b twice with equal texts, id c twice with other texts, id a twice in one shard."""
    write_part(tmp_path / "part-0.parquet", ROWS_ND[:4], ["a", "b", "c", "a"], texts=["A", "B", "C", "A"])
    write_part(tmp_path / "part-1.parquet", ROWS_ND[4:7], ["b", "c", "d"], texts=["B", "other", "D"])
    return tmp_path


def test_a_repeated_id_is_numbered_when_its_content_is_equal_and_else_rejected(cluster, repeated):
    manifest = finish_store(str(repeated), FINISH)
    found = stored(repeated)
    assert (manifest.num_rows, manifest.num_rejected) == (6, 1)
    assert sorted(found.values()) == ["A", "A", "B", "B", "C", "D"]
    assert {"a", "b", "c", "d"} <= found.keys()
    assert {row_id[:2] for row_id in found.keys() - {"a", "b", "c", "d"}} == {"a-", "b-"}
    (rejected,) = read_rejected(str(repeated / "rejected.parquet"))
    assert (rejected.id, rejected.uri) == ("c", "part-1.parquet:row 1")
    assert "other content" in rejected.reason


def test_a_repeated_id_of_other_content_is_numbered_on_request(cluster, repeated):
    manifest = finish_store(str(repeated), replace(FINISH, duplicate_ids="number"))
    assert (manifest.num_rows, manifest.num_rejected) == (7, 0)
    assert sorted(stored(repeated).values()) == ["A", "A", "B", "B", "C", "D", "other"]
    before = stamps(repeated)
    assert finish_store(str(repeated), replace(FINISH, duplicate_ids="number")) == manifest
    assert stamps(repeated) == before


def test_too_many_repeated_ids_fail_before_a_row_is_lost(cluster, repeated):
    before = stamps(repeated)
    with pytest.raises(DataError, match=r"1 of 7 rows were rejected \(1 x duplicate id"):
        finish_store(str(repeated), replace(FINISH, max_rejected_fraction=0.1))
    assert not (repeated / "manifest.json").exists()
    assert stamps(repeated) == before
    assert len(read_rejected(str(repeated / "rejected.parquet"))) == 1  # the list that the message names
    manifest = finish_store(str(repeated), replace(FINISH, duplicate_ids="number", max_rejected_fraction=0))
    assert manifest.num_rows == 7


def test_shards_that_a_manifest_lists_stay_when_data_are_added(cluster, tmp_path):
    """Also where the added shard comes first by name and source: fits count the listed ones by their hash."""
    write_part(tmp_path / "part-5.parquet", ROWS_ND[:3], ["a", "b", "c"], texts=["A", "B", "C"])
    former = finish_store(str(tmp_path), FINISH)
    before = stamps(tmp_path)
    write_part(tmp_path / "part-1.parquet", ROWS_ND[3:6], ["b", "c", "d"], texts=["B", "other", "D"])
    manifest = finish_store(str(tmp_path), FINISH)
    assert stamps(tmp_path)["part-5.parquet"] == before["part-5.parquet"]
    assert former.shards[0] in manifest.shards
    assert (manifest.num_rows, manifest.num_rejected) == (5, 1)
    assert {"a", "b", "c", "d"} <= stored(tmp_path).keys()


@pytest.mark.parametrize("shares", [[1, 1, 1], [2, 1], [3]])
def test_ids_are_compared_across_tasks_and_partitions_of_the_shuffle(cluster, tmp_path, monkeypatch, shares):
    starts = [sum(shares[:number]) for number in range(len(shares))]
    ranges = [range(start, start + size) for start, size in zip(starts, shares, strict=True)]
    monkeypatch.setattr(finish, "_shares", lambda number: ranges)
    monkeypatch.setattr(finish, "_ROWS_PER_PARTITION", 100)
    uris = []
    for number in range(3):
        path = tmp_path / f"part-{number}.parquet"
        ids = [f"row {row}" for row in range(100 * number, 100 * number + 150)]
        write_part(path, ROWS_ND[:150], ids, texts=[row_id if number < 2 else "new" for row_id in ids])
        uris.append(str(path))
    found = finish.find_repeated(uris)
    assert found == {1: dict.fromkeys(range(50), True), 2: dict.fromkeys(range(50), False)}


@pytest.mark.parametrize("number", [1, 7, 8, 9, 100, 10_000])
def test_every_shard_is_in_one_share(monkeypatch, number):
    monkeypatch.setattr(finish.ray, "cluster_resources", lambda: {"CPU": 2.0})
    shares = finish._shares(number)
    assert [place for share in shares for place in share] == list(range(number))
    assert max(map(len, shares)) <= finish._SHARDS_PER_TASK
    assert len(shares) >= min(number, 8), "enough for every CPU"


def test_images_are_compared_by_their_embeddings(cluster, tmp_path):
    write_part(tmp_path / "part-0.parquet", ROWS_ND[:2], ["a", "b"], "image")
    write_part(tmp_path / "part-1.parquet", ROWS_ND[1:3][::-1], ["a", "b"], "image")
    uris = [str(tmp_path / f"part-{number}.parquet") for number in range(2)]
    assert finish.find_repeated(uris) == {1: {0: False, 1: True}}


def test_shards_of_different_dimensions_make_no_store(cluster, tmp_path):
    write_part(tmp_path / "part-0.parquet", ROWS_ND[:2], ["a", "b"])
    write_part(tmp_path / "part-1.parquet", ROWS_ND[:2, :5], ["c", "d"])
    with pytest.raises(DataError, match=r"shards of different dimensions: \{6: .*5: "):
        finish_store(str(tmp_path), FINISH)


def test_an_output_without_rows_is_no_store(cluster, tmp_path):
    with pytest.raises(DataError, match="the sources hold no rows"):
        finish_store(str(tmp_path), FINISH)
    write_part(tmp_path / "part-0.parquet", ROWS_ND[:0], [])
    with pytest.raises(DataError, match="the sources hold no rows"):
        finish_store(str(tmp_path), FINISH)


def test_the_manifest_can_be_made_again_from_the_shards(cluster, tmp_path):
    write_part(tmp_path / "part-0.parquet", ROWS_ND, [str(row) for row in range(len(ROWS_ND))])
    manifest = finish_store(str(tmp_path), FINISH)
    (tmp_path / "manifest.json").unlink()
    assert finish_store(str(tmp_path), FINISH) == manifest == shards.read_manifest(str(tmp_path))
    assert list(read_footers(str(tmp_path))) == [str(tmp_path / "part-0.parquet")]


def test_an_output_is_claimed_by_its_settings(tmp_path):
    output = str(tmp_path / "store")
    claim(output, {"modality": "text", "input": ["a"]})
    claim(output, {"modality": "text", "input": ["a"]})
    with pytest.raises(OutputError, match=r"input was \['a'\], is now \['b'\]\); name another"):
        claim(output, {"modality": "text", "input": ["b"]})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"thesis\.tex: .*name another output"):
        claim(str(tmp_path / "home"), {"modality": "text"})


def test_rejected_rows_are_listed_and_too_many_are_an_error(tmp_path):
    rows = [Rejected(id=str(row), uri="s", reason="NaN" if row % 3 else "zero vector") for row in range(6)]
    uri = storage.join(str(tmp_path), "rejected.parquet")
    for listed in (rows, []):
        write_rejected(uri, listed)
        assert read_rejected(uri) == listed
    check_rejected(rows, 60, 0.1, uri)
    with pytest.raises(
        DataError, match=r"6 of 59 rows were rejected \(4 x NaN; 2 x zero vector\).*rejected.parq"
    ):
        check_rejected(rows, 59, 0.1, uri)
