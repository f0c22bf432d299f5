"""Conversations about images: LLaVA, Bunny and InternVL records, the files and mixtures that hold them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from revision_ray.core import storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError, DataError, quote
from revision_ray.data.fields import TEXT_IDS, DerivedIds, RowError, fields_of, image_names, known_id
from revision_ray.data.records import COCO_ANNOTATIONS, read_records
from revision_ray.data.shards import Rejected, SourceSplit
from revision_ray.data.sources import text_splits
from revision_ray.data.turns import (
    CONVERSATION_FIELDS,
    IMAGE_MARK,
    Role,
    TurnMessage,
    check_supported,
    message_of,
    system_of,
    turns_of,
)

__all__ = ["BAD_CONVERSATION", "IMAGE_MARK", "UNREADABLE", "Conversation", "ConversationSource",
           "MatchImages", "TurnMessage", "expand", "parse_record", "read_conversations", "record_splits",
           "source_of"]  # fmt: skip

# Causes under which records that hold no conversation are counted; a reason is "cause: what was found".
UNREADABLE: Final = "unreadable_record"
BAD_CONVERSATION: Final = "bad_conversation"

MatchImages = Literal["exact", "file_name"]
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that alternate between user and assistant and end with the assistant's; a system turn may lead.

    `images` names the images of the `<image>` marks, in their order.
    """

    id: str
    messages: tuple[TurnMessage, ...]
    images: tuple[str, ...] = ()

    @property
    def num_characters(self) -> int:
        return sum(len(message.content) for message in self.messages)

    def to_json(self) -> str:
        turns = [
            [message.role, message.content, *(() if message.is_target else (False,))]
            for message in self.messages
        ]
        return json.dumps({"id": self.id, "images": self.images, "messages": turns}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Conversation":
        """What `to_json` wrote."""
        found = json.loads(text)
        messages = tuple(
            TurnMessage(role=role, content=content, is_target=all(is_target))
            for role, content, *is_target in found["messages"]
        )
        return Conversation(id=found["id"], messages=messages, images=tuple(found["images"]))


@dataclass(frozen=True, kw_only=True)
class ConversationSource:
    """One part of a mixture of training data."""

    uri: str = MISSING
    """A JSON list, JSON Lines or Parquet of records, a directory or wildcard path of them, or a meta JSON of
    InternVL: {name: {root, annotation, repeat_time}}."""
    image_root: str = ""
    """Directory that the records' image paths are relative to; that of their file if not given."""
    match_images: MatchImages = "exact"
    """exact: an image of a record is found by its URI, its id, or the path that the id was made of.
    file_name: else by its file name alone, whatever the folder; two paths of one file name are an error."""
    repeat: float = 1.0
    """How often an epoch sees each record; 0.3 takes three tenths of them, drawn anew each epoch."""
    weight: float | None = None
    """Share of the epoch instead of `repeat`, relative to the weights of the other parts, which then all need
    one."""

    def __post_init__(self) -> None:
        if not 0 <= self.repeat < float("inf"):
            raise ConfigError(f"repeat={self.repeat}; expected a number from 0 on, 1 for once an epoch")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ConfigError(f"weight={self.weight}; expected a number from 0 on")


def source_of(entry: str, image_root: str = "", match_images: MatchImages = "exact") -> ConversationSource:
    """The part of a mixture that URI or URI*REPEAT names: how often an epoch sees each record."""
    uri, star, repeat = entry.rpartition("*")
    is_repeated = bool(star) and repeat.replace(".", "", 1).isdigit()
    return ConversationSource(
        uri=storage.absolute(uri if is_repeated else entry),
        image_root=storage.absolute(image_root) if image_root else "",
        repeat=float(repeat) if is_repeated else 1.0,
        match_images=match_images,
    )


def expand(source: ConversationSource) -> list[ConversationSource]:
    """The parts that `source` stands for: those of a meta JSON, times its own repeat; else itself alone.

    Annotations and roots are relative to the meta file's folder.

    Raises:
        DataError: the meta JSON is damaged, or an entry of it says no annotation.
    """
    named_json = storage.name_of(source.uri).endswith(".json")
    if not named_json or storage.is_wildcard(source.uri) or not _is_object(source.uri):
        return [source]
    document = storage.read_json(source.uri)
    if isinstance(document.get(COCO_ANNOTATIONS), list):
        return [source]  # captions of COCO, which the reader of records knows or refuses
    if not all(isinstance(entry, dict) and "annotation" in entry for entry in document.values()):
        raise DataError(
            f"{source.uri}: is an object with the keys {quote(list(document)[:8])}; expected a list of "
            f"records, or "
            "{name: {root, annotation, repeat_time}}; a file of one record a line is named .jsonl"
        )
    return [_of_meta(source, name, entry) for name, entry in document.items()]


def _is_object(uri: str) -> bool:
    with storage.open_input(uri) as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"{")


