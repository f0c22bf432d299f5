"""Encoded images of a split, from whatever format holds or names them."""

import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from revision_ray import storage
from revision_ray.data.images import HEAD_BYTES, is_image
from revision_ray.data.json_stream import elements
from revision_ray.data.parquet_rows import footer, image_columns, rows
from revision_ray.data.records import (
    IMAGE_IDS,
    DerivedIds,
    RowError,
    fields_of,
    image_of,
    known_id,
)
from revision_ray.data.schema import ImageRow, Rejected, Split
from revision_ray.data.tar_stream import Member, Sample, samples
from revision_ray.errors import DataError, quote, shorten, shorten_words

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "jif", "png", "apng", "webp", "gif", "bmp", "dib", "tif",
                    "tiff", "avif", "avifs")  # fmt: skip
# Downloads keep what stood behind the name: .jpg_large, .jpg:orig, .jpg?w=640.
_IMAGE_ENDING = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})(\?[^/]*|[^a-z0-9./?][^./]*)?$", re.IGNORECASE)
_ANY_ENDING = re.compile(r"(?<=[^/])\.[A-Za-z][A-Za-z0-9]*$")  # .0001 is a part of the name
DEFAULT_MAX_IMAGE_BYTES = 128 * 2**20
_BATCH_ROWS = 16
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
class _Named:
    """A row that names the file of its image, which is still to be read."""

    id: str | None
    uri: str


def read_images(
    split: Split, *, max_image_bytes: int = DEFAULT_MAX_IMAGE_BYTES
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
    for row in _read_ahead(_READERS[split.kind](split, max_image_bytes), max_image_bytes):
        if isinstance(row.content, RowError):
            yield Rejected(
                id=row.id or derived(row.where.encode()),
                uri=shorten_words(row.where),
                reason=str(row.content),
            )
        else:
            yield ImageRow(id=row.id or derived(row.content), uri=row.where, content=row.content)


def _read_ahead(rows: Iterator[_Found | _Named], max_bytes: int) -> Iterator[_Found]:
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


def _read(row: _Named, max_bytes: int) -> _Found:
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


def _from_files(split: Split, max_bytes: int) -> Iterator[_Named]:
    for uri in split.files:
        below = storage.relative_path(uri, split.uri)
        ending = _IMAGE_ENDING if has_image_ending(below) else _ANY_ENDING
        yield _Named(ending.sub("", below), uri)


def _from_tar(split: Split, max_bytes: int) -> Iterator[_Found]:
    for sample in samples(split.uri, IMAGE_EXTENSIONS, max_bytes, by_content=is_image):
        yield from _of_sample(split.uri, sample, max_bytes)


def images_in(sample: Sample) -> list[Member]:
    """The members of `sample` that are images by their extension, else by their content."""
    named = [member for member in sample.members if member.extension in IMAGE_EXTENSIONS]
    return named or [m for m in sample.members if m.content is not None and is_image(m.content[:HEAD_BYTES])]


def _of_sample(uri: str, sample: Sample, max_bytes: int) -> Iterator[_Found]:
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


def _from_parquet(split: Split, max_bytes: int) -> Iterator[_Found | _Named]:
    columns = (*IMAGE_IDS, *image_columns(footer(split.uri).schema))
    for number, record in rows(split.uri, split.start, split.stop, columns, _BATCH_ROWS):
        yield _of_record(record, f"{split.uri}:row {number}", split.uri, max_bytes)


def _from_json(split: Split, max_bytes: int) -> Iterator[_Found | _Named]:
    for element in elements(split.uri, "images"):
        if element.offset >= split.stop:
            return
        if element.offset >= split.start:
            yield _of_record(element.value, f"{split.uri}:byte {element.offset}", split.uri, max_bytes)


def _of_record(record: object, where: str, beside: str, max_bytes: int) -> _Found | _Named:
    identity = None
    try:
        identity = known_id(fields_of(record), IMAGE_IDS)
        image = image_of(fields_of(record))
        if isinstance(image, str):
            return _Named(identity, _located(image, beside))
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


_READERS: dict[str, Callable[[Split, int], Iterator[_Found | _Named]]] = {
    "image_files": _from_files,
    "image_tar": _from_tar,
    "image_parquet": _from_parquet,
    "image_json": _from_json,
}
