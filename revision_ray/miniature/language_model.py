"""The miniature world's language model: its tokenizer, its size, its loss, and what it knows. No Ray.

Shapes: R rows, B rows of a batch, T tokens, V words of the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from revision_ray.core.errors import ConfigError
from revision_ray.miniature.documents import (
    ANSWER,
    ANSWER_WEIGHT,
    END,
    IMAGE,
    PAD,
    QUESTION,
    UNKNOWN,
    Document,
    DocumentConfig,
    examination,
)

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
    """How large the Llama is."""

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
    """A word-level tokenizer of all words of `documents`, lower-cased; punctuation is a word.

    Ids: special tokens, words in alphabetical order, and last `<image>`, which is beyond the vocabulary of
    the language model: the multimodal model replaces it before anything looks it up.
    """
    texts = {text for pieces in documents for text, _ in pieces}
    found = Counter(word for text in texts for word in re.findall(r"<\w+>|\w+|[^\w\s]+", text.lower()))
    special = [PAD, UNKNOWN, END, QUESTION, ANSWER]
    vocabulary = [*special, *sorted(found.keys() - {*special, IMAGE}), IMAGE]
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
    """A Llama with fresh float32 weights for all tokens but `<image>`, from torch's global seed."""
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
    """Token ids and weights of each document; nothing precedes its first token, which has the weight 0."""
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
        """These of the rows, on `device`."""
        parts = (self.token_RT[rows], self.position_RT[rows], self.weight_RT[rows])
        token_BT, position_BT, weight_BT = (part.to(device) for part in parts)
        return PackedDocuments(token_RT=token_BT.long(), position_RT=position_BT.long(), weight_RT=weight_BT)


def pack(encoded: Sequence[Tokens], row_length: int) -> PackedDocuments:
    """All documents in as few rows as best fit finds: the longest first, each where the least room is left.

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
    """Mean cross entropy in nats of the next token, over all tokens of `batch` by their weights."""
    # Positions that begin anew tell transformers where documents end, and no token attends across.
    logits_BTV = model(input_ids=batch.token_RT, position_ids=batch.position_RT, use_cache=False).logits
    target_BT, weight_BT = batch.token_RT[:, 1:], batch.weight_RT[:, 1:]
    losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), reduction="none")
    return (losses * weight_BT.flatten()).sum() / weight_BT.sum()


@torch.no_grad()
def examine(
    model: Any, tokenizer: PreTrainedTokenizerFast, config: DocumentConfig, num_scenes: int
) -> dict[str, Any]:
    """What the model knows of held-out scenes, from one caption of each.

    `answers`: share of greedy answers that are right to the end token, by kind of question, and `blind`, the
    same without the caption. A short caption leaves background and relation out one time in five, so that not
    even a perfect reader reaches 1 there. `paraphrase_loss`: nats per token, end token included.
    """
    asked = examination(config, num_scenes)
    was_training = model.training
    model.eval()
    rows = pack(encode(tokenizer, asked.paraphrases), MAX_LENGTH)
    batch = rows.take(np.arange(len(rows.token_RT)), model.device)
    measured = {
        "num_scenes": num_scenes,
        "num_questions": dict(sorted(Counter(asked.kinds).items())),
        "answers": _shares(asked.kinds, _right(model, encode(tokenizer, asked.sighted))),
        "blind": _shares(asked.kinds, _right(model, encode(tokenizer, asked.blind))),
        "paraphrase_loss": weighted_loss(model, batch).item(),
    }
    model.train(was_training)
    return measured


def _right(model: Any, encoded: Sequence[Tokens]) -> list[bool]:
    """Whether the greedy answer at the end of each document is its own.

    It is exactly if each of its tokens is the likeliest after those before it, which one forward pass shows.
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
