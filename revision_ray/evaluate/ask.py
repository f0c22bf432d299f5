"""Send the prompts of each condition through the model in batches, and write scored answers (Ray Data).

Batches depend on the questions, the seed and the batch size, but not on the number of actors.

Shapes: B batch, D embedding_dim.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from revision_ray.core import storage
from revision_ray.core.cluster import data_context, pipeline_rows, refusing_late, user_errors
from revision_ray.core.errors import DataError
from revision_ray.core.observe import progress
from revision_ray.evaluate.answers import RULES, judge
from revision_ray.evaluate.benchmarks import parquet_bytes, read_parquet
from revision_ray.evaluate.prepare import ActorSettings, PreparedBenchmark

Control = Literal["blind", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkCondition:
    """One benchmark under one condition: its prompts and the image that goes with each of them."""

    benchmark: str
    condition: str
    prepared: PreparedBenchmark
    positions: list[int]
    """Positions in `prepared` of the questions asked."""
    prompts: list[str]
    shown: list[str] | None
    """Key of the image of each prompt; None if no image is given."""
    scored: bool = True
    """Whether answers are judged; False for captions."""


def conditions(
    name: str, prepared: PreparedBenchmark, controls: Sequence[Control], seed: int
) -> Iterator[BenchmarkCondition]:
    """Yield the benchmark with its own images, then under each of the controls."""
    everything = list(range(len(prepared.questions)))
    prompts = [question.prompt for question in prepared.questions]
    yield BenchmarkCondition(
        benchmark=name,
        condition="image",
        prepared=prepared,
        positions=everything,
        prompts=prompts,
        shown=prepared.keys,
    )
    if "blind" in controls:
        yield BenchmarkCondition(
            benchmark=name,
            condition="blind",
            prepared=prepared,
            positions=everything,
            prompts=prompts,
            shown=None,
        )
    if "shuffled" in controls:
        other = derangement(sorted(set(prepared.keys)), seed)
        yield BenchmarkCondition(
            benchmark=name,
            condition="shuffled",
            prepared=prepared,
            positions=everything,
            prompts=prompts,
            shown=[other[key] for key in prepared.keys],
        )


def captions(
    name: str, prepared: PreparedBenchmark, prompt: str, keys: Sequence[str], model: str
) -> BenchmarkCondition:
    """Return the condition that asks the model with fingerprint `model` to caption the images `keys`."""
    first = {key: position for position, key in reversed(list(enumerate(prepared.keys)))}
    # Other images, another prompt or another model give another condition, and so another file.
    digest = storage.sha256(model.encode(), prompt.encode(), *(key.encode() for key in keys))[:8]
    return BenchmarkCondition(
        benchmark=name,
        condition=f"captions-{digest}",
        prepared=prepared,
        positions=[first[key] for key in keys],
        prompts=[prompt] * len(keys),
        shown=list(keys),
        scored=False,
    )


def derangement(keys: Sequence[str], seed: int) -> dict[str, str]:
    """Map each image to another one, along one random cycle through all images.

    The result depends only on the keys and the seed. All questions about an image get the same other image,
    so no question is shown its own.

    Raises:
        DataError: `keys` holds fewer than two images.
    """
    if len(keys) < 2:
        raise DataError("the shuffled control needs two different images or more; leave it out of controls=")
    cycle = sorted(keys)
    random.Random(f"{seed}/shuffled").shuffle(cycle)
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def answers_path(output: str, name: str, condition: str) -> str:
    return storage.join(output, "answers", name, f"{condition}.parquet")


@refusing_late
class AnswerPrompts:
    """Actor that answers batches of prompts with the model."""

    def __init__(self, actors: ActorSettings) -> None:
        self.responder = actors.responder()

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        prompts = json.loads(row["prompts"])
        images_BD = None
        if row["embedding"] is not None:
            images_BD = np.frombuffer(row["embedding"], np.float32).reshape(len(prompts), -1).copy()
        said = self.responder.answer(prompts, images_BD)
        return pa.table({"part": [row["part"]], "rows": [row["rows"]], "said": [json.dumps(said)]})


def answer_parts(output: str, parts: Sequence[BenchmarkCondition], actors: ActorSettings) -> None:
    """Answer every part and write its scored answers below `output`.

    A part that has an answers file is not asked again, but judged again if other rules judged it.
    """
    left = [part for part in parts if not _stands(output, part)]
    batches = [
        batch for number, part in enumerate(left) for batch in _batches(number, part, actors.batch_size)
    ]
    if not batches:
        return
    said: list[dict[int, str]] = [{} for _ in left]
    with data_context(target_block_bytes=1) as context, user_errors():
        context.wait_for_min_actors_s = 0
        dataset = actors.map(ray.data.from_items(batches, override_num_blocks=len(batches)), AnswerPrompts)
        with (
            progress("answer", sum(len(part.prompts) for part in left), "questions") as shown,
            pipeline_rows(dataset) as rows,
        ):
            for row in rows:
                part, answers = left[row["part"]], json.loads(row["said"])
                said[row["part"]].update(zip(json.loads(row["rows"]), answers, strict=True))
                if len(said[row["part"]]) == len(part.prompts):
                    table = _scored(part, said[row["part"]])
                    path = answers_path(output, part.benchmark, part.condition)
                    storage.write_bytes(path, parquet_bytes(table))
                shown.advance(len(answers), f"{part.benchmark} {part.condition}")


def _stands(output: str, part: BenchmarkCondition) -> bool:
    path = answers_path(output, part.benchmark, part.condition)
    if not storage.exists(path):
        return False
    table = read_parquet(path)
    if part.scored and (table.schema.metadata or {}).get(_RULES) != str(RULES).encode():
        said = dict(enumerate(table.column("raw").to_pylist()))
        storage.write_bytes(path, parquet_bytes(_scored(part, said)))
    return True


def _batches(number: int, part: BenchmarkCondition, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of the part, sorted by prompt length to keep padding small."""
    order = sorted(range(len(part.prompts)), key=lambda row: (len(part.prompts[row]), row))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        embedding = None
        if part.shown is not None:
            embeddings_BD = np.stack([part.prepared.embeddings[part.shown[row]] for row in rows])
            embedding = embeddings_BD.astype(np.float32).tobytes()
        prompts = [part.prompts[row] for row in rows]
        yield {
            "part": number,
            "rows": json.dumps(rows),
            "prompts": json.dumps(prompts),
            "embedding": embedding,
        }


