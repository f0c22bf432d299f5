"""Text-generation engines: their interface, the request queue they share, and the one over `generate`.

The event loop owns the waiting prompts; the thread owns the model and the running prompts. Neither touches
what the other owns. No Ray. ContinuousEngine is in `continuous`.

Shapes: B rows, T tokens, V vocabulary, I images, D embedding_dim.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria

from revision_ray.core.errors import DataError
from revision_ray.model.ending import end_ids
from revision_ray.serve.sampling import (
    LogitAdjustments,
    Sampling,
    SamplingState,
    TextStream,
    TokenNames,
    adjusted,
    choose,
    fresh_generator,
    log_probabilities,
)
from revision_ray.serve.settings import EngineConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt as the model takes it."""

    input_ids: tuple[int, ...]
    """Placeholders expanded: the model's num_visual_tokens in a row for each image."""
    image_embeds: np.ndarray
    """float32 (I, D), unit rows in the order of their placeholders; I may be 0."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and its natural log probability, before temperature and top_p."""

    token: str
    bytes: tuple[int, ...]
    """UTF-8 of the token; it may be a part of a character."""
    logprob: float


@dataclass(frozen=True, kw_only=True)
class AnswerPiece:
    """What one step adds to an answer, or several together."""

    text: str
    """May be empty while a character or a stop string is undecided."""
    token: TokenLogprob | None
    """None where no log probabilities were asked for, and for the end token."""
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, likeliest first."""
    finish_reason: Literal["stop", "length"] | None = None
    """Set in the last piece alone."""
    num_tokens: int
    """Tokens of the answer so far; the end token is not counted."""


class QueueFull(Exception):  # noqa: N818  (it is not an error of the caller's)
    """As many prompts wait as may."""


class GenerationEngine(Protocol):
    context_length: int
    """Tokens of prompt and answer together."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[AnswerPiece, None]:
        """Pieces of the answer as they are made; closing the generator frees its slot before the next step.

        Raises:
            DataError: the prompt fills the context, or its images do not fit its placeholders.
            QueueFull: `max_waiting` prompts wait already.
            TimeoutError: no piece came for `token_timeout_s` while the prompt had a slot.
            RuntimeError: the model failed, or the engine was closed.
        """
        ...

    def figures(self) -> dict[str, float]:
        """running and waiting prompts, slots, and step_s: for how long the step that now runs has run."""
        ...

    async def close(self) -> None:
        """The step that runs has ended, and so has every answer, with a RuntimeError."""
        ...


_LOG = logging.getLogger(__name__)

_FAILED = "the language model failed while it made this answer; the cause is in the server's log"
_CLOSED = "the language model's engine is closed; ask again, another replica will answer"


class QueuedRequest:
    """A prompt on its way to the model, then its answer on the way to the reader."""

    def __init__(
        self, prompt: Prompt, draw: SamplingState, adjustments: LogitAdjustments, text: TextStream, limit: int
    ) -> None:
        self.prompt, self.draw, self.adjustments, self.text = prompt, draw, adjustments, text
        self.limit = limit
        """At most so many tokens."""
        self.top_logprobs = draw.sampling.top_logprobs
        self.num_tokens = 0
        self.ended = False
        """No more tokens: finished, failed, or the reader has gone. Then its slot is free."""
        self.started = False
        self.length = 0
        """Tokens whose keys and values are cached."""
        self.token = 0
        """The last one chosen, not yet cached."""
        self.pieces: asyncio.Queue[AnswerPiece | Exception] = asyncio.Queue()
        self.all_said = asyncio.Event()
        """The last piece lies in the queue."""

    def say(self, piece: AnswerPiece | Exception) -> None:
        """`piece` is on its way to the reader. In the event loop."""
        self.pieces.put_nowait(piece)
        if isinstance(piece, Exception) or piece.finish_reason is not None:
            self.all_said.set()


