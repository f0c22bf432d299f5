"""A dual encoder trained from scratch on image-caption pairs, by Ray Train workers that share negatives.

Shapes: B rows of this worker's batch, N rows, D embedding_dim, H height, W width, C 3.
"""

import dataclasses
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import open_clip
import ray.train
import ray.train.torch
import torch
from ray.train import LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from tokenizers import Tokenizer
from torch.nn.parallel import DistributedDataParallel

from revision_ray.core import artifact, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.core.observe import progress
from revision_ray.train import dual_encoder, worker
from revision_ray.train.entry import fitted, loop, scaling
from revision_ray.train.monitor import GapMonitor, MonitorConfig, embed_pairs
from revision_ray.train.pairs import (
    ImageTextPair,
    batch_rows,
    content_hash,
    drawn_captions,
    pixels,
    read_pairs,
)

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_MEASURED_PAIRS = 1000  # R@1 is only comparable among equally many candidates


@dataclass(frozen=True, kw_only=True)
class EncoderTraining:
    """Train a dual encoder from scratch on image-caption pairs. Its folder loads in open_clip as it is, and
    is `encoder.model` of jobs/embed.py. Run again with the same settings and data, it trains nothing."""

    data: list[str] = MISSING
    """WebDataset shards, or directories of them: KEY.jpg and KEY.txt, or KEY.json with several `captions`."""
    heldout: list[str] = MISSING
    """The same, of pairs that are not trained on: retrieval and gap are measured on the first 1000."""
    output: str = MISSING
    """URI of the directory that receives the encoder."""
    model: str = "miniature"
    """miniature (1.8 M parameters, 64 px), an open_clip architecture, or the URI of a model configuration
    JSON. The text tower gets a vocabulary of the captions' own words."""
    context_length: int | None = None
    """Tokens that the text tower takes, start and end among them; the model's own if not given. The miniature
    takes 26, enough for short captions; long ones need 72."""
    max_words: int = 30000
    """The vocabulary keeps this many words, the most frequent ones."""
    num_steps: int = 400
    """Steps of the optimizer."""
    global_batch_size: int = 128
    """Pairs a step, over all workers; each is a negative of every other."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate, which falls along a cosine."""
    minimum_learning_rate: float = 0.0
    """Where the cosine ends."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises to its peak."""
    warmup_ratio: float | None = None
    """The same as a share of `num_steps`, instead of `warmup_steps`."""
    weight_decay: float = 0.05
    """Of matrices and filters; biases and normalisations have none."""
    max_gradient_norm: float = 1.0
    """Longer gradients are cut to this."""
    temperature: float = 0.01
    """Fixed divisor of the cosines. A learnt one starts higher and closes much of the modality gap."""
    seed: int = 0
    """Of weights, order and captions."""
    num_workers: int = 1
    """Ray Train workers; on GPUs one GPU each."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; by default 1 where the cluster has as many as workers, else 0. On a cluster that
    starts GPU nodes on demand, say 1."""
    cpus_per_worker: float = 2.0
    """CPUs reserved for a worker, which computes on as many threads."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """The gap's geometry on the way: dynamics.jsonl, dynamics.png and TensorBoard events in the output."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.num_workers:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} does not divide among "
                f"num_workers={self.num_workers}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}; expected a positive number such as 0.01")
        if not 0 <= self.minimum_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"minimum_learning_rate={self.minimum_learning_rate}; expected 0 to "
                f"learning_rate={self.learning_rate}"
            )
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio={self.warmup_ratio}; expected 0 or more, less than 1")

    @property
    def steps_to_peak(self) -> int:
        """Steps of the warm-up, however they were given."""
        return self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * self.num_steps)


