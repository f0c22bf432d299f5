"""The request queue of both engines: waiting prompts, the model's thread, sampling, text streaming.

The event loop owns the waiting prompts; the thread owns the model and the running prompts. Neither touches
what the other owns. No Ray.

Shapes: B rows, V vocabulary.
"""

import asyncio
import contextlib
import contextvars
import json
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from revision_ray.core.errors import DataError
from revision_ray.model.ending import end_ids
from revision_ray.serve.engine import AnswerPiece, Prompt, QueueFull, Sampling, TokenLogprob
from revision_ray.serve.settings import EngineConfig

_UNDECIDED = "\ufffd"
# An incomplete character has at most three bytes, hence three tokens; some tokenizers show each of them, and
# while one is missing, all bytes before it back to the last token of another kind.
_MAX_UNDECIDED = 3
# Tokens that are decoded again with every new one before the window moves on.
_WINDOW = 16
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The text of an answer, token by token."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """A stop string has come; what stands before it has been given out, and nothing comes after."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._held = ""
        # Decoded together: a token's text depends on its left neighbours (spaces, characters of many tokens).
        self._window: list[int] = []
        self._given = 0  # characters of the window's text
        self._boundary = 0  # the last place in the window where every character was complete

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """What `token` adds and is decided. Without `may_stop` a stop string that it completes is text."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        undecided = len(text) - len(text.rstrip(_UNDECIDED))
        held = undecided
        if len(self._window) - self._boundary > _MAX_UNDECIDED:  # these bytes are no text, and never will be
            held = min(undecided, _MAX_UNDECIDED)
        decided = len(text) - held
        new = text[self._given : decided]
        self._given = max(self._given, decided)
        if not undecided:
            if len(self._window) >= _WINDOW and self._boundary:
                del self._window[: self._boundary]
                self._given = len(self._decode(self._window))
            self._boundary = len(self._window)
        return self._before_stop(new, may_stop)

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        text = self._before_stop(self._decode(self._window)[self._given :])
        held, self._held = self._held, ""
        return text + held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _before_stop(self, new: str, may_stop: bool = True) -> str:
        if not self._stop:
            return new
        text = self._held + new
        # Only those that end in what is new: the others came when nothing might stop.
        starts = ((stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stop)
        found = [place for stop, start in starts if (place := text.find(stop, start)) >= 0]
        if found and may_stop:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class TokenNames:
    """What single tokens are called where log probabilities are reported."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet(tokenizer)
        self._known: dict[int, tuple[str, tuple[int, ...]]] = {}

    def of(self, token: int) -> tuple[str, tuple[int, ...]]:
        """Its text, and its bytes, which may be a part of a character (its text then has U+FFFD)."""
        if token not in self._known:
            content = self._content(token)
            self._known[token] = content.decode("utf-8", errors="replace"), tuple(content)
        return self._known[token]

    def _content(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a vocabulary that was padded beyond the tokenizer's
            return b""
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if token in self._tokenizer.all_special_ids:
            return name.encode()
        if self._bytes_of and all(character in self._bytes_of for character in name):
            return bytes(self._bytes_of[character] for character in name)
        if "\u2581" in name:  # decoding would take the space off the front
            return name.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()


def _byte_alphabet(tokenizer: Any) -> dict[str, int]:
    """Character -> byte, of a tokenizer whose vocabulary spells bytes as printable characters; else empty."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    description = json.loads(backend.to_str())
    if '"ByteLevel"' not in json.dumps([description["decoder"], description["pre_tokenizer"]]):
        return {}
    # GPT-2's: printable bytes stand for themselves, the others follow from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


# Below, the likeliest token wins in float32 whatever is drawn.
_GREEDY_BELOW = 1e-5


class SamplingState:
    """How one answer is drawn, and where its random numbers have got to."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature < _GREEDY_BELOW
        self.temperature = 1.0 if self.greedy else sampling.temperature
        self.top_p = 1.0 if self.greedy else sampling.top_p
        self.top_k = None if self.greedy else sampling.top_k
        self.min_p = 0.0 if self.greedy else sampling.min_p
        self.generator: torch.Generator | None = None
        if sampling.seed is not None and not self.greedy:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)