def _scored(part: BenchmarkCondition, said: dict[int, str]) -> pa.Table:
    """Return one row per question, in the order of the part, with the raw answer and its verdict."""
    rows = []
    for row, position in enumerate(part.positions):
        question = part.prepared.questions[position]
        verdict = None
        if part.scored:
            verdict = judge(
                question.scoring,
                said[row],
                question.answers,
                letters=question.letters,
                options=question.options,
            )
        rows.append(
            {
                "id": question.id,
                "benchmark": part.benchmark,
                "condition": part.condition,
                "prompt": part.prompts[row],
                "answer": " | ".join(question.answers) if part.scored else None,
                "predicted": verdict.predicted if verdict else None,
                "raw": said[row],
                "correct": verdict.correct if verdict else None,
                "groups": json.dumps(question.groups),
                "image": part.prepared.keys[position],
                "shown": None if part.shown is None else part.shown[row],
            }
        )
    return pa.Table.from_pylist(rows, schema=_ANSWERS.with_metadata({_RULES: str(RULES)}))


_RULES = b"revision_ray.evaluate.rules"
_ANSWERS = pa.schema(
    [
        (name, pa.bool_() if name == "correct" else pa.string())
        for name in (
            "id",
            "benchmark",
            "condition",
            "prompt",
            "answer",
            "predicted",
            "raw",
            "correct",
            "groups",
            "image",
            "shown",
        )
    ],
)
