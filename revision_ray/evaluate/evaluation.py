"""Evaluate a saved model: ask every benchmark under every condition and report the scores.

    questions, embeddings --conditions--> batches --answer--> answers/NAME/CONDITION.parquet --> results

jobs/evaluate.py runs it, alone or as a stage of a chain.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any

import ray

from revision_ray.core import artifact, config, storage
from revision_ray.core.cluster import connect
from revision_ray.core.config import MISSING
from revision_ray.core.errors import CheckpointError, ConfigError, quote
from revision_ray.core.stage import (
    Forecast,
    Stage,
    StageKind,
    StageWork,
    actor_gpus,
    as_uris,
    first_known,
    whole_sum,
)
from revision_ray.data.chat import as_date
from revision_ray.data.records import footer
from revision_ray.data.store import Store, open_stores
from revision_ray.encode import checkpoints
from revision_ray.evaluate import ask, compare, picture, report
from revision_ray.evaluate.ask import Control
from revision_ray.evaluate.benchmarks import ReadUnit, benchmark, read_parquet, units
from revision_ray.evaluate.prepare import ActorSettings, load_prepared, prepare, sample
from revision_ray.evaluate.responder import Dtype
from revision_ray.model import ReVisionConfig, check_encoder
from revision_ray.model.ending import unknown_ends

log = logging.getLogger(__name__)

_SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Ask a model the questions of benchmarks, score its answers by rule, and report accuracy with a 95 %
    interval beside controls that do not show the image."""

    model: str = ""
    """Folder or URI of a saved model, or a hub id. Required unless `compare` is given."""
    benchmarks: list[str] = field(default_factory=list)
    """Names of benchmarks, such as mme, pope or miniature; the error for an unknown name lists the
    known ones. Required unless `compare` is given."""
    data: dict[str, str] = field(default_factory=dict)
    """Location of each benchmark by name: a directory, a file or a wildcard path of its Parquet or JSONL
    files; for miniature, the directory of a world."""
    output: str = MISSING
    """Directory to write the answers and results to. A rerun keeps what is already finished there."""
    controls: list[Control] = field(default_factory=lambda: ["blind", "shuffled"])
    """Control conditions to ask as well. blind: the same prompt without an image. shuffled: the same prompt
    with the image of another question."""
    compare: list[str] = field(default_factory=list)
    """Output directories of one or two earlier runs to compare; no question is asked. Two runs: test whether
    their answers to the same questions differ (McNemar's exact test, bootstrap interval over images), and
    compare the conditions of each run. One run: compare its conditions only."""
    images: str | None = None
    """Image store to read embeddings from, by image id. By default the model's image tower computes them."""
    max_items: int | None = None
    """Largest number of questions to ask of each benchmark, drawn uniformly. By default all are asked."""
    today: str = ""
    """Date that a chat template may print, as YYYY-MM-DD. By default the day on which the evaluation began;
    a rerun reads it from the output."""
    seed: int = 0
    """Random seed for drawing questions, for choosing the image that `shuffled` shows, and for the resampling
    of `compare`."""
    batch_size: int = 32
    """Number of prompts answered, or images encoded, in one batch."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    dtype: Dtype = "auto"
    """Data type to load the weights in; auto keeps the type that they were saved in."""
    num_pictures: int = 8
    """Number of images to draw in the picture with their captions and answers; 0 draws no picture."""
    caption_prompt: str = ""
    """Prompt that asks for a caption. Leave it empty for a model after stage 1 and for the miniature: they
    describe the image without a prompt."""
    caption_model: str = ""
    """Another model to write the captions of the picture, such as the one from stage 1, which is trained only
    to describe images. By default `model` writes them."""
    max_caption_tokens: int = 40
    """Longest caption of `caption_model`, in tokens."""
    gpus_per_actor: float | None = None
    """Number of GPUs (may be a fraction) for each copy of the model. By default 1 if the cluster has GPUs,
    else 0."""
    cpus_per_actor: float = 1.0
    """Number of CPUs for each copy of the model; also its thread count when it runs on the CPU."""
    max_actors: int | None = None
    """Largest number of copies of the model. By default as many as the GPUs of the cluster hold; without
    GPUs, as many as half of its CPUs hold."""

    def __post_init__(self) -> None:
        as_date(self.today)
        for name in ("max_items", "batch_size", "max_new_tokens", "max_caption_tokens", "max_actors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        for name in ("model", "benchmarks"):
            if not self.compare and not getattr(self, name):
                raise ConfigError(f"{name}: a value is required; give it as {name}=VALUE")
        for name in self.benchmarks:
            benchmark(name)
            if not self.compare and name not in self.data:
                raise ConfigError(f"no place for the benchmark {name}; give data.{name}=DIRECTORY")


def run_evaluate(job: EvaluateJob) -> str:
    """Run the evaluation and return the table of results; with `compare`, return the table of differences.

    Raises:
        ConfigError: an unknown benchmark, or one without a place.
        DataError: a benchmark's files or images are missing or damaged, or the output is of another model.
        CheckpointError: the model cannot be loaded, or takes other embeddings.
    """
    if job.compare:
        return compare.compare(job.compare, job.benchmarks, job.output, job.seed)
    connect()
    output = storage.absolute(job.output)
    job = _dated(job, output)
    found = {name: units(name, job.data[name]) for name in job.benchmarks}
    folder = _folder(job.model)
    store = _store(job.images, _model_config(folder), folder)
    _warn_of_unknown_ends("model", job.model, folder)
    fingerprint = _fingerprint(folder)
    _claim(output, job, fingerprint, store, found)
    actors = _actors(job)
    prepare(output, found, actors, store, lambda _, items: sample(items, job.max_items, job.seed))
    prepared = {name: load_prepared(output, name) for name in job.benchmarks}
    first = job.benchmarks[0]
    images = picture.choose(found[first], prepared[first], job.num_pictures)
    captioning = _captioning(job, actors)
    if captioning is not actors:
        fingerprint = _fingerprint(_folder(captioning.model))
    captions = ask.captions(first, prepared[first], job.caption_prompt, list(images), fingerprint)
    parts = []
    if images and captioning is not actors:
        ask.answer_parts(output, [captions], captioning)
    elif images:
        parts = [captions]
    for name in job.benchmarks:
        parts += ask.conditions(name, prepared[name], job.controls, job.seed)
    ask.answer_parts(output, parts, actors)
    config.save_resolved(job, storage.join(output, "config.yaml"))
    conditions = ["image", *job.controls]
    results = report.results(output, prepared, conditions)
    storage.write_json(storage.join(output, "results.json"), results)
    text = report.table(results, conditions)
    if images:
        said, captioned = (
            read_parquet(ask.answers_path(output, first, condition)).to_pylist()
            for condition in ("image", captions.condition)
        )
        heading = f"Captions by {job.caption_model or job.model}, answers by {job.model}"
        path = picture.write(storage.join(output, "picture.png"), heading, images, captioned, said)
        text += f"\n\nCaptions and answers for {len(images)} images: {path}"
    return f"{text}\n\nAnswers and results: {output}"


def _captioning(job: EvaluateJob, actors: ActorSettings) -> ActorSettings:
    """Return the actor settings for captions: `actors`, or a copy of them with `caption_model`.

    Raises:
        CheckpointError: `caption_model` takes other embeddings than the model.
    """
    if not job.caption_model:
        return actors
    folder = _folder(job.caption_model)
    expected, found = _model_config(_folder(actors.model)), _model_config(folder)
    if found.embedding_dim != expected.embedding_dim:
        raise CheckpointError(
            f"caption_model={job.caption_model}: takes embeddings of {found.embedding_dim} dimensions, "
            f"{job.model} of {expected.embedding_dim}; name a model of the same encoder"
        )
    if fingerprint := (expected.alignment or {}).get("image_fingerprint"):
        check_encoder(found, fingerprint)
    _warn_of_unknown_ends("caption_model", job.caption_model, folder)
    return replace(actors, model=_placed(job.caption_model), max_new_tokens=job.max_caption_tokens)


def _warn_of_unknown_ends(key: str, model: str, folder: str) -> None:
    if warning := unknown_ends(folder):
        log.warning("%s=%s: %s", key, model, warning)


def _folder(model: str) -> str:
    """Return the local folder of a saved model; for a URI or hub id, the folder of the local copy."""
    return os.path.abspath(checkpoints.folder_with_weights(_placed(model), None))


def _placed(model: str) -> str:
    """Return a local folder as an absolute path, because actors run in other folders; else return `model`."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _fingerprint(folder: str) -> str:
    """Hash every file that affects the answers: weights, configurations, tokenizer, templates."""
    endings = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    names = sorted(name for name in os.listdir(folder) if name.endswith(endings))
    return checkpoints.fingerprint_of("revision", [], [os.path.join(folder, name) for name in names])


