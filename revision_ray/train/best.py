"""The checkpoint with the lowest held-out loss, kept apart from the last ones, which Ray Train keeps."""

from pathlib import Path

import pyarrow as pa
import torch.distributed as dist

from revision_ray import storage

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
