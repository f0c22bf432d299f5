"""Storage: writes are whole or absent, listings exact, failures name their place; S3 is like local files."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from revision_ray.core import storage
from revision_ray.core.errors import DataError
from revision_ray.data import conversations, imports
from revision_ray.data.shards import ImageRow, TextRow
from revision_ray.data.sources import image_splits, read_images, read_texts, tar_shards, text_splits
from revision_ray.studies import inputs


def test_written_bytes_are_read_back_and_parents_are_made(tmp_path):
    uri = str(tmp_path / "a" / "b" / "c.bin")
    for content in (b"first", b"", b"second" * 100_000, pa.py_buffer(b"buffer")):
        storage.write_bytes(uri, content)
        assert storage.read_bytes(uri) == bytes(content)
    storage.write_json(uri, {"b": 1, "a": [None, "é"]})
    assert storage.read_json(uri) == {"a": [None, "é"], "b": 1}
    assert os.listdir(tmp_path / "a" / "b") == ["c.bin"]


def test_a_reader_never_sees_half_a_write(tmp_path):
    uri = str(tmp_path / "file")
    contents = [bytes([i]) * 300_000 for i in range(4)]
    storage.write_bytes(uri, contents[0])
    done = threading.Event()

    def write():
        for i in range(60):
            storage.write_bytes(uri, contents[i % 4])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        with open(uri, "rb") as file:
            seen.add(file.read())
    writer.join()
    assert seen <= set(contents)
    assert len(seen) > 1


def full_disk_script(uri: str) -> str:
    return (
        "import sys\n"
        "from revision_ray.core import storage\n"
        "from revision_ray.core.errors import DataError\n"
        f"storage.write_bytes({uri!r}, b'old')\n"
        "try:\n"
        f"    storage.write_bytes({uri!r}, b'new' * 100_000)\n"
        "except DataError as error:\n"
        "    sys.exit(str(error))\n"
    )


def assert_full_disk_is_survived(folder, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "file: writing 300000 bytes failed (no space left)" in done.stderr
    assert "what was finished is kept" in done.stderr
    assert os.listdir(folder) == ["file"]
    assert (folder / "file").read_bytes() == b"old"


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
    try:
        script = full_disk_script(str(tmp_path / "file"))
        assert_full_disk_is_survived(tmp_path, [sys.executable, "-c", script])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_size_limit_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    script = limit + full_disk_script(str(tmp_path / "file"))
    assert_full_disk_is_survived(tmp_path, [sys.executable, "-c", script])


def test_writes_that_storage_refuses_are_data_errors(tmp_path):
    storage.write_bytes(str(tmp_path / "file"), b"x")
    with pytest.raises(DataError, match=r"file/below: writing 1 bytes failed \(refused\)"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="refused"):
        storage.write_bytes(str(tmp_path / "folder"), b"y")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_reads_that_fail_name_the_place(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such file"):
        storage.read_bytes(str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"cannot be read.*directory"):
        storage.open_input(str(tmp_path))
    storage.write_bytes(str(tmp_path / "a.json"), b"{broken")
    with pytest.raises(DataError, match=r"a\.json: is not JSON"):
        storage.read_json(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"ftp://host/x: .*use a local path, s3://"):
        storage.info("ftp://host/x")
    with pytest.raises(DataError, match="empty path"):
        storage.info("")
    storage.write_bytes(str(tmp_path / "empty"), b"")
    assert storage.read_bytes(str(tmp_path / "empty")) == b""


def names(found) -> list[str]:
    return [storage.name_of(uri) for uri, _ in found]


def test_listings_are_sorted_and_without_unfinished_writes(tmp_path):
    for name in ("b.txt", "a.txt", "c.bin", "sub/d.txt", ".tmp-123-a.txt"):
        storage.write_bytes(str(tmp_path / name), b"12345")
    assert names(storage.list_files(str(tmp_path))) == ["a.txt", "b.txt", "c.bin"]
    assert names(storage.list_files(str(tmp_path), "*.txt")) == ["a.txt", "b.txt"]
    assert names(storage.list_files(str(tmp_path), "*.txt", recursive=True)) == ["a.txt", "b.txt", "d.txt"]
    assert storage.list_files(str(tmp_path / "gone")) == []
    assert {info.size for _, info in storage.list_files(str(tmp_path), recursive=True)} == {5}


def check_globs(place):
    for name in ("x1/a.tar", "x2/b.tar", "x2/deep/er/c.tar", "y/d.tar", "top.tar", "x1/e.txt", "Top.TAR"):
        storage.write_bytes(place(f"globs/{name}"), b"1")
    for pattern, expected in [
        ("*.tar", ["top.tar"]),
        ("x*/*.tar", ["a.tar", "b.tar"]),
        ("x[2-9]/*", ["b.tar"]),
        ("x2/**/*.tar", ["b.tar", "c.tar"]),
        ("**/*.tar", ["top.tar", "a.tar", "b.tar", "c.tar", "d.tar"]),
        ("x2/**", ["b.tar", "c.tar"]),
        ("z*", []),
        ("top.tar", ["top.tar"]),
        ("gone.tar", []),
    ]:
        assert sorted(names(storage.glob_files(place(f"globs/{pattern}")))) == sorted(expected), pattern
    for uri, _ in storage.glob_files(place("globs/**/*.tar")):
        assert storage.read_bytes(uri) == b"1"


def test_globs(tmp_path):
    check_globs(lambda key: str(tmp_path / key))
    assert names(storage.glob_files(str(tmp_path / "globs/?op.tar"))) == ["top.tar"]


def test_parts_of_a_uri_keep_its_query_and_a_local_question_mark():
    remote, local = "s3://b/x/y.tar?region=r&scheme=http", "/data/what?/y.tar"
    assert storage.join("s3://b/x?region=r", "y", "z") == "s3://b/x/y/z?region=r"
    assert (storage.name_of(remote), storage.name_of(local)) == ("y.tar", "y.tar")
    assert storage.parent_of(remote) == "s3://b/x?region=r&scheme=http"
    assert storage.parent_of(local) == "/data/what?"
    assert storage.parent_of("/file") == "/"
    assert storage.relative_path(remote, "s3://b?region=r&scheme=http") == "x/y.tar"
    assert storage.relative_path("/file", "/") == "file"
    assert storage.wildcard_root("s3://b/x/*/y?region=r") == "s3://b/x?region=r"
    assert storage.is_wildcard(local)
    assert not storage.is_wildcard(remote)
    assert storage.absolute("file:///a/b/") == "/a/b"


def test_google_storage_is_a_known_scheme():
    filesystem, path = storage.resolve("gs://bucket/a/b.tar")
    assert isinstance(filesystem, pafs.GcsFileSystem)
    assert path == "bucket/a/b.tar"


def test_digests_know_where_parts_end():
    assert storage.sha256(b"ab", b"c") != storage.sha256(b"a", b"bc")
    assert storage.sha256(b"ab", b"c") == storage.sha256(b"ab", b"c")


def test_s3_writes_reads_lists_and_deletes(bucket):
    storage.write_bytes(bucket("a/one.bin"), b"1" * 1000)
    assert storage.read_bytes(bucket("a/one.bin")) == b"1" * 1000
    assert storage.info(bucket("a/one.bin")).size == 1000
    assert [(uri, info.size) for uri, info in storage.list_files(bucket("a"))] == [
        (bucket("a/one.bin"), 1000)
    ]
    storage.delete_file(bucket("a/one.bin"))
    assert not storage.exists(bucket("a/one.bin"))
    with pytest.raises(DataError, match="no such file"):
        storage.read_bytes(bucket("a/one.bin"))
    check_globs(bucket)


def test_sources_on_s3_give_the_rows_of_local_ones(bucket, tmp_path):
    table = pa.table({"id": [str(i) for i in range(50)], "text": [f"row {i}" for i in range(50)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    content = {
        "texts/a.txt": "\n".join(f"line {i}" for i in range(50)).encode(),
        "texts/b.parquet": (tmp_path / "t.parquet").read_bytes(),
        "texts/c.json": b'[{"id": "j", "text": "listed"}]',
        "images/x/1.png": b"one",
        "images/x/2.jpg": b"two",
        "index/dataset.json": b"""{"images": [{"id": "i", "image": "./../images/no"},
                                              {"id": "k", "image": "../index/3.png"}]}""",
        "index/3.png": b"three",
    }
    for place in (bucket, lambda key: str(tmp_path / key)):
        for key, data in content.items():
            storage.write_bytes(place(key), data)

    def rows(place):
        texts = [
            row for split in text_splits([place("texts")], bytes_per_split=200) for row in read_texts(split)
        ]
        sources = [place("images/**/*.png"), place("images"), place("index")]
        images = [row for split in image_splits(sources) for row in read_images(split)]
        assert all(isinstance(row, TextRow) for row in texts)
        return texts, [(row.id, row.content if isinstance(row, ImageRow) else row.reason) for row in images]

    texts, images = rows(bucket)
    assert (texts, images) == rows(lambda key: str(tmp_path / key))
    assert len(texts) == 101
    assert images == [("x/1", b"one"), ("x/2", b"two"), ("i", "no such image file"), ("k", b"three")]
    with pytest.raises(DataError, match="no such file or directory"):
        text_splits([bucket("gone")])


def test_a_copy_of_a_folder_is_made_once_and_again_when_it_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("REVISION_RAY_CACHE", str(tmp_path))
    for name in ("a.json", "b.bin", "inner/c.bin"):
        storage.write_bytes(bucket(f"model/{name}"), name.encode())
    first = storage.local_copy(bucket("model"))
    found = {path.name: path.read_text() for path in Path(first).iterdir()}
    assert found == {"a.json": "a.json", "b.bin": "b.bin"}
    assert storage.local_copy(bucket("model")) == first
    storage.write_bytes(bucket("model/b.bin"), b"longer")
    second = storage.local_copy(bucket("model"))
    assert Path(second, "b.bin").read_text() == "longer"
    assert Path(storage.local_copy(bucket("model/a.json"))).read_text() == "a.json"
    assert not [name for name in os.listdir(tmp_path) if storage.TEMPORARY in name]


def test_what_is_no_uri_is_no_copy_and_what_is_missing_is_named(bucket, tmp_path, monkeypatch):
    assert storage.local_copy("org/model") == "org/model"
    assert storage.local_copy(f"file://{tmp_path}") == str(tmp_path)
    with pytest.raises(DataError, match=r"nothing/here.*: no such file or folder"):
        storage.local_copy(bucket("nothing/here"))
    storage.write_bytes(bucket("full/a.bin"), b"1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REVISION_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="REVISION_RAY_CACHE"):
        storage.local_copy(bucket("full"))


def test_what_a_file_is_says_its_name_also_where_the_uri_has_a_query(bucket):
    """Options of an object store ride behind the name: `s3://b/x.parquet?region=...`."""
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "colour": ["red"], "question": ["?"]}), table)
    storage.write_bytes(bucket("labels.parquet"), table.getvalue())
    assert [row for _, row in inputs._read_rows(bucket("labels.parquet"))] == [
        {"id": "a", "colour": "red", "question": "?"}
    ]
    storage.write_bytes(bucket("pairs/0.tar"), b"")
    assert tar_shards([bucket("pairs/0.tar")]) == tar_shards([bucket("pairs")]) == [bucket("pairs/0.tar")]
    meta = {"one": {"root": "images", "annotation": "one.jsonl", "repeat_time": 2}}
    storage.write_json(bucket("meta.json"), meta)
    (part,) = conversations.expand(conversations.source_of(bucket("meta.json")))
    assert (part.uri, part.repeat) == (bucket("one.jsonl"), 2)
    storage.write_bytes(bucket("pickles/one.pkl"), b"")
    assert imports._files(bucket("pickles")) == [bucket("pickles/one.pkl")]
