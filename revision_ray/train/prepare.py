"""A window's rows as one rank's samples, and the bytes in which they travel to it. No Ray.

All ranks read the texts of a window, and each reads the row groups that its own rows lie in: what is read
twice costs less than sending embeddings from rank to rank would.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import safetensors.numpy

from revision_ray.train.batches import Batch, collate, deal, split_again
from revision_ray.train.plan import Plan, Window
from revision_ray.train.samples import Formatter, Sample, Unusable
from revision_ray.train.sources import Source, Texts

# A visual token weighs as much as this many characters: what a token of English text has.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Share:
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
class Step:
    """One step's samples for one rank. Ranks have equal numbers of micro batches, less those left empty."""

    step: int
    epoch: int
    micro_batches: list[Batch]
    rejected: list[tuple[str, str, str]]  # (id, cause, detail) of this rank's samples that are left out
    truncated: list[tuple[str, str, str]]  # (id, cause, detail) of those that were cut off and kept
    num_samples: int  # of all ranks, those left out among them
    num_without_end: int = 0  # of this rank's samples: no token behind the last target says that it ends


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the preparation of any window needs."""

    source: Source
    formatter: Formatter
    plan: Plan
    share: Share


def prepare(work: Setup, window: Window, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
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
        kept = [sample for sample in made if isinstance(sample, Sample)]
        yield number, _encode(split_again(kept, len(micro_batches)), rejected, len(batch))


def _dealt(share: Share, lengths: np.ndarray) -> list[np.ndarray]:
    return deal(lengths, share.num_workers, share.micro_batch_size)[share.rank]


def _by_group(window: Window, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(row group, those of the positions whose rows lie in it), so that each row group is read once."""
    ordered = positions[np.argsort(window.groups[positions], kind="stable")]
    groups = window.groups[ordered]
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    for start, end in pairwise(edges.tolist()):
        yield int(groups[start]), ordered[start:end]


def read_texts(source: Source, window: Window) -> Texts:
    """The rows of a window without their embeddings, in the window's order."""
    size = len(window.rows)
    ids, texts = [""] * size, [""] * size
    num_characters, num_images = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for group, positions in _by_group(window, np.arange(size)):
        found = source.texts(group, window.rows[positions])
        num_characters[positions], num_images[positions] = found.num_characters, found.num_images
        for at, row_id, text in zip(positions.tolist(), found.ids, found.texts, strict=True):
            ids[at], texts[at] = row_id, text
    return Texts(ids=ids, texts=texts, num_characters=num_characters, num_images=num_images)


def read_embeddings(source: Source, window: Window, positions: np.ndarray) -> dict[int, np.ndarray]:
    """The embeddings of these positions of a window, and of no others."""
    embeds: dict[int, np.ndarray] = {}
    for group, here in _by_group(window, positions):
        embeds |= zip(here.tolist(), source.embeddings(group, window.rows[here]), strict=True)
    return embeds


def _encode(
    micro_batches: list[list[Sample]], rejected: list[tuple[str, str, str]], num_samples: int
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


def decode(step: int, epoch: int, payload: bytes, pad_id: int) -> Step:
    """The step whose samples `prepare` encoded."""
    arrays = safetensors.numpy.load(payload)
    notes = json.loads(arrays["notes"].tobytes())
    samples = _samples(arrays, notes["ids"]) if notes["ids"] else []
    edges = np.cumsum([0, *arrays["micro_batches"].tolist()]).tolist()
    return Step(
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


def _samples(arrays: dict[str, np.ndarray], ids: list[str]) -> list[Sample]:
    tokens = np.cumsum([0, *arrays["num_tokens"].tolist()]).tolist()
    images = np.cumsum([0, *arrays["num_images"].tolist()]).tolist()
    return [
        Sample(
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
