"""Read records of JSON, JSONL, Parquet and tar files in ranges, and say what a record means.

Every reader asks the functions here, so that a record means the same wherever it is read: texts and images
of the embed job, captions of stage 1, conversations of stage 2, pairs of the encoder's training.

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

import codecs
import hashlib
import io
import json
import logging
import posixpath
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote, shorten
from revision_ray.data.images import HEAD_BYTES, UndecodableImage, image_value

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


MAX_RECORD_CHARACTERS = 64 * 2**20
_READ_BYTES = 2**20
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class JsonElement:
    """A value of the list, the bytes it was parsed from, and the byte offset where they begin."""

    offset: int
    raw: bytes
    value: Any


def elements(uri: str, list_key: str) -> Iterator[JsonElement]:
    """The values of the list that the JSON document at `uri` is, or that its object has under `list_key`.

    Memory is bounded by the largest value (MAX_RECORD_CHARACTERS at most). Bytes that are not UTF-8 are given
    as lone surrogates inside the values; `raw` shows them as they are.

    Raises:
        DataError: no such list; or the document breaks: everything before that byte was given, nothing after
            it can be known.
    """
    with storage.open_input(uri) as file:
        text = _Text(file, uri)
        opening = text.peek()
        if opening == "[":
            yield from _list(text)
        elif opening == "{":
            yield from _member(text, list_key)
        else:
            raise text.broken("expected a list of records, or an object that holds one")
        if text.peek():
            raise text.broken(
                "text follows the end of the JSON document; if it has one record a line, name it .jsonl"
            )


def _list(text: "_Text") -> Iterator[JsonElement]:
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _member(text: "_Text", list_key: str) -> Iterator[JsonElement]:
    keys = []
    text.take("{")
    while text.peek() != "}":
        keys.append(text.value().value)
        text.take(":")
        if text.peek() == "[":
            for element in _list(text):  # Lists of other names are walked through too, an element at a time.
                if keys[-1] == list_key:
                    yield element
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if list_key not in keys:
        raise DataError(
            f"{text.uri}: is an object with the keys {quote(keys[:20])}; expected a list of records, or "
            f"an object with the list {list_key!r}; a file of one record a line is named .jsonl"
        )


class _Text:
    """The text of a JSON file from a position on: grows by reading, forgets what was taken."""

    def __init__(self, file: pa.NativeFile, uri: str) -> None:
        self.uri = uri
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._buffer = ""
        self._position = 0
        self._offset = 0  # bytes of the file before self._position
        self._ended = False
        self._grow()
        if self._buffer.startswith("\ufeff"):
            self._position, self._offset = 1, 3

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        if self._position < len(self._buffer) and self._buffer[self._position] not in " \t\r\n":
            return self._buffer[self._position]
        while True:
            match = _WHITESPACE.match(self._buffer, self._position)
            assert match is not None
            self._offset += match.end() - self._position
            self._position = match.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if self._ended:
                return ""
            self._grow()

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.broken(f"expected {character!r}", cut_off=not found)
        self._position += 1
        self._offset += 1

    def value(self) -> JsonElement:
        """The next JSON value."""
        if not self.peek():
            raise self.broken("expected a value", cut_off=True)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
                # A number near the end of the buffer may go on behind it: 12|34, 12.|5, 12e+|3.
                if end + 3 <= len(self._buffer) or self._ended:
                    break
            except RecursionError as error:
                raise self.broken("values are nested too deeply") from error
            except ValueError as error:
                # An error far from the end of the buffer is not for want of text; an open string may be.
                at = getattr(error, "pos", self._position)
                unfinished = at > len(self._buffer) - 32 or str(error).startswith("Unterminated string")
                if self._ended or not unfinished:
                    raise self.broken(str(error).partition(":")[0], at, cut_off=unfinished) from error
            if len(self._buffer) - self._position > MAX_RECORD_CHARACTERS:
                raise self.broken(f"a value has more than {MAX_RECORD_CHARACTERS} characters")
            self._grow()
        raw = self._buffer[self._position : end].encode("utf-8", "surrogateescape")
        element = JsonElement(self._offset, raw, value)
        self._position = end
        self._offset += len(raw)
        return element

    def _grow(self) -> None:
        # Twice what is there, so that a long value is parsed again only a few times.
        unread = len(self._buffer) - self._position
        try:
            read = self._file.read(max(_READ_BYTES, unread))
        except OSError as error:
            raise DataError(
                f"{self.uri}: cannot be read near byte {self._offset}: {shorten(error, 400)}"
            ) from error
        self._ended = not read
        self._buffer = self._buffer[self._position :] + self._decoder.decode(read, final=self._ended)
        self._position = 0

    def broken(self, reason: str, position: int | None = None, *, cut_off: bool = False) -> DataError:
        """The error that this document breaks at `position` of the buffer (where it stands, if None)."""
        position = self._position if position is None else position
        before = self._buffer[self._position : position].encode("utf-8", "surrogateescape")
        near = self._buffer[position : position + 40]
        state = "the file ends there, cut off" if cut_off else f"found {near!r}"
        return DataError(
            f"{self.uri}: malformed JSON at byte {self._offset + len(before)}: {reason}, but {state}; "
            "restore the file, for what follows cannot be known"
        )


MAX_LINE_BYTES = 64 * 2**20


def lines(uri: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line without its break) of each line that begins in bytes [start, stop) of `uri`.

    Ranges that touch give every line once: a line belongs to the range where it begins. Lines end with LF or
    CRLF. Of a line longer than MAX_LINE_BYTES that many bytes and one more are given, which tells it apart.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with io.BufferedReader(storage.open_input(uri), _READ_BYTES) as file:  # type: ignore[arg-type]
        offset = start
        try:
            if start:
                # From one byte earlier: a line that begins exactly at `start` then costs one line break only.
                file.seek(start - 1)
                offset += _skip_line(file) - 1
            while offset < stop:
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                length = len(line)
                if length > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    length += _skip_line(file)
                yield offset, line.removesuffix(b"\n").removesuffix(b"\r")
                offset += length
        except OSError as error:
            raise DataError(f"{uri}: cannot be read near byte {offset}: {shorten(error, 400)}") from error


def _skip_line(file: io.BufferedReader) -> int:
    """Bytes up to and including the next line break, which `file` now stands behind."""
    skipped = 0
    while piece := file.readline(_READ_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


_log = logging.getLogger(__name__)

ByContent = Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file of a sample; `content` is None where it was not asked for or is larger than was allowed."""

    name: str
    extension: str
    size: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class TarSample:
    key: str
    members: list[TarMember]


