"""A checkpoint of a run as a model, without the workers that wrote it; or the model that it began with."""

from dataclasses import dataclass
from typing import Any

import torch
from ray.train import Checkpoint

from revision_ray.core import config, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import CheckpointError
from revision_ray.core.stage import StageKind, StageWork, reads_keys
from revision_ray.train import export, models
from revision_ray.train.checkpoint import BEST, best_checkpoint
from revision_ray.train.stages import RESULTS, FinetuneJob, PretrainJob, alignment_identity
from revision_ray.train.zero import dtype_of

_PREFIX = "checkpoint-"
START = "start"


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Export a checkpoint. A run exports its last one by itself, to OUTPUT/model."""

    run: str = MISSING
    """Output of jobs/pretrain.py or jobs/finetune.py."""
    checkpoint: str | None = None
    """Name of a folder in RUN/checkpoints, or best: of the lowest held-out loss; or start: the model as the
    run began with it (of stage 1, with an untrained projector). The latest if not given. All but the
    model of a finished run are put together in this machine's memory: 6 bytes a parameter that trained."""
    output: str = MISSING
    """Directory of the model."""


def run_export(job: ExportJob) -> str:
    """Export the model of a run or of one of its checkpoints, and say where it is."""
    return f"model: {export_checkpoint(job.run, job.checkpoint, job.output)}"


def export_checkpoint(run: str, name: str | None, output: str) -> str:
    """The model of checkpoint `name` of the run (the latest if None, or "best", "start") stands at
    `output`.

    Raises:
        CheckpointError: no such run or checkpoint, or a damaged one.
    """
    run, output = storage.absolute(run), storage.absolute(output)
    folder = storage.join(run, "checkpoints")
    found = sorted(_checkpoints(folder))
    if not found:
        raise CheckpointError(
            f"{run}: holds no checkpoints; name the output of jobs/pretrain.py or finetune.py"
        )
    if name == START:
        chosen = found[-1]
    elif name == BEST:
        chosen = best_checkpoint(run)
        if chosen is None:
            raise CheckpointError(f"{run}: kept no best checkpoint; that takes held-out data (heldout=...)")
    else:
        chosen = found[-1] if name is None else storage.join(folder, name)
    if name not in (BEST, START) and chosen not in found:
        names = ", ".join(storage.name_of(uri) for uri in found)
        raise CheckpointError(f"{chosen}: no such checkpoint; there are {names}")
    if name is None and _exported(run, chosen):
        # A model that does not fit into this machine's memory is copied all the same.
        export.copy(storage.local_copy(storage.join(run, export.MODEL)), output)
        return output
    with Checkpoint(chosen).as_directory() as local:
        model, processor = _start_of(run, local)
        if name != START:
            export.from_checkpoint(model, local)
    models.merge_lora(model)
    export.write(model, processor, output)
    return output


def _exported(run: str, checkpoint: str) -> bool:
    """Whether the run has ended with this checkpoint, so that its own model is the one."""
    uri = storage.join(run, RESULTS)
    step = storage.name_of(checkpoint).removeprefix(_PREFIX)
    return storage.exists(uri) and storage.read_json(uri)["num_steps"] == int(step)


def _checkpoints(folder: str) -> list[str]:
    files = storage.list_files(folder, "position.json", recursive=True) if storage.exists(folder) else []
    return [storage.parent_of(uri) for uri, _ in files if _PREFIX in uri]


def _start_of(run: str, checkpoint: str) -> tuple[Any, Any]:
    """The model as the run started from it, frozen as it was."""
    uri = storage.join(run, "config.yaml")
    text = storage.read_bytes(uri).decode()
    stage: models.Stage = "pretrain" if "\narchitecture:" in f"\n{text}" else "finetune"
    job = config.load(PretrainJob if stage == "pretrain" else FinetuneJob, [uri])
    torch.manual_seed(job.seed)
    if isinstance(job, PretrainJob):
        model, processor = models.new_model(
            job.model,
            job.architecture,
            embedding_dim=_embedding_dim(checkpoint),
            alignment=alignment_identity(job.alignment) if job.alignment else {},
            image_tower=job.image_tower,
            dtype=dtype_of(job),
            attention=job.attention,
        )
        models.freeze(model, stage, None)
    else:
        model, processor = models.load_model(job.model, dtype=dtype_of(job), attention=job.attention)
        models.freeze(model, stage, job.lora)
    return model, processor


def _embedding_dim(checkpoint: str) -> int:
    return int(storage.read_json(storage.join(checkpoint, "position.json"))["identity"]["embedding_dim"])


STAGE = StageKind(
    name="export",
    job=ExportJob,
    run=run_export,
    reads=reads_keys("run"),
    proof="config.json",
    model="",
    work=lambda forecast, stage: StageWork(rows=0),
)
