"""Declare a job as a stage of a chain: what it reads and makes, its work, its proof. No Ray.

The module of each job ends with its `StageKind`; `pipeline/job.py` lists them and knows no job otherwise.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Work of a stage, for the cost estimate of a dry run. None stands for unknown."""

    rows: int | None = None
    tokens: float | None = None
    """0 where none are read or written."""
    uses_gpu: bool = False
    flops_per_token: float | None = None
    """Of a training stage, from its model's size."""
    texts: int | None = 0
    """Texts that had to be written for it."""


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """Declaration of a job as a stage of a chain."""

    name: str
    """The key of the job in a stage's configuration, and its file in jobs/."""
    job: type
    """The job's configuration."""
    run: Callable[[Any], str]
    """Do the job, or what is left of it, and return a line that says where the result is."""
    reads: Callable[[Any], dict[str, list[str]]]
    """Return, of a job, key -> URIs of everything that decides the output besides the settings; also names on
    a hub."""
    proof: str
    """The file in the output without which it is unfinished; JSON, or JSON Lines."""
    model: str | None = None
    """The folder in the output that holds a model; "" for the output itself, None where there is no model."""
    sources: tuple[str, ...] = ()
    """Keys of data as users have them, identified by names, sizes and times instead of contents."""
    trusts: tuple[str, ...] = ()
    """Keys of what the job reads without comparing it with what made the output that it keeps."""
    hub_names: tuple[str, ...] = ("model", "caption_model", "pretrained", "text_model")
    """Last parts of the keys that may hold names on a hub, which need not be there before a run."""
    work: "Callable[[Forecast, Stage], StageWork] | None" = None
    """Estimate the work before the stage runs; if not given, `estimates.rows` tells, if anything does."""
    done: "Callable[[Stage], dict[str, Any]]" = lambda stage: {}
    """Return rows and tokens of a stage that has finished."""
    gpus: Callable[[Any, float], float] = lambda job, total: 0.0
    """Return how many GPUs a job takes in a cluster that has `total`."""
    rows_at: Callable[[Any, str], int | None] | None = None
    """Of a job that writes sources: return how many rows it writes at a URI. Others write one store."""
    summary: "Callable[[Sequence[Stage]], str] | None" = None
    """Return the part of a chain's report about all its finished stages of this kind."""


@dataclass(frozen=True)
class Stage:
    """A job in a chain, under a name of its own."""

    name: str
    kind: StageKind
    job: Any
    title: str = ""

    @cached_property
    def output(self) -> str:
        return storage.absolute(self.job.output)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the job's settings as JSON gives them back."""
        return json.loads(json.dumps(asdict(self.job)))

    @cached_property
    def reads(self) -> dict[str, list[str]]:
        """Return key -> absolute URIs; a name on a hub is treated as a path, too."""
        uris_by_key = self.kind.reads(self.job)
        return {key: [storage.absolute(uri) for uri in uris if uri] for key, uris in uris_by_key.items()}

    @property
    def finished(self) -> bool:
        """Whether there is a finished output, of any settings."""
        return storage.exists(storage.join(self.output, self.kind.proof))

    def proof(self) -> dict[str, Any]:
        """Read the JSON document that proves the stage finished."""
        return storage.read_json(storage.join(self.output, self.kind.proof))

    def key_of(self, setting: str) -> str:
        """Return the name of a setting of the job on the pipeline's command line."""
        return f"stages.{self.name}.{self.kind.name}.{setting}"


# --- building blocks of declarations ----------------------------------------------------------------------


def as_uris(*values: str | Sequence[str] | None) -> list[str]:
    """Flatten settings that hold a URI, several or none into one list."""
    return [uri for value in values for uri in ([value] if isinstance(value, str) else value or []) if uri]


def reads_keys(*keys: str) -> Callable[[Any], dict[str, list[str]]]:
    """Return `reads` of a job that names everything it reads in these keys."""
    return lambda job: {key: as_uris(getattr(job, key)) for key in keys}


def store_rows_done(stage: Stage) -> dict[str, Any]:
    """Return the rows of a finished stage that made an embedding store, from its manifest."""
    return {"rows": stage.proof()["num_rows"]}


def worker_gpus(job: Any, total: float) -> float:
    """Return one GPU for each training worker, or 0 where the cluster has too few and workers run on CPUs."""
    return float(job.num_workers) if total >= job.num_workers else 0.0


def actor_gpus(settings: Any, total: float) -> float:
    """Return the GPUs of a pool of actors that has `gpus_per_actor` and `max_actors`."""
    each = (1.0 if total else 0.0) if settings.gpus_per_actor is None else settings.gpus_per_actor
    if not each:
        return 0.0
    return float(min(total, each * settings.max_actors) if settings.max_actors else total)


