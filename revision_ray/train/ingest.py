"""Steps of training as a stream: Ray Data tasks read, align, tokenise; a worker gets its own micro batches.

A task takes a window of the plan (`train.plan`), deals each global batch of it among the ranks by the length
of texts, and makes the samples of its own rank (`train.prepare`). Each rank runs a pipeline of its own.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray.data import ExecutionResources, TaskPoolStrategy

from revision_ray.cluster import connect, data_context, user_errors
from revision_ray.data.conversations import ConversationSource, expand
from revision_ray.data.store import open_stores
from revision_ray.errors import ConfigError
from revision_ray.train.joined import join
from revision_ray.train.joined_store import Kind, check_file_names
from revision_ray.train.plan import Order, Plan, repeats_of_weights
from revision_ray.train.prepare import Setup, Share, Step, decode, prepare, read_embeddings, read_texts
from revision_ray.train.samples import Formatter, Unusable, visible
from revision_ray.train.sources import JoinedSource, Source, TextSource, joined_stores_source, text_source

__all__ = ["JoinedSource", "Order", "Share", "Source", "Step", "TextSource", "conversation_source", "inspect",
           "steps", "steps_per_epoch", "text_source"]  # fmt: skip

log = logging.getLogger(__name__)

# Steps leave a task in blocks of about this size, so the first ones do not wait for the rest of the window.
_BLOCK_BYTES = 2**20
# What may lie ready for one rank. Tasks wait when their rank lags behind.
_READY_BYTES = 256 * 2**20
_WINDOWS_PER_PIPELINE = 512


def plan_of(source: Source, order: Order) -> Plan:
    """The steps that `source` gives in this order."""
    return Plan(source.parts, order)


def steps_per_epoch(source: Source, order: Order) -> int:
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
    source: Source, formatter: Formatter, order: Order, share: Share, *, start_step: int = 0, num_steps: int
) -> Iterator[Step]:
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
    setup = ray.put(Setup(source=source, formatter=formatter, plan=plan, share=share))
    while items := [asdict(window) for window in islice(windows, _WINDOWS_PER_PIPELINE)]:
        with user_errors():
            for row in _rows(items, setup, share):
                yield decode(row["step"], row["epoch"], row["payload"], pad_id)


def _rows(items: list[dict[str, Any]], setup: Any, share: Share) -> Iterator[dict[str, Any]]:
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
def _fetched(setup: Any) -> Setup:
    """The tokenizer and the fit are unpacked once in a process, not in every task."""
    return ray.get(setup)


def _prepare(item: dict[str, Any], *, setup: Any) -> Iterator[dict[str, Any]]:
    """One row a step of the window part `item`."""
    work = _fetched(setup)
    window = work.plan.window(item["epoch"], item["index"])
    for number, made in prepare(work, window, item["first_batch"], item["stop_batch"]):
        yield {"step": window.first_step + number, "epoch": window.epoch, "payload": made}


def inspect(source: Source, formatter: Formatter, order: Order, count: int) -> list[str]:
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
