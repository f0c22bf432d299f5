"""What an engine is: prompts in, pieces of text out, many at once. No Ray.

Shapes: I images, D embedding_dim.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from revision_ray.serve.settings import EngineConfig


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


def make_engine(model: Any, tokenizer: Any, config: EngineConfig) -> GenerationEngine:
    """The engine of `config.kind` over `model`, which it has to itself from now on.

    Raises:
        ConfigError: the model cannot be run that way; the message names a way it can.
    """
    if config.kind == "generate":
        from revision_ray.serve.grouped import GroupedEngine

        return GroupedEngine(model, tokenizer, config)
    from revision_ray.serve.continuous import ContinuousEngine

    return ContinuousEngine(model, tokenizer, config)
