"""What a record says in words: its turns, its text, its captions. The rules are those of `data.fields`."""

from dataclasses import dataclass
from typing import Any, Literal

from revision_ray.core.errors import quote
from revision_ray.data.fields import (
    CAPTION_FIELDS,
    IMAGE_NAMES,
    LOCATION_FIELDS,
    TEXT_FIELDS,
    TEXT_IDS,
    TURN_FIELDS,
    RowError,
    check_equal,
    checked_path,
    first_filled,
    image_names,
    is_filled,
    kind_of,
    known_id,
    missing,
    named_images,
    unicode,
    utf8,
)

Role = Literal["system", "user", "assistant"]
IMAGE_MARK = "<image>"
SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "meta_instruction")
LOSS_FIELDS = ("weight", "loss", "train", "trainable", "loss_mask", "loss_scale", "loss_weight")
REFUSED_FIELDS = (
    "tools", "functions", "video", "videos", "audio", "audios", "history", "chosen", "rejected",
    "rejected_response", "rejected_messages", "chat_template_kwargs", "train_on_input", "train_on_inputs",
    "mask_history",
)  # fmt: skip
REFUSED_TURN_FIELDS = (
    "tool_calls", "tool_call_id", "function_call", "tools", "functions", "name", "reasoning_content",
    "reasoning", "thinking", "refusal", "video", "videos", "audio", "audios", "mask", "masked", "ignore",
    "train_detail", "chosen", "rejected",
)  # fmt: skip
# Of answers that are to be liked or not: false says that this one is not.
_LIKED_FIELDS = ("label", "kto_tag")
CONVERSATION_FIELDS = (
    *TEXT_IDS, "image_id", *TEXT_FIELDS, *IMAGE_NAMES, "uri", "url", *SYSTEM_FIELDS, *LOSS_FIELDS,
    *REFUSED_FIELDS, *_LIKED_FIELDS, "mask",
)  # fmt: skip
"""All that is asked of a conversation or a caption of an image: the columns to read of a Parquet file."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")


def text_of(record: dict[str, Any]) -> str:
    """The text or caption of `record`, else the assistant's first answer that is trained on in its turns.

    Raises:
        RowError: there is none, it is blank, it is no text, or there are several.
    """
    for field in CAPTION_FIELDS:
        if is_filled(record.get(field)):
            texts = _texts(record[field], field)
            if len(texts) > 1:
                raise RowError(
                    f"field {field!r} holds {len(texts)} texts, expected one; write a record for each"
                )
            return texts[0]
    if any(is_filled(record.get(field)) for field in TURN_FIELDS):
        return _first_answer(turns_of(record))
    if any(isinstance(record.get(field), str | bytes) for field in TEXT_FIELDS):
        raise RowError("empty text")
    raise RowError(missing("text", record, TEXT_FIELDS))


def captions_of(record: dict[str, Any]) -> list[str]:
    """Everything that `record` says about its image: a list of captions where it has one, else its text.

    Raises:
        RowError: see `text_of`.
    """
    for field in reversed(CAPTION_FIELDS):
        if isinstance(record.get(field), list) and record[field]:
            return _texts(record[field], field)
    return [text_of(record)]


def _texts(value: object, field: str) -> list[str]:
    """The texts of a filled field; blank ones of a list are none."""
    texts: list[str] = []
    for found in value if isinstance(value, list) else [value]:
        if not is_filled(found):
            continue
        text = utf8(found) if isinstance(found, bytes) else found
        if not isinstance(text, str):
            raise RowError(f"field {field!r} is {kind_of(text)}, expected a string")
        texts.append(unicode(text, f"field {field!r}"))
    if not texts:
        raise RowError("empty text")
    return texts


def _first_answer(turns: list[Any]) -> str:
    for number, turn in enumerate(turns):
        message = message_of(turn, number)
        if message.role == "assistant" and message.is_target:
            return message.content
    speakers = [turn.get("from") or turn.get("role") for turn in turns]
    raise RowError(f"no turn of the assistant is trained on; found turns from {speakers[:8]}")


@dataclass(frozen=True, kw_only=True)
class TurnMessage:
    """One turn. In a user's, each `<image>` stands for one image.

    `is_target` is False for an assistant's turn that is read but not trained on. `images` has an entry for
    each `<image>`: the name that the turn gives for it, its number among the record's images, or None for
    the next one of those.
    """

    role: Role
    content: str
    is_target: bool = True
    images: tuple[str | int | None, ...] = ()


def turns_of(record: dict[str, Any]) -> list[Any]:
    """The turns of the conversation in `record`, as they stand there.

    Raises:
        RowError: there are none, or two fields hold different ones.
    """
    listed = [field for field in TURN_FIELDS if isinstance(record.get(field), list) and record[field]]
    if not listed:
        present = [field for field in TURN_FIELDS if field in record]
        found = f"fields {quote(sorted(map(str, record))[:20])}"
        if present:
            value = record[present[0]]
            found = "an empty list" if value == [] else f"{present[0]!r}, which is {kind_of(value)}"
        raise RowError(f"no conversation: found {found}, expected a list of turns in {list(TURN_FIELDS)}")
    check_equal(record, listed, "the record")
    return record[listed[0]]


def message_of(turn: object, number: int) -> TurnMessage:
    """Turn `number` of a conversation.

    Raises:
        RowError: an unknown role, no content, or a field that would change what it teaches.
    """
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is {turn!r:.60}, expected an object with 'from' and 'value'")
    where = f"turn {number}"
    speaker = first_filled(turn, ("from", "role"), where, _ROLES)
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RowError(f"{where} has the unknown role {speaker!r:.60}, expected one of {list(_ROLES)}")
    where = f"{where} ({speaker})"
    role = _ROLES[speaker]
    for field in REFUSED_TURN_FIELDS:
        if _says_something(turn.get(field)) and not (field == "name" and turn[field] == speaker):
            raise RowError(f"{where}: the field {field!r} is not supported; found {quote(turn[field], 60)}")
    content, images = _content(first_filled(turn, ("value", "content"), where), where)
    if not content or content.isspace():
        raise RowError(f"{where} is empty")
    named = named_images(turn, ("image", "images"), where)
    if named:
        if any(image is not None for image in images) or len(named) != len(images):
            raise RowError(f"{where}: {len(images)} {IMAGE_MARK} and {len(named)} images of its own")
        images = list(named)
    is_target = _is_target(turn, where)
    if is_target and role != "assistant":
        raise RowError(f"{where} asks for a loss, which only turns of the assistant have")
    return TurnMessage(
        role=role,
        content=unicode(content, where),
        is_target=role != "assistant" or is_target is not False,
        images=tuple(images),
    )


def _content(content: object, where: str) -> tuple[str, list[str | int | None]]:
    """The text of a turn's content, with a mark for each image, and what it says of those images."""
    if isinstance(content, str):
        return content, [None] * content.count(IMAGE_MARK)
    if not isinstance(content, list):
        raise RowError(f"{where} holds {type(content).__name__}, expected a string or a list of parts")
    texts: list[str] = []
    images: list[str | int | None] = []
    for part in content:
        fields: dict[str, Any] = part if isinstance(part, dict) else {}
        kind = fields.get("type")
        text = fields.get("text") if kind in _TEXT_PARTS else part
        if isinstance(text, str):
            texts.append(text)
            images += [None] * text.count(IMAGE_MARK)
        elif kind in _IMAGE_PARTS:
            texts.append(IMAGE_MARK)
            images.append(_image_of_part(fields, where))
        else:
            raise RowError(f"{where} holds the part {part!r:.60}, expected parts of type text or image")
    return "".join(texts), images


