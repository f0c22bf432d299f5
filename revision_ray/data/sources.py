"""List the data files of source URIs, and cut them into the splits that tasks read.

Reads listings, footers and first bytes, never whole contents. Files that tools and people put beside data
are left out, and counted.
"""

import logging
import math
import mimetypes
import posixpath
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote
from revision_ray.data.images import FORMATS, HEAD_BYTES, has_image_ending, is_image, without_image_ending
from revision_ray.data.interpret import read_images, read_texts
from revision_ray.data.records import (
    TEXT_ENDINGS,
    ParquetFooter,
    compression_of,
    footer,
    holds_image_bytes,
    image_columns,
    is_download_list,
    table_header,
    table_image_columns,
    table_text_columns,
    text_columns,
    uncompressed_name,
)
from revision_ray.data.shards import SourceSplit, SplitKind

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

    @property
    def is_compressed(self) -> bool:
        return compression_of(self.below) is not None

    @property
    def format(self) -> str:
        """The extension below that of compression: .json of x.json.gz."""
        return posixpath.splitext(uncompressed_name(self.below))[1].lower()


@dataclass
class ListedSource:
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


def each_source(uris: Sequence[str]) -> Iterator[ListedSource]:
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


def _source(uri: str) -> ListedSource:
    entry = storage.info(uri)
    if entry.type == pafs.FileType.File:
        absolute = storage.absolute(uri)
        return ListedSource(uri, [_file(absolute, entry, storage.parent_of(absolute), named=True)])
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
    source = ListedSource(uri, [])
    files = [_file(file_uri, info, root) for file_uri, info in listed]
    paths = {file.below for file in files}
    for file in files:
        if _is_hidden(file):
            source.pass_over(file, "hidden")
        elif _NOTES.fullmatch(posixpath.basename(uncompressed_name(file.below))):
            source.pass_over(file, f"{kind_of(file)} of notes")
        elif file.is_compressed and uncompressed_name(file.below) in paths:
            source.pass_over(file, f"{kind_of(file)} beside its uncompressed file")
        else:
            source.files.append(file)
    return source


def _file(uri: str, info: pafs.FileInfo, root: str, *, named: bool = False) -> SourceFile:
    return SourceFile(uri, root, info.size or 0, info.mtime_ns or 0, named)


def _is_hidden(file: SourceFile) -> bool:
    return any(part.startswith(".") or part in _HIDDEN_FOLDERS for part in file.below.split("/"))


def parquet_data(source: ListedSource) -> dict[str, ParquetFooter]:
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


def _footers(files: list[SourceFile]) -> dict[str, ParquetFooter]:
    uris = [file.uri for file in files if file.extension == ".parquet"]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return {found.uri: found for found in pool.map(footer, uris)}


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _table_headers(files: list[SourceFile]) -> dict[str, list[str]]:
    """Return the column names of the CSV and TSV files."""
    tables = [file for file in files if file.format in _DELIMITERS]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        headers = pool.map(lambda file: table_header(file.uri, _DELIMITERS[file.format]), tables)
        return {file.uri: header for file, header in zip(tables, headers, strict=True)}


__all__ = ["image_splits", "read_images", "read_texts", "tar_shards", "text_splits"]


_IMAGES_ACCEPTED = (
    f"files of {FORMATS} images, WebDataset shards (.tar), Parquet with a column image, bytes, jpg, png, "
    "webp, uri, image_uri, image_path, url or image_url, CSV or TSV with a header that has one of these or "
    "file_name, or a dataset.json; tar, JSON, CSV and TSV also compressed (.gz, .bz2, .zst)"
)
_TEXTS_ACCEPTED = (
    "lines (.txt, .text, .caption), JSON Lines (.jsonl, .ndjson), JSON lists or dataset.json (.json), "
    "COCO captions (.json), Parquet with a column text, caption or conversations, CSV or TSV with a header "
    "that has a column text or caption, or WebDataset shards (.tar); all but Parquet also compressed (.gz, "
    ".bz2, .zst)"
)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")  # those not read give a hint
_TEXT_FILES_PER_SPLIT = 8192
# A task parses a JSON document from its beginning to find its own records: more parts would read mostly in
# vain.
_MAX_JSON_PARTS = 16
_JSON_BYTES_PER_IMAGE = 128


