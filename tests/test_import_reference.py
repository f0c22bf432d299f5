"""The reference's pickles come in whole, whatever wrote them; nothing hostile in a pickle runs."""

import builtins
import codecs
import io
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_stores import cloud

from revision_ray.core.errors import DataError, OutputError
from revision_ray.data import imports, shards
from revision_ray.data.imports import ImportJob, read_reference, run_import
from revision_ray.data.store import open_stores, read_group, read_rejected

ROWS_ND = cloud(200, 8, "text")


def records(rows_ND=ROWS_ND, key="caption", prefix="t") -> list[dict]:
    return [{"id": f"{prefix}{i}", "embed": row, key: f"caption {i}"} for i, row in enumerate(rows_ND)]


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def job_of(source, output, **settings) -> ImportJob:
    return ImportJob(**({"input": str(source), "output": str(output), "modality": "text"} | settings))


# --- reading, without Ray ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int64"])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tmp_path, protocol, dtype):
    rows_ND = (ROWS_ND[:5] * 100).astype(dtype)
    found = list(read_reference(str(write(tmp_path / "a.pkl", records(rows_ND), protocol)), "caption"))
    assert [(row.id, row.content) for row in found] == [(f"t{i}", f"caption {i}") for i in range(5)]
    np.testing.assert_array_equal(np.stack([row.embedding for row in found]), rows_ND)


def test_the_module_names_before_numpy_2_are_read(tmp_path):
    content = pickle.dumps(records(), 2)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # names end with a line break
    found = list(read_reference(str(write(tmp_path / "a.pkl", old)), "caption"))
    np.testing.assert_array_equal(np.stack([row.embedding for row in found]), ROWS_ND)


def test_other_forms_of_a_vector_are_read(tmp_path):
    row_D = ROWS_ND[0]
    forms = [
        row_D, row_D[None], row_D.tolist(), tuple(row_D.tolist()), list(row_D), np.repeat(row_D, 2)[::2],
        np.asfortranarray(np.stack([row_D, row_D]))[0],
    ]  # fmt: skip
    content = [{"id": np.int64(i), "embed": form, "caption": ""} for i, form in enumerate(forms)]
    for protocol in (2, 5):
        found = list(read_reference(str(write(tmp_path / f"{protocol}.pkl", content, protocol)), "caption"))
        assert [row.id for row in found] == [str(i) for i in range(len(forms))]
        for row in found:
            np.testing.assert_array_equal(row.embedding, row_D)


def test_a_null_caption_is_none_and_a_null_id_is_an_error(tmp_path):
    content = [{"id": 0, "embed": [1.0], "caption": None}, {"id": None, "embed": [1.0], "caption": "a"}]
    (row,) = read_reference(str(write(tmp_path / "a.pkl", content[:1])), "caption")
    assert (row.id, row.content) == ("0", "")
    with pytest.raises(DataError, match=r"b\.pkl: record 1 has the id None"):
        list(read_reference(str(write(tmp_path / "b.pkl", content)), "caption"))


@pytest.mark.parametrize(
    "embed", [None, "text", {"a": 1}, [[1.0], [1.0, 2.0]], np.eye(3), np.array([True]), 3.0], ids=str
)
def test_what_is_no_vector_of_numbers_is_left_to_be_rejected(tmp_path, embed):
    content = [{"id": 1, "embed": embed, "caption": ""}]
    (row,) = read_reference(str(write(tmp_path / "a.pkl", content)), "caption")
    assert row.embedding is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": 1}, "holds a dict, expected a list of records"),
        ([1], "record 0 has int, expected id, embed and caption"),
        ([{"id": 1, "embed": [1.0]}], r"record 0 has \['embed', 'id'\], expected id, embed and caption"),
        ([*records(), {"id": 1}], r"record 200 has \['id'\]"),
        (records(key="image_path"), r"record 0 has .*image_path.*is the modality right"),
        (b"", "is no readable pickle"),
        (b"not a pickle at all", "is no readable pickle"),
        (b"PK\x03\x04" + bytes(100), "is no readable pickle"),
    ],
    ids=["dict", "number", "no caption", "late", "images", "empty", "text", "zip"],
)
def test_another_structure_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        list(read_reference(str(write(tmp_path / "a.pkl", content)), "caption"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_cut_anywhere_is_an_error_of_the_data(tmp_path, protocol):
    content = pickle.dumps(records(ROWS_ND[:3]), protocol)
    path = tmp_path / "a.pkl"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="is no readable pickle"):
            list(read_reference(str(path), "caption"))


# --- hostile pickles --------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


class Build:
    """Pickles as `function(*arguments)` followed by its `__setstate__(state)`."""

    def __init__(self, function, arguments, state):
        self.called = function, arguments, state

    def __reduce__(self):
        return self.called


class Unsafe:
    """Pickles as a persistent reference under `PersistentPickler`."""


class PersistentPickler(pickle.Pickler):
    def persistent_id(self, obj):
        return "somewhere" if isinstance(obj, Unsafe) else None


def persistent() -> bytes:
    target = io.BytesIO()
    PersistentPickler(target).dump([Unsafe()])
    return target.getvalue()


def hostile(sentinel: Path) -> dict[str, object]:
    """Everything here makes or could make `sentinel` when it is loaded by pickle.loads."""
    touch = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    array = np.ndarray.__reduce__(np.zeros(1))[0]  # numpy._core.multiarray._reconstruct
    object_array = np.array([Call(os.system, touch)], dtype=object)
    flagged = Build(np.dtype, ("f8", False, True), (3, "|", None, None, None, -1, -1, 63))
    fields = Build(
        np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 63)
    )
    return {
        "os.system": Call(os.system, touch),
        "nested": [{"id": 1, "embed": [1.0, [Call(os.system, touch)]], "caption": ""}],
        "as key": [{"id": 1, Call(os.system, touch): 1}],
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "getattr": Call(getattr, np.ndarray, "tofile"),
        "codecs": Call(codecs.decode, b"YQ==", "base64"),
        "another codec": Call(codecs.encode, "x", "rot13"),
        "numpy loads pickles": Call(np.load, str(sentinel)),
        "memory map": Call(np.memmap, str(sentinel), "u1", "w+", 0, (4,)),
        "object array": [{"id": 1, "embed": object_array, "caption": ""}],
        "object dtype": Call(np.dtype, "O"),
        "structured dtype": Call(np.dtype, "f8,f4"),
        "flags of a dtype": Build(array, (np.ndarray, (0,), b"b"), (1, (1,), flagged, False, b"\x41" * 8)),
        "fields of a dtype": Build(array, (np.ndarray, (0,), b"b"), (1, (1,), fields, False, b"\x41" * 8)),
        "objects as content": Build(array, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("f8"), False, [1])),
        "torch": [{"id": 1, "embed": torch.ones(3), "caption": ""}],
        "string array": [{"id": 1, "embed": np.array(["a"]), "caption": ""}],
        "persistent": persistent(),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "global": b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "inst": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
    }


