"""Sampling settings, the choice of tokens from logits, and the text of an answer token by token. No Ray.

Shapes: B rows, V vocabulary.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. A checkpoint's own sampling defaults never override it.

    Tokens are penalised and forbidden first, then come temperature, top_k, top_p and min_p, in the order that
    transformers' `generate` has.
    """

    max_tokens: int
    """At most so many tokens; fewer where the context ends before."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """The most likely tokens that together have this probability are drawn from."""
    top_k: int | None = None
    """So many of the most likely tokens are drawn from, and those that are as likely as the last."""
    min_p: float = 0.0
    """Tokens are drawn from that have at least this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """Tokens of the prompt and of the answer are less likely above 1 (arXiv 1909.05858 sec. 4.1). None is the
    checkpoint's own, which is a part of the model."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, for each time that the answer has it."""
    min_tokens: int = 0
    """Nothing ends the answer before it has so many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer beside the model's own; they are no part of it."""
    ignore_eos: bool = False
    """The model's own end tokens are tokens like any other."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    seed: int | None = None
    """The same seed draws the same answer, whatever else is in the batch."""
    top_logprobs: int | None = None
    """None: no log probabilities. 0: those of the chosen tokens. n: those of the n likeliest as well."""


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
