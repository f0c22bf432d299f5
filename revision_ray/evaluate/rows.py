"""Benchmark files to questions, one unit (a row group, a JSONL file) at a time."""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from revision_ray import storage
from revision_ray.data import parquet_rows, tar_stream
from revision_ray.data.image_rows import DEFAULT_MAX_IMAGE_BYTES, IMAGE_EXTENSIONS, images_in
from revision_ray.data.images import UndecodableImage, image_value
from revision_ray.errors import DataError, quote, shorten
from revision_ray.evaluate.benchmarks import Benchmark, benchmark
from revision_ray.evaluate.questions import Item, Row

_SPLIT = re.compile(r"(train|dev|val|validation|test|image|non_image)(?=[-_.])")
_BATCH_ROWS = 16
_LINES_PER_UNIT = 512  # whose images wait in memory together


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one task reads: a row group of a Parquet file, or lines of a JSONL file (`row_group` -1)."""

    benchmark: str
    uri: str
    row_group: int = -1
    start: int = 0
    stop: int = 0
    """Lines [start, stop) of a JSONL file."""
    identity: str = ""
    """Changes when the file may have changed: its size and modification time."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that is no question of this benchmark, and why: `several images` in MMMU, `no image`."""

    id: str
    reason: str


def units(name: str, uri: str) -> list[Unit]:
    """The units of the benchmark `name` at `uri`: a directory, a file or a wildcard path.

    In a directory, files of another split (`dev-00000-of-00001.parquet`) are passed over.

    Raises:
        ConfigError: no such benchmark.
        DataError: nothing there, or a file lacks columns.
    """
    spec = benchmark(name)
    found: list[Unit] = []
    for file, info in _files(spec, uri):
        identity = storage.sha256(f"{info.size} {info.mtime_ns}".encode())[:16]
        if not storage.name_of(file).endswith(".parquet"):
            found += _line_units(spec, file, identity)
            continue
        footer = parquet_rows.footer(file)
        _check_columns(spec, file, footer.schema.names)
        for group in range(len(footer.rows)):
            found.append(Unit(benchmark=name, uri=file, row_group=group, identity=identity))
    if not found:
        raise DataError(f"{uri}: no rows of {name} there; expected Parquet or JSONL of {_wanted(spec)}")
    return found


def _line_units(spec: Benchmark, file: str, identity: str) -> list[Unit]:
    num_lines = len(storage.read_bytes(file).splitlines())
    # The scenes of a world's questions lie in one tar, which is read as a whole.
    step = num_lines if spec.name == "miniature" else _LINES_PER_UNIT
    return [
        Unit(benchmark=spec.name, uri=file, start=start, stop=min(start + step, num_lines), identity=identity)
        for start in range(0, num_lines, max(1, step))
    ]


def _files(spec: Benchmark, uri: str) -> list[tuple[str, pafs.FileInfo]]:
    info = storage.info(uri)
    if info.type == pafs.FileType.File:
        return [(storage.absolute(uri), info)]
    if info.type == pafs.FileType.Directory:
        # A world holds other Parquet and JSONL files beside its questions.
        root = storage.join(uri, "questions") if spec.name == "miniature" else uri
        files = storage.list_files(root, recursive=True)
    elif storage.is_wildcard(uri):
        files = storage.glob_files(uri)
    else:
        raise DataError(f"{uri}: no such file or directory; it should hold the benchmark {spec.name}")
    return [(file, info) for file, info in files if _is_wanted(spec, storage.name_of(file))]


def _is_wanted(spec: Benchmark, file: str) -> bool:
    if not file.endswith((".parquet", ".jsonl")):
        return False
    if spec.name == "miniature":
        return file.startswith(tuple(f"{split}-" for split in spec.splits))
    split = _SPLIT.match(file)
    return split is None or split[1] in spec.splits


def _wanted(spec: Benchmark) -> str:
    return f"the split {' or '.join(spec.splits)} with the columns {', '.join(spec.columns)}"