@pytest.mark.parametrize("name", list(hostile(Path("sentinel"))))
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    content = hostile(sentinel)[name]
    for protocol in range(6):
        path = write(tmp_path / "a.pkl", content, protocol)
        with pytest.raises(DataError, match=r"refused: the pickle holds .*nothing in it was run"):
            list(read_reference(str(path), "caption"))
        assert not sentinel.exists()


def test_the_hostile_pickles_would_have_run(tmp_path):
    """The test above can fail: a plain unpickler runs them."""
    for name in ("os.system", "nested", "eval", "global", "inst", "obj", "memory map"):
        sentinel = tmp_path / name
        pickle.loads(write(tmp_path / "a.pkl", hostile(sentinel)[name]).read_bytes())  # noqa: S301
        assert sentinel.exists(), name


def test_a_dtype_of_this_process_is_not_changed(tmp_path):
    """Byte order arrives as a dtype's state; it must not land in NumPy's own float64."""
    swapped = Build(np.dtype, ("f8",), (3, ">", None, None, None, -1, -1, 0))
    write(tmp_path / "a.pkl", [{"id": 1, "embed": [1.0], "caption": swapped}])
    list(read_reference(str(tmp_path / "a.pkl"), "caption"))
    assert np.dtype("f8").str == "<f8"
    assert np.frombuffer(struct.pack("<d", 1.5))[0] == 1.5


def test_an_array_larger_than_its_bytes_is_refused(tmp_path):
    array = np.ndarray.__reduce__(np.zeros(1))[0]
    large = Build(array, (np.ndarray, (0,), b"b"), (1, (1 << 40,), np.dtype("f8"), False, b"\0" * 8))
    write(tmp_path / "a.pkl", [{"id": 1, "embed": large, "caption": ""}])
    with pytest.raises(DataError, match="is no readable pickle"):
        list(read_reference(str(tmp_path / "a.pkl"), "caption"))


# --- the job ----------------------------------------------------------------------------------------------


def test_parts_become_a_store_with_ids_captions_and_values_kept(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "_ROWS_PER_SHARD", 64)  # the driver's only: tasks keep 8192
    write(tmp_path / "parts" / "b.pkl", records(ROWS_ND[:120] * np.float16(3), prefix="b"), 5)
    write(tmp_path / "parts" / "a.pickle", records(ROWS_ND[120:], prefix="a"), 2)
    (tmp_path / "parts" / "notes.txt").write_text("not a part")
    job = job_of(tmp_path / "parts", tmp_path / "store", domain="general", encoder_name="LLM2CLIP")
    assert "200 text embeddings, d = 8" in run_import(job)
    store = open_stores([job.output], "text")
    assert (store.num_rows, store.domain, store.encoder.name) == (200, "general", "LLM2CLIP")
    found = {}
    for group in store.row_groups:
        table = shards.read_columns(group.uri, ["id", "text", "truncated"], group.index)
        assert not any(table["truncated"].to_pylist())
        for row_id, text, row in zip(
            table["id"].to_pylist(), table["text"].to_pylist(), read_group(group, 8), strict=True
        ):
            found[row_id] = text, row
    assert found.keys() == {*(f"b{i}" for i in range(120)), *(f"a{i}" for i in range(80))}
    assert found["a79"][0] == "caption 79"
    np.testing.assert_array_equal(found["a79"][1], ROWS_ND[199])
    np.testing.assert_array_equal(found["b3"][1], ROWS_ND[3] * np.float16(3))  # values and length are kept
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("part-*")}
    run_import(job)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("part-*")} == before


