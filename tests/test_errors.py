"""Messages: whatever a user's content is, none holds more of it than a glance needs."""

import copy
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revision_ray.core import config, storage
from revision_ray.core.errors import MAX_QUOTED, DataError, RevisionError, quote, shorten
from revision_ray.data import images
from revision_ray.data.conversations import ConversationSource, expand, read_conversations, record_splits
from revision_ray.data.shards import Rejected
from revision_ray.data.sources import image_splits, read_images, read_texts, tar_shards, text_splits
from revision_ray.encode.embed import EmbedJob
from revision_ray.evaluate.benchmarks import benchmark, read_unit, units
from revision_ray.serve.protocol import ApiError
from revision_ray.train.pairs import read_pairs

LETTERS = "Zq" * 27_000
WORDS = "Zq Zq " * 9_000


def longest(message: str) -> int:
    """Characters of the longest piece of the content that `message` quotes."""
    return max((len(piece) for piece in re.findall(r"(?:Zq?\s?|q\s?)+", message)), default=0)


def message_of(action, *arguments, **options) -> str:
    with pytest.raises(RevisionError) as error:
        action(*arguments, **options)
    return str(error.value)


def test_shortened_text_keeps_both_ends_and_says_its_length():
    assert shorten("short") == "short"
    for cut in (shorten("ab" + LETTERS + "yz"), shorten("ab" + WORDS + "yz", 60)):
        assert len(cut) <= MAX_QUOTED
        assert cut.startswith("ab")
        assert cut.endswith("yz")
        assert "54004" in cut
    assert quote("it's") == '"it\'s"'
    for value in (LETTERS, WORDS, LETTERS.encode(), [WORDS] * 3, {"a": WORDS}):
        assert len(quote(value)) <= MAX_QUOTED
        assert len(quote(value, 60)) <= 60


def test_every_error_shortens_words_and_stays_itself_in_another_process():
    error = DataError(f"{LETTERS}/a.json: no such file")
    assert len(str(error)) < MAX_QUOTED + 20
    assert str(error).endswith("/a.json: no such file")
    assert str(copy.copy(error)) == str(error)  # by the same way as a pickle
    assert len(ApiError(400, f"{LETTERS}: unknown").detail) < MAX_QUOTED + 20


@pytest.mark.parametrize("content", [LETTERS, WORDS])
def test_no_message_about_a_path_or_a_setting_quotes_it_whole(content, tmp_path):
    (tmp_path / "bad.yaml").write_text(f"- {content}")
    (tmp_path / "worse.yaml").write_text(f"output: a\n{content}: [")
    (tmp_path / "typo.yaml").write_text(json.dumps({"batch_size": content}))
    messages = [
        message_of(text_splits, [content]),
        message_of(image_splits, [f"{content}*.jpg"]),
        message_of(tar_shards, [content]),
        message_of(storage.read_json, f"s3://bucket/{content}"),
        message_of(storage.read_bytes, f"/{'/'.join([content[:200]] * 20)}"),
        message_of(benchmark, content),
        *(
            message_of(config.load, EmbedJob, arguments)
            for arguments in (
                [f"batch_size={content}"],
                [f"{content}=1"],
                [f"output=[{content}"],
                [f"dtype={content}"],
                [f"images={{{content}: 1}}"],
                [f"-{content}"],
                [content],
                [content, content],
                *([str(path)] for path in tmp_path.glob("*.yaml")),
            )
        ),
    ]
    assert {message: longest(message) for message in messages if longest(message) > MAX_QUOTED} == {}


RECORDS = [
    '{"id": "a", "text": {"x": "%s"}}', '{"id": {"x": "%s"}, "text": "t"}', '{"%s": 1}', '"%s"', '["%s"]',
    '{"id": "a", "text": "%s', '{"id": "a", "conversations": [{"from": "%s", "value": "x"}]}',
    '{"id": "a", "conversations": "%s"}', '{"id": "a", "conversations": ["%s"]}',
    '{"id": "a", "image": ["%s"], "conversations": [{"from": "human", "value": 5}]}',
    '{"id": "a", "image": "%s"}', '{"id": "a", "image": {"path": "%s"}}', '{"id": "a", "image": {"x": "%s"}}',
    '{"id": "a", "image": "data:%s"}', '{"id": "a", "image": "https://%s"}', '{"id": "a", "bytes": "%s"}',
]  # fmt: skip


@pytest.mark.parametrize("content", [LETTERS, WORDS])
def test_no_reason_of_a_rejected_row_quotes_it_whole(content, tmp_path):
    lines = [record % content for record in RECORDS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{','.join(line for line in lines if not line.endswith(content))}]")
    rows = [
        *(row for split in text_splits([f"{tmp_path}/a.jsonl"]) for row in read_texts(split)),
        *(row for split in image_splits([f"{tmp_path}/a.json"]) for row in read_images(split)),
        *(
            row
            for split in record_splits(ConversationSource(uri=f"{tmp_path}/a.jsonl"), 10**9)
            for row in read_conversations(split)
        ),
    ]
    reasons = [row.reason for row in rows if isinstance(row, Rejected)]
    assert len(reasons) > 2 * len(RECORDS)
    assert {reason for reason in reasons if longest(reason) > MAX_QUOTED or len(reason) > 600} == set()


@pytest.mark.parametrize("content", [LETTERS, WORDS])
def test_no_error_about_a_file_quotes_it_whole(content, tmp_path):
    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    def all_of(read, split, *uris):
        return [row for each in split(list(uris)) for row in read(each)]

    def asked(uri):
        return [item for unit in units("mmstar", uri) for item in read_unit(unit)]

    question = {"index": 0, "question": "?", "image": "", "answer": "A", "category": "c", "l2_category": "d"}
    columns = pa.table({f"{content[:20_000]}{number}": [1] for number in range(3)})
    pq.write_table(columns, tmp_path / "columns.parquet")
    messages = [
        message_of(all_of, read_texts, text_splits, written("keys.json", f'{{"{content}": 1}}')),
        message_of(all_of, read_texts, text_splits, written("cut.json", f'[{{"text": "{content}')),
        message_of(all_of, read_texts, text_splits, written("what.json", content)),
        message_of(text_splits, [written("odd." + content[:90].replace(" ", "_"), "x")]),
        message_of(image_splits, [str(tmp_path / "columns.parquet")]),
        message_of(read_pairs, [written("no.tar", content)]),
        message_of(expand, ConversationSource(uri=written("meta.json", json.dumps({content: {"root": 1}})))),
        message_of(storage.read_json, written("bad.json", content)),
        message_of(images.decode_image, content.encode(), max_pixels=9),
        message_of(asked, str(tmp_path / "columns.parquet")),
        message_of(asked, written("a.jsonl", content)),
        message_of(asked, written("b.jsonl", json.dumps([content]))),
        message_of(asked, written("c.jsonl", json.dumps({content: 1}))),
        *(
            message_of(asked, written(f"{field}{number}.jsonl", json.dumps({**question, field: value})))
            for field in ("image", "answer")
            for number, value in enumerate((content, {"path": content}, "data:" + content, [content]))
        ),
    ]
    assert {message: longest(message) for message in messages if longest(message) > MAX_QUOTED} == {}