def samples(
    uri: str, extensions: Collection[str], max_bytes: int, *, by_content: ByContent | None = None
) -> Iterator[TarSample]:
    """The samples of the tar at `uri`: consecutive members of one key, with contents of `extensions` only.

    The key is the member's path up to the first dot of its base name, the extension what follows, in lower
    case (the WebDataset rule). Hidden members and those named `__*__` belong to no sample, nor do those
    without an extension. `by_content` judges by their first HEAD_BYTES which members of other extensions, or
    of none, are wanted too. Holds one sample in memory.

    Raises:
        DataError: missing, compressed, damaged or cut off; the message names the last sample that is
            whole. An archive
            without its end mark counts as cut off: how much is missing cannot be known.
    """
    sample: TarSample | None = None
    last_key: str | None = None
    with storage.open_input(uri) as file:
        try:
            for name, extension, size, content in _files(file, uri, extensions, max_bytes, by_content):
                key = name[: len(name) - len(extension) - 1] if extension else name
                if sample is not None and sample.key != key:
                    yield sample
                    last_key, sample = sample.key, None
                sample = sample or TarSample(key, [])
                sample.members.append(TarMember(name, extension.lower(), size, content))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{uri}: is no sound tar archive: {shorten(error)}; the last whole sample is "
                f"{None if last_key is None else quote(last_key)}; "
                "restore the file (compressed archives are not read: decompress them first)"
            ) from error
    if sample is not None:
        yield sample


def _files(
    file: pa.NativeFile,
    uri: str,
    extensions: Collection[str],
    max_bytes: int,
    by_content: ByContent | None,
) -> Iterator[tuple[str, str, int, bytes | None]]:
    """(name, extension as spelt, size, content if wanted) of the members that belong to samples."""
    num_passed = 0
    with tarfile.open(fileobj=file, mode="r|", bufsize=_READ_BYTES, tarinfo=_StrictTarInfo) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header seen
            name = _unicode(entry.name).removeprefix("./")
            stem, _, extension = posixpath.basename(name).partition(".")
            reserved = stem.startswith("__") and stem.endswith("__")
            if not entry.isfile() or not stem or reserved:
                continue
            by_name = extension.lower() in extensions
            content = None
            if entry.size <= max_bytes and (by_name or by_content is not None):
                content = _content(archive, entry, None if by_name else by_content)
            if extension or content is not None:
                yield name, extension, entry.size, content
            else:
                num_passed += 1
        file.seek(archive.offset)  # type: ignore[attr-defined]
        while rest := file.read(_READ_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("data follows the end mark; was it joined with cat? join with tar -A")
    if num_passed:
        _log.warning("%s: passed over %d members without an extension", uri, num_passed)


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, wanted: ByContent | None) -> bytes | None:
    reader = archive.extractfile(entry)
    assert reader is not None  # `entry` is a regular file
    head = b"" if wanted is None else reader.read(HEAD_BYTES)
    if wanted is not None and not wanted(head):
        return None
    content = head + reader.read() if head else reader.read()
    if len(content) != entry.size:
        raise tarfile.ReadError(f"{shorten(entry.name)} has {len(content)} of {entry.size} bytes")
    return content


