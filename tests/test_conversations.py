"""Records of LLaVA, Bunny and InternVL become conversations; what is none is listed, with its cause."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revision_ray.data.conversations import (
    Conversation,
    ConversationSource,
    Message,
    expand,
    parse_record,
    read_conversations,
    record_splits,
)
from revision_ray.data.schema import Rejected
from revision_ray.errors import ConfigError, DataError

HUMAN = {"from": "human", "value": "<image>\nWhat is it?"}
GPT = {"from": "gpt", "value": "A red square."}
MORE = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]


def record(turns, image="a/1.jpg", **fields):
    return {"id": "r1", "image": image, "conversations": turns, **fields}


def read(uri: str, bytes_per_split: int = 2**20) -> list[Conversation | Rejected]:
    splits = record_splits(ConversationSource(uri=uri), bytes_per_split)
    return [found for split in splits for found in read_conversations(split)]


def test_a_llava_record_keeps_turns_roles_and_image():
    found = parse_record(record([{"from": "system", "value": "Be brief."}, HUMAN, GPT, *MORE]))
    assert found.id == "r1"
    assert found.images == ("a/1.jpg",)
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.messages[1] == Message(role="user", content="<image>\nWhat is it?")
    assert Conversation.from_json(found.to_json()) == found


def test_names_of_roles_and_forms_of_images():
    turns = [{"from": "user", "value": "<image><image> Which?"}, {"from": "assistant", "value": "Both."}]
    assert parse_record(record(turns, image=["a.jpg", "b.jpg"])).images == ("a.jpg", "b.jpg")
    hub = {"bytes": None, "path": "c.jpg"}
    assert parse_record(record([HUMAN, GPT], image=hub)).images == ("c.jpg",)
    for absent in (None, "", []):
        assert parse_record(record(MORE, image=absent)).images == ()


def test_ids_are_kept_or_made_from_content():
    bare = {"conversations": MORE}
    assert parse_record({**bare, "id": 17}).id == "17"
    made = parse_record(bare).id
    assert made == parse_record(dict(reversed(bare.items()))).id != parse_record(record(MORE, image=None)).id
    assert made != parse_record({"conversations": [MORE[0], GPT]}).id


@pytest.mark.parametrize(
    ("turns", "image", "said"),
    [
        ([HUMAN, HUMAN], "a.jpg", "do not alternate"),
        ([HUMAN], "a.jpg", "do not alternate"),
        ([GPT, HUMAN], "a.jpg", "do not alternate"),
        ([HUMAN, GPT, {"from": "system", "value": "x"}], "a.jpg", "do not alternate"),
        ([{"from": "system", "value": "x"}], None, "do not alternate"),
        ([HUMAN, {"from": "bard", "value": "x"}], "a.jpg", "unknown role 'bard'"),
        ([HUMAN, {"from": "gpt", "value": "  \n"}], "a.jpg", "turn 1 .gpt. is empty"),
        ([HUMAN, {"from": "gpt", "value": None}], "a.jpg", "NoneType"),
        ([HUMAN, "yes"], "a.jpg", "turn 1 is 'yes'"),
        (MORE, "a.jpg", "0 <image> in the turns and 1 images"),
        ([{**HUMAN, "value": "<image> <image> ?"}, GPT], "a.jpg", "2 <image> in the turns and 1 images"),
        ([HUMAN, GPT], None, "1 <image> in the turns and 0 images"),
        ([HUMAN, {"from": "gpt", "value": "see <image>"}], ["a.jpg", "b.jpg"], "only a user's turn"),
        ([HUMAN, GPT], 7, "field 'image' holds 7"),
        ([HUMAN, GPT], ["a.jpg", ""], "expected a path"),
        ([], "a.jpg", "an empty list"),
        ("hello", "a.jpg", "no conversation"),
        ([HUMAN, {"from": "gpt", "value": "half \ud800"}], "a.jpg", "not Unicode"),
    ],
)
def test_what_is_no_conversation_says_why(turns, image, said):
    with pytest.raises(DataError, match=said):
        parse_record(record(turns, image=image))


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(DataError, match="a list"):
        parse_record([HUMAN, GPT])


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_every_form_gives_the_same_conversations_in_order(form, tmp_path):
    records = [record([HUMAN, GPT, *MORE[: 2 * (n % 2)]], image=f"{n}.jpg", id=f"r{n}") for n in range(40)]
    path = tmp_path / f"data.{form}"
    if form == "json":
        path.write_text(json.dumps(records))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    expected = [parse_record(row) for row in records]
    assert read(str(path)) == expected
    # Cut into small splits, every record belongs to one of them.
    assert read(str(path), bytes_per_split=500) == expected


def test_bad_records_are_listed_by_cause_and_place(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        json.dumps(record([HUMAN, GPT])).encode(),
        b"{broken",
        json.dumps(record([HUMAN, HUMAN], id="r2")).encode(),
        b'{"id": "r3", "conversations": "\xff"}',
        json.dumps([1]).encode(),
        b"",
        json.dumps(record([HUMAN, GPT], id="r9")).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    found = read(str(path))
    assert [row.id for row in found if isinstance(row, Conversation)] == ["r1", "r9"]
    rejected = [row for row in found if isinstance(row, Rejected)]
    causes = [row.reason.partition(":")[0] for row in rejected]
    assert causes == ["unreadable_record", "bad_conversation", "unreadable_record", "bad_conversation"]
    assert rejected[1].id == "r2"
    assert "do not alternate" in rejected[1].reason
    assert rejected[0].uri == f"{path}:byte {len(lines[0]) + 1}"


def test_a_list_that_is_cut_off_fails_by_name(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record([HUMAN, GPT])] * 3)[:-10])
    with pytest.raises(DataError, match=r"data\.json.*cut off"):
        read(str(path))


def test_a_wildcard_and_a_missing_file(tmp_path):
    for n in range(3):
        (tmp_path / f"part{n}.jsonl").write_text(json.dumps(record([HUMAN, GPT], id=f"r{n}")) + "\n")
    assert [row.id for row in read(str(tmp_path / "part*.jsonl"))] == ["r0", "r1", "r2"]
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        read(str(tmp_path / "nothing.jsonl"))


def meta(tmp_path: Path, document) -> ConversationSource:
    (tmp_path / "meta.json").write_text(json.dumps(document))
    return ConversationSource(uri=str(tmp_path / "meta.json"), repeat=2.0)


def test_a_meta_json_stands_for_its_entries(tmp_path):
    entries = {
        "coco": {"root": "images/coco", "annotation": "a/coco.jsonl", "repeat_time": 0.5, "length": 10},
        "text": {"root": "", "annotation": "/data/text.jsonl", "length": 3},
        "far": {"root": "s3://b/images", "annotation": "s3://b/far.jsonl", "repeat_time": 3},
    }
    coco, text, far = expand(meta(tmp_path, entries))
    assert (coco.uri, coco.image_root) == (f"{tmp_path}/a/coco.jsonl", f"{tmp_path}/images/coco")
    assert (text.uri, text.image_root) == ("/data/text.jsonl", "")
    assert (far.uri, far.image_root) == ("s3://b/far.jsonl", "s3://b/images")
    assert [part.repeat for part in (coco, text, far)] == [1.0, 2.0, 6.0]


def test_a_list_of_records_is_no_meta_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record([HUMAN, GPT])]))
    source = ConversationSource(uri=str(path))
    assert expand(source) == [source]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"a": {"root": "x"}}, "expected a list of records"),
        ({"a": {"annotation": "x.jsonl", "repeat_time": "twice"}}, "repeat_time is 'twice'"),
        ({"a": {"annotation": "x.jsonl", "repeat_time": -1}}, "repeat_time is -1"),
        ({"a": {"annotation": ["x.jsonl"]}}, "are paths"),
    ],
)
def test_a_damaged_meta_json_says_what_is_wrong(document, said, tmp_path):
    with pytest.raises(DataError, match=said):
        expand(meta(tmp_path, document))


def test_repeats_and_weights_below_zero_are_refused():
    with pytest.raises(ConfigError, match="repeat=-1"):
        ConversationSource(uri="x", repeat=-1)
    with pytest.raises(ConfigError, match="weight"):
        ConversationSource(uri="x", weight=float("nan"))