def test_an_import_that_was_cut_off_writes_what_is_missing(cluster, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "parts" / f"{name}.pkl", records(prefix=name))
    job = job_of(tmp_path / "parts", tmp_path / "store")
    run_import(job)
    first, second = sorted((tmp_path / "store").glob("part-*"))
    before = (first.stat().st_ino, second.read_bytes())
    second.unlink()
    (tmp_path / "store" / "manifest.json").unlink()
    run_import(job)
    assert (first.stat().st_ino, second.read_bytes()) == before


def test_rows_that_cannot_be_stored_are_rejected_with_their_reason_and_nothing_else_is_lost(
    cluster, tmp_path
):
    content = records(ROWS_ND.astype(np.float32))
    for row, embed in {
        3: np.full(8, np.nan, np.float32), 5: np.zeros(8), 9: np.ones(7), 11: None, 13: np.full(8, 1e6),
        17: np.full(8, 1e-9),
    }.items():  # fmt: skip
        content[row]["embed"] = embed
    write(tmp_path / "a.pkl", content)
    job = job_of(tmp_path / "a.pkl", tmp_path / "store", max_rejected_fraction=0.02)
    with pytest.raises(DataError, match=r"6 of 200 rows were rejected \(2 x zero vector; .*rejected.parquet"):
        run_import(job)
    run_import(job_of(tmp_path / "a.pkl", tmp_path / "store", max_rejected_fraction=0.03))
    assert open_stores([job.output], "text").num_rows == 194
    rejected = {row.id: (row.reason, row.uri) for row in read_rejected(f"{job.output}/rejected.parquet")}
    assert {row_id: reason for row_id, (reason, _) in rejected.items()} == {
        "t3": "NaN", "t5": "zero vector", "t9": "dimension 7, expected 8", "t17": "zero vector",
        "t11": "embed is no vector of numbers", "t13": "infinite in float16",
    }  # fmt: skip
    assert rejected["t9"][1] == f"{tmp_path / 'a.pkl'}:record 9"


def test_images_come_with_their_path(cluster, tmp_path):
    write(tmp_path / "a.pkl", records(key="image_path"))
    run_import(job_of(tmp_path / "a.pkl", tmp_path / "store", modality="image", dtype="float32"))
    store = open_stores([str(tmp_path / "store")], "image")
    table = shards.read_columns(store.row_groups[0].uri, ["uri"])
    assert table["uri"].to_pylist()[:2] == ["caption 0", "caption 1"]
    assert read_group(store.row_groups[0], 8).dtype == np.float32


def test_what_cannot_be_imported_is_an_error_that_says_why(cluster, tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        run_import(job_of(tmp_path / "nowhere", tmp_path / "store"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pickles there \(expected files that end in .pkl or .pickle\)"):
        run_import(job_of(tmp_path / "empty", tmp_path / "store"))
    write(tmp_path / "hostile.pkl", Call(os.system, f"touch {tmp_path / 'sentinel'}"))
    with pytest.raises(DataError, match=r"refused: the pickle holds .*\.system"):  # through a Ray task
        run_import(job_of(tmp_path / "hostile.pkl", tmp_path / "hostile"))
    assert not (tmp_path / "sentinel").exists()
    write(tmp_path / "none.pkl", [{"id": 1, "embed": None, "caption": ""}])
    with pytest.raises(DataError, match="none of its 1 records holds an embedding"):
        run_import(job_of(tmp_path / "none.pkl", tmp_path / "none"))


def test_another_encoder_or_a_changed_file_asks_for_another_output(cluster, tmp_path):
    write(tmp_path / "a.pkl", records())
    run_import(job_of(tmp_path / "a.pkl", tmp_path / "store"))
    with pytest.raises(OutputError, match=r"encoder\.\w+ was .*name another output"):
        run_import(job_of(tmp_path / "a.pkl", tmp_path / "store", encoder_name="other"))
    write(tmp_path / "a.pkl", records(ROWS_ND[::-1][:150]))
    with pytest.raises(DataError, match=r"a.pkl: has changed since it was imported"):
        run_import(job_of(tmp_path / "a.pkl", tmp_path / "store"))


def test_pickles_of_protocol_5_hold_the_name_that_is_admitted():
    """What NumPy writes today goes through `_frombuffer`; this fails when it changes its mind."""
    arguments = [argument for _, argument, _ in pickletools.genops(pickle.dumps(records(), 5))]
    assert {"_frombuffer", "numpy._core.numeric"} <= {one for one in arguments if isinstance(one, str)}
