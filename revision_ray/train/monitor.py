"""Measure the modality gap's dynamics inside the training workers: a held-out probe, and gradients.

Every worker embeds its share of the probe and sends it to the first worker, which keeps the frame, the
record and the events. All workers take part in every probe, at steps that only the settings decide, so none
waits forever. Training is unchanged: modes and random numbers are restored.

Shapes: B rows of this worker's batch, P rows of this worker's share of the probe, N probe pairs, D embedding
dim, K batches, M 2, the modalities: images, then texts.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError
from revision_ray.geometry.dynamics import GapDynamics, Gradients
from revision_ray.train import dual_encoder, trackers
from revision_ray.train.pairs import ImageTextPair, pixels


@dataclass
class GradientSums:
    """Sums of gradients of the loss with respect to unit embeddings, this worker's part of each batch.

    A row's gradient is B times that of the mean over the worker's B rows (with several workers the gathered
    loss has already summed it over all of them): the gradient of the sum over the global batch, whatever the
    number of workers. It is the gradient in the surrounding space, before it goes back through the
    normalisation, which would take away its part along the embedding itself.
    """

    sums: list[list[torch.Tensor]] = field(default_factory=lambda: [[], []])  # M lists of (D,), one a batch
    seconds: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])  # M of (D, D)
    num_rows: int = 0

    def watch(self, image_BD: torch.Tensor, text_BD: torch.Tensor) -> None:
        """The gradients of these tensors are added when they are known; both belong to the graph."""
        for side, rows_BD in enumerate((image_BD, text_BD)):
            rows_BD.register_hook(lambda gradient_BD, side=side: self._add(side, gradient_BD))
        self.num_rows += len(image_BD)

    def _add(self, side: int, gradient_BD: torch.Tensor) -> None:
        rows_BD = gradient_BD.detach().double() * len(gradient_BD)
        former_DD = self.seconds[side]
        second_DD = rows_BD.T @ rows_BD
        self.seconds[side] = second_DD if former_DD is None else former_DD + second_DD
        self.sums[side].append(rows_BD.sum(0))

    def over_workers(self) -> Gradients | None:
        """Over all workers; None where no batch was watched. All workers must call it."""
        image_DD, text_DD = self.seconds
        if image_DD is None or text_DD is None:
            return None
        num_batches = len(self.sums[0])
        second_MDD = torch.stack([image_DD, text_DD])
        sums_MKD = torch.stack([torch.stack(side) for side in self.sums])
        count = torch.tensor(float(self.num_rows), dtype=torch.float64, device=image_DD.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for total in (second_MDD, sums_MKD, count):
                dist.all_reduce(total)
        rows = float(count)
        mean_MKD = (sums_MKD / (rows / num_batches)).cpu().numpy()
        second = (second_MDD / rows).cpu().numpy()
        means_DD = np.einsum("mkd,mke->de", mean_MKD, mean_MKD) / num_batches
        return Gradients(
            image_DD=second[0],
            text_DD=second[1],
            covariance_DD=second.sum(0) - means_DD,
            num_batches=num_batches,
        )


DYNAMICS = "dynamics.jsonl"
FIGURE = "dynamics"
_EMBEDDED_AT_ONCE = 250


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What of the modality gap's geometry is measured while the encoder trains (arXiv 2602.07026 sec. 3)."""

    every_steps: int = 0
    """Steps from one probe to the next, the first before the first step, one behind the last; 0: none."""
    num_probe: int = 2000
    """Held-out pairs that are embedded at every probe, the first ones; never more than `heldout` holds. The
    first worker holds about 64 bytes a pair and dimension while it measures: 7 GB for 200,000 of 512."""
    freeze_step: int = 100
    """The basis of U and V is estimated anew until the first probe at or behind this step, then kept."""
    energy: float = 0.9
    """U holds this share of the trace of Cov(image) + Cov(text)."""
    kappa_energy: float = 0.99
    """kappa_eff is taken over the leading eigenvalues that hold this share of their sum."""
    gradient_batches: int = 8
    """Training batches before each probe whose gradients are collected, `every_steps` at most."""
    top_components: int = 128
    """Leading eigenvalues that enter rho_eig and are recorded."""
    late_window: int = 10
    """Last probes, behind the freeze, over which per-step covariances are averaged."""
    tensorboard: bool = True
    """Events in OUTPUT/tensorboard besides dynamics.jsonl."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ConfigError(f"monitor.every_steps={self.every_steps}; expected 0 (off) or more")
        for name in ("energy", "kappa_energy"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"monitor.{name}={getattr(self, name)}; expected more than 0, less than 1")
        for name in ("num_probe", "gradient_batches", "top_components", "late_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"monitor.{name}={getattr(self, name)}; expected 1 or more")
        if self.enabled and self.gradient_batches > self.every_steps:
            raise ConfigError(
                f"monitor.gradient_batches={self.gradient_batches}, but there are only "
                f"monitor.every_steps={self.every_steps} batches from one probe to the next"
            )

    @property
    def enabled(self) -> bool:
        return self.every_steps > 0

    def check(self, num_steps: int, num_heldout: int, embedding_dim: int) -> None:
        """The run can be measured like this.

        Raises:
            ConfigError: a probe larger than the held-out pairs, or smaller than the dimension; no freeze.
        """
        if not self.enabled:
            return
        if self.num_probe > num_heldout:
            raise ConfigError(
                f"monitor.num_probe={self.num_probe}, but `heldout` holds only {num_heldout} pairs"
            )
        if self.num_probe <= embedding_dim:
            raise ConfigError(
                f"monitor.num_probe={self.num_probe} rows have no full covariance in {embedding_dim} "
                "dimensions; take several times as many"
            )
        if self.freeze_step >= num_steps:
            raise ConfigError(
                f"monitor.freeze_step={self.freeze_step} lies behind the {num_steps} steps of training, so "
                "the basis would never be frozen"
            )


class GapMonitor:
    """One worker's part. `watch` before and `probe` between the steps; `finish` behind the last."""

    def __init__(
        self,
        config: MonitorConfig,
        model: Any,
        tokenizer: Tokenizer,
        heldout: Sequence[ImageTextPair],
        *,
        image_size: int,
        num_steps: int,
        output: str,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.image_size, self.num_steps, self.output = image_size, num_steps, output
        self.seconds = 0.0
        self.shares = np.array_split(np.arange(config.num_probe), _num_workers())
        self.pairs = [heldout[row] for row in self.shares[_rank()]]
        self.collected = GradientSums()
        self.losses_seen = 0
        self.dynamics = GapDynamics(
            freeze_step=config.freeze_step,
            energy=config.energy,
            kappa_energy=config.kappa_energy,
            top_components=config.top_components,
            late_window=config.late_window,
        )
        self.writer = _open_writer(output, config) if _rank() == 0 else None

    def watch(self, step: int, image_BD: torch.Tensor, text_BD: torch.Tensor) -> None:
        """The loss's gradients with respect to these unit embeddings, of the batch of step `step` (from 0),
        will be counted, if it is one of the last before a probe."""
        every = self.config.every_steps
        following = min((step // every + 1) * every, self.num_steps)
        if following - step <= self.config.gradient_batches:
            self.collected.watch(image_BD, text_BD)

    def probe(self, step: int, losses: Sequence[float]) -> None:
        """Behind `step` steps: a record, if this is a step of one; all workers must call it at every step.
        `losses` are this worker's, one a step so far."""
        if step % self.config.every_steps and step != self.num_steps:
            return
        begun = time.monotonic()
        _same_buffers(self.model)
        with _undisturbed(self.model):
            image_PD, text_PD = embed_pairs(self.model, self.tokenizer, self.pairs, self.image_size)
        rows = _at_first_worker(torch.cat([image_PD, text_PD], dim=1), [len(share) for share in self.shares])
        gradients = self.collected.over_workers()
        loss = _mean_over_workers(losses[self.losses_seen :], image_PD.device)
        self.collected, self.losses_seen = GradientSums(), len(losses)
        if self.writer is not None and rows is not None:
            image_ND, text_ND = np.split(rows, 2, axis=1)
            record = self.dynamics.observe(step, image_ND, text_ND, gradients)
            self.writer.write(step, {**record, "train_loss": loss})
        self.seconds += time.monotonic() - begun

    def finish(self) -> None:
        """The figure stands beside the record; nothing more is written."""
        if self.writer is not None:
            # Only here: no worker without a monitor needs matplotlib.
            from revision_ray.report.dynamics_figure import draw_file

            self.writer.close()
            draw_file(storage.join(self.output, DYNAMICS), storage.join(self.output, FIGURE))


def _open_writer(output: str, config: MonitorConfig) -> trackers.MetricsWriter:
    """Sinks of a run that begins: training is not resumed, so a record left by one that died begins anew."""
    writer = trackers.MetricsWriter()
    writer.sinks.append(trackers.json_lines(storage.join(output, DYNAMICS), steps_done=-1))
    if config.tensorboard:
        events = trackers.MetricsWriter()
        trackers.add_tensorboard(events, output, purge_step=0)
        writer.sinks += [
            lambda step, values, sink=sink: sink(step, scalars("dynamics", values)) for sink in events.sinks
        ]
        writer.closers += events.closers
    return writer


def scalars(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """PREFIX/key -> number of every number in a record, those of nested records below their key."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= scalars(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and key != "step":
            found[f"{prefix}/{key}"] = float(value)
    return found


# --- embedding --------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_pairs(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[ImageTextPair], image_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows (P, D) of the images and of the first captions of `pairs`, on the model's device."""
    device = next(model.parameters()).device
    images, texts = [], []
    for first in range(0, len(pairs), _EMBEDDED_AT_ONCE):
        chunk = pairs[first : first + _EMBEDDED_AT_ONCE]
        pixels_PHWC = torch.from_numpy(np.stack([pixels(pair, image_size) for pair in chunk])).to(device)
        tokens_PT = dual_encoder.tokenize(tokenizer, [pair.captions[0] for pair in chunk]).to(device)
        images.append(model.encode_image(dual_encoder.normalised(pixels_PHWC), normalize=True))
        texts.append(model.encode_text(tokens_PT, normalize=True))
    return torch.cat(images), torch.cat(texts)


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """The model evaluates inside; afterwards every module's mode and torch's random numbers are as before."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


# --- workers ----------------------------------------------------------------------------------------------


def _num_workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _mean_over_workers(losses: Sequence[float], device: torch.device) -> float | None:
    if not losses:
        return None
    total = torch.tensor([sum(losses), len(losses)], dtype=torch.float64, device=device)
    if _num_workers() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def _same_buffers(model: torch.nn.Module) -> None:
    """Every worker has the first one's buffers, whose encoder is the one that is saved: on CPUs each batch
    normalisation counts the rows of its own worker. DistributedDataParallel does the same as it goes on."""
    if _num_workers() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _at_first_worker(rows_PD: torch.Tensor, lengths: Sequence[int]) -> np.ndarray | None:
    """float32 (N, D) rows of all workers in rank order at the first one; None at the others."""
    if _num_workers() == 1:
        return rows_PD.float().cpu().numpy()
    padded_PD = rows_PD.new_zeros((max(lengths), rows_PD.shape[1]))
    padded_PD[: len(rows_PD)] = rows_PD
    parts = [torch.empty_like(padded_PD) for _ in lengths] if _rank() == 0 else None
    dist.gather(padded_PD, parts, dst=0)
    if parts is None:
        return None
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).cpu().numpy()
