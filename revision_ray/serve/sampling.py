"""The next token of every row of a batch, and its log probability.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch

from revision_ray.serve.engine import Sampling

# Below, the likeliest token wins in float32 whatever is drawn.
_GREEDY_BELOW = 1e-5


class Draw:
    """How one answer is drawn, and where its random numbers have got to."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature < _GREEDY_BELOW
        self.temperature = 1.0 if self.greedy else sampling.temperature
        self.top_p = 1.0 if self.greedy else sampling.top_p
        self.generator: torch.Generator | None = None
        if sampling.seed is not None and not self.greedy:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)


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
    probability_BV = (logits_BV / temperature_B[:, None]).softmax(-1)
    if any(draw.top_p < 1 for draw in draws):
        top_p_B = torch.tensor([draw.top_p for draw in draws], device=device)
        probability_BV = _nucleus(probability_BV, top_p_B)
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
