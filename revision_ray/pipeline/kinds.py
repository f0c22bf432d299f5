"""The jobs that can be stages: how each is run, and what it reads."""

from typing import Any

from revision_ray import storage
from revision_ray.align import apply, fit
from revision_ray.data import import_reference
from revision_ray.data.conversations import expand, source_of
from revision_ray.encode import embed
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.errors import ConfigError
from revision_ray.evaluate import run as evaluate
from revision_ray.miniature import conversations, render
from revision_ray.pipeline.chain import Kind
from revision_ray.train import export, export_job, from_scratch
from revision_ray.train import run as training
from revision_ray.train.run import FinetuneJob, PretrainJob


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
        Kind(name="render", run=render.run, reads=_reads(), proof="manifest.json"),
        Kind(
            name="train_encoder",
            run=from_scratch.encoder,
            reads=_reads("data", "heldout", "model"),
            proof="metrics.json",
            sources=("data", "heldout"),
        ),
        Kind(
            name="train_language_model",
            run=from_scratch.language_model,
            reads=_reads(),
            proof="metrics.json",
        ),
        Kind(
            name="import_reference",
            run=import_reference.run,
            reads=_reads("input"),
            proof="manifest.json",
            sources=("input",),
        ),
        Kind(
            name="embed",
            run=embed.run,
            reads=_embed_reads,
            proof="manifest.json",
            sources=("images", "texts"),
        ),
        Kind(name="fit", run=fit.run, reads=_fit_reads, proof="alignment.json"),
        Kind(name="align", run=apply.run, reads=_reads("texts", "alignment"), proof="manifest.json"),
        Kind(
            name="conversations",
            run=conversations.run,
            reads=_reads("world"),
            proof=conversations.FILE,
        ),
        # A run knows its models by their paths alone: new weights at an old path would go unnoticed.
        Kind(
            name="pretrain",
            run=_pretrain,
            reads=_pretrain_reads,
            proof=training.RESULTS,
            result=export.MODEL,
            trusts=("model", "image_tower.model", "image_tower.pretrained", "image_tower.text_model"),
        ),
        Kind(
            name="finetune",
            run=_finetune,
            reads=_finetune_reads,
            proof=training.RESULTS,
            result=export.MODEL,
            sources=("data", "image_files", "heldout"),
            trusts=("model",),
        ),
        Kind(
            name="evaluate",
            run=evaluate.run,
            reads=_evaluate_reads,
            proof="results.json",
            sources=("data",),
        ),
        Kind(name="export", run=export_job.run, reads=_reads("run"), proof="config.json"),
    )
}
