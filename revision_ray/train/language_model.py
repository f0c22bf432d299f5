"""The miniature world's language model trained from scratch on text alone, by one Ray Train worker.

Shapes: R rows, B rows of a batch, T tokens.
"""

import dataclasses
import logging
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.train.torch
import torch
import transformers
from ray.train import LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from revision_ray.core import artifact, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.core.observe import progress
from revision_ray.miniature import language_model
from revision_ray.miniature.documents import Document, DocumentConfig, document
from revision_ray.miniature.language_model import ModelSize, PackedDocuments
from revision_ray.model.ending import declare_ends
from revision_ray.train import worker
from revision_ray.train.entry import fitted, loop, scaling
from revision_ray.train.pairs import batch_rows

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_HASHED_DOCUMENTS = 200  # enough to notice that the world's language is another one


@dataclass(frozen=True, kw_only=True)
class LanguageTraining:
    """Train a tiny language model from scratch on the miniature world's text. Its folder loads in
    transformers as it is, and is `model` of jobs/pretrain.py. Run again with the same settings, it trains
    nothing."""

    output: str = MISSING
    """URI of the directory that receives the model and its tokenizer."""
    documents: DocumentConfig = field(default_factory=DocumentConfig)
    """What it reads."""
    size: ModelSize = field(default_factory=ModelSize)
    """How large it is."""
    num_steps: int = 400
    """Steps of the optimizer."""
    rows_per_batch: int = 32
    """Rows of a step, each full of documents."""
    row_length: int = 128
    """Tokens of a row; no document may be longer."""
    learning_rate: float = 1e-2
    """Peak of Muon's, which falls to zero along a line; a third of it for what AdamW trains."""
    warmup_steps: int = 30
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Of matrices; embeddings and normalisations have none."""
    max_gradient_norm: float = 1.0
    """Longer gradients are cut to this."""
    num_heldout: int = 500
    """Scenes, none of them trained on, of which it is asked at the end."""
    seed: int = 0
    """Of weights and order."""
    cpus_per_worker: float = 2.0
    """CPUs reserved for the worker, which computes on as many threads."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "rows_per_batch", "row_length", "num_heldout"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more")


def train_language_model(training: LanguageTraining) -> tuple[dict[str, Any], bool]:
    """(metrics, whether it was trained now): the model stands at its output as a transformers folder.

    A model of the same settings and text that stands there already is kept.

    Raises:
        ConfigError: a document is longer than a row.
        DataError: the output holds another model.
    """
    output = storage.absolute(training.output)
    identity = _identity(training)
    if former := artifact.finished(output, "metrics.json", identity, "a language model"):
        return former, False
    task = {"training": training, "output": output, "identity": identity}
    return fitted(_trainer(training, output, task)), True


def _identity(training: LanguageTraining) -> dict[str, Any]:
    """What decides the model: settings and text, not where it lies or on how many CPUs it is made."""
    settings = dataclasses.asdict(training)
    for key in ("output", "cpus_per_worker"):
        settings.pop(key)
    texts = [repr(document(training.documents, number)).encode() for number in range(_HASHED_DOCUMENTS)]
    return {**settings, "text_sha256": storage.sha256(*texts)}


def _trainer(training: LanguageTraining, output: str, task: dict[str, Any]) -> TorchTrainer:
    return TorchTrainer(
        **loop(_train, task),
        scaling_config=scaling(1, None, training.cpus_per_worker),
        # Threads that spin while they wait take the cores from those that work.
        run_config=RunConfig(
            name="language_model",
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_path=storage.join(output, "ray_train"),
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "passive"}},
        ),
    )


def _train(task: dict[str, Any]) -> dict[str, Any]:
    """What the worker does: the folder stands at the output, its metrics last and returned."""
    training: LanguageTraining = task["training"]
    worker.set_up("train_language_model", task["output"], 0, training.cpus_per_worker)
    disable_progress_bar()  # of the weights: in a worker's log it is noise
    start = time.monotonic()
    read = read_documents(training.documents)
    tokenizer = language_model.build_tokenizer(read)
    rows = language_model.pack(language_model.encode(tokenizer, read), training.row_length)
    prepared = time.monotonic()
    model, losses = fit(training, tokenizer, rows, ray.train.torch.get_device())
    trained = time.monotonic()
    heldout = language_model.examine(model, tokenizer, training.documents, training.num_heldout)
    metrics = {
        "format_version": FORMAT_VERSION,
        "identity": task["identity"],
        "heldout": heldout,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-10:])),
        "num_rows": len(rows.token_RT),
        "num_tokens": sum(len(text.split()) for pieces in read for text, _ in pieces),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {"documents": prepared - start, "training": trained - prepared},
        "tokens_per_second": training.num_steps
        * training.rows_per_batch
        * training.row_length
        / (trained - prepared),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    _save(model, tokenizer, task["output"])
    storage.write_json(storage.join(task["output"], "metrics.json"), metrics)
    return metrics


def read_documents(config: DocumentConfig) -> list[Document]:
    """The documents that training reads, in order."""
    documents = []
    with progress("write documents", config.num_documents, "documents") as shown:
        for number in range(config.num_documents):
            documents.append(document(config, number))
            shown.advance(1)
    return documents


def fit(
    training: LanguageTraining,
    tokenizer: PreTrainedTokenizerFast,
    rows: PackedDocuments,
    device: torch.device,
) -> tuple[LlamaForCausalLM, list[float]]:
    """(trained model, loss of each step); a function of settings and rows alone."""
    torch.manual_seed(training.seed)
    model: Any = language_model.build_model(training.size, tokenizer)
    model.to(device)
    model.train()
    optimizers = _optimizers(model, training)
    losses, start, tokens = [], time.monotonic(), training.rows_per_batch * training.row_length
    with progress("train language model", training.num_steps, "steps") as shown:
        for step in range(training.num_steps):
            chosen = batch_rows(len(rows.token_RT), step, training.rows_per_batch, training.seed)
            # In float32: for matrices this narrow bfloat16 was slower in the backward pass.
            loss = language_model.weighted_loss(model, rows.take(chosen, device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * learning_rate_factor(training, step)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            rate = (step + 1) * tokens / (time.monotonic() - start)
            shown.advance(1, f"loss {np.mean(losses[-10:]):.3f}, {rate:,.0f} tokens/s")
    return model, losses


def _optimizers(model: LlamaForCausalLM, training: LanguageTraining) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and normalisations."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    peak = training.learning_rate
    return [
        torch.optim.Muon(
            [{"params": matrices, "peak": peak}],
            weight_decay=training.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that one learning rate serves both
        ),
        torch.optim.AdamW(
            [{"params": others, "peak": peak / 3}], betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate_factor(training: LanguageTraining, step: int) -> float:
    """Share of the peak at step `step` (from 0): up in a line over the warm-up, then down to zero in one."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    return (training.num_steps - step) / max(1, training.num_steps - training.warmup_steps)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: str) -> None:
    """Configuration, weights, generation settings, tokenizer and chat template stand at `output`."""
    declare_ends(model.generation_config, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as file:
                storage.write_bytes(storage.join(output, name), file.read())
