"""What a record of any format says: its id, its text, its image; and ids for rows that have none."""

import hashlib
from collections.abc import Sequence
from typing import Any

from revision_ray.data.images import UndecodableImage, image_value
from revision_ray.errors import DataError, quote

# Fields in the order in which they are asked. A text does not take `image_id`: five captions of one image
# share it.
TEXT_IDS = ("id", "key", "text_id")
TEXT_FIELDS = ("text", "caption", "conversations")
IMAGE_IDS = ("id", "image_id", "key")
LOCATION_FIELDS = ("uri", "image_uri", "image_path", "url", "image_url")
# `jpg`, `png` and `webp` hold bytes in the tables that img2dataset writes.
IMAGE_FIELDS = ("image", "bytes", "jpg", "jpeg", "png", "webp", *LOCATION_FIELDS)


class RowError(DataError):
    """This row cannot be used; the message is the reason. It becomes a `Rejected`."""


class DerivedIds:
    """Ids of one split's rows that bring none: 20 hex digits of the content's SHA-256.

    A function of content, hence equal between runs; a content that occurs again gets `-2`, `-3`, so that
    every row of the split keeps an id of its own. Holds about 80 bytes for each id given.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._repetitions: dict[int, int] = {}

    def __call__(self, content: bytes) -> str:
        digest = hashlib.sha256(content).digest()[:10]
        number = int.from_bytes(digest, "big")
        if number not in self._seen:
            self._seen.add(number)
            return digest.hex()
        self._repetitions[number] = self._repetitions.get(number, 1) + 1
        return f"{digest.hex()}-{self._repetitions[number]}"


def known_id(record: dict[str, Any], fields: Sequence[str]) -> str | None:
    """The first of `fields` that `record` fills, as a string; None where it fills none.

    Raises:
        RowError: the id is neither a string nor a number, or not Unicode.
    """
    for field in fields:
        value = record.get(field)
        if value is None or value == "" or value != value:  # NaN: what pandas makes of a missing number
            continue
        if isinstance(value, bytes):
            value = utf8(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # an integer column with gaps, as pandas stores it
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"field {field!r} is {_kind(value)}, expected a string or a number")
        return unicode(str(value), f"field {field!r}")
    return None


def unicode(text: str, what: str) -> str:
    """`text`, known to have a UTF-8 form. JSON can spell half a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{what} is not Unicode: a lone surrogate {text[error.start]!r} at character {error.start}"
        ) from error
    return text


def utf8(content: bytes, start: int = 0) -> str:
    """The text of UTF-8 `content`, whose first byte is byte `start` of where it was found."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {start + error.start}: {error.reason}") from error


def non_empty(text: str) -> str:
    if not text or text.isspace():
        raise RowError("empty text")
    return unicode(text, "text")


def fields_of(record: object) -> dict[str, Any]:
    """`record`, known to be an object with fields."""
    if not isinstance(record, dict):
        raise RowError(f"record is {_kind(record)}, expected an object with fields")
    return record


def text_of(record: dict[str, Any]) -> str:
    """The text or caption of `record`, else the assistant's first answer in its LLaVA-style conversations.

    Raises:
        RowError: there is none, it is empty, or it is no text.
    """
    for field in TEXT_FIELDS:
        value = record.get(field)
        if value is None:
            continue
        if isinstance(value, bytes):
            value = utf8(value)
        if field == "conversations":
            return non_empty(_first_answer(value))
        if not isinstance(value, str):
            raise RowError(f"field {field!r} is {_kind(value)}, expected a string")
        return non_empty(value)
    raise RowError(_missing("text", record, TEXT_FIELDS))


def _first_answer(conversations: object) -> str:
    turns = conversations if isinstance(conversations, list) else []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant"):
            answer = turn.get("value")
            if not isinstance(answer, str):
                raise RowError(f"the assistant's first answer is {_kind(answer)}, expected a string")
            return answer
    speakers = [turn.get("from") if isinstance(turn, dict) else _kind(turn) for turn in turns]
    raise RowError(f"'conversations' has no turn from 'gpt' or 'assistant'; found turns from {speakers[:8]}")


def image_of(record: dict[str, Any]) -> bytes | str:
    """The encoded image in `record`, or the path or URI that it gives instead; see `image_value`.

    Raises:
        RowError: there is neither, or it can be no image.
    """
    for field in IMAGE_FIELDS:
        try:
            value = image_value(record.get(field))
        except UndecodableImage as error:
            raise RowError(f"field {field!r}: {error}") from error
        if value is None or value == "":
            continue
        if isinstance(value, str) and field == "bytes":
            raise RowError(f"field 'bytes' is a string that is no image in base64: {quote(value, 60)}")
        return value if isinstance(value, bytes) else unicode(value, f"field {field!r}")
    raise RowError(_missing("image", record, IMAGE_FIELDS))


def canonical(record: dict[str, Any]) -> bytes:
    """Bytes that equal records share, to derive the id of one that was rejected."""
    return repr(sorted(record.items())).encode("utf-8", "backslashreplace")


def _missing(what: str, record: dict[str, Any], asked: Sequence[str]) -> str:
    nulls = [field for field in asked if field in record]
    state = f"fields {nulls} are null" if nulls else f"found fields {sorted(map(str, record))[:20]}"
    return f"no {what}: {state}, expected one of {list(asked)}"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
