"""The images of a request, from their parts to their embeddings: fetched, encoded and checked side by side.

Shapes: I images, D embedding_dim.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from revision_ray.serve.api_error import ApiError
from revision_ray.serve.calls import patiently, rejected, together
from revision_ray.serve.conversation import Shown
from revision_ray.serve.images import bytes_of_data_uri, embedding_row
from revision_ray.serve.model_facts import ModelFacts
from revision_ray.serve.protocol import ImageUrlPart
from revision_ray.serve.remote import Fetcher
from revision_ray.serve.reporting import DriftReporter
from revision_ray.serve.settings import ImageSettings, Limits


class ServedImages:
    """Embeddings of what requests show. `encoder` is the image encoder's handle, None without a tower."""

    def __init__(
        self,
        facts: ModelFacts,
        encoder: Any,
        fetcher: Fetcher,
        reporter: DriftReporter,
        settings: ImageSettings,
        limits: Limits,
    ) -> None:
        self.facts = facts
        self._encoder, self._fetcher, self._reporter = encoder, fetcher, reporter
        self._settings, self._limits = settings, limits

    async def embeddings(self, shown: Sequence[Shown]) -> np.ndarray:
        """float32 (I, D), unit rows in the order of `shown`.

        Raises:
            ApiError: an image is refused; which one is named.
        """
        most = self._settings.max_per_request
        if len(shown) > most:
            raise ApiError(
                400, f"{len(shown)} images in one request, at most {most}", param=shown[most].param
            )
        if not shown:
            return np.empty((0, self.facts.embedding_dim), np.float32)
        return np.stack(await together([self._embedding(each) for each in shown]))

    async def _embedding(self, shown: Shown) -> np.ndarray:
        part = shown.part
        if not isinstance(part, ImageUrlPart):
            row_D = embedding_row(
                part.image_embedding,
                dim=self.facts.embedding_dim,
                fingerprint=self.facts.fingerprint,
                param=f"{shown.param}.image_embedding",
            )
            self._reporter.add(row_D)
            return row_D
        param = f"{shown.param}.image_url.url"
        if self._encoder is None:
            raise ApiError(
                400,
                f"{param}: this model holds no image tower; send an image_embedding part instead",
                param=param,
                code="no_image_tower",
            )
        content = await self._content(part.image_url.url, param)
        try:
            row_D = await patiently(
                lambda: self._encoder.encode.remote(content),
                "image encoder",
                timeout_s=self._limits.image_timeout_s,
                max_attempts=self._limits.max_attempts,
            )
        except ApiError as error:
            if error.status_code == 400:
                raise ApiError(400, f"{param}: {error.detail}", param=param, code=error.code) from error
            raise
        return row_D

    async def _content(self, url: str, param: str) -> bytes:
        try:
            if url[:5].lower() == "data:":
                # A large one takes milliseconds, which the event loop has not.
                return await asyncio.to_thread(
                    bytes_of_data_uri, url, max_bytes=self._settings.max_bytes, param=param
                )
            return await self._fetcher.fetch(url, param)
        except ApiError:
            rejected("image")
            raise
