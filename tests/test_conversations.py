"""Records of LLaVA, Bunny and InternVL become conversations; what is none is listed, with its cause."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data.conversations import (
    Conversation,
    ConversationSource,
    TurnMessage,
    expand,
    parse_record,
    read_conversations,
    record_splits,
)
from revision_ray.data.shards import Rejected, TextRow
from revision_ray.data.sources import read_texts, text_splits
from revision_ray.data.turns import captions_of, text_of

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
    assert found.messages[1] == TurnMessage(role="user", content="<image>\nWhat is it?")
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


# --- what a record means, in every reader -----------------------------------------------------------------


USER, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}
ASKED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog."}]
SHOWN = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
TOLD = [("user", "What is it?"), ("assistant", "A dog.")]
SEEN = [("user", "<image>\nWhat is it?"), ("assistant", "A dog.")]


def parts(*of_user) -> list[dict]:
    return [{"role": "user", "content": list(of_user)}, ANSWER]


WORDS = {"type": "text", "text": "What is it?"}
JOINED = [("user", "<image>What is it?"), ("assistant", "A dog.")]

# A record; its text, or what the reason against it holds; its turns, or the same; its images.
MEANINGS = [
    # Names of turns, speakers and contents.
    ({"conversations": ASKED}, "A dog.", TOLD, ()),
    ({"conversations": [USER, ANSWER]}, "A dog.", TOLD, ()),
    ({"messages": [USER, ANSWER]}, "A dog.", TOLD, ()),
    ({"conversation": ASKED}, "A dog.", TOLD, ()),
    ({"messages": ASKED, "conversations": None}, "A dog.", TOLD, ()),
    ({"messages": ASKED, "conversations": ASKED}, "A dog.", TOLD, ()),
    ({"messages": [USER, ANSWER], "conversations": ASKED}, "'messages'", "'messages'", ()),
    ({"conversations": [{**turn, "role": None, "content": None} for turn in ASKED]}, "A dog.", TOLD, ()),
    ({"conversations": [{**ASKED[0], "role": "user"}, ASKED[1]]}, "A dog.", TOLD, ()),
    ({"conversations": [{**ASKED[0], "role": "assistant"}, ASKED[1]]}, "'role'", "'role'", ()),
    ({"conversations": [ASKED[0], {**ASKED[1], "content": "A cat."}]}, "'content'", "'content'", ()),
    ({"conversations": [{"role": "developer", "content": "Be brief."}, *ASKED]}, "A dog.",
     [("system", "Be brief."), *TOLD], ()),
    ({"conversations": [ASKED[0], {"from": "observation", "value": "x"}, ASKED[1]]}, "observation",
     "observation", ()),
    ({"conversations": ASKED[1:]}, "A dog.", "do not alternate", ()),
    ({"conversations": ASKED[:1]}, "['human']", "do not alternate", ()),
    ({"conversations": "hello"}, "conversations", "conversations", ()),
    # Texts beside turns.
    ({"text": "", "caption": "A cat."}, "A cat.", "no conversation", ()),
    ({"text": "  \n", "caption": "A cat."}, "A cat.", "no conversation", ()),
    ({"text": None, "captions": ["A cat."]}, "A cat.", "no conversation", ()),
    ({"text": float("nan"), "caption": "A cat."}, "A cat.", "no conversation", ()),
    ({"text": [], "caption": "A cat."}, "A cat.", "no conversation", ()),
    ({"text": "", "caption": "", "conversations": ASKED}, "A dog.", TOLD, ()),
    ({"text": "A bird.", "caption": "A cat.", "conversations": ASKED}, "A bird.", TOLD, ()),
    ({"caption": "A cat.", "conversations": ASKED}, "A cat.", TOLD, ()),
    ({"caption": ["A cat."]}, "A cat.", "no conversation", ()),
    ({"caption": ["A cat.", "A hound."]}, "'caption' holds 2 texts", "no conversation", ()),
    ({"captions": ["", None]}, "empty text", "no conversation", ()),
    ({"captions": ["A cat.", 7]}, "'captions'", "no conversation", ()),
    ({"text": 7, "caption": "A cat."}, "'text' is a number", "no conversation", ()),
    ({"text": False, "caption": "A cat."}, "'text' is a boolean", "no conversation", ()),
    ({"text": "", "caption": None}, "empty text", "no conversation", ()),
    ({"TEXT": "A cat."}, "TEXT", "TEXT", ()),
    # System prompts.
    ({"system": "Be brief.", "conversations": ASKED}, "A dog.", [("system", "Be brief."), *TOLD], ()),
    ({"system_prompt": "Be brief.", "messages": ASKED}, "A dog.", [("system", "Be brief."), *TOLD], ()),
    ({"system": " ", "conversations": ASKED}, "A dog.", TOLD, ()),
    ({"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *ASKED]}, "A dog.",
     [("system", "Be brief."), *TOLD], ()),
    ({"system": "Be long.", "conversations": [{"from": "system", "value": "Be brief."}, *ASKED]}, "A dog.",
     "system", ()),
    ({"system": "Be long.", "system_prompt": "Be brief.", "messages": ASKED}, "A dog.", "system_prompt", ()),
    ({"system": ["Be brief."], "conversations": ASKED}, "A dog.", "system", ()),
    # Images.
    ({"image": "a.jpg", "conversations": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"images": ["a.jpg"], "messages": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"images": [{"bytes": None, "path": "a.jpg"}], "messages": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"image": "a.jpg", "images": ["a.jpg"], "messages": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"image": "a.jpg", "images": ["b.jpg"], "messages": SHOWN}, "A dog.", "'images'", ()),
    ({"image": "", "image_path": "a.jpg", "messages": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"image": "a.jpg", "image_url": "http://b", "messages": SHOWN}, "A dog.", SEEN, ("a.jpg",)),
    ({"image_path": "a.jpg", "messages": ASKED}, "A dog.", "0 <image>", ()),
    ({"image": [None], "messages": ASKED}, "A dog.", "'image' holds None", ()),
    ({"url": "http://source", "messages": ASKED}, "A dog.", TOLD, ()),
    ({"messages": parts({"type": "image", "image": "a.jpg"}, WORDS)}, "A dog.", JOINED, ("a.jpg",)),
    ({"messages": parts({"type": "image_url", "image_url": {"url": "a.jpg"}}, WORDS)}, "A dog.", JOINED,
     ("a.jpg",)),
    ({"images": ["a.jpg"], "messages": parts({"type": "image", "text": None}, WORDS)}, "A dog.", JOINED,
     ("a.jpg",)),
    ({"images": ["a.jpg", "b.jpg"],
      "messages": parts({"type": "image", "index": 1}, {"type": "image", "index": 0}, WORDS)},
     "A dog.", [("user", "<image><image>What is it?"), TOLD[1]], ("b.jpg", "a.jpg")),
    ({"images": ["a.jpg"], "messages": parts({"type": "image", "image": "b.jpg"}, WORDS)}, "A dog.", "differ",
     ()),
    ({"images": ["a.jpg"], "messages": parts({"type": "image", "index": 3}, WORDS)}, "A dog.", "[3]", ()),
    ({"messages": parts({"type": "image"}, {"type": "image", "image": "b.jpg"}, WORDS)}, "A dog.", "1 of 2",
     ()),
    ({"messages": parts(WORDS)}, "A dog.", TOLD, ()),
    ({"messages": parts({"type": "video", "video": "a.mp4"}, WORDS)}, "video", "video", ()),
    ({"messages": parts({"type": "text", "text": None})}, "part", "part", ()),
    ({"messages": [{**USER, "content": "<image> ?", "images": ["a.jpg"]}, ANSWER]}, "A dog.",
     [("user", "<image> ?"), TOLD[1]], ("a.jpg",)),
    ({"messages": [{**USER, "images": ["a.jpg"]}, ANSWER]}, "1 images of its own", "1 images of its own", ()),
    # What changes nothing.
    ({"source": "coco", "width": 640, "tools": "[]", "videos": [], "weight": 1, "history": None,
      "rejected": False, "mask": "mask.png", "label": True,
      "messages": [USER, {**ANSWER, "tool_calls": None, "name": "assistant"}]},
     "A dog.", TOLD, ()),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "text", "turns", "images"), MEANINGS, ids=lambda value: repr(value)[:60])
def test_a_record_means_the_same_in_every_reader(fields, text, turns, images, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"id": 7, **fields}))
    [as_text] = [row for split in text_splits([str(path)]) for row in read_texts(split)]
    [as_conversation] = read(str(path))
    assert as_text.id == as_conversation.id == "7"
    assert text == as_text.text if isinstance(as_text, TextRow) else text in as_text.reason
    if isinstance(as_conversation, Rejected):
        assert isinstance(turns, str)
        assert as_conversation.reason.startswith("bad_conversation: ")
        assert turns in as_conversation.reason
        assert len(as_conversation.reason) < 400
    else:
        assert [(message.role, message.content) for message in as_conversation.messages] == turns
        assert as_conversation.images == images
        assert all(message.is_target for message in as_conversation.messages)
        assert Conversation.from_json(as_conversation.to_json()) == as_conversation


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"name": "search"}]), ("tools", '[{"name": "search"}]'), ("functions", [{"name": "f"}]),
        ("videos", ["a.mp4"]), ("video", "a.mp4"), ("audios", ["a.wav"]), ("history", [["a", "b"]]),
        ("chosen", ASKED[1]), ("rejected", {"from": "gpt", "value": "A cat."}),
        ("rejected_response", "A cat."),
        ("label", False), ("kto_tag", False), ("chat_template_kwargs", {"enable_thinking": False}),
        ("weight", 0), ("weight", 0.5), ("loss", False), ("train", 0), ("loss_mask", [0, 1]),
        ("mask", [0, 1]),
        ("weight", "x" * 10_000),
    ],
)  # fmt: skip
def test_a_field_that_changes_what_a_conversation_teaches_rejects_it_by_name(field, value):
    with pytest.raises(DataError, match=f"'{field}'") as caught:
        parse_record({"conversations": ASKED, field: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}, {"name": "Ann"}, {"refusal": "No."},
        {"reasoning_content": "Hm."}, {"mask": 1}, {"train_detail": [{"begin_offset": 0}]}, {"weight": 0.5},
        {"weight": "0"}, {"loss": 2}, {"loss_scale": 1.5}, {"weight": 1, "loss": False},
        {"weight": 0, "train": True}, {"videos": ["a.mp4"]},
    ],
)  # fmt: skip
def test_a_turn_with_a_field_that_is_not_supported_rejects_the_record_by_name(fields):
    with pytest.raises(DataError, match="turn 1 .gpt.*" + next(reversed(fields))):
        parse_record({"conversations": [ASKED[0], {**ASKED[1], **fields}]})


@pytest.mark.parametrize(
    ("fields", "is_target"),
    [
        ({"weight": 0}, False), ({"weight": 0.0}, False),
        ({"weight": False}, False), ({"loss": False}, False),
        ({"train": False}, False), ({"loss_mask": 0}, False), ({"loss_scale": 0.0}, False),
        ({"weight": 0, "loss": False}, False), ({"weight": 1}, True), ({"loss": True}, True),
        ({"weight": None, "loss": None}, True), ({"weight": float("nan")}, True), ({}, True),
    ],
)  # fmt: skip
def test_a_turn_says_whether_it_is_trained_on_and_whether_it_is_the_text(fields, is_target):
    wrong = {"from": "gpt", "value": "A cat.", **fields}
    turns = [ASKED[0], wrong, {"from": "human", "value": "No?"}, ASKED[1]]
    found = parse_record({"conversations": turns})
    assert [m.is_target for m in found.messages if m.role == "assistant"] == [is_target, True]
    assert Conversation.from_json(found.to_json()) == found
    assert text_of({"conversations": turns}) == ("A cat." if is_target else "A dog.")


def test_a_loss_on_another_turn_than_the_assistants_is_refused_and_none_is_nothing():
    def with_user(**fields):
        return parse_record({"id": 1, "conversations": [{**ASKED[0], **fields}, ASKED[1]]})

    assert with_user(weight=0, loss=None) == with_user()
    for field in ("weight", "loss", "train"):
        with pytest.raises(DataError, match=r"turn 0 .human. asks for a loss"):
            with_user(**{field: True})


def test_columns_of_parquet_that_change_a_conversation_are_read(tmp_path):
    turns = [
        {**turn, "weight": weight} for turn, weight in zip([*ASKED, *MORE], (None, 0, None, 1), strict=True)
    ]
    rows = [
        {"id": "plain", "messages": turns, "system": "", "tools": None},
        {"id": "system", "messages": turns, "system": "Be brief.", "tools": "[]"},
        {"id": "tools", "messages": turns, "system": None, "tools": '[{"name": "search"}]'},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    plain, system, tools = read(str(tmp_path / "a.parquet"))
    assert [message.is_target for message in plain.messages] == [True, False, True, True]
    assert system.messages == (TurnMessage(role="system", content="Be brief."), *plain.messages)
    assert "'tools'" in tools.reason
    texts = [row for split in text_splits([str(tmp_path)]) for row in read_texts(split)]
    assert [(row.id, row.text) for row in texts] == [(row["id"], "Yes.") for row in rows]


def test_samples_of_a_tar_are_records_with_the_image_beside_them(tmp_path):
    members = {
        "1.jpg": b"x",
        "1.json": json.dumps({"id": "other", "image": "old/1.jpg", "conversations": SHOWN}).encode(),
        "2.jpg": b"x", "2.txt": b"A cat.\n", "2.json": json.dumps({"captions": ["A cat.", "Puss."]}).encode(),
        "3.jpg": b"x", "3.txt": b" \n", "3.json": json.dumps({"caption": "A fox."}).encode(),
        "4.txt": b"A cow.", "4.json": b"[1, 2]",
        "5.txt": b"", "5.json": b'{"caption": ',
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    first, *others = read(str(tmp_path / "a.tar"))
    assert (first.id, first.images, first.messages[0].content) == ("1", ("1",), "<image>\nWhat is it?")
    assert all("no conversation" in row.reason for row in others[:3])
    assert others[3].reason.startswith("unreadable_record: malformed JSON")
    texts = [row for split in text_splits([str(tmp_path / "a.tar")]) for row in read_texts(split)]
    assert [row.text for row in texts[:4]] == ["A dog.", "A cat.", "A fox.", "A cow."]
    assert "malformed JSON" in texts[4].reason


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"text": "A cat."}, ["A cat."]),
        ({"text": "A cat.", "captions": ["A cat.", "Puss."]}, ["A cat.", "Puss."]),
        ({"caption": ["A cat.", "", "Puss."]}, ["A cat.", "Puss."]),
        ({"captions": "A cat."}, ["A cat."]),
        ({"captions": [], "caption": "A cat."}, ["A cat."]),
        ({"conversations": ASKED}, ["A dog."]),
    ],
)
def test_captions_are_the_list_of_them_else_the_text(fields, captions):
    assert captions_of(fields) == captions
