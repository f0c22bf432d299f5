"""Conversations about images: LLaVA, Bunny and InternVL records, the files and mixtures that hold them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from revision_ray import storage
from revision_ray.config import MISSING
from revision_ray.data.json_stream import elements
from revision_ray.data.line_ranges import MAX_LINE_BYTES, lines
from revision_ray.data.parquet_rows import rows
from revision_ray.data.records import DerivedIds, RowError, fields_of, known_id, unicode, utf8
from revision_ray.data.schema import Rejected, Split
from revision_ray.data.sources import text_splits
from revision_ray.data.text_rows import read_texts
from revision_ray.errors import ConfigError, DataError

Role = Literal["system", "user", "assistant"]
IMAGE_MARK = "<image>"
# Causes under which records that hold no conversation are counted; a reason is "cause: what was found".
UNREADABLE: Final = "unreadable_record"
BAD_CONVERSATION: Final = "bad_conversation"

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_IDS = ("id", "key", "question_id")
_COLUMNS = (*_IDS, "image", "images", "image_id", "text", "caption", "conversations")
_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. In a user's, each `<image>` stands for one image.

    `is_target` is False for an assistant's turn that is read but not trained on.
    """

    role: Role
    content: str
    is_target: bool = True


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that alternate between user and assistant and end with the assistant's; a system turn may lead.

    `images` names the images of the `<image>` marks, in their order.
    """

    id: str
    messages: tuple[Message, ...]
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
            Message(role=role, content=content, is_target=all(is_target))
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
    """Directory that the records' image paths are relative to; may be empty where images are known by id."""
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


def source_of(entry: str) -> ConversationSource:
    """The part of a mixture that URI or URI*REPEAT names: how often an epoch sees each record."""
    uri, star, repeat = entry.rpartition("*")
    if star and repeat.replace(".", "", 1).isdigit():
        return ConversationSource(uri=storage.absolute(uri), repeat=float(repeat))
    return ConversationSource(uri=storage.absolute(entry))


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
    if not all(isinstance(entry, dict) and "annotation" in entry for entry in document.values()):
        raise DataError(
            f"{source.uri}: is an object with the keys {list(document)[:8]}; expected a list of records, or "
            "{name: {root, annotation, repeat_time}}; a file of one record a line is named .jsonl"
        )
    return [_of_meta(source, name, entry) for name, entry in document.items()]


def _is_object(uri: str) -> bool:
    with storage.open_input(uri) as file:
        return file.read(4096).removeprefix(_BOM).lstrip().startswith(b"{")


def _of_meta(source: ConversationSource, name: str, entry: dict[str, Any]) -> ConversationSource:
    annotation, root, repeat = entry["annotation"], entry.get("root") or "", entry.get("repeat_time", 1)
    where = f"{source.uri}: entry {name!r}"
    if not isinstance(annotation, str) or not isinstance(root, str):
        raise DataError(f"{where}: annotation and root are paths; found {annotation!r} and {root!r}")
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < float("inf"):
        raise DataError(f"{where}: repeat_time is {repeat!r}, expected a number from 0 on")
    folder = storage.parent_of(storage.absolute(source.uri))
    return replace(
        source,
        uri=_below(folder, annotation),
        image_root=_below(source.image_root or folder, root) if root else source.image_root,
        repeat=repeat * source.repeat,
    )


