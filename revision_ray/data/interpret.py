"""Interpret the records of a split as encoded images or as texts, in every format."""

import json
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote, shorten, shorten_words
from revision_ray.data.images import HEAD_BYTES, is_image
from revision_ray.data.records import (
    IMAGE_IDS,
    IMAGE_NAMES,
    MAX_LINE_BYTES,
    TEXT_FIELDS,
    TEXT_IDS,
    DerivedIds,
    RowError,
    TarMember,
    TarSample,
    canonical,
    elements,
    fields_of,
    footer,
    image_columns,
    image_of,
    is_filled,
    known_id,
    lines,
    rows,
    samples,
    utf8,
)
from revision_ray.data.shards import ImageRow, Rejected, SourceSplit, TextRow
from revision_ray.data.turns import text_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "jif", "png", "apng", "webp", "gif", "bmp", "dib", "tif",
                    "tiff", "avif", "avifs")  # fmt: skip
# Downloads keep what stood behind the name: .jpg_large, .jpg:orig, .jpg?w=640.
_IMAGE_ENDING = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})(\?[^/]*|[^a-z0-9./?][^./]*)?$", re.IGNORECASE)
_ANY_ENDING = re.compile(r"(?<=[^/])\.[A-Za-z][A-Za-z0-9]*$")  # .0001 is a part of the name
DEFAULT_MAX_IMAGE_BYTES = 128 * 2**20
_IMAGE_BATCH_ROWS = 16
_READ_AHEAD = 8  # files read at once: object stores answer in tens of milliseconds, whatever the size


def without_image_ending(path: str) -> str:
    """`path` without the ending of an image file, if it has one."""
    return _IMAGE_ENDING.sub("", path)


def has_image_ending(path: str) -> bool:
    return _IMAGE_ENDING.search(path) is not None


@dataclass(frozen=True, slots=True)
class _Found:
    """A row as found: its id if it brings one, where it stands, and its bytes, or why it has none."""

    id: str | None
    where: str
    content: bytes | RowError


@dataclass(frozen=True, slots=True)
class _NamedImage:
    """A row that names the file of its image, which is still to be read."""

    id: str | None
    uri: str


def read_images(
    split: SourceSplit, *, max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES
) -> Iterator[ImageRow | Rejected]:
    """Every image of `split`, still encoded, and every row without one with the reason, in the listed order.

    Nothing is decoded here. Records are asked for `image`, `bytes`, `jpg`, `jpeg`, `png`, `webp`, then for a
    location under `uri`, `image_uri`, `image_path`, `url`, `image_url`; any of them may hold bytes, base64, a
    `data:` URI, a path or a URI (`image_value`). Relative paths are relative to the file that names them.
    Holds a few images at a time.

    Raises:
        DataError: the file that holds the rows is missing, damaged or cut off; or the storage fails to give a
            file that may be there (a file that is not there is a rejected row).
    """
    derived = DerivedIds()
    for row in _read_ahead(_IMAGE_READERS[split.kind](split, max_image_bytes), max_image_bytes):
        if isinstance(row.content, RowError):
            yield Rejected(
                id=row.id or derived(row.where.encode()),
                uri=shorten_words(row.where),
                reason=str(row.content),
            )
        else:
            yield ImageRow(id=row.id or derived(row.content), uri=row.where, content=row.content)