def train_encoder(training: EncoderTraining) -> tuple[dict[str, Any], bool]:
    """(metrics, whether it was trained now): the encoder stands at its output in open_clip's folder layout.

    An encoder of the same settings and data that stands there already is kept.

    Raises:
        ConfigError: no such model, a batch larger than the data, or a probe that the monitor cannot take.
        DataError: the pairs cannot be read, or the output holds another encoder.
    """
    output = storage.absolute(training.output)
    # Workers run in folders of their own.
    training = dataclasses.replace(
        training,
        data=[storage.absolute(uri) for uri in training.data],
        heldout=[storage.absolute(uri) for uri in training.heldout],
    )
    pairs, heldout = read_pairs(training.data), read_pairs(training.heldout)
    if training.global_batch_size > len(pairs):
        raise ConfigError(
            f"global_batch_size={training.global_batch_size}, but there are only {len(pairs)} pairs"
        )
    identity = _identity(training, pairs, heldout)
    if (former := _former_metrics(output, training, identity)) is not None:
        return former, False
    tokenizer = dual_encoder.build_tokenizer(
        (text for pair in pairs for text in pair.captions), training.max_words
    )
    model_config = dual_encoder.model_config(
        training.model, tokenizer.get_vocab_size(), training.context_length
    )
    training.monitor.check(training.num_steps, len(heldout), model_config["embed_dim"])
    log.info("%d pairs, %d held out, %d tokens", len(pairs), len(heldout), tokenizer.get_vocab_size())
    del pairs, heldout
    task = {
        "training": training,
        "output": output,
        "identity": identity,
        "model_config": model_config,
        "tokenizer": tokenizer.to_str(),
    }
    return fitted(_trainer(training, output, task)), True


def _trainer(training: EncoderTraining, output: str, task: dict[str, Any]) -> TorchTrainer:
    return TorchTrainer(
        **loop(_train, task),
        scaling_config=scaling(training.num_workers, training.gpus_per_worker, training.cpus_per_worker),
        # Threads that spin while they wait take the cores from those that work.
        run_config=RunConfig(
            name="encoder",
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_path=storage.join(output, "ray_train"),
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "passive"}},
        ),
    )


def _identity(
    training: EncoderTraining, pairs: Sequence[ImageTextPair], heldout: Sequence[ImageTextPair]
) -> dict[str, Any]:
    """What decides the encoder: settings and content, not where it lies or on how many CPUs it is made."""
    settings = dataclasses.asdict(training)
    for key in ("data", "heldout", "output", "gpus_per_worker", "cpus_per_worker", "monitor", "warmup_ratio"):
        settings.pop(key)
    settings["warmup_steps"] = training.steps_to_peak
    if not training.minimum_learning_rate:
        settings.pop("minimum_learning_rate")  # encoders from before this setting say nothing of it
    return {**settings, "data_sha256": content_hash(pairs), "heldout_sha256": content_hash(heldout)}


