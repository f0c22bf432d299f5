"""The files of a source, without what tools and people put beside data. Reads footers and first bytes."""

import logging
import mimetypes
import posixpath
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from revision_ray import storage
from revision_ray.data.images import HEAD_BYTES
from revision_ray.data.parquet_rows import Footer, footer, holds_image_bytes, is_download_list
from revision_ray.errors import DataError, quote

_log = logging.getLogger(__name__)

_FOOTERS_AT_ONCE = 16
_HEADS_AT_ONCE = 32
# Of more files with one unknown extension than this, so many are looked into; if they disagree, all are.
_MOST_HEADS = 4096

# Files of these extensions, and of those that `mimetypes` knows for something else, are no images.
_NO_IMAGES = (".tar", ".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".caption", ".npy", ".npz",
              ".pt", ".pth", ".safetensors", ".tfrecord", ".pkl", ".db", ".sqlite", ".ini", ".yaml", ".yml",
              ".toml", ".lock", ".log", ".md", ".crc", ".md5", ".sha256", ".idx", ".gz", ".tgz", ".bz2",
              ".xz", ".zst", ".zip")  # fmt: skip
_MIME_TYPES = mimetypes.MimeTypes(filenames=())  # Python's own table: not the machine's
# What Spark, Delta, Arrow, `datasets` and people put beside data.
_NOTES = re.compile(
    r"(_success|_metadata|_common_metadata|_committed_.*|_started_.*|dataset_infos?\.json|dataset_dict\.json|"
    r"state\.json|sizes\.json|thumbs\.db|desktop\.ini|(.*[-_.])?(checksums?|(md5|sha\d+)(sums?)?)(\.txt)?|"
    r"(readme|licen[cs]e|notice|changelog|citation|contributing)(\.(txt|md|rst|html|pdf|cff|bib))?)",
    re.IGNORECASE,
)
_HIDDEN_FOLDERS = ("__MACOSX", "_delta_log", "_temporary", "__pycache__")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; ids are relative to `root`; `named` says that the user gave the file itself."""

    uri: str
    root: str
    size: int
    mtime_ns: int
    named: bool = False

    @property
    def below(self) -> str:
        """The path below `root`, without query."""
        return storage.relative_path(self.uri, self.root)

    @property
    def extension(self) -> str:
        return posixpath.splitext(self.below)[1].lower()

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.below)[0]


@dataclass
class Source:
    """The files of one URI that may be data, and how many others there are, by kind."""

    uri: str
    files: list[SourceFile]
    passed: Counter[str] = field(default_factory=Counter)

    def pass_over(self, file: SourceFile, kind: str = "") -> None:
        self.passed[kind or kind_of(file)] += 1

    def passed_over(self) -> str:
        listed = ", ".join(f"{number} {kind}" for kind, number in self.passed.most_common(20))
        return f"{self.passed.total()} files: {listed}" if self.passed else ""

    def say_what_was_passed_over(self) -> None:
        if self.passed:
            _log.warning("%s: passed over %s", self.uri, self.passed_over())


def kind_of(file: SourceFile) -> str:
    # Behind the dot of a name without extension may stand anything.
    return quote(file.extension, 24).strip("'") if file.extension else "without extension"


def each_source(uris: Sequence[str]) -> Iterator[Source]:
    """Each URI with its files, without those that an earlier one named."""
    if not uris:
        raise DataError("no source was given; name files, directories or wildcard paths")
    seen: set[str] = set()
    for uri in [uris] if isinstance(uris, str) else uris:
        source = _source(uri)
        fresh = [file for file in source.files if file.uri not in seen]
        if len(fresh) < len(source.files):
            num_known = len(source.files) - len(fresh)
            _log.warning("%s: %d files were named before and are taken once", uri, num_known)
        seen.update(file.uri for file in fresh)
        if fresh or not source.files:
            source.files = fresh
            yield source


def _source(uri: str) -> Source:
    entry = storage.info(uri)
    if entry.type == pafs.FileType.File:
        absolute = storage.absolute(uri)
        return Source(uri, [_file(absolute, entry, storage.parent_of(absolute), named=True)])
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
    source = Source(uri, [])
    for found, info in listed:
        file = _file(found, info, root)
        if _is_hidden(file):
            source.pass_over(file, "hidden")
        elif _NOTES.fullmatch(posixpath.basename(file.below)):
            source.pass_over(file, f"{kind_of(file)} of notes")
        else:
            source.files.append(file)
    return source


def _file(uri: str, info: pafs.FileInfo, root: str, *, named: bool = False) -> SourceFile:
    return SourceFile(uri, root, info.size or 0, info.mtime_ns or 0, named)


def _is_hidden(file: SourceFile) -> bool:
    return any(part.startswith(".") or part in _HIDDEN_FOLDERS for part in file.below.split("/"))


def parquet_data(source: Source) -> dict[str, Footer]:
    """The footers of the Parquet files of `source`, which loses img2dataset's notes on its shards.

    Of a shard NAME (a tar, a folder, a TFRecord file, or a table that holds the images) these are
    NAME_stats.json, and where the images lie elsewhere the list of downloads NAME.parquet. NAME.json beside
    NAME.tar is an index of it. Read as data they would give its rows a second time.
    """
    by_extension: dict[str, set[str]] = {}
    for file in source.files:
        by_extension.setdefault(file.extension, set()).add(file.stem)
    tars, tables = by_extension.get(".tar", set()), by_extension.get(".parquet", set())
    elsewhere = tars | by_extension.get(".tfrecord", set()) | _folders(source.files)
    stats = {stem + "_stats.json" for stem in elsewhere | tables}
    indices = {stem + ".json" for stem in tars}
    with_stats = {file.below.removesuffix("_stats.json") for file in source.files if file.below in stats}
    footers = _footers(source.files)
    files, source.files = source.files, []
    for file in files:
        note = file.below in stats or file.below in indices
        if file.uri in footers and file.stem in elsewhere | with_stats:
            schema = footers[file.uri].schema
            note = (is_download_list(schema) or file.stem in tars) and not holds_image_bytes(schema)
        if note and not file.named:
            source.pass_over(file, f"{kind_of(file)} of img2dataset's notes")
            footers.pop(file.uri, None)
        else:
            source.files.append(file)
    return footers


def _folders(files: list[SourceFile]) -> set[str]:
    """Every folder below the root that holds files, or folders of files."""
    found = {posixpath.dirname(file.below) for file in files}
    for folder in list(found):
        while folder := posixpath.dirname(folder):
            found.add(folder)
    return found - {""}


def may_be_image(file: SourceFile) -> bool:
    if file.extension in _NO_IMAGES or not file.size:
        return False
    guess = _MIME_TYPES.types_map[True].get(file.extension, "application/octet-stream")
    return guess.startswith("image/") or guess == "application/octet-stream"


def judged(files: list[SourceFile], judge: Callable[[bytes], bool]) -> list[SourceFile]:
    """Those of `files`, which are of one kind, whose first bytes pass `judge`.

    Where there are very many, a sample of them speaks for all if it is of one mind: a request to an object
    store for each of ten million files would take hours.
    """
    if len(files) > _MOST_HEADS:
        verdicts = set(_verdicts(random.Random(0).sample(files, _MOST_HEADS), judge))
        if len(verdicts) == 1:
            return files if verdicts.pop() else []
    return [file for file, passes in zip(files, _verdicts(files, judge), strict=True) if passes]


def _verdicts(files: list[SourceFile], judge: Callable[[bytes], bool]) -> list[bool]:
    with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
        return list(pool.map(lambda file: judge(_head(file)), files))


def _head(file: SourceFile) -> bytes:
    with storage.open_input(file.uri) as opened:
        return opened.read(HEAD_BYTES)


def _footers(files: list[SourceFile]) -> dict[str, Footer]:
    uris = [file.uri for file in files if file.extension == ".parquet"]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return {found.uri: found for found in pool.map(footer, uris)}
