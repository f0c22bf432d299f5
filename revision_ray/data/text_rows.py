"""Records of a split, from whatever format holds them, and their texts."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from revision_ray import storage
from revision_ray.data.image_rows import images_in
from revision_ray.data.json_stream import elements
from revision_ray.data.line_ranges import MAX_LINE_BYTES, lines
from revision_ray.data.parquet_rows import rows
from revision_ray.data.records import (
    IMAGE_NAMES,
    TEXT_FIELDS,
    TEXT_IDS,
    DerivedIds,
    RowError,
    canonical,
    fields_of,
    is_filled,
    known_id,
    utf8,
)
from revision_ray.data.schema import Rejected, Split, TextRow
from revision_ray.data.tar_stream import Sample, samples
from revision_ray.data.turns import text_of
from revision_ray.errors import quote, shorten

TEXT_ENDINGS = ("txt", "text", "caption")
_BATCH_ROWS = 1024
_READ_AHEAD = 8  # files read at once
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


def read_texts(split: Split) -> Iterator[TextRow | Rejected]:
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


def read_records(split: Split, columns: Sequence[str]) -> Iterator[FoundRecord]:
    """Every record of `split`, in the order of the file; of a Parquet file these columns of it.

    A line of text is a record with a `text`; a sample of a tar is that of its KEY.json, its `text` that of
    KEY.txt, its id the key, which is the name of its image too where an image is in the sample.

    Raises:
        DataError: the file itself is missing, damaged or cut off; the records before were given.
    """
    if split.kind == "text_parquet":
        return _from_parquet(split, columns)
    return _READERS[split.kind](split)


def _from_lines(split: Split) -> Iterator[FoundRecord]:
    for offset, line in lines(split.uri, split.start, split.stop):
        raw = line.removeprefix(_BOM) if offset == 0 else line
        where = f"{split.uri}:byte {offset}"
        try:
            yield FoundRecord(where, raw, {"text": utf8(_whole(raw), offset + len(line) - len(raw))})
        except RowError as error:
            yield FoundRecord(where, raw, None, error)


def _from_jsonl(split: Split) -> Iterator[FoundRecord]:
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


def _from_json(split: Split) -> Iterator[FoundRecord]:
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


def _from_parquet(split: Split, columns: Sequence[str]) -> Iterator[FoundRecord]:
    for number, record in rows(split.uri, split.start, split.stop, columns, _BATCH_ROWS):
        yield FoundRecord(f"{split.uri}:row {number}", b"", record)


def _from_files(split: Split) -> Iterator[FoundRecord]:
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        for start in range(0, len(split.files), _BATCH_ROWS):
            uris = split.files[start : start + _BATCH_ROWS]
            for uri, content in zip(uris, pool.map(storage.read_bytes, uris), strict=True):
                key, _, extension = storage.relative_path(uri, split.uri).rpartition(".")
                fields, bad = _of_file(uri, extension.lower(), content)
                yield FoundRecord(uri, b"", {**fields, "id": key}, bad)


def _from_tar(split: Split) -> Iterator[FoundRecord]:
    for sample in samples(split.uri, (*TEXT_ENDINGS, "json"), MAX_LINE_BYTES):
        yield record_of_sample(split.uri, sample)


def record_of_sample(uri: str, sample: Sample) -> FoundRecord:
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


_READERS = {
    "text_files": _from_files,
    "text_lines": _from_lines,
    "text_jsonl": _from_jsonl,
    "text_json": _from_json,
    "text_tar": _from_tar,
}
