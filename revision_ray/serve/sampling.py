"""The next token of every row of a batch, and its log probability.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch

from revision_ray.serve.engine import Sampling

# Below, the likeliest token wins in float32 whatever is drawn.
_GREEDY_BELOW = 1e-5


class Draw:
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


class Adjustments:
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
    scores_BV: torch.Tensor, adjustments: Sequence[Adjustments], num_tokens: Sequence[int]
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


def choose(logits_BV: torch.Tensor, draws: Sequence[Draw], shared: torch.Generator) -> torch.Tensor:
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
