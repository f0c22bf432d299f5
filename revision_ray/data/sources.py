"""Sources, named by URIs, to the splits that tasks read. Lists and reads footers; never the contents."""

import logging
import math
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.fs as pafs

from revision_ray import storage
from revision_ray.data.image_rows import IMAGE_EXTENSIONS, read_images
from revision_ray.data.parquet_rows import Footer, footer, image_columns, text_columns
from revision_ray.data.schema import Split, SplitKind
from revision_ray.data.text_rows import read_texts
from revision_ray.errors import DataError

__all__ = ["image_splits", "read_images", "read_texts", "text_splits"]

_log = logging.getLogger(__name__)

_IMAGES_ACCEPTED = (
    "image files (.jpg .jpeg .png .webp .gif .bmp .tif .tiff), WebDataset shards (.tar), Parquet with a "
    "column image, bytes, uri, image_uri, image_path, url or image_url, or a dataset.json"
)
_TEXTS_ACCEPTED = (
    "lines (.txt), JSON Lines (.jsonl, .ndjson), JSON lists or dataset.json (.json), Parquet with a column "
    "text, caption or conversations, or WebDataset shards (.tar)"
)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_FOOTERS_AT_ONCE = 16
# A task parses a JSON document from its beginning to find its own records: more parts would read mostly in
# vain.
_MAX_JSON_PARTS = 16
_JSON_BYTES_PER_IMAGE = 128


@dataclass(frozen=True)
class _File:
    """A file of a source; ids are relative to `root`; `named` says that the user gave the file itself."""

    uri: str
    root: str
    size: int
    mtime_ns: int
    named: bool

    @property
    def below(self) -> str:
        """The path below `root`, without query."""
        return storage.relative_path(self.uri, self.root)

    @property
    def extension(self) -> str:
        return posixpath.splitext(self.below)[1].lower()


def image_splits(
    uris: Sequence[str], *, rows_per_split: int = 1024, taken: Sequence[Split] = ()
) -> list[Split]:
    """The images of `uris`, cut into splits of about `rows_per_split` rows where the format allows.

    A URI is a file, a directory (taken whole) or a wildcard path. Ids: see `read_images`; an image file's is
    its path below the given directory (below the part before the first wildcard) without extension. In a
    directory, hidden files and the metadata beside tar shards are passed over, and a `dataset.json` stands
    for the loose image files below its folder. A file that several URIs name is taken once.

    `taken` are splits of loose image files that were read before: those files are in none of the new splits,
    so that a folder that has grown gives splits of its new files only.

    Raises:
        DataError: nothing at a URI, or no images (the message says what was found); or a file of `taken` has
            changed.
    """
    splits: list[Split] = []
    for uri, listed in _each_source(uris):
        files = _indexed(uri, listed)
        loose = [file for file in files if file.extension[1:] in IMAGE_EXTENSIONS]
        parquet = _footers(files)
        fresh = _without_taken(loose, taken)
        found = _slices(fresh, rows_per_split)
        for file in files:
            if file.extension == ".tar":
                found.append(_split("image_tar", file))
            elif file.extension == ".json" and (file.named or _is_index(file)):
                found += _byte_ranges(
                    "image_json", file, rows_per_split * _JSON_BYTES_PER_IMAGE, _MAX_JSON_PARTS
                )
            elif file.uri in parquet and image_columns(parquet[file.uri].schema):
                found += _row_group_ranges("image_parquet", file, parquet[file.uri].rows, rows_per_split)
        if len(fresh) == len(loose):
            _some(found, uri, "images", _IMAGES_ACCEPTED, files, parquet)
        splits += found
    return splits


def text_splits(uris: Sequence[str], *, bytes_per_split: int = 64 * 2**20) -> list[Split]:
    """The texts of `uris`, cut into splits of about `bytes_per_split` where the format allows.

    A URI is a file, a directory (taken whole) or a wildcard path. Ids: see `read_texts`. In a directory,
    hidden files and the metadata beside tar shards are passed over. A file that several URIs name is taken
    once.

    Raises:
        DataError: nothing at a URI, or no texts; the message says what was found.
    """
    splits: list[Split] = []
    for uri, files in _each_source(uris):
        parquet = _footers(files)
        found: list[Split] = []
        for file in files:
            if file.extension == ".txt":
                found += _byte_ranges("text_lines", file, bytes_per_split)
            elif file.extension in (".jsonl", ".ndjson"):
                found += _byte_ranges("text_jsonl", file, bytes_per_split)
            elif file.extension == ".json":
                found += _byte_ranges("text_json", file, bytes_per_split, _MAX_JSON_PARTS)
            elif file.extension == ".tar":
                found.append(_split("text_tar", file))
            elif file.uri in parquet and text_columns(parquet[file.uri].schema):
                found += _row_group_ranges("text_parquet", file, parquet[file.uri].bytes, bytes_per_split)
        splits += _some(found, uri, "texts", _TEXTS_ACCEPTED, files, parquet)
    return splits


def _each_source(uris: Sequence[str]) -> Iterator[tuple[str, list[_File]]]:
    """Each URI with its files, without those that an earlier one named."""
    if not uris:
        raise DataError("no source was given; name files, directories or wildcard paths")
    seen: set[str] = set()
    for uri in [uris] if isinstance(uris, str) else uris:
        files = _files(uri)
        fresh = [file for file in files if file.uri not in seen]
        if len(fresh) < len(files):
            _log.warning("%s: %d files were named before and are taken once", uri, len(files) - len(fresh))
        seen.update(file.uri for file in fresh)
        if fresh or not files:
            yield uri, fresh


