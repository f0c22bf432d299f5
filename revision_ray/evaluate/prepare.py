"""Read questions and compute image embeddings of each benchmark once, for all conditions (Ray Data).

    units --read--> questions, encoded images --encode--> questions/NAME.parquet, images/NAME.parquet

Shapes: I images, D embedding_dim.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from revision_ray.core import storage
from revision_ray.core.cluster import data_context, pipeline_rows, refusing_late, user_errors
from revision_ray.core.errors import DataError
from revision_ray.core.observe import progress
from revision_ray.data.images import UndecodableImage
from revision_ray.data.store import Store, read_group, read_group_ids
from revision_ray.encode import checkpoints
from revision_ray.evaluate.benchmarks import (
    BenchmarkQuestion,
    LeftOut,
    ReadUnit,
    content_key,
    parquet_bytes,
    read_parquet,
    read_unit,
)
from revision_ray.evaluate.responder import Dtype, Responder

MAX_IMAGE_PIXELS = 178_956_970
_META = b"revision_ray.evaluate"


@dataclass(frozen=True, kw_only=True)
class ActorSettings:
    """Settings of the actors that run the model. `num_gpus` and `num_cpus` are for one actor."""

    model: str
    """Absolute path, URI or hub id; each actor resolves it on its own node."""
    dtype: Dtype
    batch_size: int
    max_new_tokens: int
    num_gpus: float
    num_cpus: float
    max_actors: int
    today: str = ""
    """Date that a chat template may print."""

    def responder(self) -> Responder:
        return Responder(
            checkpoints.folder_with_weights(self.model, None),
            dtype=self.dtype,
            max_new_tokens=self.max_new_tokens,
            num_threads=None if self.num_gpus else max(1, int(self.num_cpus)),
            today=self.today,
        )

    def map(self, dataset: ray.data.Dataset, stage: type) -> ray.data.Dataset:
        """Apply `stage(self)` to batches of one row each, in a pool of actors."""
        return dataset.map_batches(
            stage,
            fn_constructor_args=(self,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.max_actors),
        )


@dataclass(frozen=True, kw_only=True)
class PreparedBenchmark:
    """A benchmark ready to ask: its questions without images, and an embedding for every image key."""

    questions: list[BenchmarkQuestion]
    keys: list[str]
    """Image key of each question."""
    embeddings: dict[str, np.ndarray]
    """float32 (D,) by image key."""
    left_out: dict[str, int]
    """Number of rows left out, by reason."""


_READ_SCHEMA = pa.schema(
    {
        "benchmark": pa.string(),
        "number": pa.int64(),
        "questions": pa.large_string(),
        "keys": pa.large_string(),
        "left_out": pa.string(),
        "images": pa.list_(pa.large_binary()),
    }
)


def read_stage(batch: pa.Table) -> pa.Table:
    """Read the questions and distinct images of each unit; return one row per unit."""
    rows = [
        {**row, **_read(ReadUnit(**json.loads(row["unit"])))}
        for row in batch.select(["benchmark", "number", "unit"]).to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=_READ_SCHEMA)


def _read(unit: ReadUnit) -> dict[str, Any]:
    questions, keys, left_out = [], [], Counter[str]()
    images: dict[str, bytes] = {}
    for item in read_unit(unit):
        if isinstance(item, LeftOut):
            left_out[item.reason] += 1
            continue
        key = item.image_id if item.image is None else content_key(item.image)
        if item.image is not None:
            images[key] = item.image
        keys.append(key)
        questions.append(asdict(replace(item, image=None)))
    return {
        "questions": json.dumps(questions),
        "keys": json.dumps({"of_questions": keys, "of_images": list(images)}),
        "images": list(images.values()),
        "left_out": json.dumps(left_out),
    }


@refusing_late
class EncodeImages:
    """Actor that encodes the images of a unit with the model's own image tower."""

    def __init__(self, actors: ActorSettings) -> None:
        self.batch_size, self.responder = actors.batch_size, actors.responder()

    def __call__(self, unit: pa.Table) -> pa.Table:
        keys = json.loads(unit.column("keys")[0].as_py())["of_images"]
        images = unit.column("images")[0].as_py()
        parts = []
        for start in range(0, len(images), self.batch_size):
            chosen = images[start : start + self.batch_size]
            try:
                parts.append(self.responder.encode(chosen, MAX_IMAGE_PIXELS))
            except UndecodableImage as error:
                raise DataError(
                    f"{unit.column('benchmark')[0].as_py()}: among the images {keys[start]} and the "
                    f"{len(chosen) - 1} behind it: {error}; restore the file: a question without its image "
                    "would change the score"
                ) from error
        rows_ID = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
        dim = pa.array([rows_ID.shape[1]])
        encoded = pa.array([rows_ID.astype("<f4").tobytes()], pa.large_binary())
        return unit.drop_columns(["images"]).append_column("embedding", encoded).append_column("dim", dim)


