"""The pipeline job: a YAML that chains the other jobs, how each runs as a stage, and the final report."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from revision_ray.align import apply, fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import AlignJob
from revision_ray.align.fit import FitJob
from revision_ray.core import config, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.data import imports
from revision_ray.data.conversations import expand, source_of
from revision_ray.data.imports import ImportJob
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.evaluate import evaluation as evaluate
from revision_ray.evaluate.evaluation import EvaluateJob
from revision_ray.evaluate.report import table
from revision_ray.miniature import dataset, render
from revision_ray.miniature.dataset import ConversationsJob, DatasetConfig
from revision_ray.miniature.language_model import LanguageTraining, run_train_language_model
from revision_ray.pipeline import plan
from revision_ray.pipeline.chain import Stage, StageChoice, StageKind, chosen
from revision_ray.pipeline.ledger import open_ledger
from revision_ray.pipeline.plan import Estimates
from revision_ray.pipeline.run import run_chain
from revision_ray.train import export, export_job, from_scratch
from revision_ray.train import stages as training
from revision_ray.train.contrastive import EncoderTraining
from revision_ray.train.export_job import ExportJob
from revision_ray.train.stages import FinetuneJob, PretrainJob


def _uris(*given: str | list[str] | None) -> list[str]:
    return [uri for some in given for uri in ([some] if isinstance(some, str) else some or []) if uri]


def _encoder_reads(key: str, encoder: EncoderConfig | None) -> dict[str, list[str]]:
    if encoder is None:
        return {}
    named = {f"{key}.{name}": _uris(getattr(encoder, name)) for name in ("model", "pretrained", "text_model")}
    return {name: uris for name, uris in named.items() if uris}


def _embed_reads(job: embed.EmbedJob) -> dict[str, list[str]]:
    key = "images" if job.texts is None else "texts"
    return {key: _uris(getattr(job, key)), **_encoder_reads("encoder", job.encoder)}


def _fit_reads(job: fit.FitJob) -> dict[str, list[str]]:
    return {"texts": _uris(job.texts), "images": _uris(job.images), "append_to": _uris(job.append_to)}


def _pretrain_reads(job: PretrainJob) -> dict[str, list[str]]:
    return {
        "data": job.data,
        "images": job.images,
        "heldout": job.heldout,
        "alignment": _uris(job.alignment),
        "model": _uris(job.model),
        **_encoder_reads("image_tower", job.image_tower),
    }


def _records(entries: list[str]) -> list[str]:
    """The files of conversations, and those that a meta JSON among them lists."""
    sources = [source_of(entry) for entry in entries]
    listed = [part for source in sources if storage.exists(source.uri) for part in expand(source)]
    return list(dict.fromkeys(source.uri for source in (*sources, *listed)))


def _finetune_reads(job: FinetuneJob) -> dict[str, list[str]]:
    return {
        "data": _records(job.data),
        "images": job.images,
        "image_files": job.image_files,
        "heldout": _records(job.heldout),
        "model": _uris(job.model),
        **_encoder_reads("encoder", job.encoder),
    }


def _evaluate_reads(job: evaluate.EvaluateJob) -> dict[str, list[str]]:
    if job.compare:
        raise ConfigError("compare is no stage of a chain; run jobs/evaluate.py with it after the chain")
    return {
        "data": [job.data[name] for name in job.benchmarks],
        "images": _uris(job.images),
        "model": _uris(job.model),
        "caption_model": _uris(job.caption_model),
    }


def _pretrain(job: PretrainJob) -> str:
    return training.describe("stage 1", training.pretrain(job), job.output)


def _finetune(job: FinetuneJob) -> str:
    return training.describe("stage 2", training.finetune(job), job.output)


def _reads(*keys: str) -> Any:
    """What a job reads that names it all in these keys."""
    return lambda job: {key: _uris(getattr(job, key)) for key in keys}


KINDS = {
    kind.name: kind
    for kind in (
        StageKind(name="render", run=render.run_render, reads=_reads(), proof="manifest.json"),
        StageKind(
            name="train_encoder",
            run=from_scratch.run_train_encoder,
            reads=_reads("data", "heldout", "model"),
            proof="metrics.json",
            sources=("data", "heldout"),
        ),
        StageKind(
            name="train_language_model",
            run=run_train_language_model,
            reads=_reads(),
            proof="metrics.json",
        ),
        StageKind(
            name="import_reference",
            run=imports.run_import,
            reads=_reads("input"),
            proof="manifest.json",
            sources=("input",),
        ),
        StageKind(
            name="embed",
            run=embed.run_embed,
            reads=_embed_reads,
            proof="manifest.json",
            sources=("images", "texts"),
        ),
        StageKind(name="fit", run=fit.run_fit, reads=_fit_reads, proof="alignment.json"),
        StageKind(
            name="align", run=apply.run_align, reads=_reads("texts", "alignment"), proof="manifest.json"
        ),
        StageKind(
            name="conversations",
            run=dataset.run_conversations,
            reads=_reads("world"),
            proof=dataset.FILE,
        ),
        # A run knows its models by their paths alone: new weights at an old path would go unnoticed.
        StageKind(
            name="pretrain",
            run=_pretrain,
            reads=_pretrain_reads,
            proof=training.RESULTS,
            result=export.MODEL,
            trusts=("model", "image_tower.model", "image_tower.pretrained", "image_tower.text_model"),
        ),
        StageKind(
            name="finetune",
            run=_finetune,
            reads=_finetune_reads,
            proof=training.RESULTS,
            result=export.MODEL,
            sources=("data", "image_files", "heldout"),
            trusts=("model",),
        ),
        StageKind(
            name="evaluate",
            run=evaluate.run_evaluate,
            reads=_evaluate_reads,
            proof="results.json",
            sources=("data",),
        ),
        StageKind(name="export", run=export_job.run_export, reads=_reads("run"), proof="config.json"),
    )
}


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


def report(stages: Sequence[Stage], run: str) -> str:
    """One part for each kind of stage that has finished, from what stands at their outputs."""
    done = [stage for stage in stages if stage.finished]
    parts = [part for make in (_encoders, _gaps, _answers) if (part := make(done))]
    (last,) = [stage for stage in stages if stage.kind.name in _MODELS][-1:] or [None]
    model = f", the model in {storage.join(last.output, last.kind.result)}" if last and last.finished else ""
    left = [stage.name for stage in stages if not stage.finished]
    missing = f" Not there yet: {', '.join(left)}." if left else ""
    return "\n\n".join([*parts, f"Everything is in {run}{model}{'.' if left else ''}{missing}"])


_MODELS = ("pretrain", "finetune", "export")


def _encoders(stages: Sequence[Stage]) -> str:
    lines = []
    for stage in stages:
        if stage.kind.name == "train_encoder":
            found = storage.read_json(storage.join(stage.output, stage.kind.proof))["heldout"]
            lines.append(
                f"Encoder trained from scratch: R@1 of {found['num_pairs']} held-out pairs "
                f"{found['image_to_text_r1']:.2f} image to text, "
                f"{found['text_to_image_r1']:.2f} text to image."
            )
    return "\n".join(lines)


def _gaps(stages: Sequence[Stage]) -> str:
    """The gap that each fit leaves. Fits of the same strategy go by the names of their stages."""
    fits = [(stage, load_alignment(stage.output)) for stage in stages if stage.kind.name == "fit"]
    if not fits:
        return ""
    last = fits[-1][1]
    strategies = [found.strategy.strategy for _, found in fits]
    lines = [f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}"]
    for (stage, found), strategy in zip(fits, strategies, strict=True):
        name = stage.title or (strategy if strategies.count(strategy) == 1 else stage.name)
        gap = found.modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    sizes = f"Fitted on {last.num_texts:,} texts and {last.num_images:,} images, unpaired."
    return f"{sizes}\n\n" + "\n".join(lines)


def _answers(stages: Sequence[Stage]) -> str:
    parts = [_asked(stage) for stage in stages if stage.kind.name == "conversations"]
    pictures = []
    for stage in stages:
        if stage.kind.name == "evaluate":
            results = storage.read_json(storage.join(stage.output, stage.kind.proof))
            parts.append(f"{stage.title or stage.name}:\n{table(results, ['image', *stage.job.controls])}")
            picture = storage.join(stage.output, "picture.png")
            pictures += [picture] if storage.exists(picture) else []
    if pictures:
        parts.append("\n".join(f"Captions and answers, drawn: {picture}" for picture in pictures))
    return "\n\n".join(parts)


def _asked(stage: Stage) -> str:
    """What stage 2 learnt from, and what it is asked."""
    content = storage.read_bytes(storage.join(stage.output, stage.kind.proof)).decode()
    records = [json.loads(line) for line in content.splitlines()]
    images = {record["image"] for record in records}
    return f"{len(records)} questions about {len(images)} images to learn from: {stage.output}"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: exactly one job, with the keys that it has when it runs alone."""

    title: str = ""
    """What the report calls it; its name if not given."""
    embed: EmbedJob | None = None
    """jobs/embed.py."""
    fit: FitJob | None = None
    """jobs/fit.py."""
    align: AlignJob | None = None
    """jobs/align.py."""
    import_reference: ImportJob | None = None
    """jobs/import_reference.py."""
    pretrain: PretrainJob | None = None
    """jobs/pretrain.py."""
    finetune: FinetuneJob | None = None
    """jobs/finetune.py."""
    evaluate: EvaluateJob | None = None
    """jobs/evaluate.py."""
    export: ExportJob | None = None
    """jobs/export.py."""
    render: DatasetConfig | None = None
    """jobs/render.py."""
    conversations: ConversationsJob | None = None
    """Questions about the miniature world's images, as data of stage 2."""
    train_encoder: EncoderTraining | None = None
    """jobs/train_encoder.py."""
    train_language_model: LanguageTraining | None = None
    """jobs/train_language_model.py."""