class LogitAdjustments:
    """What an answer makes of the scores of its next token before it is drawn: penalties, forbidden ends."""

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], ends: Collection[int], model_penalty: float
    ) -> None:
        """`ends` are the tokens that end the answer; `model_penalty` is the checkpoint's for repetitions."""
        given = sampling.repetition_penalty
        self._repetition = model_penalty if given is None else given
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self.min_tokens, self.ends = sampling.min_tokens, frozenset(ends)
        self._prompt_ids = prompt_ids
        self._counts = bool(self._presence or self._frequency)
        self.needed = self._repetition != 1 or self._counts or self.min_tokens > 0
        # Made with the first scores, whose width and device they have.
        self._seen_V: torch.Tensor | None = None
        self._count_V: torch.Tensor | None = None

    def __call__(self, scores_V: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """New scores of the token that follows `num_tokens` of the answer."""
        if self._repetition != 1:
            if self._seen_V is None:
                ids = torch.tensor(self._prompt_ids, device=scores_V.device)
                self._seen_V = torch.zeros_like(scores_V, dtype=torch.bool)
                self._seen_V[ids[ids < len(scores_V)]] = True  # the placeholder may lie above
            less_V = torch.where(scores_V < 0, scores_V * self._repetition, scores_V / self._repetition)
            scores_V = less_V.where(self._seen_V, scores_V)
        if self._counts:
            if self._count_V is None:
                self._count_V = torch.zeros_like(scores_V)
            scores_V = scores_V - self._frequency * self._count_V - self._presence * (self._count_V > 0)
        if num_tokens < self.min_tokens:
            ends = [token for token in self.ends if token < len(scores_V)]
            scores_V = scores_V.index_fill(0, torch.tensor(ends, device=scores_V.device).long(), -torch.inf)
        return scores_V

    def add(self, token: int) -> None:
        """`token` is a part of the answer from here on."""
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._count_V is not None:
            self._count_V[token] += 1


def adjusted(
    scores_BV: torch.Tensor, adjustments: Sequence[LogitAdjustments], num_tokens: Sequence[int]
) -> torch.Tensor:
    """`scores_BV` with the adjustments of each row, whose answer has `num_tokens` so far."""
    if not any(each.needed for each in adjustments):
        return scores_BV
    rows = zip(scores_BV, adjustments, num_tokens, strict=True)
    return torch.stack(
        [each(scores_V, number) if each.needed else scores_V for scores_V, each, number in rows]
    )


def fresh_generator(device: torch.device) -> torch.Generator:
    """Seeded by the machine: torch's own default seed is the same in every process."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


def choose(logits_BV: torch.Tensor, draws: Sequence[SamplingState], shared: torch.Generator) -> torch.Tensor:
    """int64 (B,): the token of each row. A row of a seeded draw depends on its logits and its seed alone.

    `logits_BV` is float32. `shared` serves the rows that have no seed.
    """
    likeliest_B = logits_BV.argmax(-1)
    if all(draw.greedy for draw in draws):
        return likeliest_B
    device = logits_BV.device
    temperature_B = torch.tensor([draw.temperature for draw in draws], device=device)
    scaled_BV = logits_BV / temperature_B[:, None]
    if any(draw.top_k is not None for draw in draws):
        scaled_BV = _likeliest(scaled_BV, [draw.top_k for draw in draws])
    probability_BV = scaled_BV.softmax(-1)
    if any(draw.top_p < 1 for draw in draws):
        top_p_B = torch.tensor([draw.top_p for draw in draws], device=device)
        probability_BV = _nucleus(probability_BV, top_p_B)
    if any(draw.min_p > 0 for draw in draws):
        min_p_B = torch.tensor([draw.min_p for draw in draws], device=device)
        least_B1 = min_p_B[:, None] * probability_BV.amax(-1, keepdim=True)
        probability_BV = probability_BV.masked_fill(probability_BV < least_B1, 0)
    # A race of exponential clocks: token i has the largest p_i / noise_i with probability p_i. Unlike
    # torch.multinomial it takes the noise of every row from where we want.
    noise_BV = torch.empty_like(probability_BV)
    if any(draw.generator is None for draw in draws):
        noise_BV.exponential_(generator=shared)
    for noise_V, draw in zip(noise_BV, draws, strict=True):
        if draw.generator is not None:
            noise_V.exponential_(generator=draw.generator)
    drawn_B = (probability_BV / noise_BV.clamp_min_(1e-30)).argmax(-1)
    greedy_B = torch.tensor([draw.greedy for draw in draws], device=device)
    return torch.where(greedy_B, likeliest_B, drawn_B)


def _likeliest(logits_BV: torch.Tensor, top_k: Sequence[int | None]) -> torch.Tensor:
    """-inf but for the `top_k` largest of each row, and those that equal the last of them; None keeps all."""
    num_tokens = logits_BV.shape[1]
    number_B = torch.tensor([min(each or num_tokens, num_tokens) for each in top_k], device=logits_BV.device)
    most = max(min(each, num_tokens) for each in top_k if each is not None)
    largest_BK = logits_BV.topk(most, -1).values
    least_B1 = largest_BK.gather(-1, (number_B.clamp_max(most) - 1)[:, None])
    cut_BV = (logits_BV < least_B1) & (number_B < num_tokens)[:, None]
    return logits_BV.masked_fill(cut_BV, -torch.inf)


def _nucleus(probability_BV: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Zero but for the likeliest tokens up to the one with which their sum reaches top_p; not rescaled."""
    sorted_BV, order_BV = probability_BV.sort(-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    # The likeliest stays, whatever top_p is: nothing is before it.
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p_B.clamp_min(1e-9)[:, None], 0)
    # Rounding of the sum must not cut where nothing was asked for.
    kept_BV = torch.where((top_p_B < 1)[:, None], kept_BV, sorted_BV)
    return torch.zeros_like(kept_BV).scatter_(-1, order_BV, kept_BV)


def log_probabilities(logits_V: torch.Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log probability of `token`, and the `top` likeliest tokens with theirs."""
    log_probability_V = logits_V.float().log_softmax(-1)
    values, ids = log_probability_V.topk(min(top, len(log_probability_V)))
    return float(log_probability_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


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