def prepare(
    output: str,
    units: Mapping[str, Sequence[ReadUnit]],
    actors: ActorSettings,
    store: Store | None,
    choose: Callable[[str, list[BenchmarkQuestion]], list[int]],
) -> None:
    """Prepare every benchmark of `units` below `output`, except those already prepared there.

    Embeddings come from `store` if it is given, else from the model. `choose` returns the positions of the
    questions to keep.

    Raises:
        DataError: an image cannot be decoded, or is neither in the store nor in the files.
    """
    missing = {name: parts for name, parts in units.items() if not storage.exists(_path(output, name))}
    if not missing:
        return
    items = [
        {"benchmark": name, "number": number, "unit": json.dumps(asdict(unit))}
        for name, parts in missing.items()
        for number, unit in enumerate(parts)
    ]
    arrived: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in missing}
    with data_context(target_block_bytes=1) as context, user_errors():
        context.wait_for_min_actors_s = 0
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            read_stage, batch_size=1, batch_format="pyarrow", num_cpus=0.5
        )
        dataset = dataset.drop_columns(["images"]) if store else actors.map(dataset, EncodeImages)
        label = "read benchmarks" if store else "encode images"
        with progress(label, len(items), "units") as shown, pipeline_rows(dataset) as rows:
            for row in rows:
                name = row["benchmark"]
                arrived[name][row["number"]] = row
                if len(arrived[name]) == len(missing[name]):
                    parts = arrived.pop(name)
                    ordered = [parts[number] for number in range(len(parts))]
                    _write(output, name, _assembled(name, ordered, store, choose))
                shown.advance(1)


def _assembled(
    name: str,
    parts: list[dict[str, Any]],
    store: Store | None,
    choose: Callable[[str, list[BenchmarkQuestion]], list[int]],
) -> PreparedBenchmark:
    questions, keys, left_out = [], [], Counter[str]()
    embeddings: dict[str, np.ndarray] = {}
    for part in parts:
        part_keys = json.loads(part["keys"])
        questions += [_item(document) for document in json.loads(part["questions"])]
        keys += part_keys["of_questions"]
        left_out.update(json.loads(part["left_out"]))
        if store is None:
            rows_ID = np.frombuffer(part["embedding"], "<f4").reshape(-1, part["dim"])
            embeddings.update(zip(part_keys["of_images"], rows_ID, strict=True))
    if not questions:
        raise DataError(f"{name}: no row is a question of it; left out were {dict(left_out)}")
    questions = _numbered(questions)
    chosen = choose(name, questions)
    questions, keys = [questions[i] for i in chosen], [keys[i] for i in chosen]
    if store is not None:
        embeddings = _of_store(name, questions, keys, store)
    absent = [question.id for question, key in zip(questions, keys, strict=True) if key not in embeddings]
    if absent:
        source = f"the image store {store.uris[0]}" if store else "the benchmark's files"
        raise DataError(
            f"{name}: {len(absent)} of {len(questions)} questions have no image in {source}; the first is "
            f"{absent[0]}; give images=STORE with embeddings of these images"
        )
    needed = set(keys)
    kept = {key: row_D for key, row_D in embeddings.items() if key in needed}
    return PreparedBenchmark(questions=questions, keys=keys, embeddings=kept, left_out=dict(left_out))