def image_splits(
    uris: Sequence[str], *, rows_per_split: int = 1024, taken: Sequence[SourceSplit] = ()
) -> list[SourceSplit]:
    """The images of `uris`, cut into splits of about `rows_per_split` rows where the format allows.

    A URI is a file, a directory (taken whole) or a wildcard path. Ids: see `read_images`; an image file's is
    its path below the given directory (below the part before the first wildcard) without the ending of an
    image. Files whose extension does not tell what they are, are judged by their first bytes. In a directory,
    hidden files and notes on data are passed over (img2dataset's, README, _SUCCESS, ...), and a
    `dataset.json` stands for the loose image files below its folder. One line of the log says how many files
    were passed over, by extension. A file that several URIs name is taken once.

    `taken` are splits of loose image files that were read before: those files are in none of the new splits,
    so that a folder that has grown gives splits of its new files only.

    Raises:
        DataError: nothing at a URI, or no images (the message says what was found); or a file of `taken` has
            changed.
    """
    splits: list[SourceSplit] = []
    for source in each_source(uris):
        listed = list(source.files)
        parquet = parquet_data(source)
        tables = _table_headers(source.files)
        files = _indexed(source)
        loose = _image_files(files, taken)
        fresh = _without_taken(loose, taken)
        found = _slices("image_files", fresh, rows_per_split)
        images = {file.uri for file in loose}
        for file in files:
            if file.uri in images:
                continue
            if file.format == ".tar":
                found.append(_split("image_tar", file))
            elif file.format == ".json" and (file.named or _is_index(file)):
                found += _byte_ranges(
                    "image_json", file, rows_per_split * _JSON_BYTES_PER_IMAGE, _MAX_JSON_PARTS
                )
            elif file.uri in parquet and image_columns(parquet[file.uri].schema):
                found += _row_group_ranges("image_parquet", file, parquet[file.uri].rows, rows_per_split)
            elif (file.named or len(tables) == len(files)) and table_image_columns(tables.get(file.uri, ())):
                # Beside other files a table may tell of them, under other ids.
                found.append(_split("image_csv" if file.format == ".csv" else "image_tsv", file))
            else:
                source.pass_over(file)
        if len(fresh) == len(loose):
            _some(found, source, "images", _IMAGES_ACCEPTED, listed, parquet, tables)
        source.say_what_was_passed_over()
        splits += found
    return splits


def text_splits(
    uris: Sequence[str], *, bytes_per_split: int = 64 * 2**20, taken: Sequence[SourceSplit] = ()
) -> list[SourceSplit]:
    """The texts of `uris`, cut into splits of about `bytes_per_split` where the format allows.

    A URI is a file, a directory (taken whole) or a wildcard path. Ids: see `read_texts`. In a directory,
    hidden files and notes on data are passed over (img2dataset's, README, _SUCCESS, ...); KEY.txt, .text,
    .caption or .json beside the image KEY is one text with the image's id. One line of the log says how many
    files were passed over, by extension. A file that several URIs name is taken once.

    `taken` are splits of such single texts that were read before, as in `image_splits`.

    Raises:
        DataError: nothing at a URI, or no texts; the message says what was found; or a file of `taken` has
            changed.
    """
    splits: list[SourceSplit] = []
    for source in each_source(uris):
        listed = list(source.files)
        parquet = parquet_data(source)
        tables = _table_headers(source.files)
        single = _texts_of_images(source)
        fresh = _without_taken(single, taken)
        found = _slices("text_files", fresh, _TEXT_FILES_PER_SPLIT)
        for file in source.files:
            if file.format[1:] in TEXT_ENDINGS:
                found += _byte_ranges("text_lines", file, bytes_per_split)
            elif file.format in (".jsonl", ".ndjson"):
                found += _byte_ranges("text_jsonl", file, bytes_per_split)
            elif file.format == ".json":
                found += _byte_ranges("text_json", file, bytes_per_split, _MAX_JSON_PARTS)
            elif file.format == ".tar":
                found.append(_split("text_tar", file))
            elif table_text_columns(tables.get(file.uri, ())):
                # One split a file: a line break may stand inside a quoted cell.
                found.append(_split("text_csv" if file.format == ".csv" else "text_tsv", file))
            elif file.uri in parquet and text_columns(parquet[file.uri].schema):
                found += _row_group_ranges("text_parquet", file, parquet[file.uri].bytes, bytes_per_split)
            else:
                source.pass_over(file)
        if len(fresh) == len(single):
            _some(found, source, "texts", _TEXTS_ACCEPTED, listed, parquet, tables)
        source.say_what_was_passed_over()
        splits += found
    return splits


