"""How much a finished stage did, and on how many GPUs: what later dry runs calibrate with."""

import json
from typing import Any

import ray

from revision_ray import storage
from revision_ray.pipeline.chain import Stage


def measure(stage: Stage) -> dict[str, Any]:
    """rows, tokens and gpus of a stage that has just finished, None or 0 where its output does not tell."""
    total = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    return {**_done(stage), "gpus": _gpus(stage, total)}


def _done(stage: Stage) -> dict[str, Any]:
    kind, output = stage.kind.name, stage.output
    found = (
        storage.read_json(storage.join(output, stage.kind.proof)) if stage.kind.proof.endswith("json") else {}
    )
    if kind in ("embed", "align", "import_reference"):
        return {"rows": found["num_rows"]}
    if kind == "fit":
        return {"rows": found["num_texts"] + found["num_images"]}
    if kind in ("pretrain", "finetune"):
        each = _tokens_per_sample(storage.join(output, "metrics.jsonl"))
        samples = found["samples"]
        return {"rows": samples, "tokens": None if each is None else samples * each}
    if kind == "evaluate":
        conditions = [part["conditions"] for part in found["benchmarks"].values()]
        return {"rows": sum(asked["num"] for by_condition in conditions for asked in by_condition.values())}
    if kind == "train_encoder":
        return {"rows": stage.job.num_steps * stage.job.global_batch_size}
    if kind == "train_language_model":
        rows = stage.job.num_steps * stage.job.rows_per_batch
        return {"rows": rows, "tokens": rows * stage.job.row_length}
    return {}


def _tokens_per_sample(uri: str) -> float | None:
    """Visual and text tokens, the mean over the run's lines of metrics."""
    if not storage.exists(uri):
        return None
    lines = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
    each = [
        line["tokens_per_second"] / line["samples_per_second"]
        for line in lines
        if line.get("samples_per_second")
    ]
    return sum(each) / len(each) if each else None


def _gpus(stage: Stage, total: float) -> float:
    """That the job had, of `total` in the cluster; 0 where it ran on CPUs."""
    job = stage.job
    if stage.kind.name in ("pretrain", "finetune", "train_encoder"):
        return float(job.num_workers) if total >= job.num_workers else 0.0
    if stage.kind.name == "train_language_model":
        return 1.0 if total >= 1 else 0.0
    if stage.kind.name not in ("embed", "evaluate"):
        return 0.0
    asked = job.resources if stage.kind.name == "embed" else job
    each = (1.0 if total else 0.0) if asked.gpus_per_actor is None else asked.gpus_per_actor
    return float(min(total, each * asked.max_actors) if asked.max_actors else total) if each else 0.0