def _numbered(questions: list[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """Make the ids of the questions unique: repeated ids get the suffix `#2`, `#3` and so on."""
    seen = Counter[str]()
    numbered = []
    for question in questions:
        seen[question.id] += 1
        again = f"{question.id}#{seen[question.id]}" if seen[question.id] > 1 else question.id
        numbered.append(replace(question, id=again))
    return numbered


def _of_store(
    name: str, questions: list[BenchmarkQuestion], keys: list[str], store: Store
) -> dict[str, np.ndarray]:
    """Return float32 unit rows (D,) by image key, looked up by the question's image id or by the key."""
    wanted: dict[str, list[str]] = {}
    for question, key in zip(questions, keys, strict=True):
        for row_id in {question.image_id, key} - {""}:
            wanted.setdefault(row_id, []).append(key)
    found: dict[str, np.ndarray] = {}
    for group in store.row_groups:
        ids = read_group_ids(group)
        hits = [position for position, row_id in enumerate(ids) if row_id in wanted]
        if not hits:
            continue
        rows_ID = read_group(group, store.embedding_dim)[hits].astype(np.float32)
        rows_ID = rows_ID / np.linalg.norm(rows_ID, axis=1, keepdims=True)
        for position, row_D in zip(hits, rows_ID, strict=True):
            if not np.isfinite(row_D).all():
                raise DataError(
                    f"{group.uri}: the embedding of {ids[position]}, which {name} needs, is not finite"
                )
            for key in wanted[ids[position]]:
                found[key] = row_D
    return found


def sample(items: Sequence[BenchmarkQuestion], max_items: int | None, seed: int) -> list[int]:
    """Return sorted positions of at most `max_items` questions, drawn uniformly."""
    if max_items is None or max_items >= len(items):
        return list(range(len(items)))
    return sorted(random.Random(f"{seed}/sample").sample(range(len(items)), max_items))


def _path(output: str, name: str) -> str:
    """Return the path of the questions file. It is written after the images, so it marks both as complete."""
    return storage.join(output, "questions", f"{name}.parquet")


def _write(output: str, name: str, prepared: PreparedBenchmark) -> None:
    rows = [prepared.embeddings[key].astype("<f4").tobytes() for key in prepared.embeddings]
    images = pa.table(
        {"key": pa.array(list(prepared.embeddings), pa.string()), "embedding": pa.array(rows, pa.binary())}
    )
    storage.write_bytes(storage.join(output, "images", f"{name}.parquet"), parquet_bytes(images))
    rows = [{**asdict(question), "groups": json.dumps(question.groups)} for question in prepared.questions]
    names = ("id", "prompt", "scoring", "letters", "groups", "image_id")
    table = pa.table({
        **{column: pa.array([row[column] for row in rows], pa.string()) for column in names},
        **{column: pa.array([list(row[column]) for row in rows], pa.list_(pa.string()))
           for column in ("answers", "options")},
        "image_key": pa.array(prepared.keys, pa.string()),
    })  # fmt: skip
    table = table.replace_schema_metadata({_META: json.dumps({"left_out": prepared.left_out})})
    storage.write_bytes(_path(output, name), parquet_bytes(table))


def load_prepared(output: str, name: str) -> PreparedBenchmark:
    """Read a benchmark that `prepare` wrote below `output`."""
    table = read_parquet(_path(output, name))
    images = read_parquet(storage.join(output, "images", f"{name}.parquet"))
    return PreparedBenchmark(
        questions=_questions(table),
        keys=table.column("image_key").to_pylist(),
        embeddings={row["key"]: np.frombuffer(row["embedding"], "<f4") for row in images.to_pylist()},
        left_out=json.loads((table.schema.metadata or {})[_META])["left_out"],
    )


def load_questions(output: str, name: str) -> list[BenchmarkQuestion]:
    """Read only the questions of a benchmark that `prepare` wrote below `output`."""
    return _questions(read_parquet(_path(output, name)))


def _questions(table: pa.Table) -> list[BenchmarkQuestion]:
    return [
        _item({**{key: row[key] for key in row if key != "image_key"}, "groups": json.loads(row["groups"])})
        for row in table.to_pylist()
    ]


def _item(document: dict[str, Any]) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        **{**document, "answers": tuple(document["answers"]), "options": tuple(document["options"])}
    )
