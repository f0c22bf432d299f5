"""The miniature world's language model: trained on the world's documents, examined on held-out scenes.

Shapes: B rows of a batch, T tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from revision_ray.core import cluster, config, storage
from revision_ray.core.errors import ConfigError
from revision_ray.core.stage import Forecast, Stage, StageKind, StageWork, reads_keys
from revision_ray.miniature import documents
from revision_ray.miniature.documents import ANSWER_WEIGHT, DocumentConfig, examination
from revision_ray.train import language_model
from revision_ray.train.language_model import (
    MAX_LENGTH,
    PAD_ID,
    Document,
    LanguageModelTraining,
    Tokens,
    encode,
    pack,
    weighted_loss,
)


@dataclass(frozen=True, kw_only=True)
class LanguageTraining(LanguageModelTraining):
    """Train a tiny language model from scratch on the miniature world's text. Its folder loads in
    transformers as it is, and is `model` of jobs/pretrain.py. Run again with the same settings, it trains
    nothing."""

    documents: DocumentConfig = field(default_factory=DocumentConfig)
    """What it reads."""
    num_heldout: int = 500
    """Scenes, none of them trained on, of which it is asked at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heldout < 1:
            raise ConfigError(f"num_heldout={self.num_heldout}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class WorldDocuments:
    """Documents of a world to train on, and questions about its held-out scenes."""

    config: DocumentConfig
    num_heldout: int

    @property
    def num_documents(self) -> int:
        """Number of documents to train on."""
        return self.config.num_documents

    def document(self, number: int) -> Document:
        """Return document `number`, from 0."""
        return documents.document(self.config, number)

    def examine(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Return what `examine` measures on the held-out scenes."""
        return examine(model, tokenizer, self.config, self.num_heldout)


def train_language_model(training: LanguageTraining) -> tuple[dict[str, Any], bool]:
    """Train on the world's documents unless it is done; return (metrics, whether it was trained now)."""
    source = WorldDocuments(config=training.documents, num_heldout=training.num_heldout)
    return language_model.train_language_model(training, source)


def run_train_language_model(job: LanguageTraining) -> str:
    """Train the language model, save the settings beside it; return how well it answers."""
    cluster.connect()
    metrics, trained = train_language_model(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "train_language_model.yaml"))
    heldout = metrics["heldout"]
    answers = ", ".join(f"{kind} {share:.2f}" for kind, share in heldout["answers"].items())
    return (
        f"{'trained' if trained else 'already there'}: {job.output}; right answers about "
        f"{heldout['num_scenes']} held-out captions: {answers}"
    )


@torch.no_grad()
def examine(
    model: Any, tokenizer: PreTrainedTokenizerFast, settings: DocumentConfig, num_scenes: int
) -> dict[str, Any]:
    """Measure what the model knows of held-out scenes, from one caption of each.

    `answers`: share of greedy answers that are right to the end token, by kind of question, and `blind`, the
    same without the caption. A short caption leaves background and relation out one time in five, so that not
    even a perfect reader reaches 1 there. `paraphrase_loss`: nats per token, end token included.
    """
    exam = examination(settings, num_scenes)
    was_training = model.training
    model.eval()
    rows = pack(encode(tokenizer, exam.paraphrases), MAX_LENGTH)
    batch = rows.take(np.arange(len(rows.token_RT)), model.device)
    measured = {
        "num_scenes": num_scenes,
        "num_questions": dict(sorted(Counter(exam.kinds).items())),
        "answers": _shares(exam.kinds, _right(model, encode(tokenizer, exam.sighted))),
        "blind": _shares(exam.kinds, _right(model, encode(tokenizer, exam.blind))),
        "paraphrase_loss": weighted_loss(model, batch).item(),
    }
    model.train(was_training)
    return measured


def _right(model: Any, encoded: Sequence[Tokens]) -> list[bool]:
    """Return whether the greedy answer at the end of each document is its own.

    It is so exactly if each of its tokens is the likeliest after those before it: one forward pass shows it.
    """
    right = []
    for first in range(0, len(encoded), 256):
        chunk = encoded[first : first + 256]
        length = max(len(ids) for ids, _ in chunk)
        # Padding follows the document, where nothing that counts can attend to it.
        token_BT = torch.tensor([ids + [PAD_ID] * (length - len(ids)) for ids, _ in chunk])
        likeliest_BT = model(input_ids=token_BT.to(model.device), use_cache=False).logits.argmax(-1).tolist()
        for (ids, weights), likeliest in zip(chunk, likeliest_BT, strict=True):
            answer = [t for t, weight in enumerate(weights) if weight == ANSWER_WEIGHT]
            right.append(all(likeliest[t - 1] == ids[t] for t in answer))
    return right


def _shares(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    return {
        kind: float(np.mean([ok for ok, of in zip(right, kinds, strict=True) if of == kind]))
        for kind in sorted(set(kinds))
    }


# --- as a stage of a chain ---------------------------------------------------------------------------------


def _language_model_work(_: Forecast, stage: Stage) -> StageWork:
    return StageWork(**_language_model_figures(stage), uses_gpu=True)


def _language_model_figures(stage: Stage) -> dict[str, Any]:
    rows = stage.job.num_steps * stage.job.rows_per_batch
    return {"rows": rows, "tokens": rows * stage.job.row_length}


LANGUAGE_MODEL_STAGE = StageKind(
    name="train_language_model",
    job=LanguageTraining,
    run=run_train_language_model,
    reads=reads_keys(),
    proof="metrics.json",
    work=_language_model_work,
    done=_language_model_figures,
    gpus=lambda job, total: 1.0 if total >= 1 else 0.0,
)
