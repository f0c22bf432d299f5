"""The table of benchmarks: what their files hold, how a row becomes a question, and how files are read.

One function a benchmark turns a row, as its publishers' Parquet or JSONL holds it, into a
`BenchmarkQuestion`. Prompts are those of the public evaluation kits. The image goes before the prompt; where
a text says `<image 1>` it keeps that reference.
"""

import ast
import difflib
import hashlib
import itertools
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError, quote, shorten
from revision_ray.data import records
from revision_ray.data.fields import RowError
from revision_ray.data.images import IMAGE_EXTENSIONS, UndecodableImage, image_value
from revision_ray.data.interpret import DEFAULT_MAX_IMAGE_BYTES
from revision_ray.evaluate import scores
from revision_ray.evaluate.answers import ALL_LETTERS, Scoring, letter_set, yes_no


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def read_parquet(uri: str) -> pa.Table:
    """Read the Parquet table at `uri`.

    Raises:
        DataError: the file is missing or damaged.
    """
    with storage.open_input(uri) as file:
        try:
            return pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{uri}: is no readable Parquet file: {shorten(error)}; remove it to make it again"
            ) from error


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
_CRPE_TAIL = "Please answer directly with only the letter of the correct option and nothing else."
_VISULOGIC_TAIL = "Answer with the option letter only."
_IMAGE_REFERENCE = re.compile(r"<image\s*(\d+)>")
_CRPE_PART = re.compile(r"(?<![a-z])(exist|relation)(?![a-z])")
_OPTION_LINE = re.compile(r"^\s*\(?([A-J])[.):]\s*(.+?)\s*$", re.MULTILINE)