def _unicode(name: str) -> str:
    """`name` with bytes that are not UTF-8 spelt out, so that it can be an id."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, or missing where the end mark should be, is an error.

    `tarfile` takes such a header behind the first member for the end of the archive, and the rest would be
    lost.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the end mark
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the file ends without the end mark of an archive") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


# Remote column chunks are fetched in pieces of this size; local files are memory-mapped.
_PARQUET_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ParquetFooter:
    """Columns, and rows and bytes (uncompressed) of each row group."""

    uri: str
    schema: pa.Schema
    rows: list[int]
    bytes: list[int]


def footer(uri: str) -> ParquetFooter:
    """The footer of the Parquet file at `uri`; nothing else of it is read.

    Raises:
        DataError: it is no Parquet file.
    """
    try:
        with storage.open_input(uri) as file, pq.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
            return ParquetFooter(
                uri,
                parquet.schema_arrow,
                [group.num_rows for group in groups],
                [g.total_byte_size for g in groups],
            )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: is no readable Parquet file: {shorten(error, 400)}; write it again or leave it out"
        ) from error


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns of `schema` that may hold images or their locations."""
    return [name for name in IMAGE_FIELDS if name in schema.names and _holds_images(schema.field(name).type)]


def _holds_images(kind: pa.DataType) -> bool:
    if pat.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    if pat.is_list(kind) or pat.is_large_list(kind):
        return pat.is_integer(kind.value_type)  # the numbers of bytes
    return _is_text(kind) or _is_bytes(kind)


def holds_image_bytes(schema: pa.Schema) -> bool:
    """Whether a column of `schema` may hold images themselves, not only where they lie."""
    columns = set(image_columns(schema)) - set(LOCATION_FIELDS)
    return any(not _is_text(schema.field(name).type) for name in columns)


def is_download_list(schema: pa.Schema) -> bool:
    """Whether `schema` is that of img2dataset's list of downloads, one row a URL, failed ones among them."""
    return {"key", "url", "status", "error_message"} <= set(schema.names)


def text_columns(schema: pa.Schema) -> list[str]:
    """The columns of `schema` that may hold texts."""
    found = [name for name in TEXT_FIELDS if name in schema.names]
    return [name for name in found if _holds_texts(name, schema.field(name).type)]


def _holds_texts(name: str, kind: pa.DataType) -> bool:
    listed = pat.is_list(kind) or pat.is_large_list(kind)
    if name in TURN_FIELDS:
        return listed
    return _is_text(kind) or _is_bytes(kind) or (listed and _is_text(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_binary_view(kind)


def rows(
    uri: str, start: int, stop: int, columns: Sequence[str], batch_size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number in the file, record of `columns`) of row groups [start, stop).

    Columns that the file lacks are left out; a string that is not UTF-8 is given as bytes. Where img2dataset
    wrote images into the table, the rows of failed downloads, which hold none, are left out. Holds
    `batch_size` rows and the pages that they lie in.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        # pre_buffer would load whole column chunks: gigabytes where images lie in the table.
        with (
            storage.open_input(uri) as file,
            pq.ParquetFile(file, pre_buffer=False, buffer_size=_PARQUET_READ_BYTES) as parquet,
        ):
            number = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
            schema = parquet.schema_arrow
            present = [name for name in columns if name in schema.names]
            with_status = is_download_list(schema) and holds_image_bytes(schema)
            read = dict.fromkeys([*present, "status"] if with_status else present)
            for batch in parquet.iter_batches(
                batch_size, row_groups=list(range(start, stop)), columns=list(read)
            ):
                for i in range(batch.num_rows):
                    if not with_status or batch.column("status")[i].as_py() == "success":
                        yield number, {name: _value(batch.column(name)[i]) for name in present}
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: row groups {start} to {stop} cannot be read: {shorten(error, 400)}"
        ) from error


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:  # Other writers do not check that a string column holds UTF-8.
        return error.object
