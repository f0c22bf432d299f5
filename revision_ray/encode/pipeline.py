"""Embedding as a Ray Data pipeline: read and prepare (tasks), encode (actors), write shards (tasks).

    splits --prepare--> units of rows_per_shard prepared rows --encode--> unit rows --write--> part-*.parquet

A unit is one row of the Ray Data stream and becomes one shard, which appears atomically and records what it
was made from. A job that starts again reads the shards' footers and makes only the units that are missing.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from revision_ray.core import observe, storage
from revision_ray.core.cluster import connect, data_context, pipeline_rows, refusing_late, user_errors
from revision_ray.core.observe import progress
from revision_ray.data import images, shards, sources
from revision_ray.data.shards import (
    EmbeddingTable,
    EncoderIdentity,
    ImageRow,
    Layout,
    Modality,
    Rejected,
    ShardFooter,
    SourceSplit,
)
from revision_ray.encode.encoder import EncoderConfig, ImagePreparer, TextPreparer, backend


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each stage asks of the cluster."""

    gpus_per_actor: float | None = None
    """GPUs (or a fraction of one) for each encoder actor; by default 1 where the cluster has GPUs, else 0. On
    a cluster that starts GPU nodes on demand, say 1."""
    cpus_per_actor: float = 1.0
    """CPUs for each encoder actor; its thread count where it runs on the CPU."""
    max_actors: int | None = None
    """The actor pool grows up to this; by default to the GPUs (or half the CPUs) that the cluster has now."""
    cpus_per_task: float = 0.5
    """CPUs for each task that reads and prepares, or writes."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """How splits become shards. `done` holds the indices of the shards that stand, by split."""

    modality: Modality
    done: dict[str, frozenset[int]]
    encoder: EncoderConfig
    identity: EncoderIdentity
    output: str
    dtype: str
    layout: Layout
    rows_per_shard: int
    batch_size: int
    max_image_pixels: int


def shard_name(split: str, index: int) -> str:
    return f"part-{split}-{index:05d}.parquet"


def encode_splits(splits: Sequence[SourceSplit], plan: ShardPlan, resources: Resources) -> int:
    """Every unit of the splits that was not done stands as a shard in the store; the number of rows encoded.

    Raises:
        DataError: a source breaks off, or the storage refuses a write. Shards written so far stay.
    """
    connect()
    if not splits:
        return 0
    gpus = resources.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    items = [{"split": json.dumps(asdict(split))} for split in splits]
    encoded = 0
    # One unit a block: a block is the unit of scheduling and of what a lost worker costs.
    with data_context(target_block_bytes=1) as context, user_errors():
        context.wait_for_min_actors_s = 0
        dataset = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                Prepare(plan), batch_size=1, batch_format="pyarrow", num_cpus=resources.cpus_per_task
            )
            .map_batches(
                Encode,
                fn_constructor_args=(
                    plan.modality,
                    plan.encoder,
                    plan.batch_size,
                    gpus,
                    resources.cpus_per_actor,
                ),
                batch_size=1,  # a block; for actors with GPUs Ray Data wants a number
                batch_format="pyarrow",
                zero_copy_batch=True,
                num_cpus=resources.cpus_per_actor,
                num_gpus=gpus or None,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=_most_actors(resources, gpus)),
            )
            .map_batches(
                Write(plan), batch_size=None, batch_format="pyarrow", num_cpus=resources.cpus_per_task
            )
        )
        with progress(f"encode {plan.modality}s", None, "rows") as shown, pipeline_rows(dataset) as units:
            for unit in units:
                encoded += unit["num_rows"]
                observe.record(
                    samples=unit["num_rows"],
                    rejected=unit["num_rejected"],
                    truncated=unit["num_truncated"],
                    tokens=unit["num_tokens"],
                )
                shown.advance(
                    unit["num_rows"], f"rejected {unit['num_rejected']}" if unit["num_rejected"] else ""
                )
    return encoded


def _most_actors(resources: Resources, gpus: float) -> int:
    if resources.max_actors is not None:
        return resources.max_actors
    total = ray.cluster_resources()
    if gpus:
        return max(1, int(total.get("GPU", 1) / gpus))
    return max(1, int(total.get("CPU", 1) / 2 / resources.cpus_per_actor))


class Prepare:
    """Splits to units: rows read, decoded and resized or tokenised, as many to a unit as fit a shard."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for text in batch.column("split").to_pylist():
            document = json.loads(text)
            yield from self._units(SourceSplit(**{**document, "files": tuple(document["files"])}))

    def _units(self, split: SourceSplit) -> Iterator[pa.Table]:
        plan = self.plan
        done = plan.done.get(split.key, frozenset())
        reader = sources.read_images if plan.modality == "image" else sources.read_texts
        for index, last, rows in _grouped(reader(split), plan.rows_per_shard):
            if index in done:
                continue
            footer = ShardFooter(
                modality=plan.modality,
                embedding_dim=0,
                dtype=plan.dtype,
                encoder=plan.identity,
                split=split.key,
                split_uri=split.uri,
                split_start=split.start,
                split_files=split.files,
                identity=split.identity,
                index=index,
                last=last,
            )
            yield self._unit(footer, rows)

    def _unit(self, footer: ShardFooter, rows: list[Any]) -> pa.Table:
        rejected = [row for row in rows if isinstance(row, Rejected)]
        kept: list[Any] = [row for row in rows if not isinstance(row, Rejected)]
        if footer.modality == "image":
            kept, payload, shape, undecodable = self._pixels(kept)
            rejected += undecodable
            num_tokens = 0
            extra = {"uri": [row.uri for row in kept]}
        else:
            tokens = _text_preparer(self.plan.encoder)([row.text for row in kept])
            payload = np.concatenate([np.empty(0, np.int32), *(each.ids for each in tokens)])
            shape = [len(each.ids) for each in tokens]
            num_tokens = sum(each.num_taken for each in tokens)
            truncated = [each.truncated for each in tokens]
            footer = replace(footer, num_truncated=sum(truncated))
            extra = {"text": [row.text for row in kept], "truncated": truncated}
        footer = replace(footer, num_rows=len(kept), rejected=tuple(rejected))
        return _unit_table(footer, [row.id for row in kept], extra, payload, shape, num_tokens)

    def _pixels(self, rows: list[ImageRow]) -> tuple[list[ImageRow], np.ndarray, list[int], list[Rejected]]:
        preparer = _image_preparer(self.plan.encoder)
        kept, pixels, rejected = [], [], []
        for row in rows:
            try:
                image = images.decode_image(row.content, max_pixels=self.plan.max_image_pixels)
            except images.UndecodableImage as error:
                rejected.append(Rejected(id=row.id, uri=row.uri, reason=str(error)))
                continue
            pixels.append(preparer(image))
            kept.append(row)
        stacked_NCHW = np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)
        return kept, stacked_NCHW, list(stacked_NCHW.shape), rejected


