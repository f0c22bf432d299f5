"""AdamW's parameter groups and its learning rate at each step. No Ray, no DeepSpeed."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from revision_ray.core.errors import ConfigError
from revision_ray.train.settings import Optimisation


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], settings: Optimisation
) -> list[dict[str, Any]]:
    """Groups of what trains: projector and the rest, each with and without weight decay.

    `peak` is the group's highest learning rate. Parameters below two dimensions have no weight decay.

    Raises:
        ConfigError: nothing trains.
    """
    peaks = {
        "projector": settings.projector_learning_rate or settings.learning_rate,
        "language_model": settings.learning_rate,
    }
    groups = {
        (part, decayed): {"params": [], "peak": peak, "lr": 0.0, "weight_decay": decay}
        for part, peak in peaks.items()
        for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
    }
    for name, parameter in named:
        if parameter.requires_grad:
            part = "projector" if "projector" in name.split(".") else "language_model"
            # Under ZeRO-3 a parameter's own shape is that of its shard.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[part, dimensions > 1]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ConfigError("nothing of the model trains; check what is frozen")
    return filled


def learning_rate_factor(step: int, num_steps: int, settings: Optimisation) -> float:
    """Share of the peak at step `step` (from 0) of `num_steps`."""
    warmup = math.ceil(settings.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    past = (step - warmup) / max(1, num_steps - warmup)
    return (1 + math.cos(math.pi * past)) / 2 if settings.schedule == "cosine" else 1 - past


def set_learning_rate(optimizer: Any, factor: float) -> None:
    """Every group of `optimizer` is at `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