def _of_meta(source: ConversationSource, name: str, entry: dict[str, Any]) -> ConversationSource:
    annotation, root, repeat = entry["annotation"], entry.get("root") or "", entry.get("repeat_time", 1)
    where = f"{source.uri}: entry {quote(name, 80)}"
    if not isinstance(annotation, str) or not isinstance(root, str):
        raise DataError(
            f"{where}: annotation and root are paths; found {quote(annotation, 80)} and {quote(root, 80)}"
        )
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < float("inf"):
        raise DataError(f"{where}: repeat_time is {quote(repeat, 80)}, expected a number from 0 on")
    folder = storage.parent_of(storage.absolute(source.uri))
    return replace(
        source,
        uri=_below(folder, annotation),
        image_root=_below(source.image_root or folder, root) if root else source.image_root,
        repeat=repeat * source.repeat,
    )


def _below(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(folder, path)


def record_splits(source: ConversationSource, bytes_per_split: int) -> list[SourceSplit]:
    """The source's files, cut into what one task reads."""
    return text_splits([source.uri], bytes_per_split=bytes_per_split)


def read_conversations(split: SourceSplit) -> Iterator[Conversation | Rejected]:
    """Every conversation of `split`, and every record that is none with its cause, in the order of the file.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    derived = DerivedIds()
    for found in read_records(split, CONVERSATION_FIELDS):
        try:
            yield parse_record(found.fields(), derived)
        except RowError as error:
            cause = BAD_CONVERSATION if found.bad is None else UNREADABLE
            yield found.rejected(f"{cause}: {error}", derived)


def parse_record(record: object, derived: DerivedIds | None = None) -> Conversation:
    """The conversation of a LLaVA, Bunny or InternVL record: {id, image, conversations: [{from, value}]}.

    `image` is a path, a list of them, or absent. `data.fields` says which other fields count. A record
    without id gets one from its content (`derived`, where ids are to be unique among several records).

    Raises:
        DataError: no conversation, an unknown role, roles that do not alternate, an empty turn, a number of
            `<image>` marks that is not the number of images, or a field that is not supported.
    """
    fields = fields_of(record)
    turns = turns_of(fields)
    check_supported(fields)
    messages = [message_of(turn, number) for number, turn in enumerate(turns)]
    system = system_of(fields)
    if system is not None:
        if messages[0].role != "system":
            messages.insert(0, TurnMessage(role="system", content=system))
        elif messages[0].content != system:
            raise RowError("the record's system prompt and its system turn differ; keep one of them")
    _check_roles([message.role for message in messages])
    _check_marks(messages)
    images = _images(fields, messages)
    content = [list(images), turns, *([] if system is None else [system])]
    return Conversation(
        id=known_id(fields, TEXT_IDS)
        or (derived or DerivedIds())(json.dumps(content, sort_keys=True, default=str).encode()),
        messages=tuple(replace(message, images=()) for message in messages),
        images=images,
    )


def _check_roles(roles: list[Role]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if turns != expected or not turns:
        raise RowError(
            f"turns do not alternate: found {roles[:12]}, expected user and assistant in turn, ending with "
            "the assistant, after at most one system turn"
        )


def _check_marks(messages: list[TurnMessage]) -> None:
    for number, message in enumerate(messages):
        if message.images and message.role != "user":
            raise RowError(f"turn {number} ({message.role}) holds {IMAGE_MARK}, which only a user's turn may")


def _images(fields: dict[str, Any], messages: list[TurnMessage]) -> tuple[str, ...]:
    """The names of the images of all marks in `messages`, in their order."""
    listed = image_names(fields)
    marks = [mark for message in messages for mark in message.images]
    named = [mark for mark in marks if isinstance(mark, str)]
    if not named:
        if len(marks) != len(listed):
            raise RowError(f"{len(marks)} {IMAGE_MARK} in the turns and {len(listed)} images in the record")
        order = [next_one if mark is None else int(mark) for next_one, mark in enumerate(marks)]
        if sorted(order) != list(range(len(listed))):
            raise RowError(f"the turns show the images {order}, the record has {len(listed)}")
        return tuple(listed[place] for place in order)
    if len(named) < len(marks):
        raise RowError(f"{len(named)} of {len(marks)} images are named in the turns; name all, or none")
    if listed and list(listed) != named:
        raise RowError("the images of the record and those of its turns differ; keep one of them")
    return tuple(named)