def _below(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(folder, path)


def record_splits(source: ConversationSource, bytes_per_split: int) -> list[Split]:
    """The source's files, cut into what one task reads."""
    return text_splits([source.uri], bytes_per_split=bytes_per_split)


def read_conversations(split: Split) -> Iterator[Conversation | Rejected]:
    """Every conversation of `split`, and every record that is none with its cause, in the order of the file.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    derived = DerivedIds()
    for where, raw, record in read_records(split):
        if isinstance(record, RowError):
            yield Rejected(id=derived(raw), uri=where, reason=f"{UNREADABLE}: {record}")
            continue
        try:
            found = parse_record(record, derived)
        except RowError as error:
            found = Rejected(
                id=_id_or(record, derived, raw), uri=where, reason=f"{BAD_CONVERSATION}: {error}"
            )
        yield found


def _id_or(record: object, derived: DerivedIds, raw: bytes) -> str:
    try:
        return known_id(fields_of(record), _IDS) or derived(raw)
    except RowError:
        return derived(raw)


def parse_record(record: object, derived: DerivedIds | None = None) -> Conversation:
    """The conversation of a LLaVA, Bunny or InternVL record: {id, image, conversations: [{from, value}]}.

    `image` is a path, a list of them, or absent. A record without id gets one from its content (`derived`,
    where ids are to be unique among several records).

    Raises:
        DataError: no conversation, an unknown role, roles that do not alternate, an empty turn, or a number
            of `<image>` marks that is not the number of images.
    """
    fields = fields_of(record)
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else f"fields {sorted(map(str, fields))[:20]}"
        raise RowError(f"no conversation: found {found}, expected a list 'conversations' of turns")
    messages = tuple(_message(turn, number) for number, turn in enumerate(turns))
    _check_roles([message.role for message in messages])
    images = images_of(fields)
    _check_marks(messages, len(images))
    content = json.dumps([list(images), turns], sort_keys=True, default=str).encode()
    return Conversation(
        id=known_id(fields, _IDS) or (derived or DerivedIds())(content), messages=messages, images=images
    )


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is {turn!r:.60}, expected an object with 'from' and 'value'")
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in _ROLES:
        raise RowError(f"turn {number} has the unknown role {speaker!r}, expected one of {list(_ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"turn {number} ({speaker}) holds {type(content).__name__}, expected a string")
    if not content or content.isspace():
        raise RowError(f"turn {number} ({speaker}) is empty")
    return Message(role=_ROLES[speaker], content=unicode(content, f"turn {number}"))


def _check_roles(roles: list[Role]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if turns != expected or not turns:
        raise RowError(
            f"turns do not alternate: found {roles[:12]}, expected user and assistant in turn, ending with "
            "the assistant, after at most one system turn"
        )


def _check_marks(messages: tuple[Message, ...], num_images: int) -> None:
    marks = 0
    for number, message in enumerate(messages):
        found = message.content.count(IMAGE_MARK)
        if found and message.role != "user":
            raise RowError(f"turn {number} ({message.role}) holds {IMAGE_MARK}, which only a user's turn may")
        marks += found
    if marks != num_images:
        raise RowError(f"{marks} {IMAGE_MARK} in the turns and {num_images} images in the record")


def images_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """The paths or ids of the record's images, none of which may be empty.

    Raises:
        DataError: `image` is something else.
    """
    found = fields.get("image")
    if found is None or found == "" or found == []:
        found = fields.get("images")
    if found is None or found == "" or found == []:
        return ()
    listed = found if isinstance(found, list) else [found]
    paths: list[str] = []
    for image in listed:
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path:
            raise RowError(f"field 'image' holds {path!r:.60}, expected a path or a list of paths")
        paths.append(unicode(path, "field 'image'"))
    return tuple(paths)


def read_records(split: Split) -> Iterator[tuple[str, bytes, object]]:
    """(where, bytes that identify it, record) of every record of a JSON, JSON Lines, Parquet or tar split.

    A record that cannot be read is a RowError in its place.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    if split.kind == "text_json":
        yield from _of_json(split)
    elif split.kind == "text_jsonl":
        yield from _of_lines(split)
    elif split.kind == "text_parquet":
        for number, record in rows(split.uri, split.start, split.stop, _COLUMNS, _BATCH_ROWS):
            where = f"{split.uri}:row {number}"
            yield where, where.encode(), record
    else:
        for row in read_texts(split):  # a caption beside an image of the same key
            if isinstance(row, Rejected):
                yield row.uri, row.id.encode(), RowError(row.reason)
            else:
                yield f"{split.uri}:{row.id}", row.id.encode(), {"id": row.id, "text": row.text}


def _of_json(split: Split) -> Iterator[tuple[str, bytes, object]]:
    for element in elements(split.uri, "texts"):
        if element.offset >= split.stop:
            return
        if element.offset >= split.start:
            where = f"{split.uri}:byte {element.offset}"
            yield where, element.raw, _checked(element.raw, element.value, element.offset)


def _of_lines(split: Split) -> Iterator[tuple[str, bytes, object]]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        if not raw.strip():
            continue
        where = f"{split.uri}:byte {offset}"
        if len(raw) > MAX_LINE_BYTES:
            yield where, raw, RowError(f"a line of more than {MAX_LINE_BYTES} bytes")
            continue
        try:
            yield where, raw, json.loads(utf8(raw, offset))
        except RowError as error:
            yield where, raw, error
        except (ValueError, RecursionError) as error:
            yield where, raw, RowError(f"malformed JSON: {error}")


def _checked(raw: bytes, value: object, offset: int) -> object:
    try:
        utf8(raw, offset)
    except RowError as error:
        return error
    return value
