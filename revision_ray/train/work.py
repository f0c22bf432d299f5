"""Estimate the rows, tokens and operations of stages 1 and 2 before they run. No Ray."""

import json
import math
from typing import Any

from revision_ray.core import storage
from revision_ray.core.stage import Forecast, Stage, StageWork, first_known, whole_sum
from revision_ray.data.conversations import source_of
from revision_ray.data.store import count_rows
from revision_ray.encode.embed import listed_rows

# Floating point operations for each token and parameter of the language model: forward 2, gradients of the
# activations 2, gradients of the weights 2 where they train, forward once more with gradient checkpointing.
# Attention between tokens is left out: at 2048 tokens about 3 % of an 8 B model's.
FORWARD, THROUGH, WEIGHTS = 2, 2, 2


def pretrain_work(forecast: Forecast, stage: Stage) -> StageWork:
    """Return the work of stage 1: rows of its stores, or of captions with images as configured."""
    job = stage.job
    by_setting = forecast.configured_rows(stage)
    rows = by_setting if job.images else forecast.rows_read(stage, job.data, count_rows)
    return _training(forecast, stage, rows, forecast.tokens_per_text(), FORWARD + THROUGH)


def finetune_work(forecast: Forecast, stage: Stage) -> StageWork:
    """Return the work of stage 2, whose language model trains too unless LoRA does."""
    text = forecast.estimates.tokens_per_conversation
    flops = FORWARD + THROUGH + (0 if stage.job.lora else WEIGHTS)
    return _training(forecast, stage, _conversation_rows(forecast, stage), text, flops)


def _conversation_rows(forecast: Forecast, stage: Stage) -> int | None:
    """Return the rows of an epoch: repeat counts times the rows of each part."""
    rows_of_parts: list[int | None] = []
    for entry in stage.job.data:
        source = source_of(entry)
        rows = forecast.rows_read(stage, source.uri, _parquet_rows)
        rows_of_parts.append(None if rows is None else round(rows * source.repeat))
    return first_known(whole_sum(rows_of_parts), forecast.configured_rows(stage))


def _parquet_rows(uri: str) -> int | None:
    return listed_rows(uri, False) if storage.name_of(uri).endswith(".parquet") else None


def _training(
    forecast: Forecast, stage: Stage, rows: int | None, text_tokens: float | None, flops: int
) -> StageWork:
    job = stage.job
    samples = None if rows is None else seen_samples(rows, job.optimisation)
    visual = _visual_tokens(forecast, stage)
    estimated = None if text_tokens is None or visual is None else min(visual + text_tokens, job.max_length)
    tokens_per_sample = first_known(estimated, forecast.rate(stage).tokens_per_row)
    size = _parameters(forecast, stage)
    per_token = flops + (FORWARD if job.gradient_checkpointing else 0)
    return StageWork(
        rows=samples,
        tokens=None if samples is None or tokens_per_sample is None else samples * tokens_per_sample,
        uses_gpu=True,
        flops_per_token=None if size is None else per_token * size,
    )


def seen_samples(rows: int, optimisation: Any) -> int:
    """Return the samples that a run sees: of whole epochs all rows, of a broken one whole batches."""
    size = optimisation.global_batch_size
    per_epoch = math.ceil(rows / size)
    steps = math.ceil(per_epoch * optimisation.num_epochs)
    if optimisation.max_steps is not None:
        steps = min(steps, optimisation.max_steps)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    return epochs * rows + min(rest * size, rows)


def _visual_tokens(forecast: Forecast, stage: Stage) -> int | None:
    """Return the visual tokens of one image, as stage 1 sets or has set them."""
    if stage.kind.name == "pretrain":
        return stage.job.architecture.num_visual_tokens
    if maker := _trainer(forecast, stage):
        return _visual_tokens(forecast, maker)
    uri = storage.join(stage.job.model, "config.json")
    return storage.read_json(uri).get("num_visual_tokens") if storage.exists(uri) else None


def _parameters(forecast: Forecast, stage: Stage) -> float | None:
    """Return the parameters of the language model that a stage trains."""
    if stage.name in forecast.estimates.parameters:
        return forecast.estimates.parameters[stage.name]
    maker = _trainer(forecast, stage)
    return _parameters(forecast, maker) if maker else counted_parameters(stage.job.model)


def _trainer(forecast: Forecast, stage: Stage) -> Stage | None:
    """Return the earlier stage 1 or 2 whose model `stage` begins with, if there is one."""
    maker = forecast.maker(stage, stage.job.model)
    return maker if maker and maker.kind.name in ("pretrain", "finetune") else None


def counted_parameters(folder: str) -> float | None:
    """Count the language model's parameters from the headers of a folder's safetensors; None if none."""
    shapes: dict[str, list[int]] = {}
    for uri, _ in storage.list_files(folder, "*.safetensors"):
        with storage.open_input(uri) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    inner = {name: shape for name, shape in shapes.items() if "language_model" in name}
    counts = [math.prod(shape) for shape in (inner or shapes).values()]
    return float(sum(counts)) if counts else None
