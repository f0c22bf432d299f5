"""Samples as padded tensors, dealt to ranks so that little of them is padding. No Ray.

Shapes: B samples, T tokens of the longest, I images, D embedding dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from revision_ray.train.samples import NO_LABEL, Sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro batch on the CPU, padded on the right. `num_targets` counts labels that the model predicts."""

    input_ids: torch.Tensor  # int64 (B, T)
    attention_mask: torch.Tensor  # int64 (B, T)
    labels: torch.Tensor  # int64 (B, T)
    image_embeds: torch.Tensor  # float32 (I, D), in the order of the samples
    num_targets: int
    num_tokens: int  # without padding
    ids: tuple[str, ...] = ()


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """The samples, at least one, as one batch."""
    lengths = [len(sample.input_ids) for sample in samples]
    shape = (len(samples), max(lengths))
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, NO_LABEL, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = sample.input_ids
        labels[row, : lengths[row]] = sample.labels
        attention_mask[row, : lengths[row]] = 1
    return Batch(
        ids=tuple(sample.id for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        image_embeds=torch.from_numpy(np.concatenate([sample.image_embeds for sample in samples])),
        num_targets=int((labels[:, 1:] != NO_LABEL).sum()),
        num_tokens=sum(lengths),
    )


def padding_share(batches: Batch | Sequence[Batch]) -> float:
    """Share of the places of these batches that hold padding, 0 to 1."""
    listed = [batches] if isinstance(batches, Batch) else list(batches)
    places = sum(batch.input_ids.numel() for batch in listed)
    return 1.0 - sum(batch.num_tokens for batch in listed) / places if places else 0.0


def deal(
    lengths: Sequence[int] | np.ndarray, num_ranks: int, micro_batch_size: int
) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> positions: near lengths together, as many micro batches for every rank.

    The longest come first, so that a batch that does not fit shows at once, and the ranks' n-th micro batches
    have near lengths, so that no rank waits long for another. Micro batches hold `micro_batch_size` positions
    at most and are as equal in number as can be; some are empty where there are fewer positions than micro
    batches.
    """
    order = longest_first(lengths)
    per_rank = -(-len(order) // (micro_batch_size * num_ranks))
    micro_batches = np.array_split(order, per_rank * num_ranks) if per_rank else []
    return [micro_batches[rank::num_ranks] for rank in range(num_ranks)]


def longest_first(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions by falling length, those of equal length in their order."""
    return np.argsort(-np.asarray(lengths, np.int64), kind="stable")


def split_again(samples: Sequence[Sample], num_micro_batches: int) -> list[list[Sample]]:
    """A rank's samples by their true lengths, in as many micro batches as it was dealt."""
    order = longest_first([len(sample.input_ids) for sample in samples])
    return [[samples[place] for place in part] for part in np.array_split(order, num_micro_batches)]
