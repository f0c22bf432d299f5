"""POST /v1/embeddings: texts through the text tower, pictures through the image tower, in one space.

Shapes: N texts, D embedding_dim.
"""

import base64
from typing import Any

import numpy as np

from revision_ray.serve.calls import Refusal, patiently
from revision_ray.serve.images import ServedImages
from revision_ray.serve.prompt import ImagePartPlace
from revision_ray.serve.protocol import (
    ApiError,
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbeddingsUsage,
    ImageUrlPart,
)
from revision_ray.serve.replicas import EncodedTexts, TextTooLong
from revision_ray.serve.settings import RequestLimits


class EmbeddingInputs:
    """Embeds what requests name. `texts` is the text encoder's handle, None without one."""

    def __init__(
        self, model: str, texts: Any, images: ServedImages, has_fit: bool, limits: RequestLimits
    ) -> None:
        self._model, self._texts, self._images, self._limits = model, texts, images, limits
        self._has_fit = has_fit
        self._described: dict[str, Any] | None = None

    async def embed(self, request: EmbeddingsRequest) -> Embeddings:
        """Return the body of the answer.

        Raises:
            ApiError: an input is refused, or the parts that embed it are not there.
        """
        items = request.items
        self._check(request, items)
        texts = [item for item in items if isinstance(item, str)]
        shown = [
            ImagePartPlace(param=f"input[{position}]", part=item)
            for position, item in enumerate(items)
            if isinstance(item, ImageUrlPart)
        ]
        space = await self._space(bool(texts), shown)
        if request.dimensions not in (None, space["embedding_dim"]):
            raise ApiError(
                400,
                f"dimensions: embeddings have {space['embedding_dim']}, and are not cut; leave it out",
                param="dimensions",
            )
        encoded = await self._encode(request, items) if texts else None
        of_texts = iter(zip(encoded.rows_ND, encoded.truncated, strict=True) if encoded else ())
        of_images = ((row_D, False) for row_D in await self._images.embeddings(shown))
        rows = [next(of_texts if isinstance(item, str) else of_images) for item in items]
        num_tokens = encoded.num_tokens if encoded else 0
        return Embeddings(
            object="list",
            data=[
                Embedding(
                    object="embedding",
                    index=index,
                    embedding=_written(row_D, request.encoding_format),
                    truncated=truncated,
                )
                for index, (row_D, truncated) in enumerate(rows)
            ],
            model=self._model,
            usage=EmbeddingsUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
            encoder_fingerprint=space["fingerprint"] or "",
            num_truncated=sum(truncated for _, truncated in rows),
        )

    def _check(self, request: EmbeddingsRequest, items: list[str | ImageUrlPart]) -> None:
        limits = self._limits
        if len(items) > limits.max_texts:
            raise ApiError(400, f"input: {len(items)} inputs, at most {limits.max_texts}", param="input")
        if sum(len(item) for item in items if isinstance(item, str)) > limits.max_text_characters:
            raise ApiError(
                400,
                f"input: more than {limits.max_text_characters} characters; send shorter texts, or fewer in "
                "one request",
                param="input",
                code="context_length_exceeded",
            )
        if request.align and not self._has_fit:
            raise ApiError(400, "align: this server has no fit; leave it out", param="align")

    async def _space(self, with_texts: bool, shown: list[ImagePartPlace]) -> dict[str, Any]:
        """embedding_dim and fingerprint of the encoder that answers; texts and images must share one."""
        facts = self._images.facts
        of_images = {"embedding_dim": facts.embedding_dim, "fingerprint": facts.fingerprint}
        if not with_texts:
            return of_images
        if self._texts is None:
            raise ApiError(
                400,
                "input: this server has no text encoder; its operator sets encoder.model for one",
                param="input",
                code="no_text_encoder",
            )
        if self._described is None:
            self._described = await self._patiently(lambda: self._texts.describe.remote())
        of_texts = self._described
        assert of_texts is not None
        if shown and of_texts != of_images:
            raise ApiError(
                400,
                "input: texts and images are embedded by different encoders here, whose spaces have nothing "
                "to do with each other; send them apart",
                param="input",
            )
        return of_texts

    async def _encode(self, request: EmbeddingsRequest, items: list[str | ImageUrlPart]) -> EncodedTexts:
        """The texts among `items`.

        Raises:
            ApiError: one is longer than the encoder takes, and nobody has said that it may be cut.
        """
        places = [place for place, item in enumerate(items) if isinstance(item, str)]
        texts = [items[place] for place in places]
        truncate = self._limits.truncate_texts or request.truncate_prompt_tokens is not None

        async def attempt() -> Any:
            answer = await self._texts.encode.remote(texts, bool(request.align), truncate)
            if not (isinstance(answer, Refusal) and isinstance(answer.error, TextTooLong)):
                return answer
            text = answer.error
            param = "input" if isinstance(request.input, str) else f"input[{places[text.index]}]"
            raise ApiError(
                400,
                f"{param}: the text has {text.num_tokens} tokens, and the encoder takes {text.limit}; "
                "shorten it, or set truncate_prompt_tokens to -1 to have its end cut off",
                param=param,
                code="context_length_exceeded",
            )

        return await self._patiently(attempt)

    async def _patiently(self, attempt: Any) -> Any:
        return await patiently(
            attempt,
            "text encoder",
            timeout_s=self._limits.request_timeout_s,
            max_attempts=self._limits.max_attempts,
        )


def _written(row_D: np.ndarray, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row_D.astype("<f4").tobytes()).decode()
    return row_D.tolist()
