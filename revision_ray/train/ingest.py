"""Stream training steps: Ray Data tasks read, align and tokenise; each worker gets its own micro batches.

A task takes a window of the plan (`train.sources`), deals each of its global batches among the ranks by
length of text, and makes the samples of its own rank. All ranks read the texts of a window, and each reads
the row groups of its own rows: reading twice costs less than sending embeddings between ranks. Each rank
runs its own Ray Data pipeline.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import ray
import safetensors.numpy
from ray.data import ExecutionResources, TaskPoolStrategy

from revision_ray.core.cluster import connect, data_context, user_errors
from revision_ray.core.errors import ConfigError
from revision_ray.data.conversations import ConversationSource, expand
from revision_ray.data.store import open_stores
from revision_ray.train.joined import Kind, check_file_names, join
from revision_ray.train.samples import (
    Batch,
    Formatter,
    TrainingSample,
    Unusable,
    collate,
    deal,
    split_again,
    visible,
)
from revision_ray.train.sources import (
    JoinedSource,
    Source,
    StepOrder,
    StepPlan,
    StepWindow,
    TextBatch,
    joined_stores_source,
    repeats_of_weights,
)

# A visual token weighs as much as this many characters: what a token of English text has.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """What one training worker gets of each global batch, and with what it is prepared."""

    rank: int = 0
    num_workers: int = 1
    micro_batch_size: int = 8
    num_tasks: int = 2
    """Windows that are prepared at the same time, for this rank."""
    cpus_per_task: float = 0.01
    """CPUs that a task reserves: next to none, so that the tasks of all ranks run at once. A task keeps its
    reservation while its rank lags behind, and ranks wait for one another: were there room for one rank's
    tasks alone, training would stand still."""


@dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """One step's samples for one rank. Ranks have equal numbers of micro batches, less those left empty."""

    step: int
    epoch: int
    micro_batches: list[Batch]
    rejected: list[tuple[str, str, str]]  # (id, cause, detail) of this rank's samples that are left out
    truncated: list[tuple[str, str, str]]  # (id, cause, detail) of those that were cut off and kept
    num_samples: int  # of all ranks, those left out among them
    num_without_end: int = 0  # of this rank's samples: no token behind the last target says that it ends


@dataclass(frozen=True, kw_only=True)
class PreparationSetup:
    """What the preparation of any window needs."""

    source: Source
    formatter: Formatter
    plan: StepPlan
    share: WorkerShare


