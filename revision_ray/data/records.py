"""Read records of JSON, JSON Lines, CSV, Parquet, text and tar files, each with its place in the file.

`read_records` is the one reader of all jobs; `data.interpret` and `data.turns` turn records into texts,
images and conversations. Files ending in .gz, .bz2 or .zst are decompressed while they are read.
"""

import codecs
import csv
import io
import json
import logging
import math
import posixpath
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote, shorten
from revision_ray.data.fields import (
    CAPTION_FIELDS,
    FILE_NAME,
    IMAGE_FIELDS,
    IMAGE_NAMES,
    LOCATION_FIELDS,
    TEXT_FIELDS,
    TEXT_IDS,
    TURN_FIELDS,
    DerivedIds,
    RowError,
    canonical,
    fields_of,
    is_filled,
    known_id,
    utf8,
    with_file_name,
)
from revision_ray.data.images import HEAD_BYTES, IMAGE_EXTENSIONS, is_image
from revision_ray.data.shards import Rejected, SourceSplit

TEXT_ENDINGS = ("txt", "text", "caption")
FILES_READ_AHEAD = 8  # files read at once: object stores answer in tens of milliseconds, whatever the size
_TEXT_BATCH_ROWS = 1024
_IMAGE_BATCH_ROWS = 16
_BOM = b"\xef\xbb\xbf"
_CODECS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def compression_of(path: str) -> str | None:
    """Return the codec of a compressed file (gzip, bz2 or zstd) by the ending of its name, else None."""
    return _CODECS.get(posixpath.splitext(path)[1].lower())


def uncompressed_name(path: str) -> str:
    """Return `path` without the ending of a compressed file: x.json for x.json.gz, x.tar for x.tgz."""
    stem, ending = posixpath.splitext(path)
    if compression_of(path) is None:
        return path
    return stem + ".tar" if ending.lower() == ".tgz" else stem


def open_content(uri: str) -> pa.NativeFile:
    """Open the file at `uri`; one that is compressed gives its content, and cannot be sought.

    Raises:
        DataError: nothing there, or it cannot be read.
    """
    file = storage.open_input(uri)
    codec = compression_of(storage.name_of(uri))
    return pa.CompressedInputStream(file, codec) if codec else file


COCO_ANNOTATIONS = "annotations"
MAX_RECORD_CHARACTERS = 64 * 2**20
_READ_BYTES = 2**20
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class JsonElement:
    """A value of a list, the bytes it was parsed from, where they begin, and the list's name, if any."""

    offset: int
    raw: bytes
    value: Any
    list_name: str = ""


def elements(uri: str, list_key: str) -> Iterator[JsonElement]:
    """Read the list that the JSON document at `uri` is, or that its object has under `list_key`.

    Where an object has no list "texts", its list "annotations" is read, if it holds captions (COCO).

    Memory is bounded by the largest value (MAX_RECORD_CHARACTERS at most). Bytes that are not UTF-8 become
    lone surrogates inside the values; `raw` has them as they are.

    Raises:
        DataError: no such list; or the document breaks: everything before that byte was given, nothing after
            it can be known.
    """
    with open_content(uri) as file:
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


