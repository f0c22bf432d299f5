"""The part of the application behind /v1/embeddings: texts to embeddings, aligned where asked.

Shapes: N texts, D embedding_dim.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve

from revision_ray.align.alignment import load_alignment
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, DataError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode.encoder import EncoderConfig, Tokens, backend
from revision_ray.serve.metrics import instruments

_BATCH_SIZE, _BATCH_WAIT_S = 64, 0.005


class TextTooLong(DataError):  # noqa: N818
    """A text that the tower would cut: its place among the texts, its tokens, and the tower's limit."""

    def __init__(self, index: int, num_tokens: int, limit: int) -> None:
        super().__init__(index, num_tokens, limit)  # as pickling makes it again
        self.index, self.num_tokens, self.limit = index, num_tokens, limit

    def __str__(self) -> str:
        return f"text {self.index} has {self.num_tokens} tokens, and the encoder takes {self.limit}"


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """What the text tower made of texts."""

    rows_ND: np.ndarray
    """float32 unit rows, aligned where that was asked for."""
    num_tokens: int
    """That the tower took, special tokens included, padding not."""
    truncated: tuple[bool, ...]
    """Whether the end of each text was cut off."""


class TextEncoder:
    """The text tower of a dual encoder, and the fit that maps its rows to where images are."""

    def __init__(self, encoder: EncoderConfig, alignment: str = "", num_threads: int = 2) -> None:
        """
        Raises:
            AlignmentError: no fit there, or one that was made with another encoder.
            ConfigError: the encoder cannot be loaded.
        """
        torch.set_num_threads(num_threads)
        module = backend(encoder)
        self.fingerprint = module.fingerprint(encoder)
        self._prepare = module.text_preparer(encoder)
        self._tower: Any = module.text_tower(encoder)
        self._alignment = load_alignment(alignment) if alignment else None
        if self._alignment is not None:
            identity = EncoderIdentity(name=encoder.kind, fingerprint=self.fingerprint)
            self._alignment.check_encoder(identity, self._tower.embedding_dim, "encoder", override=False)
        # Tokenizers are not for several threads, and the tower fills the cores by itself.
        self._worker = ThreadPoolExecutor(1, "text-encoder")
        self._embed.set_max_batch_size(_BATCH_SIZE)  # type: ignore[attr-defined]
        self._embed.set_batch_wait_timeout_s(_BATCH_WAIT_S)  # type: ignore[attr-defined]

    def describe(self) -> dict[str, Any]:
        return {"embedding_dim": self._tower.embedding_dim, "fingerprint": self.fingerprint}

    def check_health(self) -> None:
        """Serve replaces the replica where this raises; a loop that hangs does not answer at all."""

    async def encode(self, texts: Sequence[str], align: bool, truncate: bool) -> EncodedTexts:
        """Embed texts. With `align` their rows lie where the fit says; with `truncate` long ones are cut.

        Raises:
            AlignmentError: `align`, but there is no fit, or a text falls onto the origin.
            TextTooLong: a text has more tokens than the tower takes, and it may not be cut.
        """
        if align and self._alignment is None:
            raise AlignmentError("this server has no fit to align texts with; leave align out")
        loop = asyncio.get_running_loop()
        tokens: list[Tokens] = await loop.run_in_executor(self._worker, self._prepare, list(texts))
        for index, each in enumerate(tokens):
            if each.truncated and not truncate:
                raise TextTooLong(index, each.num_tokens, each.limit)
        rows_ND = np.stack(await asyncio.gather(*(self._embed(each.ids) for each in tokens)))
        if align:
            rows_ND = await loop.run_in_executor(self._worker, self._aligned, texts, rows_ND)
        return EncodedTexts(
            rows_ND=rows_ND,
            num_tokens=sum(each.num_taken for each in tokens),
            truncated=tuple(each.truncated for each in tokens),
        )

    def _aligned(self, texts: Sequence[str], rows_ND: np.ndarray) -> np.ndarray:
        assert self._alignment is not None
        # Noise, where the strategy has some, belongs to the row's id: here, to what the text says.
        ids = [storage.sha256(text.encode()) for text in texts]
        aligned_ND, invalid = self._alignment.affine.apply(rows_ND, ids)
        if invalid:
            raise AlignmentError("a text has no direction after alignment; change it, or leave align out")
        return aligned_ND

    @serve.batch
    async def _embed(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        with contextlib.suppress(Exception):  # metrics fail no request
            instruments().batch_size.observe(len(tokens), tags={"part": "text_encoder"})
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._worker, self._tower.encode, tokens))
