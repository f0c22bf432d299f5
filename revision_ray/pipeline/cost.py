"""What a chain will cost, reckoned from rows and tokens: GPU hours, and dollars for them and for the data.

Nothing is guessed: a figure that neither the data, the configuration nor a measurement gives is None, and so
is every sum that it is part of.
"""

from dataclasses import dataclass, field

from revision_ray.errors import ConfigError

_SECONDS_PER_HOUR = 3600.0
# Floating point operations for each token and parameter of the language model: forward 2, gradients of the
# activations 2, gradients of the weights 2 where they train, forward once more with gradient checkpointing.
# Attention between tokens is left out: at 2048 tokens about 3 % of an 8 B model's.
FORWARD, THROUGH, WEIGHTS = 2, 2, 2


@dataclass(frozen=True, kw_only=True)
class DataCost:
    """What it costs to have data written by a language model, P_in T_in + P_out T_out (paper, app. H.4)."""

    dollars_per_million_in: float | None = None
    """P_in: dollars for a million tokens that the writing model reads."""
    dollars_per_million_out: float | None = None
    """P_out: dollars for a million tokens that it writes."""
    tokens_in: float | None = None
    """T_in: tokens that it reads for one text (instructions, and what the text is made from)."""
    tokens_out: float | None = None
    """T_out: tokens that it writes for one text."""
    paired_tokens_in: float | None = None
    """T_in of the paired baseline: tokens that a multimodal model reads for the caption of an image, the
    image's among them. The cost is also given as a multiple of that baseline's."""
    paired_tokens_out: float | None = None
    """T_out of the paired baseline; as `tokens_out` if not given."""

    def __post_init__(self) -> None:
        check_positive("estimates.data.", vars(self))

    def dollars(self, num_texts: float | None) -> float | None:
        """For so many texts."""
        return self._dollars(num_texts, self.tokens_in, self.tokens_out)

    def paired_dollars(self, num_pairs: float | None) -> float | None:
        """For as many captions of images."""
        out = self.tokens_out if self.paired_tokens_out is None else self.paired_tokens_out
        return self._dollars(num_pairs, self.paired_tokens_in, out)

    def _dollars(self, rows: float | None, t_in: float | None, t_out: float | None) -> float | None:
        p_in, p_out = self.dollars_per_million_in, self.dollars_per_million_out
        if rows is None or p_in is None or p_out is None or t_in is None or t_out is None:
            return None
        return rows * (p_in * t_in + p_out * t_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """What --dry-run reckons with. It decides nothing that a stage does."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows of a stage, by its name, where neither a manifest nor a listing tells (JSON Lines, tars)."""
    tokens_per_text: float | None = None
    """Tokens of a caption, its end among them; `data.tokens_out` if not given."""
    tokens_per_conversation: float | None = None
    """Tokens of a conversation in stage 2, without its image's."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Parameters of a training stage's language model, by the stage's name, where its folder is not there to
    count them: 8.03e9 for Llama-3-8B."""
    teraflops_per_gpu: float = 989.0
    """Dense bfloat16 throughput from the data sheet: 989 of an H100 or H200 SXM, 362 of an L40S, 312 of an
    A100."""
    utilisation: float = 0.4
    """Share of it that training reaches. 0.3 to 0.5 are usual for models of 7 to 70 B parameters on one node;
    measure yours: see `measured`."""
    tokens_per_gpu_second: dict[str, float] = field(default_factory=dict)
    """Throughput of one GPU, by stage or job name (pretrain, finetune): goes before what is reckoned from
    parameters and measured elsewhere."""
    rows_per_gpu_second: dict[str, float] = field(default_factory=dict)
    """The same in rows, by stage or job name (embed, evaluate, train_encoder): no formula gives those."""
    measured: str | None = None
    """Run directory of a pipeline that has finished on such GPUs: the throughput, and the tokens of a row, of
    its stages stand in for formulas, and for what is not configured."""
    dollars_per_gpu_hour: float | None = None
    """What a GPU costs you, its share of the node included. Time of nodes without GPUs is not reckoned."""
    data: DataCost | None = None
    """What the texts of the embed stages cost to have written; nothing if not given: they are there."""

    def __post_init__(self) -> None:
        check_positive("estimates.", vars(self))


def check_positive(prefix: str, settings: dict[str, object]) -> None:
    """Every number among the settings, and in their mappings, is 0 or more; throughputs are above 0.

    Raises:
        ConfigError: one is not.
    """
    for name, value in settings.items():
        for key, number in value.items() if isinstance(value, dict) else {"": value}.items():
            low = number if isinstance(number, int | float) else 1
            divides = ("per_gpu" in name and "dollars" not in name) or name == "utilisation"
            if low < 0 or (divides and low <= 0):
                where = f"{prefix}{name}.{key}".rstrip(".")
                raise ConfigError(f"{where}={number}; expected {'more than 0' if divides else '0 or more'}")


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a stage has to do. None stands for unknown."""

    rows: int | None = None
    tokens: float | None = None
    """0 where none are read or written."""
    uses_gpu: bool = False
    flops_per_token: float | None = None
    """Of a training stage, from its model's size."""
    texts: int | None = 0
    """Texts that had to be written for it."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Throughput of one GPU, as far as it is known."""

    tokens_per_second: float | None = None
    rows_per_second: float | None = None
    tokens_per_row: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one stage. None stands for unknown."""

    gpu_hours: float | None
    gpu_dollars: float | None
    data_dollars: float | None


def cost_of(work: Work, rate: Rate, estimates: Estimates) -> Cost:
    """What `work` costs at this rate, or at that which its model's size gives."""
    hours = gpu_hours(work, rate, estimates)
    price = estimates.dollars_per_gpu_hour
    dollars = 0.0 if hours == 0 else None if hours is None or price is None else hours * price
    data = 0.0 if estimates.data is None or work.texts == 0 else estimates.data.dollars(work.texts)
    return Cost(gpu_hours=hours, gpu_dollars=dollars, data_dollars=data)


def gpu_hours(work: Work, rate: Rate, estimates: Estimates) -> float | None:
    """By tokens where their throughput is known or reckoned, else by rows."""
    if not work.uses_gpu or work.rows == 0:
        return 0.0
    if work.tokens:
        per_second = rate.tokens_per_second
        if per_second is None and work.flops_per_token:
            per_second = estimates.teraflops_per_gpu * 1e12 * estimates.utilisation / work.flops_per_token
        if per_second is not None:
            return work.tokens / per_second / _SECONDS_PER_HOUR
    if work.rows is not None and rate.rows_per_second is not None:
        return work.rows / rate.rows_per_second / _SECONDS_PER_HOUR
    return None


def total(values: list[float | None]) -> float | None:
    """The sum; unknown where a part is."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