def _model_config(folder: str) -> ReVisionConfig:
    found = storage.read_json(os.path.join(folder, "config.json")).get("model_type")
    if found != ReVisionConfig.model_type:
        raise CheckpointError(
            f"{folder}: model_type is {quote(found, 80)}, expected {ReVisionConfig.model_type!r}; name "
            f"the folder "
            "that jobs/pretrain.py or jobs/finetune.py exported"
        )
    return ReVisionConfig.from_pretrained(folder)


def _store(uri: str | None, model: ReVisionConfig, folder: str) -> Store | None:
    """Open the image store at `uri` and check that it fits the model; return None if `uri` is None."""
    if uri is None:
        if model.image_tower is None:
            raise ConfigError(
                f"{folder}: the model was saved without an image tower; give images=STORE, embedded with "
                "jobs/embed.py by the encoder that it was trained with"
            )
        return None
    store = open_stores([uri], "image")
    if store.embedding_dim != model.embedding_dim:
        raise CheckpointError(
            f"{uri}: embedding_dim is {store.embedding_dim}, {folder} takes {model.embedding_dim}; embed the "
            "images with the encoder that it was trained with"
        )
    if store.encoder.fingerprint:  # a folder of plain Parquet files has none
        check_encoder(model, store.encoder.fingerprint)
    return store