class QueuedEngine(ABC):
    """Takes prompts, runs `_turn` while there are any, and hands their pieces to the readers."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        text_config = model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None) or config.max_length
        self.context_length = min(config.max_length, positions)
        self._end = frozenset(end_ids(model.generation_config))
        # A part of what the model is, so that greedy answers are those of model.generate.
        self._penalty = model.generation_config.repetition_penalty or 1.0
        self._device = model.get_input_embeddings().weight.device
        self._vocab_size = model.get_input_embeddings().num_embeddings
        # Any token but the placeholder; padding is masked.
        self._pad = 0 if model.config.image_token_id != 0 else 1
        self._shared = fresh_generator(self._device)
        self._names = TokenNames(tokenizer)
        self._waiting: deque[QueuedRequest] = deque()
        self._running: list[QueuedRequest] = []
        self._arrived = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "language-model")
        self._step_began: float | None = None

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[AnswerPiece, None]:
        limit = min(sampling.max_tokens, self.context_length - self._checked_length(prompt))
        if sampling.min_tokens > limit:
            raise DataError(
                f"min_tokens is {sampling.min_tokens}, and the answer has {limit} tokens at most; ask for "
                "fewer"
            )
        free = self.config.num_slots - self._num_running()
        if self._closed:
            raise RuntimeError(_CLOSED)
        if len(self._waiting) >= self.config.max_waiting + free:
            raise QueueFull(
                f"{len(self._waiting)} prompts wait for the language model, which is as many as may"
            )
        text = TextStream(self.tokenizer, sampling.stop)
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._end)
        adjustments = LogitAdjustments(sampling, prompt.input_ids, ends, self._penalty)
        request = QueuedRequest(prompt, SamplingState(sampling, self._device), adjustments, text, limit)
        self._waiting.append(request)
        self._arrived.set()
        if self._task is None:  # in no request's context: it outlives this one
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())
        try:
            while True:
                for piece in self._together(request, await self._next(request)):
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
                    if piece.finish_reason is not None:
                        return
                await self._pause(request)
        finally:
            request.ended = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(request)

    def figures(self) -> dict[str, float]:
        began = self._step_began
        return {
            "running": self._num_running(),
            "waiting": len(self._waiting),
            "slots": self.config.num_slots,
            "step_s": 0.0 if began is None else time.monotonic() - began,
        }

    async def close(self) -> None:
        self._closed = True
        self._fail([*self._running, *self._waiting], _CLOSED)
        self._waiting.clear()
        self._arrived.set()
        if self._task is not None:
            await self._task
            self._fail(self._running, _CLOSED)  # taken out of the queue at that very moment
        self._thread.shutdown(wait=False)

    # ------------------------------------------------------------------------------------- in the event loop

    @abstractmethod
    async def _turn(self) -> None:
        """One or more steps of the model, for waiting prompts and running ones."""

    @abstractmethod
    def _forget(self) -> None:
        """Nothing is left of what ran before a failure."""

    async def _run(self) -> None:
        while not self._closed:
            if not (self._waiting or self._running):
                self._arrived.clear()
                await self._arrived.wait()
                continue
            try:
                await self._turn()
            except Exception:
                _LOG.exception("a step of the language model failed; %d answers end", self._num_running())
                self._fail(self._running)
                self._running.clear()
                self._forget()

    async def _in_thread(self, step: Callable[..., None], *arguments: object) -> None:
        self._step_began = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, step, *arguments)
        finally:
            self._step_began = None

    def _take(self, num_rows: int, padded_tokens: int | None = None) -> list[QueuedRequest]:
        """The first that wait, and now have slots: `num_rows` at most, and `padded_tokens`, or one alone."""
        taken: list[QueuedRequest] = []
        longest = 0
        while self._waiting and len(taken) < num_rows:
            longest = max(longest, len(self._waiting[0].prompt.input_ids))
            if taken and padded_tokens is not None and longest * (len(taken) + 1) > padded_tokens:
                break
            taken.append(self._waiting.popleft())
            taken[-1].started = True
        return taken

    def _together(
        self, request: QueuedRequest, first: AnswerPiece | Exception
    ) -> list[AnswerPiece | Exception]:
        """`first` and what waits behind it, its texts as one piece unless each token goes by itself."""
        said = [first]
        while not request.pieces.empty():
            said.append(request.pieces.get_nowait())
        pieces = [piece for piece in said if isinstance(piece, AnswerPiece)]
        if self._each_by_itself(request) or len(pieces) < 2:
            return said
        joined = replace(pieces[-1], text="".join(piece.text for piece in pieces))
        return [joined, *(error for error in said if isinstance(error, Exception))]

    def _each_by_itself(self, request: QueuedRequest) -> bool:
        return request.top_logprobs is not None or not self.config.piece_interval_s

    async def _pause(self, request: QueuedRequest) -> None:
        """Until the reader may hear more: the interval has passed, or the answer has ended."""
        if self._each_by_itself(request):
            return
        seconds = self.config.piece_interval_s * math.sqrt(max(1, self._num_running()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await request.all_said.wait()

    async def _next(self, request: QueuedRequest) -> AnswerPiece | Exception:
        """Waits in the queue as long as it takes, then for a piece as long as one may take."""
        while True:
            if not request.pieces.empty():
                return request.pieces.get_nowait()
            started = request.started
            try:
                async with asyncio.timeout(self.config.token_timeout_s):
                    return await request.pieces.get()
            except TimeoutError as error:
                if started:
                    raise TimeoutError(
                        f"the language model made no token in {self.config.token_timeout_s:g} s"
                    ) from error

    def _fail(self, requests: Sequence[QueuedRequest], message: str = _FAILED) -> None:
        for request in requests:
            if not request.ended:
                request.ended = True
                request.say(RuntimeError(message))

    def _num_running(self) -> int:
        return sum(not request.ended for request in self._running)

    def _checked_length(self, prompt: Prompt) -> int:
        """Tokens of `prompt`. What raises here would else fail a step, and every request in it."""
        length = len(prompt.input_ids)
        if not length:
            raise DataError("the prompt has 0 tokens; give a text or an image")
        if length >= self.context_length:
            raise DataError(
                f"the prompt has {length} tokens, and the context holds {self.context_length}, the answer "
                "included; give a shorter one"
            )
        config = self.model.config
        num_images, expected = len(prompt.image_embeds), (len(prompt.image_embeds), config.embedding_dim)
        if num_images and (
            prompt.image_embeds.shape != expected or not np.isfinite(prompt.image_embeds).all()
        ):
            raise DataError(
                f"image_embeds has shape {prompt.image_embeds.shape}, expected {expected}, all finite"
            )
        num_slots = prompt.input_ids.count(config.image_token_id)
        if num_slots != num_images * config.num_visual_tokens:
            raise DataError(
                f"the prompt has {num_slots} image placeholders and {num_images} images of "
                f"{config.num_visual_tokens} visual tokens each; give one image for each <image>, in order"
            )
        others = set(prompt.input_ids) - {config.image_token_id}
        if others and not 0 <= min(others) <= max(others) < self._vocab_size:
            raise DataError(f"the prompt has a token id outside the vocabulary of {self._vocab_size}")
        return length

    # ----------------------------------------------------------------------------------------- in the thread

    def _images(self, requests: Sequence[QueuedRequest]) -> torch.Tensor | None:
        """float32 (I, D): the images of all, in the order of their placeholders; None without any."""
        rows = [request.prompt.image_embeds for request in requests if len(request.prompt.image_embeds)]
        return torch.from_numpy(np.concatenate(rows, dtype=np.float32)).to(self._device) if rows else None

    def _choose(
        self, requests: Sequence[QueuedRequest], scores_BV: torch.Tensor, logits_BV: torch.Tensor
    ) -> list[int]:
        """The next tokens, drawn from `scores_BV` and handed to the readers; -1 where a row is not finite.

        `scores_BV` are without what a request itself asks for, `logits_BV` the model's own, for log
        probabilities. A row that is not finite ends its request alone. Rows of requests that have ended are
        drawn and dropped.
        """
        numbers = [request.num_tokens for request in requests]
        scores_BV = adjusted(scores_BV, [request.adjustments for request in requests], numbers)
        tokens_B = choose(scores_BV, [request.draw for request in requests], self._shared)
        sound_B = scores_BV.gather(-1, tokens_B[:, None])[:, 0].isfinite()
        handed: list[tuple[QueuedRequest, AnswerPiece | Exception]] = []
        tokens = tokens_B.where(sound_B, -1).tolist()
        for row, token in enumerate(tokens):
            request = requests[row]
            if request.ended:
                continue
            try:
                if token < 0:
                    raise FloatingPointError("the logits are not finite")
                handed.append((request, self._accept(request, token, logits_BV[row])))
            except Exception:
                _LOG.exception("one answer of the language model ends")
                request.ended = True
                handed.append((request, RuntimeError(_FAILED)))
        self._loop().call_soon_threadsafe(_hand_over, handed)
        return tokens

    def _accept(self, request: QueuedRequest, token: int, logits_V: torch.Tensor) -> AnswerPiece:
        if token in request.adjustments.ends:
            request.ended = True
            return AnswerPiece(
                text=request.text.finish(), token=None, finish_reason="stop", num_tokens=request.num_tokens
            )
        request.token = token
        request.num_tokens += 1
        request.adjustments.add(token)
        text = request.text.push(token, may_stop=request.num_tokens > request.adjustments.min_tokens)
        reason = None
        if request.text.stopped:
            reason = "stop"
        elif request.num_tokens >= request.limit:
            reason = "length"
            text += request.text.finish()
        request.ended = reason is not None
        chosen, top = None, ()
        if request.top_logprobs is not None:
            logprob, likeliest = log_probabilities(logits_V, token, request.top_logprobs)
            chosen = self._named(token, logprob)
            top = tuple(self._named(*pair) for pair in likeliest)
        return AnswerPiece(
            text=text, token=chosen, top=top, finish_reason=reason, num_tokens=request.num_tokens
        )

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        text, content = self._names.of(token)
        return TokenLogprob(token=text, bytes=content, logprob=logprob)

    def _loop(self) -> asyncio.AbstractEventLoop:
        assert self._task is not None
        return self._task.get_loop()


def _hand_over(handed: Sequence[tuple[QueuedRequest, AnswerPiece | Exception]]) -> None:
    for request, piece in handed:
        request.say(piece)


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