def _grouped(rows: Iterable[Any], size: int) -> Iterator[tuple[int, bool, list[Any]]]:
    """(index, whether it is the last, rows): groups of `size` rows, rejected ones too; at least one group."""
    index, group = 0, []
    for row in rows:
        if len(group) == size:
            yield index, False, group
            index, group = index + 1, []
        group.append(row)
    yield index, True, group


@lru_cache(maxsize=1)
def _image_preparer(config: EncoderConfig) -> ImagePreparer:
    return backend(config).image_preparer(config)


@lru_cache(maxsize=1)
def _text_preparer(config: EncoderConfig) -> TextPreparer:
    return backend(config).text_preparer(config)


def _unit_table(
    footer: ShardFooter,
    ids: list[str],
    extra: dict[str, list[Any]],
    payload: np.ndarray,
    shape: list[int],
    num_tokens: int,
) -> pa.Table:
    """One unit; `num_tokens` are those that the tower takes of its texts, without padding."""
    content = np.ascontiguousarray(payload)
    offsets = np.array([0, content.nbytes], np.int64)
    binary = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    )
    return pa.table(
        {
            "footer": pa.array([json.dumps(asdict(footer))], pa.large_string()),
            "rows": pa.array([json.dumps({"id": ids, **extra})], pa.large_string()),
            "shape": pa.array([shape], pa.list_(pa.int64())),
            "payload": binary,
            "num_tokens": pa.array([num_tokens], pa.int64()),
        }
    )


