"""Rules for the fields of a record: which of them hold its id, text, turns and images.

All jobs follow these rules: texts and images of the embed job, captions of stage 1, conversations of stage 2,
pairs of the encoder's training.

A field that is null, NaN, blank or an empty list is not filled, and hides no other field. The first filled
field counts, in this order:

- id of a text or conversation: `id`, `key`, `text_id`, `question_id`; of an image: `id`, `image_id`, `key`;
- text: `text`, `caption`, `captions`, else the assistant's first answer in the turns that is trained on.
  A list of several texts is several captions and no text;
- turns: `conversations`, `messages` or `conversation`, of {from, value} or {role, content}; roles are human,
  user, gpt, assistant, system, developer; content is a string or a list of text and image parts;
- image: `image` or `images`, then the fields of a location.

Fields that change what a conversation teaches are honoured: `system` (and its other names) becomes a system
turn; `weight`, `loss`, `train` and the like of an assistant's turn, 0 or 1, say whether it is trained on.
Those that would change it in a way that is not supported (`tools`, `videos`, `rejected`, ...: REFUSED_FIELDS
and REFUSED_TURN_FIELDS) reject the record, as do fields that contradict each other. All others are metadata.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from revision_ray.core.errors import DataError, quote
from revision_ray.data.images import UndecodableImage, image_value

# A text does not take `image_id`: five captions of one image share it.
TEXT_IDS = ("id", "key", "text_id", "question_id")
CAPTION_FIELDS = ("text", "caption", "captions")
TURN_FIELDS = ("conversations", "messages", "conversation")
TEXT_FIELDS = (*CAPTION_FIELDS, *TURN_FIELDS)
IMAGE_IDS = ("id", "image_id", "key")
LOCATION_FIELDS = ("uri", "image_uri", "image_path", "url", "image_url")
# `jpg`, `png` and `webp` hold bytes in the tables that img2dataset writes.
IMAGE_FIELDS = ("image", "bytes", "jpg", "jpeg", "png", "webp", *LOCATION_FIELDS)
# Fields under which a conversation or a caption names images; `uri` and `url` are often where a text is from.
IMAGE_NAMES = ("image", "images", "image_path", "image_uri", "image_url")
# The image of a row in COCO's lists and in the tables beside image folders.
FILE_NAME = "file_name"


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
        if not is_filled(value):
            continue
        if isinstance(value, bytes):
            value = utf8(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # an integer column with gaps, as pandas stores it
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"field {field!r} is {kind_of(value)}, expected a string or a number")
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


def fields_of(record: object) -> dict[str, Any]:
    """`record`, known to be an object with fields."""
    if not isinstance(record, dict):
        raise RowError(f"record is {kind_of(record)}, expected an object with fields")
    return record


def is_filled(value: object) -> bool:
    """Whether a field says something: it is not null, NaN, blank, or an empty list or object."""
    if isinstance(value, str | bytes):
        return bool(value.strip())
    if isinstance(value, list | tuple | dict):
        return bool(value)
    # NaN is what pandas makes of a missing value.
    return value is not None and not (isinstance(value, float) and value != value)


def with_file_name(record: dict[str, Any]) -> dict[str, Any]:
    """Return `record` with its `file_name` as `image`, where no other field names an image."""
    if not is_filled(record.get(FILE_NAME)) or any(is_filled(record.get(field)) for field in IMAGE_FIELDS):
        return record
    return {**record, "image": record[FILE_NAME]}


def image_names(record: dict[str, Any]) -> tuple[str, ...]:
    """The paths or ids by which `record` names its images outside its turns; none where it names none.

    Raises:
        RowError: a name is no string, or `image` and `images` differ.
    """
    return named_images(record, IMAGE_NAMES, "the record")


def named_images(fields: dict[str, Any], asked: Sequence[str], where: str) -> tuple[str, ...]:
    filled = [field for field in asked if is_filled(fields.get(field))]
    paths: dict[str, tuple[str, ...]] = {}
    for field in filled:
        value = fields[field]
        paths[field] = tuple(
            checked_path(image.get("path") if isinstance(image, dict) else image, f"field {field!r}")
            for image in (value if isinstance(value, list) else [value])
        )
        if field not in ("image", "images"):
            break  # the same image, elsewhere
    if not paths:
        return ()
    if paths.get("image", paths.get("images")) != paths.get("images", paths.get("image")):
        raise RowError(f"'image' and 'images' of {where} differ; keep one of them")
    return next(iter(paths.values()))


def checked_path(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise RowError(f"{what} holds {value!r:.60}, expected a path or a list of paths")
    return unicode(value, what)


def first_filled(
    fields: dict[str, Any], asked: Sequence[str], where: str, alike: dict[str, Any] | None = None
) -> Any:
    """The value of the first of `asked` that is filled, else of the first that is there.

    Others that are filled must be equal to it, or stand for the same in `alike`.
    """
    filled = [field for field in asked if is_filled(fields.get(field))]
    check_equal(fields, filled, where, alike)
    present = filled or [field for field in asked if fields.get(field) is not None]
    return fields[present[0]] if present else None


def check_equal(
    fields: dict[str, Any], filled: Sequence[str], where: str, alike: dict[str, Any] | None = None
) -> None:
    for other in filled[1:]:
        first, second = fields[filled[0]], fields[other]
        if first != second and (not alike or alike.get(str(first)) != alike.get(str(second))):
            raise RowError(f"{filled[0]!r} and {other!r} of {where} differ; keep one of them")


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
    raise RowError(missing("image", record, IMAGE_FIELDS))


def canonical(record: dict[str, Any]) -> bytes:
    """Bytes that equal records share, to derive the id of one that was rejected."""
    return repr(sorted(record.items())).encode("utf-8", "backslashreplace")


def missing(what: str, record: dict[str, Any], asked: Sequence[str]) -> str:
    nulls = [field for field in asked if field in record]
    state = (
        f"fields {nulls} are null or empty"
        if nulls
        else f"found fields {quote(sorted(map(str, record))[:20])}"
    )
    return f"no {what}: {state}, expected one of {list(asked)}"


def kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
