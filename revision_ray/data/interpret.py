"""Interpret the records of a split as encoded images or as texts, in every format."""

import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote, shorten, shorten_words
from revision_ray.data.fields import (
    IMAGE_IDS,
    TEXT_FIELDS,
    TEXT_IDS,
    DerivedIds,
    RowError,
    fields_of,
    image_of,
    known_id,
    with_file_name,
)
from revision_ray.data.images import IMAGE_EXTENSIONS, has_image_ending, is_image, without_image_ending
from revision_ray.data.records import (
    FILES_READ_AHEAD,
    TarSample,
    footer,
    image_columns,
    images_in,
    read_records,
    samples,
)
from revision_ray.data.shards import ImageRow, Rejected, SourceSplit, TextRow
from revision_ray.data.turns import text_of

_ANY_ENDING = re.compile(r"(?<=[^/])\.[A-Za-z][A-Za-z0-9]*$")  # .0001 is a part of the name
DEFAULT_MAX_IMAGE_BYTES = 128 * 2**20


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
    with ThreadPoolExecutor(FILES_READ_AHEAD) as pool:
        for row in rows:
            waiting.append(row if isinstance(row, _Found) else pool.submit(_read, row, max_bytes))
            # Rows that are here already need no window, unless earlier ones are still being read.
            while waiting and (isinstance(waiting[0], _Found) or len(waiting) > FILES_READ_AHEAD):
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
        name = without_image_ending(below) if has_image_ending(below) else _ANY_ENDING.sub("", below)
        yield _NamedImage(name, uri)


def _images_from_tar(split: SourceSplit, max_bytes: int) -> Iterator[_Found]:
    for sample in samples(split.uri, IMAGE_EXTENSIONS, max_bytes, by_content=is_image):
        yield from _of_sample(split.uri, sample, max_bytes)


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


def _images_from_records(split: SourceSplit, max_bytes: int) -> Iterator[_Found | _NamedImage]:
    is_parquet = split.kind == "image_parquet"
    columns = (*IMAGE_IDS, *image_columns(footer(split.uri).schema)) if is_parquet else ()
    for record in read_records(split, columns):
        if record.bad is not None:
            yield _Found(None, record.where, record.bad)
        else:
            yield _of_record(record.content, record.where, split.uri, max_bytes)


def _of_record(record: object, where: str, beside: str, max_bytes: int) -> _Found | _NamedImage:
    identity = None
    try:
        fields = with_file_name(fields_of(record))
        identity = known_id(fields, IMAGE_IDS)
        image = image_of(fields)
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
    "image_parquet": _images_from_records,
    "image_json": _images_from_records,
    "image_csv": _images_from_records,
    "image_tsv": _images_from_records,
}


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
