"""One optimizer step over a global batch, and the held-out loss: what every worker computes. No Ray.

Shapes: B samples of a micro batch, T tokens, I images, D embedding dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from revision_ray.train.batches import Batch
from revision_ray.train.samples import NO_LABEL
from revision_ray.train.zero import Engine


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Sums over all workers."""

    loss: float  # mean over the valid target tokens of the global batch
    num_targets: int
    num_tokens: int  # without padding
    num_slots: int  # with padding
    num_samples: int
    gradient_norm: float

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / self.num_slots if self.num_slots else 0.0


def train_step(engine: Engine, micro_batches: Sequence[Batch]) -> StepResult:
    """The weights have moved once, by the gradient of the mean loss over the global batch's target tokens.

    Not a mean of means: every target token weighs the same, whichever worker and micro batch it is in.
    A batch without any target moves nothing.
    """
    totals = _totals(engine, micro_batches)
    if not totals["targets"]:
        return _result(totals, 0.0, 0.0)
    loss_sum, norm = torch.zeros((), dtype=torch.float64), 0.0
    even = _evened(engine, micro_batches)
    for index, batch in enumerate(even):
        last = index == len(even) - 1
        engine.deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the workers; here they are to be summed.
        loss = _loss(engine, batch, totals["targets"] / _world_size())
        engine.deepspeed.backward(loss, scale_wrt_gas=False)
        norm = engine.step(last)
        loss_sum += loss.detach().double().cpu()
    return _result(totals, _sum(engine, [float(loss_sum) / _world_size()])[0], norm)


@torch.no_grad()
def heldout_loss(engine: Engine, steps: Sequence[Sequence[Batch]]) -> float:
    """Mean loss over the target tokens of the steps' micro batches, of all workers."""
    sums = [0.0, 0.0]
    for micro_batches in steps:
        totals = _totals(engine, micro_batches)
        sums[1] += totals["targets"]
        sums[0] += sum(float(_loss(engine, batch, 1.0)) for batch in _evened(engine, micro_batches))
    total = _sum(engine, [sums[0]])[0]
    return total / sums[1] if sums[1] else float("nan")


def _evened(engine: Engine, micro_batches: Sequence[Batch]) -> list[Batch]:
    """As many micro batches as any worker has, empty ones behind: all must go through the model equally
    often, because ZeRO-3 gathers weights from all of them as it goes."""
    rounds = torch.tensor(len(micro_batches), device=engine.device)
    dist.all_reduce(rounds, dist.ReduceOp.MAX)
    nothing = Batch(
        input_ids=torch.zeros((1, 2), dtype=torch.int64),
        attention_mask=torch.ones((1, 2), dtype=torch.int64),
        labels=torch.full((1, 2), NO_LABEL),
        image_embeds=torch.zeros((0, engine.model.config.embedding_dim)),
        num_targets=0,
        num_tokens=0,
    )
    return [*micro_batches, *[nothing] * (int(rounds) - len(micro_batches))]


def _loss(engine: Engine, batch: Batch, num_items: float) -> torch.Tensor:
    """Sum of the cross entropies of the batch's targets over `num_items`."""
    moved: dict[str, Any] = {
        "input_ids": batch.input_ids.to(engine.device),
        "attention_mask": batch.attention_mask.to(engine.device),
        "labels": batch.labels.to(engine.device),
    }
    if len(batch.image_embeds):
        moved["image_embeds"] = batch.image_embeds.to(engine.device, engine.dtype)
    return engine.deepspeed(**moved, num_items_in_batch=num_items, use_cache=False).loss


def _totals(engine: Engine, micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Counts over all workers."""
    counted = [
        sum(batch.num_targets for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
        sum(batch.input_ids.numel() for batch in micro_batches),
        sum(len(batch.ids) for batch in micro_batches),
    ]
    names = ("targets", "tokens", "slots", "samples")
    return dict(zip(names, map(int, _sum(engine, counted)), strict=True))


def _sum(engine: Engine, values: Sequence[float]) -> list[float]:
    summed = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(summed)
    return summed.tolist()


def _world_size() -> int:
    return dist.get_world_size()


def _result(totals: dict[str, int], loss: float, gradient_norm: float) -> StepResult:
    return StepResult(
        loss=loss,
        num_targets=totals["targets"],
        num_tokens=totals["tokens"],
        num_slots=totals["slots"],
        num_samples=totals["samples"],
        gradient_norm=gradient_norm,
    )
