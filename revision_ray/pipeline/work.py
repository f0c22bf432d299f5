"""How much a stage of a chain has to do: rows and tokens, from manifests, listings and settings. No Ray."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from revision_ray import storage
from revision_ray.data.conversations import source_of
from revision_ray.data.parquet_rows import footer
from revision_ray.pipeline.chain import Stage, inside
from revision_ray.pipeline.cost import FORWARD, THROUGH, WEIGHTS, Estimates, Rate, Work
from revision_ray.pipeline.ledger import Ledger
from revision_ray.pipeline.sizes import counted_parameters, first_known, listed_rows, seen_samples, whole_sum


@dataclass
class Forecast:
    """Looks ahead along a chain: of what is not there yet, the stage that will make it is asked."""

    stages: Sequence[Stage]
    makers: dict[str, tuple[str, ...]]
    estimates: Estimates
    standing: frozenset[str]
    """Stages that will not run, so that their outputs are as counted."""
    measured: Ledger | None = None
    _works: dict[str, Work] = field(default_factory=dict)

    def work(self, stage: Stage) -> Work:
        if stage.name not in self._works:
            self._works[stage.name] = _WORKS.get(stage.kind.name, _unknown)(self, stage)
        return self._works[stage.name]

    def rate(self, stage: Stage) -> Rate:
        """Configured, else measured, throughput of one GPU at this stage."""
        configured, measured = self.estimates, measured_rate(self.measured, stage)

        def given(rates: dict[str, float]) -> float | None:
            return rates.get(stage.name, rates.get(stage.kind.name))

        return Rate(
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


def measured_rate(book: Ledger | None, stage: Stage) -> Rate:
    """What one GPU did at this stage, or at another one of the same job, when it ran in one go."""
    records = book.records if book else {}
    same = [records[stage.name]] if stage.name in records else []
    same += [record for name, record in records.items() if name != stage.name]
    for record in same:
        if record.job == stage.kind.name and record.state == "finished" and record.rows and record.unbroken:
            tokens, gpu_seconds = record.tokens, record.seconds * record.gpus
            return Rate(
                tokens_per_second=tokens / gpu_seconds if tokens and gpu_seconds else None,
                rows_per_second=record.rows / gpu_seconds if gpu_seconds else None,
                tokens_per_row=tokens / record.rows if tokens else None,
            )
    return Rate()


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


def _unknown(forecast: Forecast, stage: Stage) -> Work:
    return Work(rows=forecast.given_rows(stage))


def _render(_: Forecast, stage: Stage) -> Work:
    return Work(
        rows=sum(getattr(stage.job, f"num_{split}") for split in ("pairs", "heldout", "images", "texts"))
    )


def _train_encoder(_: Forecast, stage: Stage) -> Work:
    return Work(rows=stage.job.num_steps * stage.job.global_batch_size, tokens=0, uses_gpu=True)


def _train_language_model(_: Forecast, stage: Stage) -> Work:
    rows = stage.job.num_steps * stage.job.rows_per_batch
    return Work(rows=rows, tokens=rows * stage.job.row_length, uses_gpu=True)


def _conversations(_: Forecast, stage: Stage) -> Work:
    return Work(rows=stage.job.num_samples)


def _embed(forecast: Forecast, stage: Stage) -> Work:
    job, manifest = stage.job, storage.join(stage.output, "manifest.json")
    of_images = job.texts is None
    if stage.name in forecast.standing and storage.exists(manifest):
        rows = storage.read_json(manifest).get("num_rows")
    else:
        rows = _source_rows(forecast, stage, job.images if of_images else job.texts, of_images)
    if of_images:
        return Work(rows=rows, tokens=0, uses_gpu=True)
    each = _tokens_per_text(forecast)
    tokens = None if rows is None or each is None else rows * each
    return Work(rows=rows, tokens=tokens, uses_gpu=True, texts=rows)


def _fit(forecast: Forecast, stage: Stage) -> Work:
    sides = [_store_rows(forecast, stage, uris) for uris in (stage.job.texts, stage.job.images)]
    most = stage.job.max_rows
    return Work(rows=whole_sum([min(rows, most) if rows and most else rows for rows in sides]))


def _align(forecast: Forecast, stage: Stage) -> Work:
    return Work(rows=_store_rows(forecast, stage, stage.job.texts))


def _pretrain(forecast: Forecast, stage: Stage) -> Work:
    job = stage.job
    rows = forecast.given_rows(stage) if job.images else _store_rows(forecast, stage, job.data)
    return _training(forecast, stage, rows, _tokens_per_text(forecast), FORWARD + THROUGH)


def _tokens_per_text(forecast: Forecast) -> float | None:
    written = forecast.estimates.data.tokens_out if forecast.estimates.data else None
    return first_known(forecast.estimates.tokens_per_text, written)


def _finetune(forecast: Forecast, stage: Stage) -> Work:
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
) -> Work:
    job = stage.job
    samples = None if rows is None else seen_samples(rows, job.optimisation)
    visual = _visual_tokens(forecast, stage)
    reckoned = None if text_tokens is None or visual is None else min(visual + text_tokens, job.max_length)
    each = first_known(reckoned, forecast.rate(stage).tokens_per_row)
    size = _parameters(forecast, stage)
    per_token = flops + (FORWARD if job.gradient_checkpointing else 0)
    return Work(
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


def _evaluate(forecast: Forecast, stage: Stage) -> Work:
    job = stage.job
    asked = [_questions(forecast, stage, name) for name in job.benchmarks]
    rows = first_known(whole_sum(asked), forecast.given_rows(stage))
    return Work(rows=None if rows is None else rows * (1 + len(job.controls)), uses_gpu=True)


def _questions(forecast: Forecast, stage: Stage, name: str) -> int | None:
    """Questions of a benchmark, before those are left out that are none."""
    from revision_ray.evaluate.rows import units

    uri, most = stage.job.data[name], stage.job.max_items
    if forecast.maker(stage, uri) and not storage.exists(uri):
        return None
    rows = 0
    for unit in units(name, uri):
        rows += unit.stop - unit.start if unit.row_group < 0 else footer(unit.uri).rows[unit.row_group]
    return min(rows, most) if most else rows


_WORKS: dict[str, Callable[[Forecast, Stage], Work]] = {
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
    "export": lambda forecast, stage: Work(rows=0),
}
