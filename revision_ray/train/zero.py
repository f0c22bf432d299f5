"""The DeepSpeed engine: ZeRO, precision, clipping and accumulation from typed settings."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from revision_ray.train.optimizer import parameter_groups
from revision_ray.train.settings import Training

# DeepSpeed loads its checkpoints with torch.load(weights_only=False). This overrules it: only tensors, plain
# containers and the names of `checkpoint.SAFE` are read, and no code in a checkpoint runs.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import deepspeed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Of use to its inference alone: on CPUs it would cost a minute of the first run, and ask for a C++ compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True, kw_only=True)
class ZeroEngine:
    """DeepSpeed's engine and what the loop asks it for."""

    deepspeed: Any
    device: torch.device
    dtype: torch.dtype
    max_gradient_norm: float
    plain: bool  # neither sharded nor bfloat16: DeepSpeed leaves the optimizer as it is

    @property
    def model(self) -> Any:
        return self.deepspeed.module

    def step(self, last: bool) -> float:
        """The micro batch's gradients are counted; behind the last one the weights move. The gradient's norm
        before it was clipped, 0 where this is not the last."""
        norm = None
        if last and self.plain:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.deepspeed.step()
        if last and not self.plain:
            norm = self.deepspeed.get_global_grad_norm()
        return float(norm or 0.0)


def dtype_of(training: Training) -> torch.dtype:
    """Of weights and activations on this machine."""
    if training.precision != "auto":
        return getattr(torch, training.precision)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def is_plain(training: Training) -> bool:
    """Whether DeepSpeed only adds gradients up over the workers."""
    return training.zero.stage == 0 and dtype_of(training) == torch.float32


def accumulation_steps(training: Training) -> int:
    """Forward passes of a worker in a step."""
    return training.optimisation.global_batch_size // (
        training.optimisation.micro_batch_size * training.num_workers
    )


def deepspeed_config(training: Training) -> dict[str, Any]:
    """DeepSpeed's own configuration of this run."""
    zero: dict[str, Any] = {"stage": training.zero.stage}
    plain = is_plain(training)
    if training.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if training.zero.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": training.optimisation.micro_batch_size,
        # Where nothing is sharded, DeepSpeed divides by this whatever it is told, and says no gradient norm.
        "gradient_accumulation_steps": 1 if plain else accumulation_steps(training),
        "gradient_clipping": 0.0 if plain else training.optimisation.max_gradient_norm,
        "bf16": {"enabled": dtype_of(training) == torch.bfloat16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW works offloaded too
        "steps_per_print": 10**9,  # the progress display is ours
    }


@contextmanager
def sharded_loading(training: Training) -> Iterator[None]:
    """Models loaded inside are sharded over the workers while they are read, if ZeRO-3 is on: none of them
    ever holds all weights."""
    kept = HfDeepSpeedConfig(deepspeed_config(training)) if training.zero.stage == 3 else None
    yield
    del kept  # transformers looks for it by a weak reference


def build_engine(model: torch.nn.Module, training: Training, device: torch.device) -> ZeroEngine:
    """`model` under DeepSpeed with AdamW over what trains; torch.distributed is up."""
    groups = parameter_groups(model.named_parameters(), training.optimisation)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=training.optimisation.betas)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,  # type: ignore[arg-type]
        config=deepspeed_config(training),
        dist_init_required=False,
    )
    return ZeroEngine(
        deepspeed=engine,
        device=device,
        dtype=dtype_of(training),
        max_gradient_norm=training.optimisation.max_gradient_norm,
        plain=is_plain(training),
    )
