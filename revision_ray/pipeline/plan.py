"""The plan of --dry-run: what a chain would run, how much work each stage has, and what it costs. No Ray.

Nothing is guessed: a figure that neither the data, the configuration nor a measurement gives is None, and so
is every sum that it is part of.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError
from revision_ray.data import sources
from revision_ray.data.conversations import source_of
from revision_ray.data.records import footer
from revision_ray.pipeline.chain import Stage, StageChoice, chosen, inside, makers
from revision_ray.pipeline.ledger import Contents, Ledger, open_ledger
from revision_ray.pipeline.run import inputs_of, why

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
class StageWork:
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
class Throughput:
    """Throughput of one GPU, as far as it is known."""

    tokens_per_second: float | None = None
    rows_per_second: float | None = None
    tokens_per_row: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Of one stage. None stands for unknown."""

    gpu_hours: float | None
    gpu_dollars: float | None
    data_dollars: float | None


def cost_of(work: StageWork, rate: Throughput, estimates: Estimates) -> StageCost:
    """What `work` costs at this rate, or at that which its model's size gives."""
    hours = gpu_hours(work, rate, estimates)
    price = estimates.dollars_per_gpu_hour
    dollars = 0.0 if hours == 0 else None if hours is None or price is None else hours * price
    data = 0.0 if estimates.data is None or work.texts == 0 else estimates.data.dollars(work.texts)
    return StageCost(gpu_hours=hours, gpu_dollars=dollars, data_dollars=data)


def gpu_hours(work: StageWork, rate: Throughput, estimates: Estimates) -> float | None:
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


def listed_rows(uri: str, images: bool) -> int | None:
    """Rows of a source as far as its listing tells: image files and Parquet; None of anything else."""
    splits = sources.image_splits([uri]) if images else sources.text_splits([uri])
    counted: list[int | None] = []
    for split in splits:
        if split.files:
            counted.append(len(split.files))
        elif split.kind.endswith("_parquet"):
            counted.append(sum(footer(split.uri).rows[split.start : split.stop]))
        else:
            counted.append(None)
    return whole_sum(counted)


def seen_samples(rows: int, optimisation: Any) -> int:
    """Samples that a run sees: of whole epochs all rows, of a broken one whole batches."""
    size = optimisation.global_batch_size
    per_epoch = math.ceil(rows / size)
    steps = math.ceil(per_epoch * optimisation.num_epochs)
    if optimisation.max_steps is not None:
        steps = min(steps, optimisation.max_steps)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    return epochs * rows + min(rest * size, rows)


def counted_parameters(folder: str) -> float | None:
    """Of the language model in a folder of safetensors, from the files' headers; None where there is none."""
    files = [uri for uri, _ in storage.list_files(folder, "*.safetensors")]
    shapes: dict[str, list[int]] = {}
    for uri in files:
        with storage.open_input(uri) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    inner = {name: shape for name, shape in shapes.items() if "language_model" in name}
    counts = [math.prod(shape) for shape in (inner or shapes).values()]
    return float(sum(counts)) if counts else None


