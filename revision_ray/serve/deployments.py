"""The parts as Serve runs them. What a request caused by itself comes back as a value.

Serve logs what is raised, with its trace: a refusal under load must cost little, and tell nothing about the
prompt.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from revision_ray.errors import RevisionError
from revision_ray.serve.engine import Piece, Prompt, QueueFull, Sampling
from revision_ray.serve.image_encoder import ImageEncoder
from revision_ray.serve.language_model import LanguageModel
from revision_ray.serve.text_encoder import TextEncoder

_REFUSALS = (RevisionError, QueueFull, TimeoutError)


class LanguageModelReplica(LanguageModel):
    async def stream(  # type: ignore[override]
        self, prompt: Prompt, sampling: Sampling
    ) -> AsyncGenerator[Piece | Exception, None]:
        pieces = super().stream(prompt, sampling)
        try:
            async for piece in pieces:
                yield piece
        except _REFUSALS as refusal:
            yield refusal
        finally:
            await pieces.aclose()


class ImageEncoderReplica(ImageEncoder):
    async def encode(self, content: bytes) -> Any:
        try:
            return await super().encode(content)
        except _REFUSALS as refusal:
            return refusal


class TextEncoderReplica(TextEncoder):
    async def encode(self, texts: Sequence[str], align: bool, truncate: bool) -> Any:
        try:
            return await super().encode(texts, align, truncate)
        except _REFUSALS as refusal:
            return refusal