def prepare(work: PreparationSetup, window: StepWindow, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(number, encoded samples of this rank) of batches [first, stop) of a window."""
    texts = read_texts(work.source, window)
    lengths = texts.num_characters + texts.num_images * (
        work.formatter.num_visual_tokens * _CHARACTERS_PER_TOKEN
    )
    batches = work.plan.batches(window, lengths)[first:stop]
    dealt = [[batch[chosen] for chosen in _dealt(work.share, lengths[batch])] for batch in batches]
    mine = [np.concatenate(micro_batches) for micro_batches in dealt]
    embeds = read_embeddings(work.source, window, np.concatenate(mine))
    for number, (batch, positions, micro_batches) in enumerate(zip(batches, mine, dealt, strict=True), first):
        chosen = positions.tolist()
        made = []
        if chosen:
            made = work.source.samples(
                work.formatter,
                [texts.ids[at] for at in chosen],
                [texts.texts[at] for at in chosen],
                [embeds.pop(at) for at in chosen],
            )
        rejected = [
            (texts.ids[at], sample.cause, sample.detail)
            for at, sample in zip(chosen, made, strict=True)
            if isinstance(sample, Unusable)
        ]
        kept = [sample for sample in made if isinstance(sample, TrainingSample)]
        yield number, _encode(split_again(kept, len(micro_batches)), rejected, len(batch))


def _dealt(share: WorkerShare, lengths: np.ndarray) -> list[np.ndarray]:
    return deal(lengths, share.num_workers, share.micro_batch_size)[share.rank]


def _by_group(window: StepWindow, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(row group, those of the positions whose rows lie in it), so that each row group is read once."""
    ordered = positions[np.argsort(window.groups[positions], kind="stable")]
    groups = window.groups[ordered]
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    for start, end in pairwise(edges.tolist()):
        yield int(groups[start]), ordered[start:end]


def read_texts(source: Source, window: StepWindow) -> TextBatch:
    """The rows of a window without their embeddings, in the window's order."""
    size = len(window.rows)
    ids, texts = [""] * size, [""] * size
    num_characters, num_images = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for group, positions in _by_group(window, np.arange(size)):
        found = source.texts(group, window.rows[positions])
        num_characters[positions], num_images[positions] = found.num_characters, found.num_images
        for at, row_id, text in zip(positions.tolist(), found.ids, found.texts, strict=True):
            ids[at], texts[at] = row_id, text
    return TextBatch(ids=ids, texts=texts, num_characters=num_characters, num_images=num_images)


def read_embeddings(source: Source, window: StepWindow, positions: np.ndarray) -> dict[int, np.ndarray]:
    """The embeddings of these positions of a window, and of no others."""
    embeds: dict[int, np.ndarray] = {}
    for group, here in _by_group(window, positions):
        embeds |= zip(here.tolist(), source.embeddings(group, window.rows[here]), strict=True)
    return embeds


def _encode(
    micro_batches: list[list[TrainingSample]], rejected: list[tuple[str, str, str]], num_samples: int
) -> bytes:
    """A step's samples as safetensors: arrays of all samples one after the other, and their lengths."""
    samples = [sample for micro_batch in micro_batches for sample in micro_batch]
    notes = {
        "ids": [sample.id for sample in samples],
        "rejected": rejected,
        "num_samples": num_samples,
        "num_without_end": sum(not sample.ended for sample in samples),
    }
    arrays = {
        "micro_batches": np.array([len(micro_batch) for micro_batch in micro_batches], np.int64),
        "num_tokens": np.array([len(sample.input_ids) for sample in samples], np.int64),
        "num_images": np.array([len(sample.image_embeds) for sample in samples], np.int64),
        "num_cut": np.array([sample.num_cut for sample in samples], np.int64),
        "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
    }
    if samples:
        arrays["input_ids"] = np.concatenate([sample.input_ids for sample in samples])
        arrays["labels"] = np.concatenate([sample.labels for sample in samples])
        arrays["image_embeds"] = np.concatenate([sample.image_embeds for sample in samples])
    return safetensors.numpy.save(arrays)


def decode(step: int, epoch: int, payload: bytes, pad_id: int) -> PreparedStep:
    """The step whose samples `prepare` encoded."""
    arrays = safetensors.numpy.load(payload)
    notes = json.loads(arrays["notes"].tobytes())
    samples = _samples(arrays, notes["ids"]) if notes["ids"] else []
    edges = np.cumsum([0, *arrays["micro_batches"].tolist()]).tolist()
    return PreparedStep(
        step=step,
        epoch=epoch,
        micro_batches=[collate(samples[start:end], pad_id) for start, end in pairwise(edges) if end > start],
        rejected=[tuple(entry) for entry in notes["rejected"]],
        truncated=[
            (sample.id, "too_long", f"{sample.num_cut} tokens were cut off")
            for sample in samples
            if sample.num_cut
        ],
        num_samples=notes["num_samples"],
        num_without_end=notes["num_without_end"],
    )


def _samples(arrays: dict[str, np.ndarray], ids: list[str]) -> list[TrainingSample]:
    tokens = np.cumsum([0, *arrays["num_tokens"].tolist()]).tolist()
    images = np.cumsum([0, *arrays["num_images"].tolist()]).tolist()
    return [
        TrainingSample(
            id=row_id,
            input_ids=arrays["input_ids"][start:end],
            labels=arrays["labels"][start:end],
            image_embeds=arrays["image_embeds"][first:last],
            num_cut=num_cut,
        )
        for row_id, (start, end), (first, last), num_cut in zip(
            ids, pairwise(tokens), pairwise(images), arrays["num_cut"].tolist(), strict=True
        )
    ]


log = logging.getLogger(__name__)

# Steps leave a task in blocks of about this size, so the first ones do not wait for the rest of the window.
_BLOCK_BYTES = 2**20
# What may lie ready for one rank. Tasks wait when their rank lags behind.
_READY_BYTES = 256 * 2**20
_WINDOWS_PER_PIPELINE = 512


def plan_of(source: Source, order: StepOrder) -> StepPlan:
    """The steps that `source` gives in this order."""
    return StepPlan(source.parts, order)


def steps_per_epoch(source: Source, order: StepOrder) -> int:
    """Global batches of an epoch, the last of which may be smaller.

    Raises:
        DataError: the source has no rows.
    """
    return plan_of(source, order).steps_per_epoch


def conversation_source(
    parts: Sequence[ConversationSource],
    images: Sequence[str],
    cache: str,
    *,
    kind: Kind = "conversations",
    max_rejected_fraction: float = 0.001,
) -> JoinedSource:
    """The records of all parts, joined with the embeddings of their images in the image stores `images`.

    Joined stores are written below `cache` and found there again. A meta JSON stands for its entries.

    Raises:
        ConfigError: only some of the parts have a weight.
        DataError: records or image stores cannot be read, too many records cannot be used, or different
            images share the file name by which they are matched.
    """
    store = open_stores(images, "image") if images else None
    expanded = [entry for part in parts for entry in expand(part)]
    used = [entry for entry in expanded if (entry.repeat if entry.weight is None else entry.weight)]
    joined = [
        join(entry, store, cache, kind=kind, max_rejected_fraction=max_rejected_fraction) for entry in used
    ]
    check_file_names(
        [found.uri for entry, found in zip(used, joined, strict=True) if entry.match_images == "file_name"]
    )
    weights = [entry.weight for entry in used if entry.weight is not None]
    repeats = [entry.repeat for entry in used]
    if weights:
        if len(weights) < len(used):
            raise ConfigError("some parts of the mixture have a weight and others none; give all of them one")
        repeats = repeats_of_weights([found.num_rows for found in joined], weights)
    return joined_stores_source(joined, repeats)


def steps(
    source: Source,
    formatter: Formatter,
    order: StepOrder,
    share: WorkerShare,
    *,
    start_step: int = 0,
    num_steps: int,
) -> Iterator[PreparedStep]:
    """Steps `start_step` to `num_steps - 1` of the run, epoch after epoch, as this rank's micro batches.

    Which samples a step sees is a function of source, order and step alone. Closing the iterator ends the
    tasks behind it.

    Raises:
        DataError: the source has no rows, or cannot be read.
    """
    plan = plan_of(source, order)
    windows = plan.windows(start_step, max(num_steps - start_step, 0))
    tokenizer = formatter.tokenizer
    pad_id: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    connect()
    setup = ray.put(PreparationSetup(source=source, formatter=formatter, plan=plan, share=share))
    while items := [asdict(window) for window in islice(windows, _WINDOWS_PER_PIPELINE)]:
        with user_errors():
            for row in _rows(items, setup, share):
                yield decode(row["step"], row["epoch"], row["payload"], pad_id)


def _rows(items: list[dict[str, Any]], setup: Any, share: WorkerShare) -> Iterator[dict[str, Any]]:
    with data_context(target_block_bytes=_BLOCK_BYTES) as context:
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=_READY_BYTES
        )
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
            partial(_prepare, setup=setup),
            num_cpus=share.cpus_per_task,
            compute=TaskPoolStrategy(size=share.num_tasks),
        )
    blocks: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        for block in blocks:
            yield from block.to_pylist()
    finally:
        blocks.close()  # a generator: ends the pipeline's tasks now


