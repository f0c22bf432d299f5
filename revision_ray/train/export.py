"""The trained model as a transformers folder, from a running engine or from any checkpoint."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow as pa
import torch
import torch.distributed as dist
from transformers.utils import GENERATION_CONFIG_NAME

from revision_ray.core import storage
from revision_ray.core.errors import CheckpointError
from revision_ray.model.ending import declare_ends, generation_settings
from revision_ray.train import checkpoint, models
from revision_ray.train.zero import ZeroEngine

log = logging.getLogger(__name__)
MODEL = "model"


def export(engine: ZeroEngine, processor: Any, output: str, rank: int) -> None:
    """The model stands in OUTPUT/model, adapters merged; all ranks must call it, the first writes."""
    state = _whole_state(engine, rank)
    if rank == 0:
        assert state is not None
        model = engine.model
        if engine.deepspeed.zero_optimization_stage() == 3:
            model = _unsharded(model, state)
        models.merge_lora(model)
        write(model, processor, storage.join(output, MODEL))
    dist.barrier()


def _whole_state(engine: ZeroEngine, rank: int) -> dict[str, torch.Tensor] | None:
    """All weights in main memory of the first rank, gathered one by one where ZeRO-3 shards them."""
    if engine.deepspeed.zero_optimization_stage() < 3:
        return dict(engine.model.state_dict())
    state = {}
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0:
                state[name] = parameter.detach().cpu().clone()
    saved = engine.model.state_dict().keys()
    state.update({name: buffer.cpu() for name, buffer in engine.model.named_buffers() if name in saved})
    return state if rank == 0 else None


def _unsharded(model: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model of the same configuration that holds `state` itself."""
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.load_state_dict(state, strict=False, assign=True)
    whole.generation_config = model.generation_config
    return whole


def write(model: Any, processor: Any, uri: str) -> None:
    """`model` and `processor` stand at `uri` as a transformers folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        put(folder, uri)


def copy(folder: str, uri: str) -> None:
    """The model in the local `folder` stands at `uri` too; its generation settings know its ends."""
    settings = generation_settings(folder)
    declare_ends(settings, models.load_tokenizer(folder))
    storage.write_bytes(storage.join(uri, GENERATION_CONFIG_NAME), settings.to_json_string().encode())
    put(folder, uri, leave_out=GENERATION_CONFIG_NAME)


def put(folder: str, uri: str, leave_out: str = "") -> None:
    """The model's files in the local `folder`, but for the one named `leave_out`, stand at `uri`."""
    # The configuration goes last: a folder that has it is whole.
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != leave_out)
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        with pa.memory_map(str(path)) as file:
            storage.write_bytes(storage.join(uri, path.relative_to(folder).as_posix()), file.read_buffer())
    log.info("model: %s", uri)


def from_checkpoint(model: Any, folder: str) -> None:
    """`model`, as the run started from it, has the weights that trained in the checkpoint in `folder`.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    set_weights(model, checkpoint.trained_weights(folder), folder)


def set_weights(model: Any, trained: Mapping[str, torch.Tensor], folder: str) -> None:
    """`model` holds the weights that trained, by name, as a checkpoint in `folder` has them.

    Raises:
        CheckpointError: the model has no such weight.
    """
    # Checkpoints hold tied weights under each of their names, and the buffers of a tower's batch norm.
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    strangers = sorted(set(trained) - set(own))
    if strangers:
        raise CheckpointError(f"{folder}: holds {strangers[0]}, which the model does not have")
    with torch.no_grad():
        for name, values in trained.items():
            own[name].copy_(values)