# --- estimates --------------------------------------------------------------------------------------------


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
        """Return the cost of `num_texts` texts."""
        return self._dollars(num_texts, self.tokens_in, self.tokens_out)

    def paired_dollars(self, num_pairs: float | None) -> float | None:
        """Return the cost of `num_pairs` captions of images."""
        out = self.tokens_out if self.paired_tokens_out is None else self.paired_tokens_out
        return self._dollars(num_pairs, self.paired_tokens_in, out)

    def _dollars(self, rows: float | None, t_in: float | None, t_out: float | None) -> float | None:
        p_in, p_out = self.dollars_per_million_in, self.dollars_per_million_out
        if rows is None or p_in is None or p_out is None or t_in is None or t_out is None:
            return None
        return rows * (p_in * t_in + p_out * t_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Assumptions of --dry-run. They change nothing that a stage does."""

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
    """Check that every number among the settings, and in their mappings, is 0 or more; throughputs above 0.

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
class Throughput:
    """Throughput of one GPU, as far as it is known."""

    tokens_per_second: float | None = None
    rows_per_second: float | None = None
    tokens_per_row: float | None = None


def whole_sum(values: Sequence[int | None]) -> int | None:
    """Return the sum; None where a part is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def first_known(*values: Any) -> Any:
    """Return the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def inside(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or lies in it; a wildcard path counts as the folder that it searches."""
    uri, folder = (storage.wildcard_root(each).partition("?")[0].rstrip("/") + "/" for each in (uri, folder))
    return uri.startswith(folder)


@dataclass
class Forecast:
    """Estimates of a chain's work, also of stages whose inputs earlier stages have yet to make."""

    stages: Sequence[Stage]
    makers: dict[str, tuple[str, ...]]
    """Stage -> the earlier stages whose outputs it reads."""
    estimates: Estimates
    standing: frozenset[str]
    """Stages that will not run, so that their outputs are as counted."""
    measured: Callable[[Stage], Throughput] = lambda stage: Throughput()
    """Throughput of an earlier run at this stage, or at another one of its kind."""
    _works: dict[str, StageWork] = field(default_factory=dict)

    def work(self, stage: Stage) -> StageWork:
        """Return the work of a stage."""
        if stage.name not in self._works:
            estimate = stage.kind.work
            work = estimate(self, stage) if estimate else StageWork(rows=self.configured_rows(stage))
            self._works[stage.name] = work
        return self._works[stage.name]

    def rate(self, stage: Stage) -> Throughput:
        """Return the configured, else the measured throughput of one GPU at this stage."""
        configured, measured = self.estimates, self.measured(stage)

        def configured_rate(rates: dict[str, float]) -> float | None:
            return rates.get(stage.name, rates.get(stage.kind.name))

        return Throughput(
            tokens_per_second=first_known(
                configured_rate(configured.tokens_per_gpu_second), measured.tokens_per_second
            ),
            rows_per_second=first_known(
                configured_rate(configured.rows_per_gpu_second), measured.rows_per_second
            ),
            tokens_per_row=measured.tokens_per_row,
        )

    def maker(self, stage: Stage, uri: str) -> Stage | None:
        """Return the earlier stage that makes what `stage` reads at `uri`, if one does."""
        for other in self.stages:
            if other.name in self.makers[stage.name] and inside(uri, other.output):
                return other
        return None

    def configured_rows(self, stage: Stage) -> int | None:
        return self.estimates.rows.get(stage.name)

    def tokens_per_text(self) -> float | None:
        written = self.estimates.data.tokens_out if self.estimates.data else None
        return first_known(self.estimates.tokens_per_text, written)

    def rows_read(
        self, stage: Stage, uris: str | Sequence[str] | None, count: Callable[[str], int | None]
    ) -> int | None:
        """Return the rows that a stage reads at `uris`, None if unknown.

        Rows of what a stage has yet to make are that stage's; everything else is counted by `count`.
        """
        return whole_sum([self._rows_at(stage, uri, count) for uri in as_uris(uris)])

    def _rows_at(self, stage: Stage, uri: str, count: Callable[[str], int | None]) -> int | None:
        maker = self.maker(stage, uri)
        if maker is None:
            return count(uri)
        planned = maker.kind.rows_at(maker.job, uri) if maker.kind.rows_at else None
        if maker.name in self.standing:
            return count(uri) if planned is None else planned
        return planned if maker.kind.rows_at else self.work(maker).rows