def _former_metrics(
    output: str, training: EncoderTraining, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the metrics of the finished encoder at `output`; None where there is none.

    Raises:
        OutputError: another encoder is there, or one that was not measured as asked.
    """
    metrics = artifact.finished(output, "metrics.json", identity, "an encoder")
    if metrics and training.monitor.enabled:
        former, current = metrics.get("monitor"), dataclasses.asdict(training.monitor)
        artifact.refuse(
            output,
            "an encoder",
            artifact.changes({"monitor": former}, {"monitor": current}),
            advice="a finished training cannot be measured afterwards",
        )
    return metrics


def _train(task: dict[str, Any]) -> dict[str, Any]:
    """What every worker does; the files are written, and the metrics returned, by the first."""
    training: EncoderTraining = task["training"]
    rank, num_workers = (getattr(ray.train.get_context(), f"get_world_{what}")() for what in ("rank", "size"))
    device = ray.train.torch.get_device()
    worker.set_up("train_encoder", task["output"], rank, training.cpus_per_worker)
    pairs = read_pairs(training.data)
    tokenizer = Tokenizer.from_str(task["tokenizer"])
    dual_encoder.set_context(tokenizer, task["model_config"]["text_cfg"].get("context_length", 77))
    image_size = task["model_config"]["vision_cfg"].get("image_size", 224)

    torch.manual_seed(training.seed)
    model = dual_encoder.build_model(task["model_config"], training.temperature).to(device)
    network: torch.nn.Module = model
    if num_workers > 1:
        # Batch normalisation over all workers exists on GPUs only; on CPUs each normalises its own rows.
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    optimizer = _optimizer(model, training)
    monitor = _monitor(task, model, tokenizer)

    start, losses = time.monotonic(), []
    with progress("train encoder", training.num_steps, "steps", counted=rank == 0) as shown:
        for step in range(training.num_steps):
            if monitor is not None:
                monitor.probe(step, losses)
            rows = batch_rows(len(pairs), step, training.global_batch_size, training.seed)
            chosen = [pairs[row] for row in rows]
            mine = slice(rank * len(rows) // num_workers, (rank + 1) * len(rows) // num_workers)
            texts = drawn_captions(chosen, step, training.seed)[mine]
            pixels_BHWC = torch.from_numpy(np.stack([pixels(pair, image_size) for pair in chosen[mine]]))
            tokens_BT = dual_encoder.tokenize(tokenizer, texts)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step)
            image_BD, text_BD, *_ = network(
                dual_encoder.normalised(pixels_BHWC.to(device)), tokens_BT.to(device)
            )
            loss = dual_encoder.contrastive_loss(image_BD, text_BD, training.temperature)
            if monitor is not None:
                monitor.watch(step, image_BD, text_BD)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), training.max_gradient_norm)
            optimizer.step()

            losses.append(loss.item())
            rate = (step + 1) * training.global_batch_size / (time.monotonic() - start)
            shown.advance(1, f"loss {np.mean(losses[-10:]):.3f}, {rate:.0f} images/s")
    if monitor is not None:
        monitor.probe(training.num_steps, losses)
    if rank != 0:
        return {}
    run = {"losses": losses, "seconds": time.monotonic() - start, "monitor_seconds": 0.0}
    if monitor is not None:
        monitor.finish()
        run["monitor_seconds"] = monitor.seconds
    return _save(task, model, tokenizer, run)


def _monitor(task: dict[str, Any], model: torch.nn.Module, tokenizer: Tokenizer) -> GapMonitor | None:
    """This worker's part of the monitor, if there is one."""
    training: EncoderTraining = task["training"]
    if not training.monitor.enabled:
        return None
    return GapMonitor(
        training.monitor,
        model,
        tokenizer,
        read_pairs(training.heldout),
        image_size=task["model_config"]["vision_cfg"].get("image_size", 224),
        num_steps=training.num_steps,
        output=task["output"],
    )


def _optimizer(model: torch.nn.Module, training: EncoderTraining) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98))


def learning_rate(training: EncoderTraining, step: int) -> float:
    """Of step `step` (from 0): up in a line over the warm-up, down to the minimum in half a cosine."""
    warmup = training.steps_to_peak
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    past = (step - warmup) / max(1, training.num_steps - warmup)
    falls_by = training.learning_rate - training.minimum_learning_rate
    return training.minimum_learning_rate + falls_by * (1 + math.cos(math.pi * past)) / 2


def _save(
    task: dict[str, Any], model: torch.nn.Module, tokenizer: Tokenizer, run: dict[str, Any]
) -> dict[str, Any]:
    """The folder stands at the output, its metrics last: where they are, the rest is."""
    training: EncoderTraining = task["training"]
    model.eval()
    size = task["model_config"]["vision_cfg"].get("image_size", 224)
    measured = measure(model, tokenizer, read_pairs(training.heldout)[:_MEASURED_PAIRS], size)
    metrics = {
        "format_version": FORMAT_VERSION,
        "identity": task["identity"],
        "monitor": dataclasses.asdict(training.monitor) if training.monitor.enabled else None,
        "monitor_seconds": run["monitor_seconds"],
        "heldout": measured,
        "num_steps": training.num_steps,
        "first_loss": run["losses"][0],
        "last_loss": float(np.mean(run["losses"][-10:])),
        "seconds": run["seconds"],
        "images_per_second": training.num_steps * training.global_batch_size / run["seconds"],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
    }
    for name, content in dual_encoder.checkpoint_files(model, task["model_config"], tokenizer).items():
        storage.write_bytes(storage.join(task["output"], name), content)
    storage.write_json(storage.join(task["output"], "metrics.json"), metrics)
    return metrics


def measure(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[ImageTextPair], image_size: int
) -> dict[str, float]:
    """Measure `pairs` by their first captions (see `dual_encoder.pair_metrics`)."""
    return dual_encoder.pair_metrics(*embed_pairs(model, tokenizer, pairs, image_size))
