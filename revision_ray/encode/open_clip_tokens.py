"""Texts to token ids for open_clip's text towers, each of which came with a tokenizer of its own kind."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import PlainTexts, Tokens
from revision_ray.encode.open_clip_source import Source
from revision_ray.errors import ConfigError


class FileTokens:
    """A `tokenizers` file whose post-processor adds start and end token; cut texts keep the end token."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(context)
        self._tokenizer, self._context = tokenizer, context
        self._plain = PlainTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        self._num_special = tokenizer.num_special_tokens_to_add(False)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        rows = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(list(texts)), strict=True):
            if self._plain.names_control(text):
                rows.append(self._plain(text, self._context))
                continue
            # What was cut off lies in parts, each with special tokens of its own.
            cut_off = sum(len(part.ids) - self._num_special for part in encoding.overflowing)
            rows.append(
                Tokens(
                    ids=np.asarray(encoding.ids, dtype=np.int32),
                    num_tokens=len(encoding.ids) + cut_off,
                    limit=self._context,
                )
            )
        return rows


class ClipTokens:
    """The ids of open_clip's SimpleTokenizer by way of the tokenizers library.

    The original merges a word's pairs in a Python loop that is quadratic in the word: minutes for 100 kB
    without a space.
    """

    def __init__(self, original: SimpleTokenizer, context: int) -> None:
        assert original.context_length is not None
        # The original takes the names of its special tokens in a text for these tokens; here they are text.
        special = "|".join(original.decoder[token_id] for token_id in original.all_special_ids)
        words = original.pat.pattern.removeprefix(f"{special}|")
        merges = [pair for pair in original.bpe_ranks if len(pair) == 2]
        self._words = Tokenizer(models.BPE(original.encoder, merges, end_of_word_suffix="</w>"))
        self._words.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(f"(?i){words}"), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._original, self._context = original, context

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        start, end = self._original.sot_token_id, self._original.eot_token_id
        rows = []
        for encoding in self._words.encode_batch([self._original.clean_fn(text) for text in texts]):
            words_T = encoding.ids
            rows.append(
                Tokens(
                    ids=np.asarray([start, *words_T[: self._context - 2], end], dtype=np.int32),
                    num_tokens=len(words_T) + 2,
                    limit=self._context,
                )
            )
        return rows


class LibraryTokens:
    """Whatever tokenizer open_clip chose, padded by itself to full length: its text tower may read that."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._plain = PlainTexts(tokenizer.tokenizer)
        tokenizer.tokenizer.split_special_tokens = True  # a special token's name in a text is text

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        ids_NT = self._tokenizer(list(texts), context_length=self._context).numpy().astype(np.int32)
        clean = getattr(self._tokenizer, "clean_fn", str)
        cleaned = [clean(text) for text in texts]
        whole = self._tokenizer.tokenizer(cleaned, verbose=False)["input_ids"]
        # The mode "clips" adds a class token behind the padding.
        clips = getattr(self._tokenizer, "tokenizer_mode", "") == "clips"
        rows = []
        for text, row_T, ids in zip(cleaned, ids_NT, whole, strict=True):
            num_tokens = len(ids) + clips
            if not clips and self._plain.names_control(text):
                plain = self._plain(text, self._context)
                row_T[:] = self._tokenizer.tokenizer.pad_token_id
                row_T[: len(plain.ids)] = plain.ids
                num_tokens = plain.num_tokens
            rows.append(Tokens(ids=row_T, num_tokens=num_tokens, limit=self._context))
        return rows


def tokenizer_of(source: Source) -> Any:
    """A `tokenizers` file beside the configuration, else what open_clip chooses for it.

    Raises:
        ConfigError: the tokenizer cannot be read, or knows more tokens than the text tower.
    """
    text_cfg = source.model_cfg["text_cfg"]
    named = text_cfg.get("hf_tokenizer_name")
    file = os.path.join(source.folder, "tokenizer.json") if source.folder else ""
    kwargs = text_cfg.get("tokenizer_kwargs") or {}
    try:
        if source.folder is None:
            return open_clip.get_tokenizer(source.name)
        if named:
            mode = text_cfg.get("tokenizer_mode")
            origin = source.folder if os.path.isfile(file) else named
            return HFTokenizer(origin, context_length=source.context, tokenizer_mode=mode, **kwargs)
    except (*checkpoints.DAMAGED, ImportError) as error:
        raise checkpoints.damaged(f"{source.name} (tokenizer)", error) from error
    if not os.path.isfile(file):
        return SimpleTokenizer(context_length=source.context, **kwargs)
    tokenizer = _read_tokenizer(file)
    known, taken = tokenizer.get_vocab_size(), text_cfg.get("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    if known > taken:
        raise ConfigError(
            f"{file}: knows {known} tokens, but the text tower beside it takes {taken} "
            "(text_cfg.vocab_size); they do not belong together"
        )
    return tokenizer


def _read_tokenizer(file: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing narrower for a file that it cannot parse
        raise checkpoints.damaged(file, error) from error


def vocabulary_of(tokenizer: Any) -> bytes:
    """What tells this tokenizer from every other, for the fingerprint."""
    if isinstance(tokenizer, SimpleTokenizer):
        with open(default_bpe(), "rb") as file:
            return file.read()
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.tokenizer.backend_tokenizer
    return backend.to_str().encode()