@lru_cache(maxsize=2)
def _fetched(setup: Any) -> PreparationSetup:
    """The tokenizer and the fit are unpacked once in a process, not in every task."""
    return ray.get(setup)


def _prepare(item: dict[str, Any], *, setup: Any) -> Iterator[dict[str, Any]]:
    """One row a step of the window part `item`."""
    work = _fetched(setup)
    window = work.plan.window(item["epoch"], item["index"])
    for number, made in prepare(work, window, item["first_batch"], item["stop_batch"]):
        yield {"step": window.first_step + number, "epoch": window.epoch, "payload": made}


def inspect(source: Source, formatter: Formatter, order: StepOrder, count: int) -> list[str]:
    """The first samples of a run as the model reads them, or why one is left out. Starts no Ray."""
    order = replace(order, global_batch_size=count, batches_per_window=1)
    window = plan_of(source, order).window(0, 0)
    texts = read_texts(source, window)
    embeds = read_embeddings(source, window, np.arange(len(window.rows)))
    made = source.samples(formatter, texts.ids, texts.texts, [embeds[at] for at in range(len(embeds))])
    return [
        f"{row_id}: "
        + (str(sample) if isinstance(sample, Unusable) else visible(sample, formatter.tokenizer))
        for row_id, sample in zip(texts.ids, made, strict=True)
    ]
