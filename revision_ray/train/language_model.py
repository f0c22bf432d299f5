"""A small language model trained from scratch on documents of text, by one Ray Train worker.

Its tokenizer, its size, the packing of documents into rows, its weighted loss, and the training.
Shapes: R rows, B rows of a batch, T tokens, V words of the vocabulary.
"""

import dataclasses
import logging
import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import ray
import ray.train.torch
import torch
import torch.nn.functional as F
import transformers
from ray.train import LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from revision_ray.core import artifact, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.core.observe import progress
from revision_ray.model.ending import declare_ends
from revision_ray.train import worker
from revision_ray.train.entry import fitted, loop, scaling
from revision_ray.train.pairs import batch_rows

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_HASHED_DOCUMENTS = 200  # enough to notice that the documents are others

PAD, UNKNOWN, END, QUESTION, ANSWER, IMAGE = "<pad>", "<unk>", "<e>", "<q>", "<a>", "<image>"
Piece = tuple[str, float]
"""A part of a document: its text, and the weight that each of its tokens has in the loss."""
Document = list[Piece]
PAD_ID, END_ID = 0, 2
MAX_LENGTH = 512
"""Tokens that the model takes, visual tokens among them."""

Tokens = tuple[list[int], list[float]]
"""A document's token ids, and the weight of each."""

# Images come first, wherever the message names them. A message without words asks for a caption.
CHAT_TEMPLATE = """
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}{{- '<image> ' if 'image' in part.type else part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set text = text_of(message.content) -%}
    {%- set words = text | replace('<image>', ' ') | trim -%}
    {{- '' if loop.first else ' ' -}}
    {%- if message.role == 'user' -%}
        {%- set slots = '<image> ' * (text.split('<image>') | length - 1) -%}
        {{- (slots ~ ('<q> ' ~ words ~ ' <a>' if words else '')) | trim -}}
    {%- elif message.role == 'assistant' -%}
        {%- generation -%}{{- (words ~ ' <e>') | trim -}}{%- endgeneration -%}
    {%- elif message.role == 'system' -%}
        {{- words -}}
    {%- else -%}
        {{- raise_exception('role ' ~ message.role ~ ': expected system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of the Llama."""

    hidden_size: int = 128
    """Width of the residual stream; the embeddings are tied."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads of each block."""
    intermediate_size: int = 352
    """Width inside the feed-forward layers."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size={self.hidden_size} is no even multiple of num_heads={self.num_heads}"
            )


def build_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of all words of `documents`, lower-cased; punctuation is a word.

    Ids: special tokens, words in alphabetical order, and last `<image>`, which is beyond the vocabulary of
    the language model: the multimodal model replaces it before anything looks it up.
    """
    texts = {text for pieces in documents for text, _ in pieces}
    counts = Counter(word for text in texts for word in re.findall(r"<\w+>|\w+|[^\w\s]+", text.lower()))
    special = [PAD, UNKNOWN, END, QUESTION, ANSWER]
    vocabulary = [*special, *sorted(counts.keys() - {*special, IMAGE}), IMAGE]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([*special, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[QUESTION, ANSWER, IMAGE],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=True,  # no space before punctuation
    )


def build_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama with fresh float32 weights for all tokens but `<image>`, from torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) - 1,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=MAX_LENGTH,
        # Llama's 0.02 is for wider layers: from there this one takes twice as long.
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 40
    return model


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[Tokens]:
    """Return token ids and weights of each document; the first token, which nothing precedes, weighs 0."""
    texts = list({text: None for pieces in documents for text, _ in pieces})
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids_of = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
    encoded = []
    for pieces in documents:
        ids = [token for text, _ in pieces for token in ids_of[text]]
        weights = [weight for text, weight in pieces for _ in ids_of[text]]
        encoded.append((ids, [0.0, *weights[1:]]))
    return encoded


@dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """Documents side by side in rows of one length, each with positions from 0, then padding of weight 0."""

    token_RT: torch.Tensor
    position_RT: torch.Tensor
    weight_RT: torch.Tensor

    def take(self, rows: np.ndarray, device: torch.device) -> "PackedDocuments":
        """Return these rows, on `device`."""
        parts = (self.token_RT[rows], self.position_RT[rows], self.weight_RT[rows])
        token_BT, position_BT, weight_BT = (part.to(device) for part in parts)
        return PackedDocuments(token_RT=token_BT.long(), position_RT=position_BT.long(), weight_RT=weight_BT)


def pack(encoded: Sequence[Tokens], row_length: int) -> PackedDocuments:
    """Pack documents into few rows by best fit: the longest first, each where the least room is left.

    Raises:
        ConfigError: a document is longer than a row.
    """
    longest_first = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # room -> rows that have it
    for i in longest_first:
        length = len(encoded[i][0])
        if length > row_length:
            raise ConfigError(f"row_length={row_length}, but a document has {length} tokens; raise it")
        room = next((room for room in range(length, row_length + 1) if with_room[room]), row_length)
        row = with_room[room].pop() if with_room[room] else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        with_room[room - length].append(row)
    token_RT = np.full((len(rows), row_length), PAD_ID, np.int32)
    position_RT = np.zeros((len(rows), row_length), np.int32)
    weight_RT = np.zeros((len(rows), row_length), np.float32)
    for r, members in enumerate(rows):
        first = 0
        for ids, weights in (encoded[i] for i in members):
            here = slice(first, first + len(ids))
            token_RT[r, here], weight_RT[r, here], position_RT[r, here] = ids, weights, np.arange(len(ids))
            first += len(ids)
        position_RT[r, first:] = np.arange(row_length - first)
    token, position, weight = (torch.from_numpy(array) for array in (token_RT, position_RT, weight_RT))
    return PackedDocuments(token_RT=token, position_RT=position, weight_RT=weight)