Row = dict[str, Any]
"""A record with every image column as bytes (or None), and two fields of ours: `#file` (the URI of
its file) and `#row` (an id for rows that bring none)."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion:
    """One question about one image."""

    id: str
    prompt: str
    """Text of the question, without an image placeholder."""
    answers: tuple[str, ...]
    """The true answer, or all accepted spellings of it."""
    scoring: Scoring
    letters: str = ALL_LETTERS
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    image_id: str = ""
    """Id of the image in an image store; empty if only its content identifies it."""
    image: bytes | None = None


def content_key(content: bytes) -> str:
    """20 hex digits that are a function of the bytes: the id that `embed` gives to images that bring none."""
    return hashlib.sha256(content).digest()[:10].hex()


def mme(row: Row) -> BenchmarkQuestion:
    question = row["question"].replace("Please answer yes or no.", "").strip()
    return BenchmarkQuestion(
        id=row["#row"],  # the two questions of an image share question_id
        prompt=f"{question}\n{SHORT}",
        answers=(_yes_or_no(row["answer"], row),),
        scoring="yes_no",
        groups={"category": row["category"], "image": str(row["question_id"])},
        image=row["image"],
    )


def mmstar(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=str(row["index"]),
        prompt=f"{row['question']}\n{LETTER}",
        answers=(_letter(row["answer"], "ABCD", row),),
        scoring="letter",
        letters="ABCD",
        groups={"l2_category": row["l2_category"], "category": row["category"]},
        image=row["image"],
    )


def science_qa(row: Row) -> BenchmarkQuestion:
    hint = (row["hint"] or "").strip()
    options = list(row["choices"])
    lines = [f"Context: {hint}"] if hint else []
    return BenchmarkQuestion(
        id=row["#row"],
        prompt="\n".join([*lines, row["question"], *_lettered(options), LETTER]),
        answers=(ALL_LETTERS[row["answer"]],),
        scoring="letter",
        letters=ALL_LETTERS[: len(options)],
        groups={"subject": str(row.get("subject") or "")},
        image=row["image"],
    )


def real_world_qa(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=row["#row"],
        prompt=row["question"],
        answers=(str(row["answer"]),),
        scoring="letter_or_word",
        image=row["image"],
    )


def mmmu(row: Row) -> BenchmarkQuestion | str:
    """Single-image questions alone: exactly one distinct `<image N>` in question and options."""
    options = _list_of(row["options"], row)
    named = sorted(set(_IMAGE_REFERENCE.findall(" ".join([row["question"], *options]))))
    if len(named) != 1:
        return "several images" if named else "names no image"
    column = f"image_{named[0]}"
    groups = {"subject": str(row.get("subject") or "_".join(row["id"].split("_")[1:-1]))}
    if row.get("question_type") == "open":
        answer = str(row["answer"])
        answers = _list_of(answer, row) if answer.startswith("[") else [answer]
        prompt, scoring, letters = f"{row['question']}\n{SHORT}", "open", ALL_LETTERS
    else:
        letters, scoring = ALL_LETTERS[: len(options)], "letter"
        answers = [_letter(row["answer"], letters, row)]
        prompt = "\n".join([row["question"], *_lettered(options), LETTER])
    return BenchmarkQuestion(
        id=row["id"],
        prompt=prompt,
        answers=tuple(answers),
        scoring=scoring,
        letters=letters,
        groups=groups,
        image=row.get(column),
    )


def mmmu_pro_vision(row: Row) -> BenchmarkQuestion:
    """Return the row as a question; its text and options are inside the image."""
    letters = ALL_LETTERS[: len(_list_of(row["options"], row))]
    return BenchmarkQuestion(
        id=row["id"],
        prompt=LETTER,
        answers=(_letter(row["answer"], letters, row),),
        scoring="letter",
        letters=letters,
        groups={"subject": str(row.get("subject") or "")},
        image=row.get("image") or row.get("image_1"),
    )


def visulogic(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=str(row.get("id") or row["#row"]),
        prompt=f"{row['question']}\n{_VISULOGIC_TAIL}",
        answers=(_letter(row["label"], "ABCD", row),),
        scoring="letter",
        letters="ABCD",
        groups={"tag": str(row["tag"])},
        image=row["image_path"],
    )


def logic_vista(row: Row) -> BenchmarkQuestion:
    if letter_set(str(row["answer"])) is None:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(row['answer'], 80)}, expected letters "
            f"such as 'A, C'"
        )
    return BenchmarkQuestion(
        id=row["#row"],
        prompt=row["question"],
        answers=(row["answer"],),
        scoring="letters",
        image=row["image"],
    )


def crpe(row: Row) -> BenchmarkQuestion:
    """The same question occurs with its options in several orders: those rows are one `question`."""
    text = row["text"]
    options = _OPTION_LINE.findall(text)
    stem = _OPTION_LINE.split(text)[0] + "|".join(sorted(option for _, option in options))
    letters = ALL_LETTERS[: len(options)] or "ABCD"
    # The file's own name tells its part; where it does not ("relation/test.parquet"), its folder's does.
    named = _CRPE_PART.findall("/".join(row["#file"].lower().split("/")[-2:]))
    part = named[-1] if named else ""
    return BenchmarkQuestion(
        id=row["#row"],
        prompt=f"{text}\n{_CRPE_TAIL}",
        answers=(_letter(row["correct_option"], letters, row),),
        scoring="letter",
        letters=letters,
        options=tuple(option for _, option in options),
        groups={
            "part": part,
            "question": content_key((row["image"] or b"") + stem.encode()),
            "category": str(row.get("category") or part),
        },
        image=row["image"],
    )


def pope(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=f"{row['category']}/{row['question_id']}",
        prompt=f"{row['question']}\n{SHORT}",
        answers=(_yes_or_no(row["answer"], row),),
        scoring="yes_no",
        groups={"category": row["category"], "image_source": row["image_source"]},
        image=row["image"],
    )


def hallusion_bench(row: Row) -> BenchmarkQuestion:
    unit = {
        "category": row["category"],
        "subcategory": row["subcategory"],
        "set": str(row["set_id"]),
        "figure": str(row["figure_id"]),
        "question": str(row["question_id"]),
    }
    truth = {"0": "no", "1": "yes"}.get(str(row["gt_answer"]).strip())
    return BenchmarkQuestion(
        id="/".join(unit.values()),
        prompt=row["question"],
        answers=(truth or _yes_or_no(row["gt_answer"], row),),
        scoring="yes_no",
        groups=unit,
        image=row["image"],
    )


def miniature(row: Row) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=row["id"],
        prompt=row["text"],
        answers=(row["answer"],),
        scoring="word",
        groups={"kind": row["kind"]},
        image_id=row["scene"],
        image=row["image"],
    )


def _letter(answer: Any, letters: str, row: Row) -> str:
    """The true option, of which there are `letters`; a test split without answers has none."""
    found = str(answer).strip().strip("()").upper()
    if len(found) != 1 or found not in letters:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(answer, 80)}, expected one of the "
            f"letters {letters}"
        )
    return found


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"{label}. {option}" for label, option in zip(ALL_LETTERS, options, strict=False)]


def _yes_or_no(answer: Any, row: Row) -> str:
    found = yes_no(str(answer))
    if found is None:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(answer, 80)}, expected yes or no"
        )
    return found


def _list_of(value: Any, row: Row) -> list[str]:
    """A list, also where the file holds it as the text of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(
                f"{row['#file']}: row {row['#row']}: {quote(value, 80)} is no list: {shorten(error)}"
            ) from error
    return [str(entry) for entry in value]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Settings of one benchmark: how it is read, asked and scored."""

    name: str
    columns: tuple[str, ...]
    """That a file must have."""
    item: Callable[[Row], BenchmarkQuestion | str]
    """The question of a row, or why it is left out."""
    optional: tuple[str, ...] = ()
    """Read where there."""
    splits: tuple[str, ...] = ("test",)
    """Files of other splits (`dev-*.parquet`) are passed over in a directory."""
    shown: tuple[str, ...] = ()
    """Groupings whose groups are listed in the results; the others only serve the metrics."""
    family: str = ""
    """Of the variants of one benchmark, which count as one in the average."""
    metrics: Callable[[Sequence[scores.Answered]], dict[str, Any]] | None = None
    """Figures beside accuracy."""


def benchmark(name: str) -> Benchmark:
    """Return the benchmark with this name.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"benchmark {quote(name, 80)} is not known; {hint}known are {', '.join(sorted(BENCHMARKS))}"
        )
    return BENCHMARKS[name]


_MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_MMMU_REST = (*_MMMU_IMAGES, "question_type", "subject")

BENCHMARKS = {
    spec.name: spec
    for spec in (
        Benchmark(
            name="mme",
            columns=("question_id", "image", "question", "answer", "category"),
            item=mme,
            shown=("category",),
            metrics=scores.mme,
        ),
        Benchmark(
            name="mmstar",
            columns=("index", "question", "image", "answer", "category", "l2_category"),
            item=mmstar,
            splits=("val", "validation"),
            shown=("category", "l2_category"),
            metrics=scores.mmstar,
        ),
        Benchmark(
            name="science_qa",
            columns=("image", "question", "choices", "answer", "hint"),
            optional=("subject",),
            item=science_qa,
            splits=("validation", "val", "test"),
            shown=("subject",),
        ),
        Benchmark(name="real_world_qa", columns=("image", "question", "answer"), item=real_world_qa),
        Benchmark(
            name="mmmu",
            columns=("id", "question", "options", "answer"),
            optional=_MMMU_REST,
            item=mmmu,
            splits=("validation", "val"),
            shown=("subject",),
        ),
        Benchmark(
            name="mmmu_pro_standard",
            family="mmmu_pro",
            columns=("id", "question", "options", "answer"),
            optional=_MMMU_REST,
            item=mmmu,
            shown=("subject",),
        ),
        Benchmark(
            name="mmmu_pro_vision",
            family="mmmu_pro",
            columns=("id", "options", "answer"),
            optional=("image", "image_1", "subject"),
            item=mmmu_pro_vision,
            shown=("subject",),
        ),
        Benchmark(
            name="visulogic",
            columns=("image_path", "question", "label", "tag"),
            optional=("id",),
            item=visulogic,
            shown=("tag",),
        ),
        Benchmark(name="logic_vista", columns=("question", "image", "answer"), item=logic_vista),
        Benchmark(
            name="crpe",
            columns=("image", "text", "correct_option"),
            optional=("category",),
            item=crpe,
            shown=("part", "category"),
            metrics=scores.crpe,
        ),
        Benchmark(
            name="pope",
            columns=("question_id", "question", "answer", "image_source", "image", "category"),
            item=pope,
            shown=("category",),
            metrics=scores.pope,
        ),
        Benchmark(
            name="hallusion_bench",
            columns=(
                "category",
                "subcategory",
                "set_id",
                "figure_id",
                "question_id",
                "question",
                "gt_answer",
                "image",
            ),
            item=hallusion_bench,
            splits=("image",),
            shown=("category", "subcategory"),
            metrics=scores.hallusion_bench,
        ),
        Benchmark(
            name="miniature",
            columns=("id", "scene", "kind", "text", "answer"),
            item=miniature,
            splits=("heldout",),
            shown=("kind",),
        ),
    )
}