def _files(uri: str) -> list[_File]:
    entry = storage.info(uri)
    if entry.type == pafs.FileType.File:
        absolute = storage.absolute(uri)
        return [_file(absolute, entry, storage.parent_of(absolute), named=True)]
    if entry.type == pafs.FileType.Directory:
        root, listed = storage.absolute(uri), storage.list_files(uri, recursive=True)
    elif storage.is_wildcard(uri):
        root, listed = storage.wildcard_root(uri), storage.glob_files(uri)
        if not listed:
            raise DataError(
                f"{uri}: matches no file; wildcards match files (folder-*/** those of whole folders)"
            )
    else:
        raise DataError(f"{uri}: no such file or directory")
    files = [_file(found, info, root, named=False) for found, info in listed]
    return _without_companions([file for file in files if not _is_hidden(file)])


def _file(uri: str, info: pafs.FileInfo, root: str, *, named: bool) -> _File:
    return _File(uri, root, info.size or 0, info.mtime_ns or 0, named)


def _is_hidden(file: _File) -> bool:
    return any(segment.startswith(".") or segment == "__MACOSX" for segment in file.below.split("/"))


def _without_companions(files: list[_File]) -> list[_File]:
    """`files` without NAME.parquet, NAME.json, NAME_stats.json beside NAME.tar: img2dataset's notes on it.

    Read as sources they would give its rows a second time.
    """
    shards = {posixpath.splitext(file.below)[0] for file in files if file.extension == ".tar"}
    notes = {stem + ending for stem in shards for ending in (".parquet", ".json", "_stats.json")}
    return [file for file in files if file.below not in notes]


def _is_index(file: _File) -> bool:
    return posixpath.basename(file.below) == "dataset.json"


def _indexed(uri: str, files: list[_File]) -> list[_File]:
    """`files` without the images that a dataset.json lists: under two ids each would count twice."""
    folders = tuple(file.below.removesuffix("dataset.json") for file in files if _is_index(file))
    kept = [f for f in files if f.extension[1:] not in IMAGE_EXTENSIONS or not f.below.startswith(folders)]
    if len(kept) < len(files):
        _log.warning("%s: %d image files are taken as dataset.json lists them", uri, len(files) - len(kept))
    return kept


def _without_taken(files: list[_File], taken: Sequence[Split]) -> list[_File]:
    """`files` without those of the splits `taken`, which are known to be as they were."""
    present = {file.uri: file for file in files}
    for split in taken:
        here = [present[uri] for uri in split.files if uri in present]
        if len(here) == len(split.files) and _identity(here) != split.identity:
            raise DataError(
                f"{split.uri}: image files changed since they were read (among {here[0].uri} to "
                f"{here[-1].uri}); restore them, or read the folder into a new output"
            )
    read = {uri for split in taken for uri in split.files}
    return [file for file in files if file.uri not in read]


def _footers(files: list[_File]) -> dict[str, Footer]:
    uris = [file.uri for file in files if file.extension == ".parquet"]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return {found.uri: found for found in pool.map(footer, uris)}


def _identity(files: Sequence[_File]) -> str:
    return storage.sha256(*(f"{file.size} {file.mtime_ns}".encode() for file in files))[:16]


def _split(kind: SplitKind, file: _File, start: int = 0, stop: int = 0) -> Split:
    return Split(kind=kind, uri=file.uri, start=start, stop=stop, identity=_identity([file]))


def _slices(files: list[_File], size: int) -> list[Split]:
    return [
        Split(
            kind="image_files",
            uri=part[0].root,
            files=tuple(file.uri for file in part),
            identity=_identity(part),
        )
        for part in (files[start : start + size] for start in range(0, len(files), size))
    ]


def _byte_ranges(kind: SplitKind, file: _File, size: int, max_parts: int | None = None) -> list[Split]:
    """Ranges of `size` bytes that cover `file`; one, for its error, of an empty JSON document."""
    if not file.size:
        return [_split(kind, file)] if file.extension == ".json" else []
    step = max(size, math.ceil(file.size / max_parts)) if max_parts else size
    return [_split(kind, file, start, min(start + step, file.size)) for start in range(0, file.size, step)]


def _row_group_ranges(kind: SplitKind, file: _File, weights: list[int], size: int) -> list[Split]:
    """Ranges of consecutive row groups whose weights add up to `size` or just less, at least one each."""
    splits, start, total = [], 0, 0
    for group, weight in enumerate(weights):
        if group > start and total + weight > size:
            splits.append(_split(kind, file, start, group))
            start, total = group, 0
        total += weight
    return [*splits, _split(kind, file, start, len(weights))] if weights else []


def _some(
    found: list[Split], uri: str, what: str, accepted: str, files: list[_File], parquet: dict[str, Footer]
) -> list[Split]:
    """`found`, unless it is empty: then an error that says what is there instead."""
    if found:
        return found
    empty = sum(not file.size for file in files)
    kinds = Counter(file.extension or "no extension" for file in files)
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(8))
    state = f"{len(files)} files ({listed})" if files else "no files"
    notes = [f"{empty} of them empty"] if empty else []
    notes += [f"{found.uri} has the columns {found.schema.names}" for found in list(parquet.values())[:2]]
    if any(kind in _COMPRESSED for kind in kinds):
        notes.append("compressed files are not read: decompress them first")
    raise DataError(f"{uri}: no {what}, found {'; '.join([state, *notes])}; accepted are {accepted}")
