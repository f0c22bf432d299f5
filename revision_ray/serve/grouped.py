"""Dynamic batches through the model's own `generate`, for architectures whose cache only it knows.

A batch takes the prompts that wait; those that come later wait for its longest answer.

Shapes: B rows, T tokens, V vocabulary.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from revision_ray.serve.request_queue import QueuedEngine, QueuedRequest


class GroupedEngine(QueuedEngine):
    """Any settings can share a batch: tokens are chosen here, and `generate` is told which."""

    async def _turn(self) -> None:
        if len(self._waiting) < self.config.num_slots:
            await asyncio.sleep(self.config.batch_wait_s)
        self._running += self._take(self.config.num_slots)
        if self._running:
            await self._in_thread(self._generate, self._running)
        self._fail(self._running)  # none is left, unless a setting of the checkpoint's ended the batch
        self._running.clear()

    def _forget(self) -> None:
        """Each batch has a cache of its own."""

    @torch.inference_mode()
    def _generate(self, group: Sequence[QueuedRequest]) -> None:
        """Every answer of `group` has ended. Padding is on the left, as `generate` wants it."""
        longest = max(len(request.prompt.input_ids) for request in group)
        ids_BT = torch.full((len(group), longest), self._pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(group):
            length = len(request.prompt.input_ids)
            ids_BT[row, longest - length :] = torch.tensor(request.prompt.input_ids)
            mask_BT[row, longest - length :] = 1
        images_ID = self._images(group)
        own = _OwnLogits(self.model)
        try:
            self.model.generate(
                input_ids=ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device),
                **({} if images_ID is None else {"image_embeds": images_ID}),
                max_new_tokens=max(request.limit for request in group),
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                # The checkpoint's defaults would only bring warnings: nothing is drawn in there.
                temperature=None,
                top_p=None,
                top_k=None,
                # What differs between the rows is done here: penalties, and which tokens end an answer.
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=self._pad,
                logits_processor=[_Choose(self, group, own)],
                stopping_criteria=[_Ended(group)],
            )
        finally:
            own.remove()

    def _step(
        self, group: Sequence[QueuedRequest], scores_BV: torch.Tensor, logits_BV: torch.Tensor
    ) -> list[int]:
        self._step_began = time.monotonic()
        return self._choose(group, scores_BV, logits_BV)


class _OwnLogits:
    """The model's logits of the last step, before any processor."""

    def __init__(self, model: Any) -> None:
        self.last_BV = torch.empty(0)
        self.remove = model.register_forward_hook(self._keep).remove

    def _keep(self, model: Any, inputs: Any, outputs: Any) -> None:
        self.last_BV = outputs.logits[:, -1]


class _Choose(LogitsProcessor):
    """Leaves one token in each row: the one that was chosen and handed to the reader."""

    def __init__(self, engine: GroupedEngine, group: Sequence[QueuedRequest], own: _OwnLogits) -> None:
        self._engine, self._group, self._own = engine, group, own

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = self._engine._step(self._group, scores, self._own.last_BV)
        # A row that failed goes on with any token; it has ended.
        chosen_B1 = torch.tensor(tokens, device=scores.device).clamp_min(0)[:, None]
        only: Any = torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)
        return only


class _Ended(StoppingCriteria):
    """Which rows need no more tokens: finished, stopped, or without a reader."""

    def __init__(self, group: Sequence[QueuedRequest]) -> None:
        self._group = group

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.tensor([request.ended for request in self._group], device=input_ids.device)