def weighted_loss(model: Any, batch: PackedDocuments) -> torch.Tensor:
    """Return the mean cross entropy (nats) of the next token, over the tokens of `batch` by their weights."""
    # Positions that begin anew tell transformers where documents end, and no token attends across.
    logits_BTV = model(input_ids=batch.token_RT, position_ids=batch.position_RT, use_cache=False).logits
    target_BT, weight_BT = batch.token_RT[:, 1:], batch.weight_RT[:, 1:]
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), reduction="none")
    return (losses * weight_BT.flatten()).sum() / weight_BT.sum()


@dataclass(frozen=True, kw_only=True)
class LanguageModelTraining:
    """Settings of a small language model that is trained from scratch."""

    output: str = MISSING
    """URI of the directory that receives the model and its tokenizer."""
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
    seed: int = 0
    """Of weights and order."""
    cpus_per_worker: float = 2.0
    """CPUs reserved for the worker, which computes on as many threads."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "rows_per_batch", "row_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more")


class DocumentSource(Protocol):
    """Documents to train on, and an examination of the trained model. It is pickled to the worker."""

    @property
    def num_documents(self) -> int:
        """Number of documents to train on."""
        ...

    def document(self, number: int) -> Document:
        """Return document `number`, from 0; a function of the number alone."""
        ...

    def examine(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Return figures of what the model has learnt, for the metrics."""
        ...


def train_language_model(
    training: LanguageModelTraining, documents: DocumentSource
) -> tuple[dict[str, Any], bool]:
    """Train on `documents` and write a transformers folder; return (metrics, whether it was trained now).

    A model of the same settings and text that stands at the output already is kept.

    Raises:
        ConfigError: a document is longer than a row.
        OutputError: the output holds another model.
    """
    output = storage.absolute(training.output)
    identity = _identity(training, documents)
    if former := artifact.finished(output, "metrics.json", identity, "a language model"):
        return former, False
    task = {"training": training, "documents": documents, "output": output, "identity": identity}
    return fitted(_trainer(training, output, task)), True


def _identity(training: LanguageModelTraining, documents: DocumentSource) -> dict[str, Any]:
    """Return what decides the model: settings and text, not where it lies or on how many CPUs it is made."""
    settings = dataclasses.asdict(training)
    for key in ("output", "cpus_per_worker"):
        settings.pop(key)
    texts = [repr(documents.document(number)).encode() for number in range(_HASHED_DOCUMENTS)]
    return {**settings, "text_sha256": storage.sha256(*texts)}


def _trainer(training: LanguageModelTraining, output: str, task: dict[str, Any]) -> TorchTrainer:
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
    """Train in the worker: write the folder, its metrics last, and return them."""
    training: LanguageModelTraining = task["training"]
    worker.set_up("train_language_model", task["output"], 0, training.cpus_per_worker)
    disable_progress_bar()  # of the weights: in a worker's log it is noise
    start = time.monotonic()
    documents = read_documents(task["documents"])
    tokenizer = build_tokenizer(documents)
    rows = pack(encode(tokenizer, documents), training.row_length)
    prepared = time.monotonic()
    model, losses = fit(training, tokenizer, rows, ray.train.torch.get_device())
    trained = time.monotonic()
    heldout = task["documents"].examine(model, tokenizer)
    metrics = {
        "format_version": FORMAT_VERSION,
        "identity": task["identity"],
        "heldout": heldout,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-10:])),
        "num_rows": len(rows.token_RT),
        "num_tokens": sum(len(text.split()) for pieces in documents for text, _ in pieces),
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


def read_documents(source: DocumentSource) -> list[Document]:
    """Return the documents that training reads, in order."""
    documents = []
    with progress("write documents", source.num_documents, "documents") as bar:
        for number in range(source.num_documents):
            documents.append(source.document(number))
            bar.advance(1)
    return documents


def fit(
    training: LanguageModelTraining,
    tokenizer: PreTrainedTokenizerFast,
    rows: PackedDocuments,
    device: torch.device,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Return (trained model, loss of each step), a function of settings and rows alone."""
    torch.manual_seed(training.seed)
    model: Any = build_model(training.size, tokenizer)
    model.to(device)
    model.train()
    optimizers = _optimizers(model, training)
    losses, start, tokens = [], time.monotonic(), training.rows_per_batch * training.row_length
    with progress("train language model", training.num_steps, "steps") as shown:
        for step in range(training.num_steps):
            chosen = batch_rows(len(rows.token_RT), step, training.rows_per_batch, training.seed)
            # In float32: for matrices this narrow bfloat16 was slower in the backward pass.
            loss = weighted_loss(model, rows.take(chosen, device))
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


def _optimizers(model: LlamaForCausalLM, training: LanguageModelTraining) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, AdamW for embeddings and normalisations."""
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


def learning_rate_factor(training: LanguageModelTraining, step: int) -> float:
    """Return the share of the peak rate at `step` (from 0): a line up in the warm-up, then a line to zero."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    return (training.num_steps - step) / max(1, training.num_steps - training.warmup_steps)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: str) -> None:
    """Write configuration, weights, generation settings, tokenizer and chat template to `output`."""
    declare_ends(model.generation_config, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as file:
                storage.write_bytes(storage.join(output, name), file.read())