def tar_shards(uris: Sequence[str]) -> list[str]:
    """The tar files at `uris`: files, directories (not what lies in folders inside), or wildcard paths.

    Raises:
        DataError: nothing at a URI, or no tar file.
    """
    none = "holds no *.tar shard; name a directory of WebDataset shards, or one shard"
    for uri in uris:
        if not storage.is_wildcard(uri) and not storage.exists(uri):
            raise DataError(f"{uri}: no such file or directory, so that it {none}")
    shards: list[str] = []
    for source in each_source(uris):
        parquet_data(source)
        whole = storage.is_wildcard(source.uri)
        found = {f.uri for f in source.files if f.format == ".tar" and (whole or "/" not in f.below)}
        for file in source.files:
            if file.uri not in found:
                source.pass_over(file)
        if not found:
            raise DataError(f"{source.uri}: {none}; found {source.passed_over() or 'no files'}")
        source.say_what_was_passed_over()
        shards += [file.uri for file in source.files if file.uri in found]
    return shards


def _image_files(files: list[SourceFile], taken: Sequence[SourceSplit]) -> list[SourceFile]:
    """Those of `files` that are images by their name, or by their content where the name does not tell."""
    known = {uri for split in taken for uri in split.files}
    unknown: dict[str, list[SourceFile]] = {}
    images = []
    for file in files:
        if has_image_ending(file.below) or file.uri in known:
            images.append(file)
        elif may_be_image(file):
            unknown.setdefault(file.extension, []).append(file)
    for same_kind in unknown.values():
        images += judged(same_kind, is_image)
    return sorted(images, key=lambda file: file.uri)


def _texts_of_images(source: ListedSource) -> list[SourceFile]:
    """The files that hold the text of the image of the same name, one an image; `source` loses all of them.

    KEY.txt comes before KEY.json, unless it is empty: the rule of tar shards.
    """
    keys = {
        without_image_ending(file.below)
        for file in source.files
        if not file.named and has_image_ending(file.below)
    }
    endings = [f".{ending}" for ending in (*TEXT_ENDINGS, "json")]
    texts: dict[str, list[SourceFile]] = {}
    for file in source.files:
        if file.extension in endings and file.stem in keys and not _is_index(file):
            texts.setdefault(file.stem, []).append(file)
    chosen = [
        min(several, key=lambda file: (not file.size, endings.index(file.extension)))
        for several in texts.values()
    ]
    # A list of records beside a picture of the same name is no record of that picture.
    records = [file for file in chosen if file.extension == ".json"]
    lists = {file.uri for file in judged(records, _begins_a_list)}
    single = [file for file in chosen if file.uri not in lists]
    taken = {file.uri for file in single}
    others = {file.uri for several in texts.values() for file in several} - lists
    files, source.files = source.files, []
    for file in files:
        if file.uri not in others:
            source.files.append(file)
        elif file.uri not in taken:
            source.pass_over(file, f"{kind_of(file)} beside a text")
    return sorted(single, key=lambda file: file.uri)


