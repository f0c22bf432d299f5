"""Sharded checkpoints of a run (weights that train, optimizer shards, position), and the best one kept apart.

Every rank writes its shard to a directory of its own; Ray Train merges those of all ranks into one
checkpoint in the run's storage. Random numbers and the order of data are functions of (seed, step), so the
step is the whole position.
"""

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from ray.train import Checkpoint

from revision_ray.core import artifact, storage
from revision_ray.core.errors import CheckpointError, shorten
from revision_ray.train.zero import ZeroEngine

BEST = "best"
_RECORD = "best.json"


def lowest_loss(output: str) -> float:
    """Held-out loss of the best checkpoint of this run so far; infinite without one."""
    uri = storage.join(output, BEST, _RECORD)
    return float(storage.read_json(uri)["heldout_loss"]) if storage.exists(uri) else float("inf")


def best_checkpoint(output: str) -> str | None:
    """URI of the best checkpoint of the run at `output`, if one was kept."""
    uri = storage.join(output, BEST, _RECORD)
    return storage.join(output, BEST, storage.read_json(uri)["checkpoint"]) if storage.exists(uri) else None


def keep(folder: Path, output: str, step: int, heldout_loss: float) -> None:
    """Every rank's shard, as it lies in its `folder`, stands in OUTPUT/best; all ranks must call it.

    The record names the new one before the files of the former one go, so there is a whole one at any time.
    """
    former, name = best_checkpoint(output), f"checkpoint-{step:08d}"
    dist.barrier()  # every rank has read the former record
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            uri = storage.join(output, BEST, name, path.relative_to(folder).as_posix())
            with pa.memory_map(str(path)) as file:
                storage.write_bytes(uri, file.read_buffer())
    dist.barrier()
    if dist.get_rank() == 0:
        record = {"checkpoint": name, "step": step, "heldout_loss": heldout_loss}
        storage.write_json(storage.join(output, BEST, _RECORD), record)
        if former is not None and storage.name_of(former) != name:
            for uri, _ in storage.list_files(former, recursive=True):
                storage.delete_file(uri)


FORMAT_VERSION = 1
TAG = "state"
# What DeepSpeed's files hold besides tensors and plain containers; see zero.py.
SAFE = [LossScaler, ZeroStageEnum, fragment_address]
torch.serialization.add_safe_globals(SAFE)
_DAMAGED = (
    RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AssertionError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """Where a run stands: everything before `step` has been trained on."""

    step: int
    num_workers: int
    identity: dict[str, Any]
    """Settings and data that decide the weights."""
    counters: dict[str, int]
    """Samples seen and rejected so far, of all workers."""
    losses: dict[str, float | None] = field(default_factory=dict)
    """"last": of the last step; "heldout": where something is held out, of that when last measured."""
    format_version: int = FORMAT_VERSION


def save(engine: ZeroEngine, position: RunPosition, folder: Path, rank: int) -> None:
    """This rank's shard of the state lies in `folder`, with hashes of its files; all ranks must call it.

    Frozen weights are left out: they are in the model that the run started from.
    """
    engine.deepspeed.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(hashes, indent=1))
    if rank == 0:
        (folder / "position.json").write_text(json.dumps(vars(position), indent=1))


@contextmanager
def written(where: str) -> Iterator[None]:
    """Raises CheckpointError, which says what to do, where the storage refuses what is written inside."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where} cannot be written ({error}); make room, then run the same command again: it goes on "
            "from the checkpoint before"
        ) from error


def read_position(checkpoint: Checkpoint, identity: dict[str, Any], num_workers: int) -> RunPosition:
    """Where `checkpoint` stands; it is one of this very run.

    Raises:
        OutputError: it belongs to a run of other settings or data.
        CheckpointError: it belongs to another number of workers, or it is damaged.
    """
    where = checkpoint.path
    with checkpoint.as_directory() as folder:
        try:
            position = RunPosition(**json.loads(Path(folder, "position.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: its position cannot be read ({error}); {_ADVICE}") from error
    if position.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format version {position.format_version}, expected {FORMAT_VERSION}; finish the run "
            "with the version of revision_ray that began it"
        )
    artifact.check_same(where, "a checkpoint", position.identity, identity)
    if position.num_workers != num_workers:
        raise CheckpointError(
            f"{where}: was written by {position.num_workers} workers, this run has {num_workers}; ZeRO's "
            f"shards cannot be dealt anew: resume with num_workers={position.num_workers}, or export the "
            "checkpoint (jobs/export.py) and start another run from it"
        )
    return position


def load(engine: ZeroEngine, checkpoint: Checkpoint) -> None:
    """Weights that train and optimizer state are those of `checkpoint`, to the bit; all ranks must call it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    with checkpoint.as_directory() as folder:
        verify(Path(folder), checkpoint.path)
        try:
            loaded, _ = engine.deepspeed.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        except _DAMAGED as error:
            raise CheckpointError(
                f"{checkpoint.path}: cannot be loaded ({shorten(error)}); {_ADVICE}"
            ) from error
    if loaded is None:
        raise CheckpointError(f"{checkpoint.path}: holds no state; {_ADVICE}")


_ADVICE = "remove that folder to resume from the one before"


def verify(folder: Path, where: str) -> None:
    """Every file that a rank wrote is there and unchanged.

    Raises:
        CheckpointError: naming the file that is not.
    """
    listed = sorted(folder.glob("rank-*.json"))
    if not listed:
        raise CheckpointError(f"{where}: no rank's shard is there; {_ADVICE}")
    for path in listed:
        for name, digest in json.loads(path.read_text()).items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{where}: {name} is missing; {_ADVICE}")
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{where}: {name} is damaged (its hash has changed); {_ADVICE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trained_weights(folder: str) -> dict[str, torch.Tensor]:
    """float32 weights that trained, by name, put together from all ranks' shards.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    verify(Path(folder), folder)
    sharded = list(Path(folder, TAG).glob("*optim_states.pt"))
    try:
        if sharded:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it narrates and shows bars
                found = get_fp32_state_dict_from_zero_checkpoint(
                    folder, tag=TAG, exclude_frozen_parameters=True
                )
            return dict(found or {})
        (path,) = Path(folder, TAG).glob("*model_states.pt")  # of ZeRO stage 0
        return torch.load(path, map_location="cpu", weights_only=True)["module"]
    except _DAMAGED as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({shorten(error)})") from error