def _image_of_part(part: dict[str, Any], where: str) -> str | int | None:
    for field in ("image", "path", "url", "image_url", "uri"):
        value = part.get(field)
        if isinstance(value, dict):
            value = value.get("path") or value.get("url")
        if is_filled(value):
            return checked_path(value, f"{where}: {field!r}")
    index = part.get("index")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise RowError(f"{where}: the index of an image is {index!r:.60}, expected a number from 0 on")
    return index


def system_of(record: dict[str, Any]) -> str | None:
    """The system prompt that `record` has beside its turns.

    Raises:
        RowError: it is no string, or two fields hold different ones.
    """
    found = first_filled(record, SYSTEM_FIELDS, "the record")
    if not is_filled(found):
        return None
    if not isinstance(found, str):
        raise RowError(f"the system prompt is {kind_of(found)}, expected a string")
    return unicode(found, "the system prompt")


def check_supported(record: dict[str, Any]) -> None:
    """
    Raises:
        RowError: a field outside the turns changes what the conversation teaches, in a way that is not
            supported.
    """
    for field in REFUSED_FIELDS:
        if _says_something(record.get(field)):
            raise RowError(f"the field {field!r} is not supported; found {quote(record[field], 60)}")
    for field in _LIKED_FIELDS:
        if record.get(field) is False:
            raise RowError(f"{field!r} is false: an answer that is not to be learnt")
    if is_filled(record.get("mask")) and not isinstance(record["mask"], str):  # a string is a picture's path
        raise RowError(f"the field 'mask' is not supported; found {quote(record['mask'], 60)}")
    for field in LOSS_FIELDS:
        value = record.get(field)
        if is_filled(value) and not (isinstance(value, int | float) and value == 1):
            raise RowError(
                f"{field!r} of the record is {quote(value, 60)}; leave the record out, or say in its turns "
                "which of them are trained on"
            )


def _is_target(turn: dict[str, Any], where: str) -> bool | None:
    """Whether the turn's fields say that it is trained on; None where they say nothing."""
    said: dict[str, bool] = {}
    for field in LOSS_FIELDS:
        value = turn.get(field)
        if not is_filled(value):
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowError(
                f"{where}: {field!r} is {quote(value, 60)}; expected 1 or true (train on this turn), 0 "
                "or false (do not)"
            )
        said[field] = bool(value)
    if len(set(said.values())) > 1:
        raise RowError(f"{where}: its fields contradict each other: {said}")
    return next(iter(said.values()), None)


def caption_images(record: dict[str, Any]) -> tuple[str, ...]:
    """The paths or ids of the images that a caption is about: those that the record or its turns name, else
    its `image_id`, `id` or `key`, else its location.

    Raises:
        RowError: see `image_names`, `message_of` and `known_id`.
    """
    named = image_names(record)
    if not named and any(is_filled(record.get(field)) for field in TURN_FIELDS):
        marks = [mark for n, turn in enumerate(turns_of(record)) for mark in message_of(turn, n).images]
        named = tuple(mark for mark in marks if isinstance(mark, str))
    if not named:
        identity = known_id(record, ("image_id", "id", "key"))
        named = (identity,) if identity else named_images(record, LOCATION_FIELDS, "the record")
    return named


def _says_something(value: object) -> bool:
    """Whether a field that is not supported asks for anything: an empty list may be written as a string."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    return is_filled(value) and value is not False