@refusing_late
class Encode:
    """One tower in one actor; units of prepared rows become units of float32 embeddings."""

    def __init__(
        self, modality: Modality, encoder: EncoderConfig, batch_size: int, gpus: float, cpus: float
    ) -> None:
        if not gpus:
            torch.set_num_threads(max(1, int(cpus)))
        module = backend(encoder)
        self.modality, self.batch_size = modality, batch_size
        self.tower: Any = module.image_tower(encoder) if modality == "image" else module.text_tower(encoder)

    def __call__(self, units: pa.Table) -> pa.Table:
        encoded = []
        for unit in units.to_batches(max_chunksize=1):
            payload = unit.column("payload")[0].as_buffer()
            shape = unit.column("shape")[0].as_py()
            if self.modality == "image":
                pixels_NCHW = np.frombuffer(payload, np.uint8).reshape(shape)
                embedding_ND = encode_images(self.tower, pixels_NCHW, self.batch_size)
            else:
                tokens = np.split(np.frombuffer(payload, np.int32), np.cumsum(shape)[:-1]) if shape else []
                embedding_ND = encode_texts(self.tower, tokens, self.batch_size)
            encoded.append(embedding_ND.astype(np.float32, copy=False).tobytes())
        columns = {
            "embedding": pa.array(encoded, pa.large_binary()),
            "embedding_dim": pa.array([self.tower.embedding_dim] * len(encoded)),
        }
        passed_on = {name: units.column(name) for name in ("footer", "rows", "num_tokens")}
        return pa.table({**passed_on, **columns})


def encode_images(tower: Any, pixels_NCHW: np.ndarray, batch_size: int) -> np.ndarray:
    """float32 unit rows (N, D), encoded `batch_size` at a time."""
    starts = range(0, len(pixels_NCHW), batch_size)
    parts = [tower.encode(pixels_NCHW[start : start + batch_size]) for start in starts]
    return np.concatenate([np.empty((0, tower.embedding_dim), np.float32), *parts])


def encode_texts(tower: Any, tokens: list[np.ndarray], batch_size: int) -> np.ndarray:
    """float32 unit rows (N, D), encoded `batch_size` at a time, longest first so that little is padding."""
    embedding_ND = np.empty((len(tokens), tower.embedding_dim), np.float32)
    order = sorted(range(len(tokens)), key=lambda position: (-len(tokens[position]), position))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        embedding_ND[chosen] = tower.encode([tokens[position] for position in chosen])
    return embedding_ND


# What is told of each unit that was written.
_COUNTED = ("num_rows", "num_rejected", "num_truncated", "num_tokens")


class Write:
    """Units of embeddings to shards of the store."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan

    def __call__(self, units: pa.Table) -> pa.Table:
        written = [self._write(unit) for unit in units.to_pylist()]
        return pa.table({key: [row[key] for row in written] for key in _COUNTED})

    def _write(self, unit: dict[str, Any]) -> dict[str, int]:
        footer = replace(shards.parse_footer(unit["footer"]), embedding_dim=unit["embedding_dim"])
        rows = json.loads(unit["rows"])
        columns = {
            name: pa.array(rows[name], pa.bool_() if name == "truncated" else pa.string())
            for name in ("text", "uri", "truncated")
            if name in rows
        }
        embedding_ND = np.frombuffer(unit["embedding"], np.float32).reshape(-1, footer.embedding_dim)
        table = EmbeddingTable(ids=rows["id"], embedding_ND=embedding_ND, columns=columns)
        uri = storage.join(self.plan.output, shard_name(footer.split, footer.index))
        shards.write_shard(uri, table, footer, self.plan.layout)
        return {
            "num_rows": footer.num_rows,
            "num_rejected": len(footer.rejected),
            "num_truncated": footer.num_truncated,
            "num_tokens": unit["num_tokens"],
        }