def _check_columns(spec: Benchmark, where: str, columns: list[str]) -> None:
    missing = [name for name in spec.columns if name not in columns]
    if missing:
        raise DataError(
            f"{where}: has no column {', '.join(missing)}, which {spec.name} needs; found "
            f"{shorten(', '.join(columns))}"
        )


def read_unit(unit: Unit) -> Iterator[Item | LeftOut]:
    """The questions of a unit, in the order of the file, with their images; rows left out say why.

    A question of the miniature has no image where neither a tar nor a folder of its split is there.

    Raises:
        DataError: the file is damaged, or an image that a row names is not there.
    """
    spec = benchmark(unit.benchmark)
    for row in _miniature_rows(unit) if spec.name == "miniature" else _rows(spec, unit):
        item = spec.item(row)
        if isinstance(item, str):
            yield LeftOut(id=str(row.get("id") or row["#row"]), reason=item)
        elif item.image is None and spec.name != "miniature":
            yield LeftOut(id=item.id, reason="no image")
        else:
            yield item


def _rows(spec: Benchmark, unit: Unit) -> Iterator[Row]:
    stem = posixpath.splitext(storage.name_of(unit.uri))[0]
    for number, row in _records(spec, unit):
        where = f"{unit.uri}: row {number}"
        for column in row:
            if column in ("image_path", "image") or re.fullmatch(r"image_\d+", column):
                row[column] = _image_bytes(row[column], unit.uri, where)
        yield {**row, "#file": unit.uri, "#row": f"{stem}-{number:06d}"}


def _records(spec: Benchmark, unit: Unit) -> Iterator[tuple[int, dict[str, Any]]]:
    if unit.row_group >= 0:
        columns = (*spec.columns, *spec.optional)
        group = unit.row_group
        yield from parquet_rows.rows(unit.uri, group, group + 1, columns, _BATCH_ROWS)
        return
    lines = storage.read_bytes(unit.uri).splitlines()[unit.start : unit.stop]
    for number, line in enumerate(lines, unit.start):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{unit.uri}: line {number + 1}: is not JSON: {shorten(error)}") from error
        if not isinstance(record, dict):
            raise DataError(f"{unit.uri}: line {number + 1}: expected an object, found {quote(line, 80)}")
        _check_columns(spec, f"{unit.uri}: line {number + 1}", list(record))
        yield number, record


def _image_bytes(cell: Any, uri: str, where: str) -> bytes | None:
    """The encoded image of a cell (see `image_value`); a path is relative to the file `uri`."""
    try:
        cell = image_value(cell)
    except UndecodableImage as error:
        raise DataError(f"{where}: an image {error}") from error
    if cell is None or isinstance(cell, bytes):
        return cell
    path = cell if "://" in cell or cell.startswith("/") else storage.join(storage.parent_of(uri), cell)
    try:
        return storage.read_bytes(path)
    except DataError as error:
        raise DataError(f"{where}: {error}; unpack the images beside the file that names them") from error


def _miniature_rows(unit: Unit) -> Iterator[Row]:
    """Questions with the images of their scenes: `questions/SPLIT-NUMBER.jsonl` and the split's files."""
    world = storage.parent_of(storage.parent_of(unit.uri))
    split, _, number = posixpath.splitext(storage.name_of(unit.uri))[0].rpartition("-")
    shard = storage.join(world, split, f"part-{number}.tar")
    images = _images_of(shard) if storage.exists(shard) else None
    for row_number, row in _records(benchmark("miniature"), unit):
        if images is None:
            path = storage.join(world, split, f"{row['scene']}.jpg")
            content = storage.read_bytes(path) if storage.exists(path) else None
        elif row["scene"] in images:
            content = images[row["scene"]]
        else:
            raise DataError(f"{shard}: holds no image of scene {row['scene']}, which {unit.uri} asks about")
        yield {**row, "image": content, "#file": unit.uri, "#row": f"{split}-{row_number:06d}"}


def _images_of(shard: str) -> dict[str, bytes]:
    found = {}
    for sample in tar_stream.samples(shard, IMAGE_EXTENSIONS, DEFAULT_MAX_IMAGE_BYTES):
        for member in images_in(sample):
            if member.content is not None:
                found[sample.key] = member.content
    return found
