"""Stage 1 and stage 2 as jobs: sources, Ray Train's workers around the loop, and what is said at the end."""

import dataclasses
import datetime
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from revision_ray.align.alignment import load_alignment
from revision_ray.core import artifact, config, storage
from revision_ray.core.cluster import connect
from revision_ray.core.config import MISSING
from revision_ray.core.errors import AlignmentError, ConfigError, DataError
from revision_ray.core.stage import Stage, StageKind, as_uris, worker_gpus
from revision_ray.core.storage import is_passing, patiently
from revision_ray.data.chat import as_date, prints_date
from revision_ray.data.conversations import expand, source_of
from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob, encoder_reads
from revision_ray.encode.encoder import EncoderConfig, located
from revision_ray.train import export, ingest, sources
from revision_ray.train.entry import fitted, loop, scaling
from revision_ray.train.joined import Kind
from revision_ray.train.loop import TrainingTask, order_of, train
from revision_ray.train.models import Architecture, load_tokenizer
from revision_ray.train.samples import Formatter
from revision_ray.train.settings import Lora, Training
from revision_ray.train.sources import Source
from revision_ray.train.work import finetune_work, pretrain_work

log = logging.getLogger(__name__)
RESULTS, CONFIG = "results.json", "config.yaml"
# Settings that say where and how a run works, not what comes out.
_OUTSIDE = ("output", "num_workers", "workers", "checkpoints", "logging", "max_rejected_fraction", "inspect",
            "image_files", "encoder", "image_root", "match_images")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainJob(Training):
    """Stage 1: a projector learns to make visual tokens of aligned text embeddings, the language model frozen
    (paper, sec. 5). Run again, it goes on from its last checkpoint, or says that it is finished."""

    data: list[str] = MISSING
    """Text stores of jobs/embed.py. With `images`: JSONL files of captions with the ids of their images."""
    images: list[str] = field(default_factory=list)
    """Image stores: train on real pairs of image embedding and caption (the paired upper bound)."""
    heldout: list[str] = field(default_factory=list)
    """The same as `data`, for the held-out loss."""
    architecture: Architecture = field(default_factory=Architecture)
    """Between encoder and language model."""
    image_tower: EncoderConfig | None = None
    """Image side of the fit's encoder (encoder.* of jobs/embed.py), to be kept inside the model: it then
    answers about pictures by itself. Without one it takes embeddings."""
    inspect: int = 0
    """Print this many samples as the model sees them, with the label mask, and stop (--inspect: 4)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(Training):
    """Stage 2: projector and language model learn from conversations about real images (paper, sec. 5). Run
    again, it goes on from its last checkpoint, or says that it is finished."""

    data: list[str] = MISSING
    """Conversations: LLaVA, Bunny or InternVL records (JSON, JSONL), or InternVL's meta JSON. URI*N is seen N
    times an epoch."""
    images: list[str] = field(default_factory=list)
    """Image stores that hold the embeddings of the conversations' images."""
    image_files: list[str] = field(default_factory=list)
    """Image sources of jobs/embed.py (folders, tars, Parquet), beside or instead of stores: the job embeds
    them first, once, into OUTPUT/images, and goes on from there. Needs `encoder`."""
    encoder: EncoderConfig | None = None
    """Image side of the encoder that the model was pretrained with, for `image_files`."""
    heldout: list[str] = field(default_factory=list)
    """The same as `data`, for the held-out loss; the same image stores."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the whole language model."""
    today: str = ""
    """Date that a chat template may print, as YYYY-MM-DD; by default the day on which the run began, which
    OUTPUT/config.yaml keeps."""
    inspect: int = 0
    """Print this many samples as the model sees them, with the label mask, and stop (--inspect: 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        as_date(self.today)


def pretrain(job: PretrainJob) -> dict[str, Any]:
    """The figures of the finished run; its model stands in OUTPUT/model.

    Raises:
        ConfigError, DataError, AlignmentError, CheckpointError: what the user gave does not fit.
    """
    connect()
    tower = job.image_tower and located(job.image_tower)
    job = dataclasses.replace(job, model=_placed(job.model), image_tower=tower)
    source = _pretrain_source(job, job.data)
    heldout = _pretrain_source(job, job.heldout) if job.heldout else None
    identity = alignment_identity(job.alignment) if job.alignment else {}
    return _fit(job, source, heldout, identity, architecture=job.architecture)


def finetune(job: FinetuneJob) -> dict[str, Any]:
    """The figures of the finished run; its model stands in OUTPUT/model.

    Raises:
        ConfigError, DataError, AlignmentError, CheckpointError: what the user gave does not fit.
    """
    connect()
    job = _with_images(dataclasses.replace(_dated(job), model=_placed(job.model)))
    source = _conversations(job, job.data)
    _check_model(job, source)
    heldout = _conversations(job, job.heldout) if job.heldout else None
    return _fit(job, source, heldout, {}, lora=job.lora)


def _dated(job: FinetuneJob) -> FinetuneJob:
    """The same job with a date: its own, that of the run in its output, or that of this day."""
    if job.today:
        return job
    uri = storage.join(storage.absolute(job.output), CONFIG)
    former = yaml.safe_load(storage.read_bytes(uri)) if storage.exists(uri) else {}
    return dataclasses.replace(job, today=former.get("today") or datetime.date.today().isoformat())


def _with_images(job: FinetuneJob) -> FinetuneJob:
    """The same job with the embeddings of its image files in a store, made now or by a run before."""
    if not job.image_files:
        return job
    if job.encoder is None:
        raise ConfigError(
            "image_files: set encoder.kind, encoder.model, ... to embed them, or give image stores"
        )
    store = storage.join(storage.absolute(job.output), "images")
    log.info("%s", embed.run_embed(EmbedJob(images=job.image_files, output=store, encoder=job.encoder)))
    return dataclasses.replace(job, images=[*job.images, store])


def _placed(model: str) -> str:
    """A local folder by its absolute path: workers run in folders of their own. A hub id as it is."""
    return os.path.abspath(model) if os.path.exists(model) else model


def describe(stage: str, figures: dict[str, Any], output: str) -> str:
    """What a run did, for a person."""
    losses = {"loss": figures["loss"], "held out": figures["heldout_loss"]}
    shown = "".join(f", {name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
    if without_end := figures.get("without_end"):
        shown = f", {without_end:,} without an end token behind the last turn{shown}"
    return (
        f"{stage}: {figures['num_steps']} steps, {figures['samples']:,} samples, {figures['rejected']:,} "
        f"rejected or cut off{shown}\n"
        f"model: {storage.join(storage.absolute(output), export.MODEL)}"
    )


def inspect(job: PretrainJob | FinetuneJob) -> str:
    """The first samples of the run as the model sees them, targets in [[ ]]; nothing is trained."""
    if isinstance(job, PretrainJob):
        source = _pretrain_source(job, job.data)
        tokenizer, num_visual_tokens = load_tokenizer(job.model), job.architecture.num_visual_tokens
    else:
        job = _dated(_with_images(job))
        source = _conversations(job, job.data)
        tokenizer = load_tokenizer(job.model)
        num_visual_tokens = storage.read_json(storage.join(job.model, "config.json"))["num_visual_tokens"]
    today = job.today if isinstance(job, FinetuneJob) else ""
    formatter = Formatter(tokenizer, num_visual_tokens, job.max_length, job.on_too_long, today)
    return "\n\n".join(ingest.inspect(source, formatter, order_of(job), job.inspect))


def _pretrain_source(job: PretrainJob, data: Sequence[str]) -> Source:
    if job.images:
        return _joined(job, data, "captions")
    if not job.alignment:
        raise ConfigError("alignment: a value is required for texts; give the directory of a fit")
    return sources.text_source(data, job.alignment, allow_other_encoder=job.allow_other_encoder)


def _conversations(job: FinetuneJob, data: Sequence[str]) -> Source:
    return _joined(job, data, "conversations")


def _joined(job: PretrainJob | FinetuneJob, data: Sequence[str], kind: Kind) -> Source:
    parts = [source_of(entry, job.image_root, job.match_images) for entry in data]
    cache = storage.join(storage.absolute(job.output), "joined")
    return ingest.conversation_source(
        parts, job.images, cache, kind=kind, max_rejected_fraction=job.max_rejected_fraction
    )


def alignment_identity(uri: str) -> dict[str, Any]:
    """What a model keeps of the fit that its stage 1 used."""
    fit = load_alignment(uri)
    return {
        "strategy": fit.strategy.strategy,
        "content_hash": fit.content_hash,
        "text_fingerprint": fit.text_encoder.fingerprint,
        "image_fingerprint": fit.image_encoder.fingerprint,
        "domain": fit.domain,
    }


def _check_model(job: FinetuneJob, source: Source) -> None:
    """The conversations' embeddings are of the space that the model was pretrained in.

    Raises:
        ConfigError: no such model. AlignmentError: another encoder. DataError: another dimension.
    """
    config_uri = storage.join(job.model, "config.json")
    if not storage.exists(config_uri):
        raise ConfigError(f"model={job.model}: no config.json there; name OUTPUT/model of jobs/pretrain.py")
    found = storage.read_json(config_uri)
    if not source.embedding_dim:  # text alone
        return
    if found.get("embedding_dim") != source.embedding_dim:
        raise DataError(
            f"{job.images}: embedding_dim is {source.embedding_dim}, the model's is "
            f"{found.get('embedding_dim')}; embed the images with the encoder of stage 1"
        )
    expected = (found.get("alignment") or {}).get("image_fingerprint", "")
    if expected and expected != source.encoder.fingerprint and not job.allow_other_encoder:
        raise AlignmentError(
            f"{job.images}: were made by {source.encoder}, the model was pretrained with the encoder of "
            f"fingerprint {expected}; embed the images with that encoder, or set allow_other_encoder=true"
        )


def _fit(
    job: PretrainJob | FinetuneJob,
    source: Source,
    heldout: Source | None,
    alignment: dict[str, Any],
    architecture: Architecture | None = None,
    lora: Lora | None = None,
) -> dict[str, Any]:
    output = storage.absolute(job.output)
    per_epoch = ingest.steps_per_epoch(source, order_of(job))
    num_steps = math.ceil(per_epoch * job.optimisation.num_epochs)
    if job.optimisation.max_steps is not None:
        num_steps = min(num_steps, job.optimisation.max_steps)
    identity = _identity(job, source)
    if former := artifact.finished(output, RESULTS, identity, "a finished run"):
        log.info("%s: finished before", output)
        return former
    config.save_resolved(job, storage.join(output, CONFIG))
    task = TrainingTask(
        stage="pretrain" if isinstance(job, PretrainJob) else "finetune",
        training=job,
        architecture=architecture,
        lora=lora,
        embedding_dim=source.embedding_dim,
        alignment=alignment,
        image_tower=job.image_tower if isinstance(job, PretrainJob) else None,
        source=source,
        heldout=heldout,
        num_steps=num_steps,
        output=output,
        identity=identity,
        resolved=dataclasses.asdict(job),
        today=job.today if isinstance(job, FinetuneJob) else "",
    )
    log.info("%s: %d samples an epoch, %d steps", task.stage, source.num_rows, num_steps)
    results = {**_run(job, output, task), "identity": identity}
    storage.write_json(storage.join(output, RESULTS), results)
    return results


def _identity(job: PretrainJob | FinetuneJob, source: Source) -> dict[str, Any]:
    """What decides the weights: settings, by their dotted keys, and content; as JSON gives it back."""
    settings = dataclasses.asdict(job)
    if isinstance(job, FinetuneJob) and not prints_date(load_tokenizer(job.model)):
        settings.pop("today")  # decides nothing
    for key in (*_OUTSIDE, "data", "images", "heldout", "alignment"):
        settings.pop(key, None)
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{inner}".rstrip("."): found for inner, found in nested.items()}
    flat |= {"source": source.content_hash, "embedding_dim": source.embedding_dim}
    return json.loads(json.dumps(flat))


def _run(job: Training, output: str, task: TrainingTask) -> dict[str, Any]:
    placement = scaling(job.num_workers, job.workers.gpus_per_worker, job.workers.cpus_per_worker)
    environment = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    if not placement.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    run_config = RunConfig(
        name="checkpoints",
        storage_path=output,
        failure_config=FailureConfig(max_failures=job.workers.max_failures),
        logging_config=LoggingConfig(log_level="WARNING"),
        checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoints.keep),
        worker_runtime_env={"env_vars": environment},
    )

    def attempt() -> dict[str, Any]:
        try:
            return fitted(TorchTrainer(**loop(train, task), scaling_config=placement, run_config=run_config))
        except ControllerError as error:
            cause = error.controller_failure
            if isinstance(cause, OSError) and is_passing(cause):
                raise cause from error
            raise

    # Ray Train's controller notes its checkpoints there, tries for seconds, and ends the run where it cannot:
    # a new run goes on from the last checkpoint.
    return patiently(output, attempt)


# --- as stages of a chain ---------------------------------------------------------------------------------


def _pretrain_reads(job: PretrainJob) -> dict[str, list[str]]:
    return {
        "data": job.data,
        "images": job.images,
        "heldout": job.heldout,
        "alignment": as_uris(job.alignment),
        "model": as_uris(job.model),
        **encoder_reads("image_tower", job.image_tower),
    }


def _finetune_reads(job: FinetuneJob) -> dict[str, list[str]]:
    return {
        "data": _record_files(job.data),
        "images": job.images,
        "image_files": job.image_files,
        "heldout": _record_files(job.heldout),
        "model": as_uris(job.model),
        **encoder_reads("encoder", job.encoder),
    }


def _record_files(entries: list[str]) -> list[str]:
    """Return the files of conversations, and those that a meta JSON among them lists."""
    parts = [source_of(entry) for entry in entries]
    listed = [part for source in parts if storage.exists(source.uri) for part in expand(source)]
    return list(dict.fromkeys(source.uri for source in (*parts, *listed)))


def _done(stage: Stage) -> dict[str, Any]:
    tokens_per_sample = _tokens_per_sample(storage.join(stage.output, "metrics.jsonl"))
    samples = stage.proof()["samples"]
    return {"rows": samples, "tokens": None if tokens_per_sample is None else samples * tokens_per_sample}


def _tokens_per_sample(uri: str) -> float | None:
    """Return the visual and text tokens of a sample, the mean over the lines of a run's metrics."""
    if not storage.exists(uri):
        return None
    lines = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
    tokens_per_sample = [
        line["tokens_per_second"] / line["samples_per_second"]
        for line in lines
        if line.get("samples_per_second")
    ]
    return sum(tokens_per_sample) / len(tokens_per_sample) if tokens_per_sample else None


# A run knows its models by their paths alone: new weights at an old path would go unnoticed (`trusts`).
PRETRAIN_STAGE = StageKind(
    name="pretrain",
    job=PretrainJob,
    run=lambda job: describe("stage 1", pretrain(job), job.output),
    reads=_pretrain_reads,
    proof=RESULTS,
    model=export.MODEL,
    trusts=("model", "image_tower.model", "image_tower.pretrained", "image_tower.text_model"),
    work=pretrain_work,
    done=_done,
    gpus=worker_gpus,
)
FINETUNE_STAGE = StageKind(
    name="finetune",
    job=FinetuneJob,
    run=lambda job: describe("stage 2", finetune(job), job.output),
    reads=_finetune_reads,
    proof=RESULTS,
    model=export.MODEL,
    sources=("data", "image_files", "heldout"),
    trusts=("model",),
    work=finetune_work,
    done=_done,
    gpus=worker_gpus,
)