def _list(text: "_Text", name: str = "") -> Iterator[JsonElement]:
    text.take("[")
    while text.peek() != "]":
        yield text.value(name)
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _member(text: "_Text", list_key: str) -> Iterator[JsonElement]:
    keys = []
    has_captions = False
    text.take("{")
    while text.peek() != "}":
        key = text.value().value
        text.take(":")
        if text.peek() == "[":
            may_be_coco = key == COCO_ANNOTATIONS and list_key == "texts" and "texts" not in keys
            # Lists of other names are walked through too, an element at a time.
            for number, element in enumerate(_list(text, key)):
                if may_be_coco and not number:
                    has_captions = isinstance(element.value, dict) and "caption" in element.value
                if key == list_key or (may_be_coco and has_captions):
                    yield element
        else:
            text.value()
        keys.append(key)
        if text.peek() != "}":
            text.take(",")
        if has_captions and key == list_key:
            raise DataError(
                f"{text.uri}: has captions in {COCO_ANNOTATIONS!r}, and a list {list_key!r} too; keep one"
            )
    text.take("}")
    if list_key not in keys and not has_captions:
        raise DataError(
            f"{text.uri}: is an object with the keys {quote(keys[:20])}; expected a list of records, or "
            f"an object with the list {list_key!r}, or with COCO's captions in {COCO_ANNOTATIONS!r}; a file "
            "of one record a line is named .jsonl"
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

    def value(self, list_name: str = "") -> JsonElement:
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
        element = JsonElement(self._offset, raw, value, list_name)
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


def lines(uri: str, start: int = 0, stop: float = math.inf) -> Iterator[tuple[int, bytes]]:
    """Read (byte offset, line without its break) of each line that begins in bytes [start, stop) of `uri`.

    Ranges that touch give every line once: a line belongs to the range where it begins. Lines end with LF or
    CRLF. Of a line longer than MAX_LINE_BYTES that many bytes and one more are given, which tells it apart.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with io.BufferedReader(open_content(uri), _READ_BYTES) as file:  # type: ignore[arg-type]
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
    """Read the samples of the tar at `uri`: consecutive members of one key, contents of `extensions` only.

    The key is the member's path up to the first dot of its base name, the extension what follows, in lower
    case (the WebDataset rule). Hidden members and those named `__*__` belong to no sample, nor do those
    without an extension. `by_content` judges by their first HEAD_BYTES which members of other extensions, or
    of none, are wanted too. Holds one sample in memory.

    Raises:
        DataError: missing, damaged or cut off; the message names the last sample that is whole. An archive
            without its end mark counts as cut off: how much is missing cannot be known.
    """
    sample: TarSample | None = None
    last_key: str | None = None
    with open_content(uri) as file:
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
                "restore the file (a compressed archive is named .tar.gz, .tgz, .tar.bz2 or .tar.zst)"
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
        stream = archive.fileobj
        assert stream is not None
        while rest := stream.read(_READ_BYTES):
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
    """Read the footer of the Parquet file at `uri`, and nothing else of it.

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
    """Read (row number in the file, record of `columns`) of row groups [start, stop).

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


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A record of a file: its place, its bytes, their content, and why it cannot be read, if so.

    The content of a record that cannot be read may still hold its id. `raw` is empty where the format gives
    values, not bytes.
    """

    where: str
    raw: bytes
    content: object
    bad: RowError | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of the record.

        Raises:
            RowError: the record cannot be read, or is no object.
        """
        if self.bad is not None:
            raise self.bad
        return fields_of(self.content)

    def rejected(self, reason: str, derived: DerivedIds) -> Rejected:
        """Return the entry of this record in the list of rejected ones, under its id if that is usable."""
        identity = None
        if isinstance(self.content, dict):
            with suppress(RowError):
                identity = known_id(self.content, TEXT_IDS)
        raw = self.raw or (canonical(self.content) if isinstance(self.content, dict) else b"")
        return Rejected(id=identity or derived(raw), uri=self.where, reason=reason)


def read_records(split: SourceSplit, columns: Sequence[str]) -> Iterator[SourceRecord]:
    """Read every record of `split`, in the order of the file; of a Parquet file these columns only.

    A line of text is a record with a `text`. A sample of a tar is the record in its KEY.json, with `text`
    from KEY.txt and the key as its id, which is the name of its image too where an image is in the sample. A
    caption of COCO has `image`, its image's file name, where `columns` ask for images.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    modality, _, container = split.kind.partition("_")
    if container == "parquet":
        return _from_parquet(split, columns, _IMAGE_BATCH_ROWS if modality == "image" else _TEXT_BATCH_ROWS)
    if container == "json":
        return _from_json(split, modality, columns)
    if container in ("csv", "tsv"):
        return _from_table(split, "," if container == "csv" else "\t")
    return {"lines": _from_lines, "jsonl": _from_jsonl, "files": _from_text_files, "tar": _from_tar}[
        container
    ](split)


def _from_lines(split: SourceSplit) -> Iterator[SourceRecord]:
    for offset, line in lines(split.uri, split.start, _end(split)):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        where = f"{split.uri}:byte {offset}"
        try:
            yield SourceRecord(where, raw, {"text": utf8(_whole(raw), offset + len(line) - len(raw))})
        except RowError as error:
            yield SourceRecord(where, raw, None, error)


def _from_jsonl(split: SourceSplit) -> Iterator[SourceRecord]:
    for offset, line in lines(split.uri, split.start, _end(split)):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        if raw.strip():
            yield record_of_json(raw, f"{split.uri}:byte {offset}", offset + len(line) - len(raw))


def _whole(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return line


def record_of_json(raw: bytes, where: str, offset: int) -> SourceRecord:
    """Parse one record as JSON; its first byte is byte `offset` of the file."""
    bad = None
    try:
        utf8(_whole(raw), offset)
    except RowError as error:
        bad = error
    try:
        # Where bytes are not UTF-8 the id may still be good.
        return SourceRecord(where, raw, json.loads(raw.decode("utf-8", "surrogateescape")), bad)
    except json.JSONDecodeError as error:
        at = offset + len(error.doc[: error.pos].encode("utf-8", "surrogateescape"))
        return SourceRecord(where, raw, None, bad or RowError(f"malformed JSON at byte {at}: {error.msg}"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting beyond the stack
        return SourceRecord(where, raw, None, bad or RowError(f"malformed JSON: {shorten(error)}"))


def _from_json(split: SourceSplit, modality: str, columns: Sequence[str]) -> Iterator[SourceRecord]:
    file_names: dict[Any, Any] | None = None
    for element in elements(split.uri, f"{modality}s"):
        if element.offset >= _end(split):
            return
        if element.offset < split.start:
            continue
        value, bad = element.value, None
        if modality == "text":
            try:
                utf8(element.raw, element.offset)
            except RowError as error:
                bad = error
        if element.list_name == COCO_ANNOTATIONS and "image" in columns and isinstance(value, dict):
            file_names = _coco_file_names(split.uri) if file_names is None else file_names
            image_id = value.get("image_id")
            if image_id in file_names:
                value = {**value, "image": file_names[image_id]}
            else:
                bad = bad or RowError(f"image_id {quote(image_id, 60)} is not among the file's 'images'")
        yield SourceRecord(f"{split.uri}:byte {element.offset}", element.raw, value, bad)


def _end(split: SourceSplit) -> float:
    """Return the byte where the split ends; a compressed file is one split, whose size nobody knows."""
    return split.stop or math.inf


def _coco_file_names(uri: str) -> dict[Any, Any]:
    """Return the file name of each image by its id."""
    images = (element.value for element in elements(uri, "images"))
    return {image.get("id"): image.get("file_name") for image in images if isinstance(image, dict)}


def _from_parquet(split: SourceSplit, columns: Sequence[str], batch_rows: int) -> Iterator[SourceRecord]:
    for number, record in rows(split.uri, split.start, split.stop, columns, batch_rows):
        yield SourceRecord(f"{split.uri}:row {number}", b"", record)


def table_header(uri: str, delimiter: str) -> list[str]:
    """Read the column names of the CSV or TSV file at `uri`; none where it does not begin with a header.

    Raises:
        DataError: the file cannot be read.
    """
    with suppress(csv.Error):
        for _, header in _table_rows(uri, delimiter):
            return header
    return []


def table_text_columns(header: Sequence[str]) -> list[str]:
    """Return the columns of a CSV or TSV file that hold texts."""
    return [name for name in CAPTION_FIELDS if name in header]


def table_image_columns(header: Sequence[str]) -> list[str]:
    """Return the columns of a CSV or TSV file that hold images or their locations."""
    return [name for name in (*IMAGE_FIELDS, FILE_NAME) if name in header]


def _from_table(split: SourceSplit, delimiter: str) -> Iterator[SourceRecord]:
    header: list[str] | None = None
    line = 1
    try:
        for line, cells in _table_rows(split.uri, delimiter):
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{split.uri}: two columns of {quote(header[:20])} have the same name")
                continue
            bad = None
            if len(cells) != len(header):
                bad = RowError(f"{len(cells)} cells, but the header has {len(header)}")
            fields = dict(zip(header, cells, strict=False))
            try:
                utf8("".join(cells).encode("utf-8", "surrogateescape"))
            except RowError as error:
                bad = RowError(f"invalid UTF-8 in line {line}: {error}")
            yield SourceRecord(f"{split.uri}:line {line}", b"", with_file_name(fields), bad)
    except csv.Error as error:
        raise DataError(
            f"{split.uri}: malformed at or after line {line}: {error}; what follows cannot be known. Quote "
            'cells that hold quotes, delimiters or line breaks, and double the quotes inside: "a ""b"" c"'
        ) from error


def _table_rows(uri: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Read (number of its first line, cells) of every row that is not blank.

    Raises:
        csv.Error: a quote that is not closed, or with text behind it.
        DataError: the file cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit of 131072 characters is for all readers
    with io.TextIOWrapper(
        io.BufferedReader(open_content(uri), _READ_BYTES),  # type: ignore[arg-type]
        "utf-8-sig",
        "surrogateescape",
        newline="",
    ) as text:
        reader = csv.reader(_bounded_lines(text), delimiter=delimiter, strict=True)
        first = 1
        try:
            for cells in reader:
                if cells:
                    yield first, cells
                first = reader.line_num + 1
        except OSError as error:
            raise DataError(f"{uri}: cannot be read near line {first}: {shorten(error, 400)}") from error


def _bounded_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise csv.Error(f"a line of more than {MAX_LINE_BYTES} characters")
        yield line


def _from_text_files(split: SourceSplit) -> Iterator[SourceRecord]:
    with ThreadPoolExecutor(FILES_READ_AHEAD) as pool:
        for start in range(0, len(split.files), _TEXT_BATCH_ROWS):
            uris = split.files[start : start + _TEXT_BATCH_ROWS]
            for uri, content in zip(uris, pool.map(storage.read_bytes, uris), strict=True):
                key, _, extension = storage.relative_path(uri, split.uri).rpartition(".")
                fields, bad = _of_file(uri, extension.lower(), content)
                yield SourceRecord(uri, b"", {**fields, "id": key}, bad)


def _from_tar(split: SourceSplit) -> Iterator[SourceRecord]:
    for sample in samples(split.uri, (*TEXT_ENDINGS, "json"), MAX_LINE_BYTES):
        yield record_of_sample(split.uri, sample)


def images_in(sample: TarSample) -> list[TarMember]:
    """Return the members of `sample` that are images by their extension, else by their content."""
    named = [member for member in sample.members if member.extension in IMAGE_EXTENSIONS]
    return named or [m for m in sample.members if m.content is not None and is_image(m.content[:HEAD_BYTES])]


def record_of_sample(uri: str, sample: TarSample) -> SourceRecord:
    """Return the record of a sample of the tar at `uri`, whose contents of TEXT_ENDINGS and json were read.

    Its text is that of KEY.txt (.text, .caption) that is not blank; all else is in KEY.json.
    """
    by_extension = {member.extension: member for member in reversed(sample.members)}
    members = [by_extension[ending] for ending in (*TEXT_ENDINGS, "json") if ending in by_extension]
    fields: dict[str, Any] = {}
    bad: RowError | None = None
    if not members:
        bad = RowError(f"no text: found members {quote(sorted(by_extension))}, expected .txt or .json")
    for member in reversed(members):  # the text of the first of them in place of those of the others
        if member.content is None:
            bad = RowError(f"{member.size} bytes, more than {MAX_LINE_BYTES}")
            continue
        member_fields, problem = _of_file(storage.join(uri, member.name), member.extension, member.content)
        if problem is not None:
            bad = problem
        elif member.extension == "json":
            fields = member_fields
        elif is_filled(member_fields["text"]) or len(members) == 1:
            fields, bad = {**fields, **member_fields}, None  # a text does not need the .json beside it
    if images_in(sample) and not _names_several(fields):
        fields = {name: value for name, value in fields.items() if name not in IMAGE_NAMES}
        fields["image"] = sample.key
    where = storage.join(uri, members[0].name if members else sample.key)
    return SourceRecord(where, b"", {**fields, "id": sample.key}, bad)


def _of_file(where: str, extension: str, content: bytes) -> tuple[dict[str, Any], RowError | None]:
    """Return the fields of a file that holds a text, or a record as JSON; or why it holds none."""
    raw = content.removeprefix(_BOM)
    try:
        if extension == "json":
            return record_of_json(raw, where, 0).fields(), None
        # The line break at the end of a text file is no part of the caption.
        return {"text": utf8(_whole(raw)).strip()}, None
    except RowError as error:
        return {}, error


def _names_several(fields: dict[str, Any]) -> bool:
    lists = [value for name in IMAGE_NAMES if isinstance(value := fields.get(name), list)]
    return any(len(value) > 1 for value in lists)
