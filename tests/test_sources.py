"""Sources: every row of every format comes out once, with its id; what cannot be a row says why and where."""

import base64
import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from revision_ray.core.errors import DataError
from revision_ray.data import records, sources
from revision_ray.data.images import decode_image
from revision_ray.data.shards import ImageRow, Rejected, TextRow
from revision_ray.data.sources import image_splits, read_images, read_texts, text_splits


def content_id(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:20]


def texts(*uris, **options):
    return [row for split in text_splits([str(uri) for uri in uris], **options) for row in read_texts(split)]


def images(*uris, max_image_bytes=10**8, **options):
    splits = image_splits([str(uri) for uri in uris], **options)
    return [row for split in splits for row in read_images(split, max_image_bytes=max_image_bytes)]


def read_until_error(splits, read):
    """The rows that came before the DataError that must come, and its message."""
    rows = []
    try:
        for split in splits():
            for row in read(split):
                rows.append(row)
    except DataError as error:
        return rows, str(error)
    raise AssertionError(f"no error after {len(rows)} rows")


def pairs(rows):
    return [(row.id, row.text) for row in rows if isinstance(row, TextRow)]


def rejections(rows):
    return [row for row in rows if isinstance(row, Rejected)]


def jpeg(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = jpeg("red"), jpeg("blue")


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


# Texts: formats


def test_lines_are_texts_with_ids_of_their_content(tmp_path):
    path = write(tmp_path / "a.txt", "a red cube\r\nzwei Kreise, größer\na red cube\na red cube")
    assert pairs(texts(path)) == [
        (content_id("a red cube"), "a red cube"),
        (content_id("zwei Kreise, größer"), "zwei Kreise, größer"),
        (content_id("a red cube") + "-2", "a red cube"),
        (content_id("a red cube") + "-3", "a red cube"),
    ]


def test_jsonl_keeps_ids_and_makes_numbers_strings(tmp_path):
    records = [
        {"id": "x", "text": "one"},
        {"id": 7, "caption": "two"},
        {"key": "000000012", "text": "three", "caption": "not this"},
        {"id": 3.0, "text": "four"},
        {"id": None, "text": "five"},
        {"image_id": 5, "text": "six"},  # five captions of an image share it: no id of a text
        {"id": 0, "text": "seven"},
        {"id": float("nan"), "text": "eight"},  # pandas writes a missing number so
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")
    assert pairs(texts(path)) == [
        ("x", "one"),
        ("7", "two"),
        ("000000012", "three"),
        ("3", "four"),
        (content_id("five"), "five"),
        (content_id("six"), "six"),
        ("0", "seven"),
        (content_id("eight"), "eight"),
    ]


LLAVA = [
    {
        "id": "l1",
        "image": "1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cube."},
            {"from": "human", "value": "Its colour?"},
            {"from": "gpt", "value": "Red."},
        ],
    },
    {"id": "l2", "caption": "the caption", "conversations": [{"from": "gpt", "value": "the answer"}]},
]


def test_llava_records_give_caption_or_first_answer_as_list_and_as_lines(tmp_path):
    expected = [("l1", "A cube."), ("l2", "the caption")]
    assert pairs(texts(write(tmp_path / "a.json", json.dumps(LLAVA)))) == expected
    assert pairs(texts(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, LLAVA))))) == expected
    pq.write_table(
        pa.Table.from_pylist([{"id": "l1", "conversations": LLAVA[0]["conversations"]}]),
        tmp_path / "a.parquet",
    )
    assert pairs(texts(tmp_path / "a.parquet")) == expected[:1]
    silent = {"id": "l3", "conversations": [{"from": "human", "value": "Hello?"}]}
    [rejected] = texts(write(tmp_path / "b.json", json.dumps([silent])))
    assert rejected.id == "l3"
    assert "['human']" in rejected.reason