def _read_ahead(rows: Iterator[_Found | _NamedImage], max_bytes: int) -> Iterator[_Found]:
    """`rows` in their order with every named file read, some of them in advance."""
    waiting: deque[_Found | Future[_Found]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        for row in rows:
            waiting.append(row if isinstance(row, _Found) else pool.submit(_read, row, max_bytes))
            # Rows that are here already need no window, unless earlier ones are still being read.
            while waiting and (isinstance(waiting[0], _Found) or len(waiting) > _READ_AHEAD):
                yield _ready(waiting.popleft())
        while waiting:
            yield _ready(waiting.popleft())


def _ready(row: "_Found | Future[_Found]") -> _Found:
    return row if isinstance(row, _Found) else row.result()


def _read(row: _NamedImage, max_bytes: int) -> _Found:
    try:
        with storage.open_input(row.uri) as file:
            size = file.size()
            return _Found(
                row.id, row.uri, RowError(_too_large(size, max_bytes)) if size > max_bytes else file.read()
            )
    except OSError as error:
        raise DataError(f"{row.uri}: cannot be read: {error}") from error
    except DataError as error:
        # Absent for good, whereas a storage that fails now may answer later: that must not lose rows.
        if storage.is_absence(error.__cause__):
            return _Found(row.id, row.uri, RowError("no such image file"))
        raise


def _too_large(size: int, max_bytes: int) -> str:
    return f"{size} bytes, more than max_image_bytes={max_bytes}"


def _images_from_files(split: SourceSplit, max_bytes: int) -> Iterator[_NamedImage]:
    for uri in split.files:
        below = storage.relative_path(uri, split.uri)
        ending = _IMAGE_ENDING if has_image_ending(below) else _ANY_ENDING
        yield _NamedImage(ending.sub("", below), uri)


def _images_from_tar(split: SourceSplit, max_bytes: int) -> Iterator[_Found]:
    for sample in samples(split.uri, IMAGE_EXTENSIONS, max_bytes, by_content=is_image):
        yield from _of_sample(split.uri, sample, max_bytes)


def images_in(sample: TarSample) -> list[TarMember]:
    """The members of `sample` that are images by their extension, else by their content."""
    named = [member for member in sample.members if member.extension in IMAGE_EXTENSIONS]
    return named or [m for m in sample.members if m.content is not None and is_image(m.content[:HEAD_BYTES])]


def _of_sample(uri: str, sample: TarSample, max_bytes: int) -> Iterator[_Found]:
    images = images_in(sample)
    if not images:
        found = quote(sorted(member.extension for member in sample.members))
        bad = RowError(f"no image: found members {found}, expected one of {list(IMAGE_EXTENSIONS)}")
        yield _Found(sample.key, storage.join(uri, sample.key), bad)
    for number, member in enumerate(images):
        content = RowError(_too_large(member.size, max_bytes)) if member.content is None else member.content
        if number:
            content = RowError(
                f"sample {quote(sample.key, 80)} has another image, {quote(images[0].name, 80)}, which was "
                "taken"
            )
        yield _Found(sample.key, storage.join(uri, member.name), content)


def _images_from_parquet(split: SourceSplit, max_bytes: int) -> Iterator[_Found | _NamedImage]:
    columns = (*IMAGE_IDS, *image_columns(footer(split.uri).schema))
    for number, record in rows(split.uri, split.start, split.stop, columns, _IMAGE_BATCH_ROWS):
        yield _of_record(record, f"{split.uri}:row {number}", split.uri, max_bytes)


def _images_from_json(split: SourceSplit, max_bytes: int) -> Iterator[_Found | _NamedImage]:
    for element in elements(split.uri, "images"):
        if element.offset >= split.stop:
            return
        if element.offset >= split.start:
            yield _of_record(element.value, f"{split.uri}:byte {element.offset}", split.uri, max_bytes)


def _of_record(record: object, where: str, beside: str, max_bytes: int) -> _Found | _NamedImage:
    identity = None
    try:
        identity = known_id(fields_of(record), IMAGE_IDS)
        image = image_of(fields_of(record))
        if isinstance(image, str):
            return _NamedImage(identity, _located(image, beside))
        if len(image) > max_bytes:
            raise RowError(_too_large(len(image), max_bytes))
        return _Found(identity, where, image)
    except RowError as error:
        return _Found(identity, where, error)


def _located(path: str, beside: str) -> str:
    """The URI that `path` means in a file at `beside`."""
    scheme = path.partition("://")[0] if "://" in path else ""
    if scheme not in ("", "file", "s3", "gs"):
        raise RowError(
            f"{shorten(path)}: read are local paths, s3:// and gs://, not {shorten(scheme, 20)}://; download "
            "images first"
        )
    if scheme or path.startswith("/"):
        return path
    folder, path = storage.parent_of(beside), posixpath.normpath(path)
    while path.startswith("../"):  # An object store would take the dots for a part of the name.
        folder, path = storage.parent_of(folder), path.removeprefix("../")
    return storage.join(folder, path)


_IMAGE_READERS: dict[str, Callable[[SourceSplit, int], Iterator[_Found | _NamedImage]]] = {
    "image_files": _images_from_files,
    "image_tar": _images_from_tar,
    "image_parquet": _images_from_parquet,
    "image_json": _images_from_json,
}


TEXT_ENDINGS = ("txt", "text", "caption")
_TEXT_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """A record as found: where it stands, its bytes, what they say, and why it cannot be read, if so.

    What cannot be read may still say its id.
    """

    where: str
    raw: bytes
    content: object
    bad: RowError | None = None

    def fields(self) -> dict[str, Any]:
        """
        Raises:
            RowError: the record cannot be read, or is no object.
        """
        if self.bad is not None:
            raise self.bad
        return fields_of(self.content)

    def rejected(self, reason: str, derived: DerivedIds) -> Rejected:
        """The record on the list of rejected ones, under its id where it has a usable one."""
        identity = None
        if isinstance(self.content, dict):
            with suppress(RowError):
                identity = known_id(self.content, TEXT_IDS)
        raw = self.raw or (canonical(self.content) if isinstance(self.content, dict) else b"")
        return Rejected(id=identity or derived(raw), uri=self.where, reason=reason)


def read_texts(split: SourceSplit) -> Iterator[TextRow | Rejected]:
    """Every text of `split`, and every row that holds none with the reason, in the order of the file.

    Texts are given as stored, whatever their length. What a record's text and id are: see `data.records`.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the rows before were given.
    """
    derived = DerivedIds()
    for found in read_records(split, (*TEXT_IDS, *TEXT_FIELDS)):
        try:
            identity = known_id(found.fields(), TEXT_IDS)
            text = text_of(found.fields())
            yield TextRow(id=identity or derived(text.encode()), text=text)
        except RowError as error:
            yield found.rejected(str(error), derived)


def read_records(split: SourceSplit, columns: Sequence[str]) -> Iterator[FoundRecord]:
    """Every record of `split`, in the order of the file; of a Parquet file these columns of it.

    A line of text is a record with a `text`; a sample of a tar is that of its KEY.json, its `text` that of
    KEY.txt, its id the key, which is the name of its image too where an image is in the sample.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    if split.kind == "text_parquet":
        return _texts_from_parquet(split, columns)
    return _TEXT_READERS[split.kind](split)


def _from_lines(split: SourceSplit) -> Iterator[FoundRecord]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        where = f"{split.uri}:byte {offset}"
        try:
            yield FoundRecord(where, raw, {"text": utf8(_whole(raw), offset + len(line) - len(raw))})
        except RowError as error:
            yield FoundRecord(where, raw, None, error)


def _from_jsonl(split: SourceSplit) -> Iterator[FoundRecord]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        if raw.strip():
            yield _from_json_bytes(raw, f"{split.uri}:byte {offset}", offset + len(line) - len(raw))


def _whole(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return line


def _from_json_bytes(raw: bytes, where: str, offset: int) -> FoundRecord:
    """One record as JSON, whose first byte is byte `offset` of where it was found."""
    bad = None
    try:
        utf8(_whole(raw), offset)
    except RowError as error:
        bad = error
    try:
        # Where bytes are not UTF-8 the id may still be good.
        return FoundRecord(where, raw, json.loads(raw.decode("utf-8", "surrogateescape")), bad)
    except json.JSONDecodeError as error:
        at = offset + len(error.doc[: error.pos].encode("utf-8", "surrogateescape"))
        return FoundRecord(where, raw, None, bad or RowError(f"malformed JSON at byte {at}: {error.msg}"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting beyond the stack
        return FoundRecord(where, raw, None, bad or RowError(f"malformed JSON: {shorten(error)}"))


def _texts_from_json(split: SourceSplit) -> Iterator[FoundRecord]:
    for element in elements(split.uri, "texts"):
        if element.offset >= split.stop:
            return
        if element.offset < split.start:
            continue
        bad = None
        try:
            utf8(element.raw, element.offset)
        except RowError as error:
            bad = error
        yield FoundRecord(f"{split.uri}:byte {element.offset}", element.raw, element.value, bad)


def _texts_from_parquet(split: SourceSplit, columns: Sequence[str]) -> Iterator[FoundRecord]:
    for number, record in rows(split.uri, split.start, split.stop, columns, _TEXT_BATCH_ROWS):
        yield FoundRecord(f"{split.uri}:row {number}", b"", record)


def _texts_from_files(split: SourceSplit) -> Iterator[FoundRecord]:
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        for start in range(0, len(split.files), _TEXT_BATCH_ROWS):
            uris = split.files[start : start + _TEXT_BATCH_ROWS]
            for uri, content in zip(uris, pool.map(storage.read_bytes, uris), strict=True):
                key, _, extension = storage.relative_path(uri, split.uri).rpartition(".")
                fields, bad = _of_file(uri, extension.lower(), content)
                yield FoundRecord(uri, b"", {**fields, "id": key}, bad)


def _texts_from_tar(split: SourceSplit) -> Iterator[FoundRecord]:
    for sample in samples(split.uri, (*TEXT_ENDINGS, "json"), MAX_LINE_BYTES):
        yield record_of_sample(split.uri, sample)


def record_of_sample(uri: str, sample: TarSample) -> FoundRecord:
    """The record of a sample of the tar at `uri`, whose contents of TEXT_ENDINGS and json were read.

    Its text is that of KEY.txt (.text, .caption) that is not blank; all else is said by KEY.json.
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
        said, problem = _of_file(storage.join(uri, member.name), member.extension, member.content)
        if problem is not None:
            bad = problem
        elif member.extension == "json":
            fields = said
        elif is_filled(said["text"]) or len(members) == 1:
            fields, bad = {**fields, **said}, None  # a text does not need the .json beside it
    if images_in(sample) and not _names_several(fields):
        fields = {name: value for name, value in fields.items() if name not in IMAGE_NAMES}
        fields["image"] = sample.key
    where = storage.join(uri, members[0].name if members else sample.key)
    return FoundRecord(where, b"", {**fields, "id": sample.key}, bad)


def _of_file(where: str, extension: str, content: bytes) -> tuple[dict[str, Any], RowError | None]:
    """The fields of a file that holds a text, or a record as JSON; or why it holds none."""
    raw = content.removeprefix(_BOM)
    try:
        if extension == "json":
            return _from_json_bytes(raw, where, 0).fields(), None
        # The line break at the end of a text file is no part of the caption.
        return {"text": utf8(_whole(raw)).strip()}, None
    except RowError as error:
        return {}, error


def _names_several(fields: dict[str, Any]) -> bool:
    lists = [value for name in IMAGE_NAMES if isinstance(value := fields.get(name), list)]
    return any(len(value) > 1 for value in lists)


_TEXT_READERS = {
    "text_files": _texts_from_files,
    "text_lines": _from_lines,
    "text_jsonl": _from_jsonl,
    "text_json": _texts_from_json,
    "text_tar": _texts_from_tar,
}