def _actors(job: EvaluateJob) -> ActorSettings:
    total = ray.cluster_resources()
    gpus = job.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) else 0.0
    most = total.get("GPU", 1) / gpus if gpus else total.get("CPU", 1) / 2 / job.cpus_per_actor
    return ActorSettings(
        model=_placed(job.model),
        dtype=job.dtype,
        batch_size=job.batch_size,
        max_new_tokens=job.max_new_tokens,
        num_gpus=gpus,
        num_cpus=job.cpus_per_actor,
        max_actors=job.max_actors or max(1, int(most)),
        today=job.today,
    )


def _dated(job: EvaluateJob, output: str) -> EvaluateJob:
    """Return the job with a date: its own, else that of the earlier run in the output, else today."""
    return replace(job, today=job.today or _former(output).get("today") or date.today().isoformat())


def _former(output: str) -> dict[str, Any]:
    """Return the settings of the earlier evaluation in `output`, or an empty dict."""
    path = storage.join(output, _SETTINGS)
    return storage.read_json(path) if storage.exists(path) else {}


def _claim(
    output: str, job: EvaluateJob, fingerprint: str, store: Store | None, found: dict[str, list[ReadUnit]]
) -> None:
    """Write the settings that affect the answers to the output. A later run may add benchmarks.

    Raises:
        OutputError: the earlier run had other settings, so its answers are not this run's.
    """
    former = _former(output)
    settings: dict[str, Any] = {
        "model": fingerprint,
        "images": storage.sha256(*(h.encode() for h in sorted(store.shard_hashes))) if store else None,
        **{name: getattr(job, name) for name in ("max_items", "seed", "max_new_tokens", "dtype", "today")},
        "data": {name: _identity(parts) for name, parts in found.items()},
    }
    data = {**former.get("data", {}), **settings["data"]}
    former_settings = {**settings, **former, "data": {**data, **former.get("data", {})}}
    artifact.check_same(output, "answers", former_settings, {**former, **settings, "data": data})
    storage.write_json(storage.join(output, _SETTINGS), {**settings, "data": data})


def _identity(parts: Sequence[ReadUnit]) -> str:
    return storage.sha256(*(json.dumps(asdict(unit)).encode() for unit in parts))[:16]


# --- as a stage of a chain --------------------------------------------------------------------------------


def _reads(job: EvaluateJob) -> dict[str, list[str]]:
    if job.compare:
        raise ConfigError("compare is no stage of a chain; run jobs/evaluate.py with it after the chain")
    return {
        "data": [job.data[name] for name in job.benchmarks],
        "images": as_uris(job.images),
        "model": as_uris(job.model),
        "caption_model": as_uris(job.caption_model),
    }


def _work(forecast: Forecast, stage: Stage) -> StageWork:
    job = stage.job
    questions = [_num_questions(forecast, stage, name) for name in job.benchmarks]
    rows = first_known(whole_sum(questions), forecast.configured_rows(stage))
    return StageWork(rows=None if rows is None else rows * (1 + len(job.controls)), uses_gpu=True)


def _num_questions(forecast: Forecast, stage: Stage, name: str) -> int | None:
    """Return the number of rows of a benchmark, or None if an earlier stage has yet to write it.

    Rows without a question count too; `max_items` limits the number.
    """
    uri, most = stage.job.data[name], stage.job.max_items
    if forecast.maker(stage, uri) and not storage.exists(uri):
        return None
    rows = 0
    for unit in units(name, uri):
        rows += unit.stop - unit.start if unit.row_group < 0 else footer(unit.uri).rows[unit.row_group]
    return min(rows, most) if most else rows


def _done(stage: Stage) -> dict[str, Any]:
    benchmarks = stage.proof()["benchmarks"].values()
    return {"rows": sum(part["num"] for each in benchmarks for part in each["conditions"].values())}


def _summary(stages: Sequence[Stage]) -> str:
    """Return the table of each evaluation, and where its pictures are."""
    parts, pictures = [], []
    for stage in stages:
        conditions = ["image", *stage.job.controls]
        parts.append(f"{stage.title or stage.name}:\n{report.table(stage.proof(), conditions)}")
        drawn = storage.join(stage.output, "picture.png")
        pictures += [drawn] if storage.exists(drawn) else []
    if pictures:
        parts.append("\n".join(f"Captions and answers, drawn: {uri}" for uri in pictures))
    return "\n\n".join(parts)


STAGE = StageKind(
    name="evaluate",
    job=EvaluateJob,
    run=run_evaluate,
    reads=_reads,
    proof="results.json",
    sources=("data",),
    work=_work,
    done=_done,
    gpus=actor_gpus,
    summary=_summary,
)