def _begins_a_list(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _is_index(file: SourceFile) -> bool:
    return posixpath.basename(file.below) == "dataset.json"


def _indexed(source: ListedSource) -> list[SourceFile]:
    """The files without the images that a dataset.json lists: under two ids each would count twice."""
    folders = tuple(file.below.removesuffix("dataset.json") for file in source.files if _is_index(file))
    kept = [
        file
        for file in source.files
        if not file.below.startswith(folders) or not (has_image_ending(file.below) or may_be_image(file))
    ]
    if len(kept) < len(source.files):
        num_listed = len(source.files) - len(kept)
        _log.warning("%s: %d image files are taken as dataset.json lists them", source.uri, num_listed)
    return kept


def _without_taken(files: list[SourceFile], taken: Sequence[SourceSplit]) -> list[SourceFile]:
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


def _identity(files: Sequence[SourceFile]) -> str:
    return storage.sha256(*(f"{file.size} {file.mtime_ns}".encode() for file in files))[:16]


def _split(kind: SplitKind, file: SourceFile, start: int = 0, stop: int = 0) -> SourceSplit:
    return SourceSplit(kind=kind, uri=file.uri, start=start, stop=stop, identity=_identity([file]))


def _slices(kind: SplitKind, files: list[SourceFile], size: int) -> list[SourceSplit]:
    return [
        SourceSplit(
            kind=kind,
            uri=part[0].root,
            files=tuple(file.uri for file in part),
            identity=_identity(part),
        )
        for part in (files[start : start + size] for start in range(0, len(files), size))
    ]


def _byte_ranges(
    kind: SplitKind, file: SourceFile, size: int, max_parts: int | None = None
) -> list[SourceSplit]:
    """Return ranges of `size` bytes that cover `file`: one if it is compressed, or an empty JSON document."""
    if file.is_compressed:
        return [_split(kind, file)]  # cannot be entered in the middle
    if not file.size:
        return [_split(kind, file)] if file.extension == ".json" else []  # reading it gives the error
    step = max(size, math.ceil(file.size / max_parts)) if max_parts else size
    return [_split(kind, file, start, min(start + step, file.size)) for start in range(0, file.size, step)]


def _row_group_ranges(kind: SplitKind, file: SourceFile, weights: list[int], size: int) -> list[SourceSplit]:
    """Ranges of consecutive row groups whose weights add up to `size` or just less, at least one each."""
    splits, start, total = [], 0, 0
    for group, weight in enumerate(weights):
        if group > start and total + weight > size:
            splits.append(_split(kind, file, start, group))
            start, total = group, 0
        total += weight
    return [*splits, _split(kind, file, start, len(weights))] if weights else []


def _some(
    found: Sequence[SourceSplit],
    source: ListedSource,
    what: str,
    accepted: str,
    files: list[SourceFile],
    parquet: dict[str, ParquetFooter],
    tables: dict[str, list[str]],
) -> None:
    """Check that splits were found, else tell which files are there instead.

    Raises:
        DataError: none was found.
    """
    if found:
        return
    empty = sum(not file.size for file in files)
    kinds = Counter(kind_of(file) for file in files)
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(8))
    state = f"{len(files)} files ({listed})" if files else "no files"
    notes = [f"{empty} of them empty"] if empty else []
    columns = {uri: table.schema.names for uri, table in parquet.items()} | tables
    notes += [f"{uri} has the columns {quote(names[:20])}" for uri, names in list(columns.items())[:2]]
    if any(file.extension in _COMPRESSED for file in files):
        notes.append("of compressed files only those named below are read: decompress them first")
    notes += [f"beside {number} {kind}" for kind, number in source.passed.items() if kind not in kinds]
    raise DataError(f"{source.uri}: no {what}, found {'; '.join([state, *notes])}; accepted are {accepted}")
