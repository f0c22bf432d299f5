"""Prompts that wait for the model, the thread that runs it, and the way back of what it says. No Ray.

Both engines are built on it. The event loop owns the waiting prompts; the thread owns the model and the
running ones, and nothing of either is touched by both at once.
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
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from revision_ray.errors import DataError
from revision_ray.model.ending import end_ids
from revision_ray.serve.engine import Piece, Prompt, QueueFull, Sampling, TokenLogprob
from revision_ray.serve.sampling import (
    Adjustments,
    Draw,
    adjusted,
    choose,
    fresh_generator,
    log_probabilities,
)
from revision_ray.serve.settings import EngineConfig
from revision_ray.serve.text_stream import TextStream, TokenNames

_LOG = logging.getLogger(__name__)

_FAILED = "the language model failed while it made this answer; the cause is in the server's log"
_CLOSED = "the language model's engine is closed; ask again, another replica will answer"


class Request:
    """A prompt on its way to the model, then its answer on the way to the reader."""

    def __init__(
        self, prompt: Prompt, draw: Draw, adjustments: Adjustments, text: TextStream, limit: int
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
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.all_said = asyncio.Event()
        """The last piece lies in the queue."""

    def say(self, piece: Piece | Exception) -> None:
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
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._arrived = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "language-model")
        self._step_began: float | None = None

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
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
        adjustments = Adjustments(sampling, prompt.input_ids, ends, self._penalty)
        request = Request(prompt, Draw(sampling, self._device), adjustments, text, limit)
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

    def _take(self, num_rows: int, padded_tokens: int | None = None) -> list[Request]:
        """The first that wait, and now have slots: `num_rows` at most, and `padded_tokens`, or one alone."""
        taken: list[Request] = []
        longest = 0
        while self._waiting and len(taken) < num_rows:
            longest = max(longest, len(self._waiting[0].prompt.input_ids))
            if taken and padded_tokens is not None and longest * (len(taken) + 1) > padded_tokens:
                break
            taken.append(self._waiting.popleft())
            taken[-1].started = True
        return taken

    def _together(self, request: Request, first: Piece | Exception) -> list[Piece | Exception]:
        """`first` and what waits behind it, its texts as one piece unless each token goes by itself."""
        said = [first]
        while not request.pieces.empty():
            said.append(request.pieces.get_nowait())
        pieces = [piece for piece in said if isinstance(piece, Piece)]
        if self._each_by_itself(request) or len(pieces) < 2:
            return said
        joined = replace(pieces[-1], text="".join(piece.text for piece in pieces))
        return [joined, *(error for error in said if isinstance(error, Exception))]

    def _each_by_itself(self, request: Request) -> bool:
        return request.top_logprobs is not None or not self.config.piece_interval_s

    async def _pause(self, request: Request) -> None:
        """Until the reader may hear more: the interval has passed, or the answer has ended."""
        if self._each_by_itself(request):
            return
        seconds = self.config.piece_interval_s * math.sqrt(max(1, self._num_running()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await request.all_said.wait()

    async def _next(self, request: Request) -> Piece | Exception:
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

    def _fail(self, requests: Sequence[Request], message: str = _FAILED) -> None:
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

    def _images(self, requests: Sequence[Request]) -> torch.Tensor | None:
        """float32 (I, D): the images of all, in the order of their placeholders; None without any."""
        rows = [request.prompt.image_embeds for request in requests if len(request.prompt.image_embeds)]
        return torch.from_numpy(np.concatenate(rows, dtype=np.float32)).to(self._device) if rows else None

    def _choose(
        self, requests: Sequence[Request], scores_BV: torch.Tensor, logits_BV: torch.Tensor
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
        handed: list[tuple[Request, Piece | Exception]] = []
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

    def _accept(self, request: Request, token: int, logits_V: torch.Tensor) -> Piece:
        if token in request.adjustments.ends:
            request.ended = True
            return Piece(
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
        return Piece(text=text, token=chosen, top=top, finish_reason=reason, num_tokens=request.num_tokens)

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        text, content = self._names.of(token)
        return TokenLogprob(token=text, bytes=content, logprob=logprob)

    def _loop(self) -> asyncio.AbstractEventLoop:
        assert self._task is not None
        return self._task.get_loop()


def _hand_over(handed: Sequence[tuple[Request, Piece | Exception]]) -> None:
    for request, piece in handed:
        request.say(piece)