_SPLIT = re.compile(r"(train|dev|val|validation|test|image|non_image)(?=[-_.])")
_BATCH_ROWS = 16
_LINES_PER_UNIT = 512  # whose images wait in memory together


@dataclass(frozen=True, kw_only=True)
class ReadUnit:
    """Input of one read task: a row group of a Parquet file, or lines of a JSONL file (`row_group` -1)."""

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
    """A row left out of a benchmark, and the reason, such as `several images` in MMMU or `no image`."""

    id: str
    reason: str


def units(name: str, uri: str) -> list[ReadUnit]:
    """Return the units of the benchmark `name` at `uri`: a directory, a file or a wildcard path.

    In a directory, files of another split (`dev-00000-of-00001.parquet`) are passed over.

    Raises:
        ConfigError: no such benchmark.
        DataError: nothing there, or a file lacks columns.
    """
    spec = benchmark(name)
    found: list[ReadUnit] = []
    for file, info in _files(spec, uri):
        identity = storage.sha256(f"{info.size} {info.mtime_ns}".encode())[:16]
        if not storage.name_of(file).endswith(".parquet"):
            found += _line_units(spec, file, identity)
            continue
        footer = records.footer(file)
        _check_columns(spec, file, footer.schema.names)
        for group in range(len(footer.rows)):
            found.append(ReadUnit(benchmark=name, uri=file, row_group=group, identity=identity))
    if not found:
        raise DataError(f"{uri}: no rows of {name} there; expected Parquet or JSONL of {_wanted(spec)}")
    return found


def _line_units(spec: Benchmark, file: str, identity: str) -> list[ReadUnit]:
    num_lines = sum(1 for _ in records.lines(file))
    # The scenes of a world's questions lie in one tar, which is read as a whole.
    step = num_lines if spec.name == "miniature" else _LINES_PER_UNIT
    return [
        ReadUnit(
            benchmark=spec.name, uri=file, start=start, stop=min(start + step, num_lines), identity=identity
        )
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


def read_unit(unit: ReadUnit) -> Iterator[BenchmarkQuestion | LeftOut]:
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


def _rows(spec: Benchmark, unit: ReadUnit) -> Iterator[Row]:
    stem = posixpath.splitext(storage.name_of(unit.uri))[0]
    for number, row in _records(spec, unit):
        where = f"{unit.uri}: row {number}"
        for column in row:
            if column in ("image_path", "image") or re.fullmatch(r"image_\d+", column):
                row[column] = _image_bytes(row[column], unit.uri, where)
        yield {**row, "#file": unit.uri, "#row": f"{stem}-{number:06d}"}


def _records(spec: Benchmark, unit: ReadUnit) -> Iterator[tuple[int, dict[str, Any]]]:
    if unit.row_group >= 0:
        columns = (*spec.columns, *spec.optional)
        group = unit.row_group
        yield from records.rows(unit.uri, group, group + 1, columns, _BATCH_ROWS)
        return
    lines = itertools.islice(records.lines(unit.uri), unit.start, unit.stop)
    for number, (offset, line) in enumerate(lines, unit.start):
        if not line.strip():
            continue
        where = f"{unit.uri}: line {number + 1}"
        try:
            row = records.record_of_json(line, where, offset).fields()
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
        _check_columns(spec, where, list(row))
        yield number, row


def _image_bytes(cell: Any, uri: str, where: str) -> bytes | None:
    """Return the encoded image of a cell (see `image_value`); a path is relative to the file `uri`."""
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


def _miniature_rows(unit: ReadUnit) -> Iterator[Row]:
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
    for sample in records.samples(shard, IMAGE_EXTENSIONS, DEFAULT_MAX_IMAGE_BYTES):
        for member in records.images_in(sample):
            if member.content is not None:
                found[sample.key] = member.content
    return found