def test_reference_index_serves_both_sides(tmp_path):
    write(tmp_path / "img" / "1.png", RED)
    elsewhere = write(tmp_path / "elsewhere" / "2.png", BLUE)
    index = {
        "version": [1, {"x": 2}],
        "images": [{"id": 1, "image": "img/1.png"}, {"id": "b", "image": str(elsewhere)}],
        "texts": [{"id": "t1", "text": "one"}, {"id": "t2", "text": "two"}],
    }
    path = write(tmp_path / "dataset.json", json.dumps(index, indent=1))
    assert pairs(texts(path)) == [("t1", "one"), ("t2", "two")]
    assert images(path) == [
        ImageRow(id="1", uri=str(tmp_path / "img" / "1.png"), content=RED),
        ImageRow(id="b", uri=str(elsewhere), content=BLUE),
    ]
    # The folder: the index stands for the files that lie beside it, so that no image counts twice.
    assert [row.id for row in images(tmp_path)] == ["1", "b"]


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_texts(tmp_path, column, kind):
    values = (
        pa.array(["one", "two", None, "four"]).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(["one", "two", None, "four"]).dictionary_encode()
    )
    table = pa.table({"other": [1.0] * 4, column: values, "id": [10, 11, 12, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = texts(tmp_path / "a.parquet")
    assert pairs(rows) == [("10", "one"), ("11", "two"), (content_id("four"), "four")]
    [rejected] = rejections(rows)
    assert (rejected.id, rejected.uri) == ("12", f"{tmp_path}/a.parquet:row 2")
    assert "null" in rejected.reason


def test_tar_texts_take_txt_before_json_and_the_key_as_id(tmp_path):
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("./a/001.jpg", b"x" * 5000),
            ("./a/001.txt", b"a caption\n"),
            ("./a/001.json", b'{"caption": "not this"}'),
            ("./a/002.json", b'{"caption": "from json", "id": "not this"}'),
            ("./a/002.jpg", b"x" * 5000),
            ("./a/003.jpg", b"x"),
            ("b.c/004.seg.txt", b"not a caption"),
            ("b.c/004.txt", b"dotted folder"),
            ("__meta__.json", b"{}"),
            ("005.txt", b" \n"),
            ("006.json", b'{"caption": '),
            ("007.txt", b"caf\xe9"),
        ],
    )
    rows = texts(path)
    assert pairs(rows) == [("a/001", "a caption"), ("a/002", "from json"), ("b.c/004", "dotted folder")]
    assert [(row.id, row.uri) for row in rejections(rows)] == [
        ("a/003", f"{path}/a/003"),
        ("005", f"{path}/005.txt"),
        ("006", f"{path}/006.json"),
        ("007", f"{path}/007.txt"),
    ]
    reasons = [row.reason for row in rejections(rows)]
    assert "['jpg']" in reasons[0]
    assert reasons[1] == "empty text"
    assert "malformed JSON at byte 12" in reasons[2]
    assert "invalid UTF-8 at byte 3" in reasons[3]


# Texts: bad input


def test_bad_lines_are_rejected_with_their_place_and_reason(tmp_path):
    good = b'{"id": "g", "text": "good"}\n'
    bad = [
        (b'{"id": "e", "text": ""}', "e", "empty text"),
        (b'{"id": "w", "text": " \\t\\n "}', "w", "empty text"),
        (b'{"id": "u", "text": "caf\xe9 x"}', "u", "invalid UTF-8 at byte {+24}"),
        (b'{"id": "j", "text": "open}', None, "malformed JSON at byte {+20}"),
        (b'{"id": "m", "title": "t", "body": 1}', "m", "['body', 'id', 'title']"),
        (b'{"id": "n", "text": 5}', "n", "field 'text' is a number"),
        (b'{"id": "s", "text": "half \\ud800"}', "s", "lone surrogate"),
        (b'{"id": {"a": 1}, "text": "t"}', None, "field 'id' is an object"),
        (b'["a", "b"]', None, "record is a list"),
        (b"[" * 100_000, None, "malformed JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", None, "malformed JSON"),
        (b"\xff\xfe\x00", None, "invalid UTF-8 at byte {+0}"),
    ]
    path = write(tmp_path / "a.jsonl", b"".join(good + line + b"\n" for line, _, _ in bad))
    rows = texts(path)
    assert pairs(rows) == [("g", "good")] * len(bad)
    offset = 0
    for (line, known, expected), row in zip(bad, rejections(rows), strict=True):
        offset += len(good)
        assert row.uri == f"{path}:byte {offset}"
        assert row.id == (known or content_id(line))
        reason, placed, within = expected.partition("{+")
        assert reason + (str(offset + int(within.rstrip("}"))) if placed else "") in row.reason
        offset += len(line) + 1


def test_blank_lines_and_invalid_bytes_in_a_text_file(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\n  \ncaf\xe9\ntwo\n")
    rows = texts(path)
    assert [text for _, text in pairs(rows)] == ["one", "two"]
    assert [(row.uri.partition(":")[2], row.reason[:24]) for row in rejections(rows)] == [
        ("byte 4", "empty text"),
        ("byte 5", "empty text"),
        ("byte 8", "invalid UTF-8 at byte 11"),
    ]
    assert len({row.id for row in rows}) == len(rows)


def test_bytes_that_are_not_utf8_spoil_one_record_of_a_json_list(tmp_path):
    path = write(tmp_path / "a.json", b'[{"id": "a", "text": "caf\xe9"}, {"id": "b", "text": "caf\xc3\xa9"}]')
    bad, good = texts(path)
    assert good == TextRow(id="b", text="café")
    assert (bad.id, bad.uri) == ("a", f"{path}:byte 1")
    assert "invalid UTF-8 at byte 25" in bad.reason


def test_bytes_that_are_not_utf8_spoil_one_row_of_a_parquet_file(tmp_path):
    raw = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": text}), tmp_path / "a.parquet")
    rows = texts(tmp_path / "a.parquet")
    assert pairs(rows) == [("a", "good"), ("c", "fine")]
    assert rejections(rows)[0].id == "b"
    assert "invalid UTF-8 at byte 3" in rejections(rows)[0].reason


def test_long_texts_pass_whole_in_every_format(tmp_path):
    long = "ein sehr langer Satz über Würfel " * 3200
    assert len(long.encode()) > 100_000
    write(tmp_path / "a.txt", long + "\n")
    write(tmp_path / "b.jsonl", json.dumps({"id": "b", "text": long}))
    write(tmp_path / "c.json", json.dumps([{"id": "c", "text": long}] * 30))
    pq.write_table(pa.table({"id": ["d"], "text": [long]}), tmp_path / "d.parquet")
    rows = texts(tmp_path)
    assert len(rows) == 33
    assert {row.text for row in rows} == {long}


def test_an_endless_line_is_rejected_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_READ_BYTES", 64)
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path / "a.txt", "x" * 1000 + "\n" + "y" * 5000 + "\nlast\n")
    first, long, last = texts(path)
    assert (first.text, last.text) == ("x" * 1000, "last")
    assert long.reason == "a line of more than 1000 bytes"


def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    write(tmp_path / "a.txt", mark + b"one")
    write(tmp_path / "b.jsonl", mark + b'{"text": "two"}')
    write(tmp_path / "c.json", mark + b'[{"text": "three"}]')
    write(tmp_path / "d.json", mark + b"[7]")
    rows = texts(tmp_path)
    assert [row.text for row in rows[:3]] == ["one", "two", "three"]
    assert rows[3].uri == f"{tmp_path}/d.json:byte 4"


@pytest.mark.parametrize("keep", [0, 1, 30, 500, -1])
def test_a_json_file_that_is_cut_off_names_the_byte_after_giving_what_stands_before(tmp_path, keep):
    document = json.dumps([{"id": str(i), "text": f"text {i}"} for i in range(100)])
    path = write(tmp_path / "a.json", document[:keep])
    rows, error = read_until_error(lambda: text_splits([str(path)]), read_texts)
    assert "a.json: malformed JSON at byte" in error
    whole = document[:keep].count("}")
    assert [row.id for row in rows] == [str(i) for i in range(whole)]
    at = int(error.partition("at byte ")[2].partition(":")[0])
    # The break is in or after the last whole record, never behind the end of the file.
    assert document[:keep].rfind("}") <= at <= len(document[:keep])


def test_a_json_file_damaged_in_the_middle_or_of_another_shape_is_an_error(tmp_path):
    for content, message in [
        ('[{"text": "a"} {"text": "b"}]', "at byte 15: expected ','"),
        ('[{"text": "a"}] tail', "at byte 16: text follows the end"),
        ('{"text": "a"}\n{"text": "b"}', "named .jsonl"),
        ('{"records": []}', r"keys \['records'\].*'texts'"),
        ('"just a string"', "at byte 0: expected a list"),
        ("[" * 100_000, "nested too deeply"),
    ]:
        path = write(tmp_path / "a.json", content)
        with pytest.raises(DataError, match=message):
            texts(path)


# Texts: splits


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_any_cut_of_a_line_file_gives_every_line_once(tmp_path, size):
    chance = random.Random(size)
    lines = ["é" * chance.randrange(12) + str(i) for i in range(60)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    splits = text_splits([str(path)], bytes_per_split=size)
    assert len(splits) == -(-path.stat().st_size // size)
    assert len({split.key for split in splits}) == len(splits)
    assert [row.text for split in splits for row in read_texts(split)] == lines


@pytest.mark.parametrize("size", [1, 100, 333, 10_000])
def test_any_cut_of_a_json_list_gives_every_record_once(tmp_path, size, monkeypatch):
    monkeypatch.setattr(records, "_READ_BYTES", 50)  # records, escapes and numbers straddle reads
    documents = [{"id": i, "text": f'né "{i}" \\ \n' * (i % 5 + 1), "n": -12345.5e10} for i in range(80)]
    path = write(tmp_path / "a.json", json.dumps({"n": 12345, "texts": documents}, ensure_ascii=size > 100))
    splits = text_splits([str(path)], bytes_per_split=size)
    assert len(splits) == min(16, -(-path.stat().st_size // size))
    expected = [(str(record["id"]), record["text"]) for record in documents]
    assert pairs(row for split in splits for row in read_texts(split)) == expected


def test_a_json_record_belongs_to_the_range_in_which_it_begins(tmp_path):
    path = write(tmp_path / "a.json", '[{"text":"a"},{"text":"b"}]')
    for size, expected in (
        (14, [["a"], ["b"]]),
        (15, [["a", "b"], []]),
    ):  # the second record begins at byte 14
        splits = text_splits([str(path)], bytes_per_split=size)
        assert [[row.text for row in read_texts(split)] for split in splits] == expected


@pytest.mark.parametrize("size", range(1, 40))
def test_a_json_document_may_be_read_in_pieces_of_any_size(tmp_path, size, monkeypatch):
    monkeypatch.setattr(records, "_READ_BYTES", size)
    path = write(
        tmp_path / "a.json",
        '{"n": -12345.5e2, "ok": true, "texts": [{"text": "\\u00e9\\n ü"}, {"text": "b"}]}',
    )
    assert [row.text for row in texts(path)] == ["é\n ü", "b"]


def test_row_groups_are_packed_and_none_is_lost(tmp_path):
    table = pa.table({"id": [str(i) for i in range(100)], "text": [f"text {i}" for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    size = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size
    splits = text_splits([str(tmp_path / "a.parquet")], bytes_per_split=int(size * 3.5))
    assert [(split.start, split.stop) for split in splits] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    rows = [row for split in splits for row in read_texts(split)]
    assert [row.id for row in rows] == table["id"].to_pylist()


def test_a_split_gives_the_same_rows_each_time_and_knows_a_changed_file(tmp_path):
    path = write(tmp_path / "a.txt", "one\none\n\n")
    [split] = text_splits([str(path)])
    assert list(read_texts(split)) == list(read_texts(split))
    assert text_splits([str(path)]) == [split]
    os.utime(path, ns=(1, 1))
    [touched] = text_splits([str(path)])
    assert touched.key == split.key
    assert touched.identity != split.identity


def peak_bytes_of_reading(split) -> int:
    tracemalloc.start()
    assert sum(1 for _ in read_texts(split)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_json_list_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_READ_BYTES", 2**16)
    record = json.dumps({"id": "x", "text": "word " * 500})
    path = write(tmp_path / "a.json", "[" + ",".join([record] * 2000) + "]")
    [split] = text_splits([str(path)])
    # A few buffers of 64 KiB; the document would be 5 MB, and its parsed form more.
    assert peak_bytes_of_reading(split) < 1_000_000


def test_a_tar_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_READ_BYTES", 2**16)
    members = [(f"{i:06}.{end}", b"x" * 2000) for i in range(2000) for end in ("jpg", "txt")]
    [split] = text_splits([str(write_tar(tmp_path / "a.tar", members))])
    # A few buffers of 64 KiB and the ids; 4000 headers, which tarfile keeps by itself, would be about 4 MB.
    assert peak_bytes_of_reading(split) < 1_000_000


# Images


def test_folder_ids_are_paths_below_it_without_extension(tmp_path):
    for name in ("b/2.JPG", "b/1.jpeg", "a.v2.png", "c.webp", "d.gif", "e.bmp", "f.tif", "g.TIFF"):
        write(tmp_path / name, RED)
    for name in ("notes.md", ".hidden.png", ".cache/x.png", "__MACOSX/._c.png"):
        write(tmp_path / name, BLUE)
    rows = images(tmp_path)
    assert [row.id for row in rows] == ["a.v2", "b/1", "b/2", "c", "d", "e", "f", "g"]
    assert {row.content for row in rows} == {RED}
    assert rows[1].uri == str(tmp_path / "b/1.jpeg")


def test_files_globs_and_many_uris(tmp_path):
    for name in ("x/1.png", "x/2.png", "y/1.png", "y/deep/3.png"):
        write(tmp_path / name, name.encode())
    assert [row.id for row in images(tmp_path / "x/1.png")] == ["1"]
    assert [row.id for row in images(tmp_path / "x/*.png")] == ["1", "2"]
    assert [row.id for row in images(tmp_path / "*/1.png")] == ["x/1", "y/1"]
    assert [row.id for row in images(tmp_path / "**/*.png")] == ["x/1", "x/2", "y/1", "y/deep/3"]
    # What two URIs name is taken once.
    assert [row.id for row in images(tmp_path / "y", tmp_path / "x/2.png", tmp_path / "x")] == [
        "1",
        "deep/3",
        "2",
        "1",
    ]
    # A name may hold wildcard characters; the file itself comes first.
    write(tmp_path / "z[1].png", RED)
    assert [row.id for row in images(tmp_path / "z[1].png")] == ["z[1]"]


def test_folders_are_cut_into_slices_of_the_sorted_listing(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.png", bytes([i]))
    splits = image_splits([str(tmp_path)], rows_per_split=4)
    assert [len(split.files) for split in splits] == [4, 4, 2]
    assert [row.id for split in splits for row in read_images(split)] == [str(i) for i in range(10)]
    write(tmp_path / "9.png", b"changed")
    changed = image_splits([str(tmp_path)], rows_per_split=4)
    assert [a.identity == b.identity for a, b in zip(splits, changed, strict=True)] == [True, True, False]


def test_tar_images(tmp_path):
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("001.png", RED),
            ("001.txt", b"caption"),
            ("d/002.JPG", BLUE),
            ("d/002.png", RED),
            ("003.txt", b"no image"),
            ("004.png", b""),
            ("005.jpeg", b"x" * 3000),
        ],
    )
    rows = images(path, max_image_bytes=2000)
    assert [(row.id, row.uri, row.content) for row in rows if isinstance(row, ImageRow)] == [
        ("001", f"{path}/001.png", RED),
        ("d/002", f"{path}/d/002.JPG", BLUE),
        ("004", f"{path}/004.png", b""),
    ]
    assert [(row.id, row.uri) for row in rejections(rows)] == [
        ("d/002", f"{path}/d/002.png"),
        ("003", f"{path}/003"),
        ("005", f"{path}/005.jpeg"),
    ]
    another, none, large = (row.reason for row in rejections(rows))
    assert "another image, 'd/002.JPG'" in another
    assert "no image: found members ['txt']" in none
    assert large == "3000 bytes, more than max_image_bytes=2000"


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_tar_cut_anywhere_is_an_error_after_what_is_whole(tmp_path, modality):
    members = [
        (f"{i:03}.{end}", content) for i in range(6) for end, content in (("png", RED), ("txt", b"words"))
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    read = images if modality == "image" else texts
    assert len(read(tmp_path / "whole.tar")) == 6
    sample = len(whole.rstrip(b"\0")) // 6 // 512 * 512
    for cut in (0, 100, 511, 512, 700, 3 * 512, 3 * sample + 10, 4 * sample, 5 * sample + 512, 6 * 4 * 512):
        path = write(tmp_path / "cut.tar", whole[:cut])
        if modality == "image":
            rows, error = read_until_error(lambda path=path: image_splits([str(path)]), read_images)
        else:
            rows, error = read_until_error(lambda path=path: text_splits([str(path)]), read_texts)
        assert "cut.tar: is no sound tar archive" in error
        last = rows[-1].id if rows else None
        assert f"the last whole sample is {last!r}" in error
        assert len(rows) <= cut // 2048


def test_a_tar_with_a_damaged_header_or_joined_by_cat_loses_nothing_silently(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.png", RED) for i in range(5)]).read_bytes()
    damaged = bytearray(whole)
    damaged[2 * 1024 + 10] ^= 0xFF  # in the name of the third member: its checksum no longer holds
    assert whole[2 * 1024 : 2 * 1024 + 5] == b"2.png"
    with pytest.raises(DataError, match=r"bad checksum.*last whole sample is '0'"):
        images(write(tmp_path / "damaged.tar", bytes(damaged)))
    with pytest.raises(DataError, match="data follows the end mark"):
        images(write(tmp_path / "joined.tar", whole + whole))
    with pytest.raises(DataError, match="compressed"):
        images(write(tmp_path / "gzip.tar", b"\x1f\x8b\x08" + b"\0" * 100))


def test_damaged_tars_give_rows_or_a_data_error_and_nothing_else(tmp_path):
    members = [(f"{'long' * 40}/{i:03}.{end}", RED) for i in range(4) for end in ("png", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(120):
        data = bytearray(whole)
        header = chance.randrange(len(data) // 512) * 512
        for _ in range(chance.choice([1, 3, 40])):
            data[header + chance.randrange(512)] = chance.randrange(256)
        path = write(tmp_path / "damaged.tar", bytes(data))
        try:
            images(path)
        except DataError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("layout", ["struct", "binary", "bytes"])
def test_parquet_with_image_bytes(tmp_path, layout):
    contents = [RED, BLUE, None, RED]
    if layout == "struct":
        column = {"image": [{"bytes": content, "path": "p.png" if content else None} for content in contents]}
    else:
        column = {"image" if layout == "binary" else "bytes": contents}
    table = pa.table({"image_id": [1, 2, 3, None], "label": [0] * 4, **column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    splits = image_splits([str(tmp_path / "a.parquet")], rows_per_split=2)
    assert [(split.start, split.stop) for split in splits] == [(0, 1), (1, 2)]
    rows = images(tmp_path / "a.parquet", rows_per_split=2)
    assert [(row.id, row.content) for row in rows if isinstance(row, ImageRow)] == [
        ("1", RED),
        ("2", BLUE),
        (content_id(RED), RED),
    ]
    [rejected] = rejections(rows)
    assert (rejected.id, rejected.uri) == ("3", f"{tmp_path}/a.parquet:row 2")
    assert decode_image(rows[0].content, max_pixels=100).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("column", ["image", "uri", "image_path", "url"])
def test_parquet_with_image_locations(tmp_path, column):
    write(tmp_path / "img/1.png", RED)
    other = write(tmp_path / "other/2.png", BLUE)
    (tmp_path / "img/dir.png").mkdir()
    locations = [
        "img/1.png",
        str(other),
        f"file://{other}",
        "gone.png",
        "https://host/a.png",
        "img/dir.png",
        None,
    ]
    table = pa.table({column: locations, "key": [f"k{i}" for i in range(7)]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = images(tmp_path / "a.parquet")
    assert [(row.id, row.content) for row in rows if isinstance(row, ImageRow)] == [
        ("k0", RED),
        ("k1", BLUE),
        ("k2", BLUE),
    ]
    assert [row.id for row in rejections(rows)] == ["k3", "k4", "k5", "k6"]
    gone, remote, _, null = rejections(rows)
    assert (gone.uri, gone.reason) == (str(tmp_path / "gone.png"), "no such image file")
    assert "download" in remote.reason
    assert "null" in null.reason


def test_images_without_ids_are_named_by_content_and_order_survives_reading_ahead(tmp_path):
    contents = [bytes([i % 50]) * 10 for i in range(100)]
    for i, content in enumerate(contents):
        write(tmp_path / f"{i}.png", content)
    index = {"images": [{"image": f"{i}.png"} for i in range(100)]}
    write(tmp_path / "dataset.json", json.dumps(index))
    rows = images(tmp_path / "dataset.json")
    assert [row.content for row in rows] == contents
    assert [row.id for row in rows] == [
        content_id(c) + ("-2" if i >= 50 else "") for i, c in enumerate(contents)
    ]


def test_images_that_vanish_or_are_too_large_are_rejected_by_their_id(tmp_path):
    for name, size in (("a.png", 10), ("b.png", 2000), ("c.png", 10)):
        write(tmp_path / name, b"x" * size)
    [split] = image_splits([str(tmp_path)])
    (tmp_path / "a.png").unlink()
    gone, large, kept = read_images(split, max_image_bytes=1000)
    assert (gone.id, gone.reason) == ("a", "no such image file")
    assert (large.id, large.reason) == ("b", "2000 bytes, more than max_image_bytes=1000")
    assert isinstance(kept, ImageRow)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_any_cut_of_an_image_index_gives_every_image_once(tmp_path, size):
    write(tmp_path / "1.png", RED)
    write(
        tmp_path / "dataset.json",
        json.dumps({"texts": [], "images": [{"id": i, "image": "1.png"} for i in range(90)]}),
    )
    assert [row.id for row in images(tmp_path, rows_per_split=size)] == [str(i) for i in range(90)]
    assert len(image_splits([str(tmp_path)], rows_per_split=size)) > 1 or size == 50


# What is named


def test_a_folder_of_many_kinds_gives_each_modality_its_own(tmp_path):
    write(tmp_path / "a.png", RED)
    write(tmp_path / "b.txt", "a line")
    write(tmp_path / "c.jsonl", '{"text": "a record"}')
    pq.write_table(pa.table({"text": ["a row"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"image": [BLUE]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "f.parquet")
    write(tmp_path / "readme.md", "words")
    assert [row.text for row in texts(tmp_path)] == ["a line", "a record", "a row"]
    assert [row.content for row in images(tmp_path)] == [RED, BLUE]


def test_img2dataset_notes_beside_a_shard_are_no_second_source(tmp_path):
    write_tar(tmp_path / "0.tar", [("00.png", RED), ("00.txt", b"words")])
    pq.write_table(
        pa.table({"key": ["00"], "url": ["https://h/1.png"], "caption": ["words"]}), tmp_path / "0.parquet"
    )
    write(tmp_path / "0_stats.json", "{}")
    assert [row.id for row in images(tmp_path)] == ["00"]
    assert pairs(texts(tmp_path)) == [("00", "words")]


def test_missing_and_empty_sources_say_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "csv" / "a.csv", "1,2")
    write(tmp_path / "csv" / "b.csv", "1,2")
    write(tmp_path / "zip" / "a.jsonl.xz", b"\xfd7zXZ")
    write(tmp_path / "void" / "a.txt", "")
    write(tmp_path / "void" / "b.jsonl", "")
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "scores.parquet")
    for path, message in [
        ("gone.jsonl", r"gone\.jsonl: no such file or directory"),
        ("gone-*.jsonl", "matches no file"),
        ("empty", "found no files"),
        ("csv", r"found 2 files \(2 \.csv\).*accepted are"),
        ("csv/a.csv", r"found 1 files \(1 \.csv\)"),
        ("zip", "decompress them first"),
        ("void", "2 of them empty"),
        ("scores.parquet", r"scores\.parquet has the columns \['score'\]"),
    ]:
        for splits in (text_splits, image_splits):
            with pytest.raises(DataError, match=message) as error:
                splits([str(tmp_path / path)])
            assert str(tmp_path) in str(error.value)
    with pytest.raises(DataError, match="no source was given"):
        text_splits([])
    with pytest.raises(DataError, match=r"Unrecognized filesystem"):
        text_splits(["ftp://host/a.txt"])


def test_damaged_parquet_is_an_error_that_names_the_file(tmp_path):
    table = pa.table({"id": [str(i) for i in range(2000)], "text": [f"text {i}" for i in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", content[:-20], b"x" * 500):
        write(tmp_path / "a.parquet", damaged)
        with pytest.raises(DataError, match=r"a\.parquet: is no readable Parquet file"):
            texts(tmp_path / "a.parquet")
    write(tmp_path / "a.parquet", content[:100] + bytes(2000) + content[2100:])
    with pytest.raises(DataError, match=r"a\.parquet: row groups 0 to 1 cannot be read"):
        texts(tmp_path / "a.parquet")


def test_file_names_that_are_not_utf8_are_an_error_that_shows_them(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(RED)
    with pytest.raises(DataError, match=r"not UTF-8.*caf\\xe9"):
        images(tmp_path)


def test_tar_names_that_are_not_utf8_become_ids_spelt_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        entry = tarfile.TarInfo("café.png")
        entry.size = len(RED)
        archive.addfile(entry, io.BytesIO(RED))
    [row] = images(path)
    assert row.id == r"caf\xe9"


# What a folder holds besides data


def img2dataset_notes(tmp_path, **columns):
    """A shard of four downloads, the last of which failed, as img2dataset's list of downloads has it."""
    rows = {
        "url": [f"https://h/{i}.jpg" for i in range(4)],
        "caption": [f"caption {i}" for i in range(4)],
        "key": [f"00000000{i}" for i in range(4)],
        "status": ["success"] * 3 + ["failed_to_download"],
        "error_message": [None] * 3 + ["<urlopen error>"],
    }
    write(tmp_path / "00000_stats.json", json.dumps({"count": 4, "successes": 3}))
    pq.write_table(pa.table({**rows, **columns}), tmp_path / "00000.parquet")
    return rows


def logged(caplog):
    return [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_img2datasets_layouts_give_each_image_and_its_caption_under_one_id(tmp_path, caplog, layout):
    table = {"jpg": [RED, BLUE, RED, None]} if layout == "parquet" else {}
    rows = img2dataset_notes(tmp_path, **table)
    members = [
        (f"{key}.{ending}", content)
        for key, caption in zip(rows["key"][:3], rows["caption"], strict=False)
        for ending, content in (
            ("jpg", RED),
            ("json", json.dumps({"key": key, "caption": caption, "status": "success"}).encode()),
            ("txt", caption.encode()),
        )
    ]
    if layout == "files":
        for name, content in members:
            write(tmp_path / "00000" / name, content)
    if layout == "webdataset":
        write_tar(tmp_path / "00000.tar", members)
    ids = [("00000/" if layout == "files" else "") + key for key in rows["key"][:3]]
    assert [row.id for row in images(tmp_path)] == ids
    assert pairs(texts(tmp_path)) == list(zip(ids, rows["caption"][:3], strict=True))
    ours = [line for line in logged(caplog) if str(tmp_path) in line]
    assert len(ours) == 2  # one of the images, one of the texts
    assert all("1 .json of img2dataset's notes" in line for line in ours)
    assert all(("1 .parquet of" in line) == (layout != "parquet") for line in ours)


def test_a_shard_of_which_every_download_failed_has_no_rows(tmp_path):
    img2dataset_notes(tmp_path)
    for read in (images, texts):
        with pytest.raises(DataError, match=r"img2dataset"):
            read(tmp_path)


def test_a_table_beside_a_folder_of_its_name_is_data_where_it_is_no_list_of_downloads(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "text": ["one"]}), tmp_path / "train.parquet")
    write(tmp_path / "train" / "b.txt", "two")
    assert [row.text for row in texts(tmp_path)] == ["one", "two"]


def test_the_text_beside_an_image_is_one_text_with_its_id(tmp_path):
    for key in "abcde":
        write(tmp_path / "x" / f"{key}.png", RED)
    write(tmp_path / "x/a.txt", "of two\nlines\n")
    write(tmp_path / "x/b.caption", "in .caption")
    write(tmp_path / "x/c.json", '{"caption": "in .json"}')
    write(tmp_path / "x/d.txt", "")
    write(tmp_path / "x/d.json", '{"caption": "behind an empty .txt"}')
    write(tmp_path / "x/e.json", '[{"id": "1", "text": "a list is no record of the picture"}]')
    write(tmp_path / "x/captions.txt", "line 1\nline 2")
    assert pairs(texts(tmp_path)) == [
        ("x/a", "of two\nlines"),
        ("x/b", "in .caption"),
        ("x/c", "in .json"),
        ("x/d", "behind an empty .txt"),
        (content_id("line 1"), "line 1"),
        (content_id("line 2"), "line 2"),
        ("1", "a list is no record of the picture"),
    ]
    before = text_splits([str(tmp_path)])
    write(tmp_path / "x/f.png", RED)
    write(tmp_path / "x/f.txt", "new")
    after = text_splits([str(tmp_path)], taken=[split for split in before if split.files])
    assert [pairs(read_texts(split)) for split in after if split.files] == [[("x/f", "new")]]


NOTES = ("_SUCCESS", "_metadata", "_delta_log/0.json", "README", "README.md", "LICENSE.txt", "state.json",
         "dataset_info.json", "sha256sums.txt", "checksums", ".DS_Store", ".a.txt.crc", "__MACOSX/._0.png",
         "Thumbs.db", "desktop.ini")  # fmt: skip


def test_notes_of_other_tools_are_no_data(tmp_path, caplog):
    for name in NOTES:
        write(tmp_path / name, "not a caption\n")
    write(tmp_path / "0.png", RED)
    write(tmp_path / "license_plates.jsonl", '{"id": "t", "text": "data"}')
    assert [row.id for row in images(tmp_path)] == ["0"]
    assert pairs(texts(tmp_path)) == [("t", "data")]
    for line in logged(caplog):
        assert f"passed over {len(NOTES) + 1} files" in line
        assert "4 hidden" in line


# Files whose extension does not tell


def avif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "AVIF")
    return file.getvalue()


def test_images_are_known_by_their_content_where_the_extension_does_not_tell(tmp_path, caplog):
    for name in ("a.jfif", "b.jpe", "c.JPG", "d.jpg_large", "e.jpg?w=640", "f.bin", "g", "h.0001", "h.0002"):
        write(tmp_path / name, RED)
    for name in ("k.avif", "l.heic"):
        write(tmp_path / name, avif())
    write(tmp_path / "m.heic", b"\0\0\0\x18ftypheic" + bytes(80))
    write(tmp_path / "n.xyz", "no image")
    write(tmp_path / "o.xyz", "no image")
    write(tmp_path / "p", "no image")
    write(tmp_path / "q.jpg", "no image, but named as one")
    rows = images(tmp_path)
    assert [row.id for row in rows] == [*"abcdefg", "h.0001", "h.0002", *"klq"]
    for row in rows[:-1]:
        assert decode_image(row.content, max_pixels=64).size == (8, 8)
    [line] = logged(caplog)
    assert "passed over 4 files" in line
    assert all(part in line for part in ("2 .xyz", "1 .heic", "1 without extension"))
    assert [row.id for row in images(tmp_path / "g")] == ["g"]


def test_a_sample_speaks_for_many_files_of_one_extension(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MOST_HEADS", 4)
    for i in range(9):
        write(tmp_path / f"{i}.dat", RED)
        write(tmp_path / f"{i}.raw", "no image")
        write(tmp_path / f"{i}.mix", BLUE if i % 3 else "no image")
    opened = []
    read_head = sources._head
    monkeypatch.setattr(sources, "_head", lambda file: opened.append(file.extension) or read_head(file))
    found = [row.uri.rpartition(".")[2] for row in images(tmp_path)]
    assert (found.count("dat"), found.count("mix"), found.count("raw")) == (9, 6, 0)
    assert (opened.count(".dat"), opened.count(".raw")) == (4, 4)


def test_members_of_tars_are_known_by_their_content_too(tmp_path, caplog):
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("a.jfif", RED), ("a.txt", b"one"),
            ("b.jpg_large", RED), ("b.json", b"{}"),
            ("c", RED),
            ("d.png", BLUE), ("d.seg.png", RED),
            ("README", b"no image"),
            ("e.cls", b"7"),
        ],
    )  # fmt: skip
    rows = images(path)
    assert [(row.id, row.content) for row in rows[:-1]] == [("a", RED), ("b", RED), ("c", RED), ("d", BLUE)]
    assert (rows[-1].id, "cls" in rows[-1].reason) == ("e", True)
    assert f"{path}: passed over 1 members without an extension" in logged(caplog)


# Images in fields


def of_records(tmp_path, *values, field="image"):
    records = [{"id": str(i), field: value} for i, value in enumerate(values)]
    return images(write(tmp_path / "records.json", json.dumps(records)))


def test_images_in_fields_are_decoded_however_they_are_written(tmp_path):
    plain = base64.b64encode(RED).decode()
    values = [
        plain,
        base64.encodebytes(RED).decode(),
        base64.urlsafe_b64encode(RED).decode().rstrip("="),
        "data:image/png;base64," + plain,
        "DATA:image/jpeg;charset=x;base64," + plain.replace("+", "%2B").replace("/", "%2F"),
        "data:," + "".join(f"%{byte:02x}" for byte in RED),
        list(RED),
        {"bytes": plain, "path": None},
        {"bytes": list(RED), "path": "gone.png"},
        {"path": "data:image/png;base64," + plain},
    ]
    assert [row.content for row in of_records(tmp_path, *values)] == [RED] * len(values)
    assert [row.content for row in of_records(tmp_path, plain, field="bytes")] == [RED]
    kinds = [pa.string(), pa.large_string()]
    for number, kind in enumerate(kinds):
        table = pa.table({"image": pa.array([plain, values[3]], kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert [row.content for row in images(tmp_path / f"{number}.parquet")] == [RED, RED]


def test_paths_stay_paths_whatever_they_look_like(tmp_path):
    names = ["9j/4AAQSkZJRgABAQAAAQABAAD/a.png", "iVBORw0KGgo", "R0lGODlh", "Qk/" + "a" * 60, "AAAA" * 20]
    for name in names:
        write(tmp_path / name, name.encode())
    rows = of_records(
        tmp_path, *names, {"path": names[1]}, {"bytes": None, "path": names[2]}, {"url": names[1]}
    )
    assert [row.content.decode() for row in rows] == [*names, names[1], names[2], names[1]]


def test_a_value_that_is_no_image_is_one_short_rejection(tmp_path):
    text = base64.b64encode(bytes(40_000)).decode()
    broken = base64.b64encode(RED * 300).decode() + "#"
    values = [
        text, broken, "data:image/png;base64," + broken, "data:" + text, "word " * 9000, "x/" * 2000, "a\0b",
        "y" * 300, {"bytes": "photo.png"}, {"bytes": text}, [1, 2, 999], [0.5], 7, True, "", None,
        {"path": "z" * 900}, "ftp://" + "h" * 3000, "https://h/" + "w " * 1500,
    ]  # fmt: skip
    rows = of_records(tmp_path, *values)
    assert [type(row) for row in rows] == [Rejected] * len(values)
    assert max(len(row.reason) for row in rows) < 400
    for row in rows:
        assert not re.search(r"\S{201}", row.reason + " " + row.uri)
    for row, part in zip(rows, ("no base64", "breaks", "not base64"), strict=False):
        assert part in row.reason
    assert {row.reason for row in rows[5:8]} == {"no such image file"}


# Compressed files, tables and COCO captions.

CODECS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
LINES = "".join(json.dumps({"id": f"t{n}", "text": f"text {n} ü"}) + "\n" for n in range(500))
PLAIN = {
    "a.jsonl": LINES,
    "a.json": json.dumps([json.loads(line) for line in LINES.splitlines()]),
    "a.csv": "id,text\r\n" + "".join(f"t{n},text {n} ü\r\n" for n in range(500)),
    "a.txt": "".join(f"text {n} ü\n" for n in range(500)),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_compressed_file_has_the_rows_of_its_plain_one_in_one_split(tmp_path, name, codec):
    plain = write(tmp_path / "plain" / name, PLAIN[name])
    packed = write(tmp_path / "packed" / f"{name}.{codec}", CODECS[codec](PLAIN[name].encode()))
    assert len(text_splits([str(packed)], bytes_per_split=100)) == 1
    assert pairs(texts(packed.parent)) == pairs(texts(plain))
    assert len(pairs(texts(packed))) == 500
    # The same data twice in a folder is taken once.
    both = write(tmp_path / "plain" / packed.name, packed.read_bytes()).parent
    assert pairs(texts(both)) == pairs(texts(plain))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.zst"])
def test_a_compressed_tar_has_the_samples_of_its_plain_one(tmp_path, name):
    tar = write_tar(
        tmp_path / "plain.tar", [("a.png", RED), ("a.txt", b"red"), ("b.png", BLUE), ("b.txt", b"blue")]
    )
    codec = {"tgz": "gz"}.get(name.split(".")[-1], name.split(".")[-1])
    packed = write(tmp_path / "packed" / name, CODECS[codec](tar.read_bytes()))
    assert pairs(texts(packed)) == [("a", "red"), ("b", "blue")]
    assert [(row.id, row.content) for row in images(packed)] == [("a", RED), ("b", BLUE)]
    assert sources.tar_shards([str(packed.parent)]) == [str(packed)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_compressed_file_that_is_cut_off_or_damaged_is_an_error_that_names_it(tmp_path, name, codec):
    content = CODECS[codec](PLAIN[name].encode())
    for number, damaged in enumerate((content[: len(content) // 2], b"no such format", content[:-3])):
        path = write(tmp_path / f"{number}" / f"{name}.{codec}", damaged)
        with pytest.raises(DataError, match=re.escape(str(path))):
            texts(path)


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_follow_the_rules_of_quotes_and_of_records(tmp_path, ending, delimiter):
    rows = [
        ["id", "url", "caption", "note"],
        ["007", "https://h/1", f'a "red"{delimiter} dog', ""],
        ["b", "", "two\r\nlines", "x"],
        ["", "", "no id", ""],
        ["d", "", " ", ""],
    ]
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter).writerows(rows)
    text = sink.getvalue() + delimiter.join(["e", "too few"]) + "\r\n\r\n"
    path = write(tmp_path / f"a.{ending}", "\ufeff" + text + delimiter.join(["f", "", "last", ""]))
    found = texts(path)
    assert pairs(found) == [
        ("007", f'a "red"{delimiter} dog'),
        ("b", "two\r\nlines"),
        (content_id("no id"), "no id"),
        ("f", "last"),
    ]
    assert [(row.id, row.uri.rpartition(":")[2]) for row in rejections(found)] == [
        ("d", "line 6"),
        ("e", "line 7"),
    ]
    assert "2 cells" in rejections(found)[1].reason


def test_a_table_that_cannot_be_read_names_its_columns_or_its_line(tmp_path):
    write(tmp_path / "none.csv", "name,score\na,1\n")
    with pytest.raises(DataError, match=r"\['name', 'score'\].*text or caption"):
        texts(tmp_path / "none.csv")
    write(tmp_path / "open.csv", 'text\na\n"never closed\nb\n')
    with pytest.raises(DataError, match=r"open\.csv: malformed at or after line 2"):
        texts(tmp_path / "open.csv")
    write(tmp_path / "twice.csv", "text,text\na,b\n")
    with pytest.raises(DataError, match="same name"):
        texts(tmp_path / "twice.csv")
    write(tmp_path / "latin.csv", b"id,text\n1,caf\xe9\n2,tea\n")
    found = texts(tmp_path / "latin.csv")
    assert pairs(found) == [("2", "tea")]
    assert (rejections(found)[0].id, "UTF-8" in rejections(found)[0].reason) == ("1", True)


def test_a_table_lists_images_beside_it_or_stands_for_texts_only(tmp_path):
    write(tmp_path / "all" / "pictures" / "a.png", RED)
    table = write(
        tmp_path / "all" / "metadata.csv", "id,file_name,text\n7,pictures/a.png,a red square\n8,b.png,gone\n"
    )
    found = images(table)
    assert [(row.id, row.content) for row in found if isinstance(row, ImageRow)] == [("7", RED)]
    assert [row.id for row in rejections(found)] == ["8"]
    assert [row.id for row in images(tmp_path / "all")] == ["pictures/a"]  # the files themselves
    assert pairs(texts(tmp_path / "all")) == [("7", "a red square"), ("8", "gone")]


def coco(tmp_path, **fields):
    document = {
        "info": {"year": 2017},
        "images": [
            {"id": 9, "file_name": "9.png", "coco_url": "http://h/9"},
            {"id": 4, "file_name": "4.png"},
        ],
        "annotations": [
            {"image_id": 9, "id": 38, "caption": "a red square"},
            {"image_id": 4, "id": 67, "caption": "a blue one"},
            {"image_id": 9, "id": 70, "caption": "something red"},
        ],
    }
    return write(tmp_path / "captions.json", json.dumps(document | fields))


def test_captions_of_coco_are_texts_and_its_images_images(tmp_path):
    path = coco(tmp_path)
    expected = [("38", "a red square"), ("67", "a blue one"), ("70", "something red")]
    assert pairs(texts(path)) == expected
    assert pairs(texts(path, bytes_per_split=60)) == expected
    write(tmp_path / "9.png", RED)
    write(tmp_path / "4.png", BLUE)
    assert [(row.id, row.content) for row in images(path)] == [("9", RED), ("4", BLUE)]
    (split,) = text_splits([str(path)])
    named = [record.fields()["image"] for record in records.read_records(split, ["image"])]
    assert named == ["9.png", "4.png", "9.png"]


def test_objects_that_are_no_captions_of_coco_are_refused(tmp_path):
    with pytest.raises(DataError, match="'annotations'"):
        texts(coco(tmp_path, annotations=[{"image_id": 9, "id": 1, "bbox": [0, 0, 1, 1]}]))
    with pytest.raises(DataError, match="keep one"):
        texts(coco(tmp_path, texts=[{"id": "a", "text": "b"}]))
    (split,) = text_splits([str(coco(tmp_path, images=[{"id": 9, "file_name": "9.png"}]))])
    bad = [record.bad for record in records.read_records(split, ["image"])]
    assert [reason is not None for reason in bad] == [False, True, False]