@dataclass(frozen=True, kw_only=True)
class PipelineJob:
    """Run a chain of jobs, each on what earlier ones made. Run again, it skips what has not changed and goes
    on where it was. --dry-run prints what would run and what it would cost, --from STAGE begins there, --only
    STAGE,STAGE runs those alone."""

    output: str = MISSING
    """Run directory: the ledger of what was done, and the resolved configuration. Stages have outputs of
    their own, usually below it."""
    given: dict[str, Any] = field(default_factory=dict)
    """Values that several stages name, as ${given.NAME}."""
    stages: dict[str, StageConfig] = MISSING
    """The chain, in the order in which it runs. A stage names what an earlier one makes by
    ${stages.NAME.JOB.output}."""
    estimates: Estimates = field(default_factory=Estimates)
    """What --dry-run reckons with."""
    from_stage: str | None = None
    """--from: begin with this stage; what it reads must be there."""
    only: list[str] = field(default_factory=list)
    """--only: run these stages alone; what they read must be there."""
    dry_run: bool = False
    """--dry-run: print what would run, with rows, tokens, GPU hours and dollars, and do nothing."""


def run_pipeline(job: PipelineJob) -> str:
    """The chain has run; what came out. Or, of a dry run, the table of what would.

    Raises:
        ConfigError: the chain cannot be, or a stage has no such name.
        DataError, AlignmentError, CheckpointError: a stage's data are at fault, or another job writes there.
    """
    stages = stages_of(job)
    book = open_ledger(job.output)
    choice = StageChoice(first=job.from_stage, only=tuple(job.only))
    if job.dry_run:
        return plan.table(plan.plan(stages, book, choice, job.estimates), job.estimates)
    chosen(stages, choice)  # before anything is written
    whole = replace(job, from_stage=None, only=[])
    config.save_resolved(whole, storage.join(storage.absolute(job.output), "pipeline.yaml"))
    run_chain(stages, book, choice, measure)
    return report(stages, storage.absolute(job.output))


def stages_of(job: PipelineJob) -> list[Stage]:
    """The chain that the configuration describes.

    Raises:
        ConfigError: no stages, a name that no command line can hold, or a stage of no job or of several.
    """
    if not job.stages:
        raise ConfigError(
            "stages: name at least one, as stages.NAME.JOB.KEY=VALUE; see configs/pipeline.yaml"
        )
    found = []
    for name, entry in job.stages.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"stages.{name}: a stage's name is made of letters, digits, _ and -")
        jobs = [kind for kind in KINDS if getattr(entry, kind) is not None]
        if len(jobs) != 1:
            said = " and ".join(jobs) or "no job"
            raise ConfigError(f"stages.{name}: names {said}; a stage is one of {', '.join(KINDS)}")
        stage = Stage(name, KINDS[jobs[0]], getattr(entry, jobs[0]), entry.title)
        if stage.output == storage.absolute(job.output):
            raise ConfigError(
                f"{stage.key_of('output')}={stage.output}: is the pipeline's own directory; give the stage "
                "one below it"
            )
        found.append(stage)
    return found