def whole_sum(values: Sequence[int | None]) -> int | None:
    """None where a part is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def first_known(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


@dataclass
class Forecast:
    """Looks ahead along a chain: of what is not there yet, the stage that will make it is asked."""

    stages: Sequence[Stage]
    makers: dict[str, tuple[str, ...]]
    estimates: Estimates
    standing: frozenset[str]
    """Stages that will not run, so that their outputs are as counted."""
    measured: Ledger | None = None
    _works: dict[str, StageWork] = field(default_factory=dict)

    def work(self, stage: Stage) -> StageWork:
        if stage.name not in self._works:
            self._works[stage.name] = _WORKS.get(stage.kind.name, _unknown)(self, stage)
        return self._works[stage.name]

    def rate(self, stage: Stage) -> Throughput:
        """Configured, else measured, throughput of one GPU at this stage."""
        configured, measured = self.estimates, measured_rate(self.measured, stage)

        def given(rates: dict[str, float]) -> float | None:
            return rates.get(stage.name, rates.get(stage.kind.name))

        return Throughput(
            tokens_per_second=first_known(
                given(configured.tokens_per_gpu_second), measured.tokens_per_second
            ),
            rows_per_second=first_known(given(configured.rows_per_gpu_second), measured.rows_per_second),
            tokens_per_row=measured.tokens_per_row,
        )

    def maker(self, stage: Stage, uri: str) -> Stage | None:
        """The earlier stage that makes what lies at `uri`."""
        for other in self.stages:
            if other.name in self.makers[stage.name] and inside(uri, other.output):
                return other
        return None

    def given_rows(self, stage: Stage) -> int | None:
        return self.estimates.rows.get(stage.name)


def measured_rate(book: Ledger | None, stage: Stage) -> Throughput:
    """What one GPU did at this stage, or at another one of the same job, when it ran in one go."""
    records = book.records if book else {}
    same = [records[stage.name]] if stage.name in records else []
    same += [record for name, record in records.items() if name != stage.name]
    for record in same:
        if record.job == stage.kind.name and record.state == "finished" and record.rows and record.unbroken:
            tokens, gpu_seconds = record.tokens, record.seconds * record.gpus
            return Throughput(
                tokens_per_second=tokens / gpu_seconds if tokens and gpu_seconds else None,
                rows_per_second=record.rows / gpu_seconds if gpu_seconds else None,
                tokens_per_row=tokens / record.rows if tokens else None,
            )
    return Throughput()


# --- rows -------------------------------------------------------------------------------------------------


def _store_rows(forecast: Forecast, stage: Stage, uris: str | Sequence[str] | None) -> int | None:
    """Rows of embedding stores: of those that an earlier stage will make, as many as that one reads."""
    named = [uris] if isinstance(uris, str) else uris or []
    return whole_sum([_one_store(forecast, stage, uri) for uri in named])


def _one_store(forecast: Forecast, stage: Stage, uri: str) -> int | None:
    maker = forecast.maker(stage, uri)
    if maker and maker.name not in forecast.standing:
        return forecast.work(maker).rows
    manifest = storage.join(uri, "manifest.json")
    if storage.exists(manifest):
        return storage.read_json(manifest).get("num_rows")
    files = [found for found, _ in storage.list_files(uri, "*.parquet")]
    return sum(sum(footer(found).rows) for found in files) if files else None


def _source_rows(forecast: Forecast, stage: Stage, uris: str | Sequence[str], images: bool) -> int | None:
    """Rows of sources as far as their listing tells: image files and Parquet; of others, nobody knows."""
    named = [uris] if isinstance(uris, str) else list(uris)
    found = []
    for uri in named:
        maker = forecast.maker(stage, uri)
        if maker and maker.name not in forecast.standing:
            found.append(_planned_rows(maker, uri))
        elif maker and (planned := _planned_rows(maker, uri)) is not None:
            found.append(planned)
        else:
            found.append(listed_rows(uri, images))
    return first_known(whole_sum(found), forecast.given_rows(stage))


def _planned_rows(maker: Stage, uri: str) -> int | None:
    """Rows that a stage that writes sources will have written at `uri`."""
    if maker.kind.name == "conversations":
        return maker.job.num_samples
    if maker.kind.name == "render":
        return getattr(maker.job, f"num_{storage.name_of(uri)}", None)
    return None


# --- stages -----------------------------------------------------------------------------------------------


def _unknown(forecast: Forecast, stage: Stage) -> StageWork:
    return StageWork(rows=forecast.given_rows(stage))


def _render(_: Forecast, stage: Stage) -> StageWork:
    return StageWork(
        rows=sum(getattr(stage.job, f"num_{split}") for split in ("pairs", "heldout", "images", "texts"))
    )


def _train_encoder(_: Forecast, stage: Stage) -> StageWork:
    return StageWork(rows=stage.job.num_steps * stage.job.global_batch_size, tokens=0, uses_gpu=True)


def _train_language_model(_: Forecast, stage: Stage) -> StageWork:
    rows = stage.job.num_steps * stage.job.rows_per_batch
    return StageWork(rows=rows, tokens=rows * stage.job.row_length, uses_gpu=True)


def _conversations(_: Forecast, stage: Stage) -> StageWork:
    return StageWork(rows=stage.job.num_samples)


def _embed(forecast: Forecast, stage: Stage) -> StageWork:
    job, manifest = stage.job, storage.join(stage.output, "manifest.json")
    of_images = job.texts is None
    if stage.name in forecast.standing and storage.exists(manifest):
        rows = storage.read_json(manifest).get("num_rows")
    else:
        rows = _source_rows(forecast, stage, job.images if of_images else job.texts, of_images)
    if of_images:
        return StageWork(rows=rows, tokens=0, uses_gpu=True)
    each = _tokens_per_text(forecast)
    tokens = None if rows is None or each is None else rows * each
    return StageWork(rows=rows, tokens=tokens, uses_gpu=True, texts=rows)


def _fit(forecast: Forecast, stage: Stage) -> StageWork:
    sides = [_store_rows(forecast, stage, uris) for uris in (stage.job.texts, stage.job.images)]
    most = stage.job.max_rows
    return StageWork(rows=whole_sum([min(rows, most) if rows and most else rows for rows in sides]))


def _align(forecast: Forecast, stage: Stage) -> StageWork:
    return StageWork(rows=_store_rows(forecast, stage, stage.job.texts))


def _pretrain(forecast: Forecast, stage: Stage) -> StageWork:
    job = stage.job
    rows = forecast.given_rows(stage) if job.images else _store_rows(forecast, stage, job.data)
    return _training(forecast, stage, rows, _tokens_per_text(forecast), FORWARD + THROUGH)


def _tokens_per_text(forecast: Forecast) -> float | None:
    written = forecast.estimates.data.tokens_out if forecast.estimates.data else None
    return first_known(forecast.estimates.tokens_per_text, written)


def _finetune(forecast: Forecast, stage: Stage) -> StageWork:
    text = forecast.estimates.tokens_per_conversation
    flops = FORWARD + THROUGH + (0 if stage.job.lora else WEIGHTS)
    return _training(forecast, stage, _conversation_rows(forecast, stage), text, flops)


def _conversation_rows(forecast: Forecast, stage: Stage) -> int | None:
    """Rows of an epoch; repeat counts times the rows of each part."""
    found: list[int | None] = []
    for entry in stage.job.data:
        source = source_of(entry)
        maker = forecast.maker(stage, source.uri)
        parquet = storage.name_of(source.uri).endswith(".parquet")
        rows = (
            _planned_rows(maker, source.uri) if maker else listed_rows(source.uri, False) if parquet else None
        )
        found.append(None if rows is None else round(rows * source.repeat))
    return first_known(whole_sum(found), forecast.given_rows(stage))


def _training(
    forecast: Forecast, stage: Stage, rows: int | None, text_tokens: float | None, flops: int
) -> StageWork:
    job = stage.job
    samples = None if rows is None else seen_samples(rows, job.optimisation)
    visual = _visual_tokens(forecast, stage)
    reckoned = None if text_tokens is None or visual is None else min(visual + text_tokens, job.max_length)
    each = first_known(reckoned, forecast.rate(stage).tokens_per_row)
    size = _parameters(forecast, stage)
    per_token = flops + (FORWARD if job.gradient_checkpointing else 0)
    return StageWork(
        rows=samples,
        tokens=None if samples is None or each is None else samples * each,
        uses_gpu=True,
        flops_per_token=None if size is None else per_token * size,
    )


def _visual_tokens(forecast: Forecast, stage: Stage) -> int | None:
    """Of one image, as stage 1 set them."""
    if stage.kind.name == "pretrain":
        return stage.job.architecture.num_visual_tokens
    maker = forecast.maker(stage, stage.job.model)
    if maker and maker.kind.name in ("pretrain", "finetune"):
        return _visual_tokens(forecast, maker)
    uri = storage.join(stage.job.model, "config.json")
    return storage.read_json(uri).get("num_visual_tokens") if storage.exists(uri) else None


def _parameters(forecast: Forecast, stage: Stage) -> float | None:
    """Of the language model that a stage trains."""
    if stage.name in forecast.estimates.parameters:
        return forecast.estimates.parameters[stage.name]
    maker = forecast.maker(stage, stage.job.model)
    if maker and maker.kind.name in ("pretrain", "finetune"):
        return _parameters(forecast, maker)
    return counted_parameters(stage.job.model)


def _evaluate(forecast: Forecast, stage: Stage) -> StageWork:
    job = stage.job
    asked = [_questions(forecast, stage, name) for name in job.benchmarks]
    rows = first_known(whole_sum(asked), forecast.given_rows(stage))
    return StageWork(rows=None if rows is None else rows * (1 + len(job.controls)), uses_gpu=True)


def _questions(forecast: Forecast, stage: Stage, name: str) -> int | None:
    """Questions of a benchmark, before those are left out that are none."""
    from revision_ray.evaluate.benchmarks import units

    uri, most = stage.job.data[name], stage.job.max_items
    if forecast.maker(stage, uri) and not storage.exists(uri):
        return None
    rows = 0
    for unit in units(name, uri):
        rows += unit.stop - unit.start if unit.row_group < 0 else footer(unit.uri).rows[unit.row_group]
    return min(rows, most) if most else rows


_WORKS: dict[str, Callable[[Forecast, Stage], StageWork]] = {
    "render": _render,
    "train_encoder": _train_encoder,
    "train_language_model": _train_language_model,
    "conversations": _conversations,
    "embed": _embed,
    "fit": _fit,
    "align": _align,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "export": lambda forecast, stage: StageWork(rows=0),
}


_HEADS = ("rows", "tokens", "GPU hours", "GPU $", "data $")


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """A stage in the table."""

    stage: Stage
    reason: str
    """Why it runs; empty where it is skipped."""
    work: StageWork
    cost: StageCost


def plan(stages: Sequence[Stage], book: Ledger, choice: StageChoice, estimates: Estimates) -> list[PlanLine]:
    """The chosen stages, whether each would run, and what that would cost as a whole. Nothing is written.

    Raises:
        ConfigError: the chain or the choice cannot be. DataError: a source is missing that no stage makes.
    """
    made_by = makers(stages)
    contents = Contents(dict(book.hashes))
    reasons: dict[str, str] = {}
    for stage in chosen(stages, choice):
        reason = why(stage, book.records.get(stage.name), inputs_of(stage, contents), contents)
        running = [name for name in made_by[stage.name] if reasons.get(name)]
        waits = f"runs if {', '.join(running)} makes something else" if running else ""
        reasons[stage.name] = reason or waits
    forecast = Forecast(
        stages=stages,
        makers=made_by,
        estimates=estimates,
        standing=frozenset(stage.name for stage in stages if not reasons.get(stage.name) and stage.finished),
        measured=open_ledger(estimates.measured) if estimates.measured else None,
    )
    lines = []
    for stage in stages:
        if stage.name in reasons:
            work = forecast.work(stage)
            cost = cost_of(work, forecast.rate(stage), estimates)
            done = not reasons[stage.name]
            nothing = StageCost(gpu_hours=0.0, gpu_dollars=0.0, data_dollars=0.0)
            lines.append(
                PlanLine(stage=stage, reason=reasons[stage.name], work=work, cost=nothing if done else cost)
            )
    return lines


def table(lines: Sequence[PlanLine], estimates: Estimates) -> str:
    """For a person: a line a stage, the sums, and what the sums leave out."""
    rows: list[tuple[str, ...]] = [("stage", "job", *_HEADS, "")]
    for line in lines:
        done = not line.reason
        rows.append(
            (
                line.stage.name,
                line.stage.kind.name,
                _count(line.work.rows),
                "-" if not line.work.uses_gpu else _count(line.work.tokens),
                *(("-",) * 3 if done else _cells(line.cost)),
                line.reason or "skipped, unchanged",
            )
        )
    rows.append(("total", "", "", "", *_cells(_sums(lines)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = [_line(row, widths) for row in rows]
    return "\n".join([*text, "", *_notes(lines, estimates)])


def _sums(lines: Sequence[PlanLine]) -> StageCost:
    return StageCost(
        gpu_hours=total([line.cost.gpu_hours for line in lines]),
        gpu_dollars=total([line.cost.gpu_dollars for line in lines]),
        data_dollars=total([line.cost.data_dollars for line in lines]),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
    right = "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:-1], widths[2:-1], strict=True))
    return f"{left}{right}  {row[-1]}".rstrip()


def _cells(cost: StageCost) -> tuple[str, str, str]:
    hours = "unknown" if cost.gpu_hours is None else f"{cost.gpu_hours:,.2f}" if cost.gpu_hours else "-"
    return hours, _dollars(cost.gpu_dollars), _dollars(cost.data_dollars)


def _dollars(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f}" if value else "-"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value else "-"


def _notes(lines: Sequence[PlanLine], estimates: Estimates) -> list[str]:
    notes = []
    sums = _sums(lines)
    if sums.gpu_dollars is not None and sums.data_dollars is not None:
        notes.append(f"In all ${sums.gpu_dollars + sums.data_dollars:,.2f}.")
    texts = total([line.work.texts for line in lines if line.reason])
    if estimates.data and texts:
        paired, ours = estimates.data.paired_dollars(texts), estimates.data.dollars(texts)
        if paired and ours is not None:
            notes.append(
                f"The data as {texts:,.0f} image-text pairs: ${paired:,.2f}; texts alone cost "
                f"{ours / paired:.2f} of that (arXiv 2602.07026, app. H.4)."
            )
    notes.append(
        "Whole stages: of one that goes on, less is left. Time of nodes without GPUs is not in the dollars."
    )
    return notes
