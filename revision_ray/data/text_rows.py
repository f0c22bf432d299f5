"""Texts of a split, from whatever format holds them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from revision_ray import storage
from revision_ray.data.json_stream import elements
from revision_ray.data.line_ranges import MAX_LINE_BYTES, lines
from revision_ray.data.parquet_rows import rows
from revision_ray.data.records import (
    TEXT_FIELDS,
    TEXT_IDS,
    DerivedIds,
    RowError,
    canonical,
    fields_of,
    known_id,
    non_empty,
    text_of,
    utf8,
)
from revision_ray.data.schema import Rejected, Split, TextRow
from revision_ray.data.tar_stream import Sample, samples
from revision_ray.errors import quote, shorten

TEXT_ENDINGS = ("txt", "text", "caption")
_BATCH_ROWS = 1024
_READ_AHEAD = 8  # files read at once
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class _Found:
    """A row as found: the id it brings, where it stands, its bytes, and its text or why it has none."""

    id: str | None
    where: str
    raw: bytes
    text: str | RowError


def read_texts(split: Split) -> Iterator[TextRow | Rejected]:
    """Every text of `split`, and every row that holds none with the reason, in the order of the file.

    Texts are given as stored, whatever their length. Records are asked for `text`, `caption`, then
    `conversations` (the assistant's first answer), and for their id under `id`, `key`, `text_id`.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the rows before were given.
    """
    derived = DerivedIds()
    for found in _READERS[split.kind](split):
        if isinstance(found.text, RowError):
            yield Rejected(id=found.id or derived(found.raw), uri=found.where, reason=str(found.text))
        else:
            yield TextRow(id=found.id or derived(found.text.encode()), text=found.text)


def _found(record: object, raw: bytes, where: str, bad: RowError | None = None) -> _Found:
    """The text of `record`, or the reason against it, with its id in both cases where it has a usable one."""
    identity = None
    try:
        identity = known_id(fields_of(record), TEXT_IDS)
        if bad is not None:
            raise bad
        return _Found(identity, where, raw, text_of(fields_of(record)))
    except RowError as error:
        return _Found(identity, where, raw, bad or error)


def _from_lines(split: Split) -> Iterator[_Found]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        where = f"{split.uri}:byte {offset}"
        try:
            text = non_empty(utf8(_whole(raw), offset + len(line) - len(raw)))
        except RowError as error:
            text = error
        yield _Found(None, where, raw, text)


def _from_jsonl(split: Split) -> Iterator[_Found]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        if raw.strip():
            yield _from_json_bytes(raw, f"{split.uri}:byte {offset}", offset + len(line) - len(raw))


def _whole(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return line


def _from_json_bytes(raw: bytes, where: str, offset: int) -> _Found:
    """The row of one record as JSON, whose first byte is byte `offset` of where it was found."""
    bad = None
    try:
        utf8(_whole(raw), offset)
    except RowError as error:
        bad = error
    try:
        # Where bytes are not UTF-8 the id may still be good.
        record = json.loads(raw.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        at = offset + len(error.doc[: error.pos].encode("utf-8", "surrogateescape"))
        return _Found(None, where, raw, bad or RowError(f"malformed JSON at byte {at}: {error.msg}"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting beyond the stack
        return _Found(None, where, raw, bad or RowError(f"malformed JSON: {shorten(error)}"))
    return _found(record, raw, where, bad)


def _from_json(split: Split) -> Iterator[_Found]:
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
        yield _found(element.value, element.raw, f"{split.uri}:byte {element.offset}", bad)


def _from_parquet(split: Split) -> Iterator[_Found]:
    columns = (*TEXT_IDS, *TEXT_FIELDS)
    for number, record in rows(split.uri, split.start, split.stop, columns, _BATCH_ROWS):
        found = _found(record, b"", f"{split.uri}:row {number}")
        yield replace(found, raw=canonical(record)) if isinstance(found.text, RowError) else found


def _from_files(split: Split) -> Iterator[_Found]:
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        for start in range(0, len(split.files), _BATCH_ROWS):
            uris = split.files[start : start + _BATCH_ROWS]
            for uri, content in zip(uris, pool.map(storage.read_bytes, uris), strict=True):
                key, _, extension = storage.relative_path(uri, split.uri).rpartition(".")
                yield _of_file(key, uri, extension.lower(), content)


def _from_tar(split: Split) -> Iterator[_Found]:
    for sample in samples(split.uri, (*TEXT_ENDINGS, "json"), MAX_LINE_BYTES):
        yield _of_sample(split.uri, sample)


def _of_sample(uri: str, sample: Sample) -> _Found:
    """The text of KEY.txt (.text, .caption) that is not empty, else of the record in KEY.json; the key is the
    id."""
    by_extension = {member.extension: member for member in reversed(sample.members)}
    members = [by_extension[ending] for ending in (*TEXT_ENDINGS, "json") if ending in by_extension]
    if not members:
        bad = RowError(f"no text: found members {quote(sorted(by_extension))}, expected .txt or .json")
        return _Found(sample.key, storage.join(uri, sample.key), b"", bad)
    member = next((member for member in members if member.size), members[0])
    where = storage.join(uri, member.name)
    if member.content is None:
        return _Found(sample.key, where, b"", RowError(f"{member.size} bytes, more than {MAX_LINE_BYTES}"))
    return _of_file(sample.key, where, member.extension, member.content)


def _of_file(key: str, where: str, extension: str, content: bytes) -> _Found:
    """The text of a file that holds one, or the record of one."""
    raw = content.removeprefix(_BOM)
    if extension == "json":
        return _Found(key, where, raw, _from_json_bytes(raw, where, 0).text)
    try:
        # The line break at the end of a text file is no part of the caption.
        return _Found(key, where, raw, non_empty(utf8(_whole(raw)).strip()))
    except RowError as error:
        return _Found(key, where, raw, error)


_READERS = {
    "text_files": _from_files,
    "text_lines": _from_lines,
    "text_jsonl": _from_jsonl,
    "text_json": _from_json,
    "text_parquet": _from_parquet,
    "text_tar": _from_tar,
}
