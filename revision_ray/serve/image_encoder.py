"""The part of the application that turns pictures into embeddings: batches, a cache, a word to the monitor.

Shapes: B images of a batch, D embedding_dim, C channels, H height, W width.
"""

import asyncio
import contextlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from ray import serve
from transformers import AutoProcessor

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data.images import UndecodableImage, decode_image
from revision_ray.encode.checkpoints import read_tensors, weight_files
from revision_ray.model import ReVisionConfig
from revision_ray.model.modeling import FrozenImageTower
from revision_ray.serve.images import digest
from revision_ray.serve.metrics import DriftReporter, instruments
from revision_ray.serve.settings import ImageSettings

_PREFIX = "image_tower."
# Characters of a decoder's reason that a message repeats.
_MAX_REASON = 200


def load_image_tower(model: str) -> FrozenImageTower:
    """The image tower of a saved model, without the rest of it; on the GPU where this process has one.

    In the saved dtype on a GPU, in float32 on the CPU.

    Raises:
        ConfigError: the model holds none, or its weights are not there.
    """
    folder = storage.local_copy(model)
    config = ReVisionConfig.from_pretrained(folder)
    if config.image_tower is None:
        raise ConfigError(f"{model}: the model holds no image tower")
    tower = FrozenImageTower(config.image_tower)
    named = read_tensors(weight_files(folder), lambda name: name.startswith(_PREFIX))
    tower.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in named.items()})
    on_gpu = torch.cuda.is_available()
    dtype = next(iter(named.values())).dtype if on_gpu else torch.float32
    return tower.to(torch.device("cuda" if on_gpu else "cpu"), dtype).eval()


class ImageEncoder:
    """Unit embeddings of encoded images. Identical images are encoded once, also when they come at once."""

    def __init__(self, model: str, settings: ImageSettings, monitor: Any = None) -> None:
        """
        Raises:
            ConfigError: the model holds no image tower.
        """
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._tower = load_image_tower(model)
        self._device = next(self._tower.parameters()).device
        self._processor: Any = AutoProcessor.from_pretrained(storage.local_copy(model)).image_processor
        self._reporter = DriftReporter(monitor)
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[np.ndarray]] = {}
        # Decoding and the tower each have their threads: a batch is computed while the next is decoded.
        self._decoders = ThreadPoolExecutor(settings.num_threads, "decode")
        self._computer = ThreadPoolExecutor(1, "tower")
        self._embed.set_max_batch_size(settings.batch_size)  # type: ignore[attr-defined]
        self._embed.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    async def encode(self, content: bytes) -> np.ndarray:
        """float32 (D,) of length one. Every call counts as an image served, cached or not.

        Raises:
            UndecodableImage: damaged, too large, or of a format that is not known.
        """
        key = digest(content)
        row_D = self._cache.get(key)
        task = self._under_way.get(key)
        known = row_D is not None or task is not None
        with contextlib.suppress(Exception):  # metrics fail no request
            instruments().image_cache.inc(tags={"result": "hit" if known else "miss"})
        if row_D is None:
            if task is None:
                task = asyncio.create_task(self._encode_new(key, content))
                self._under_way[key] = task
                task.add_done_callback(lambda done: self._forget(key, done))
            # Others may wait for the same image: one who leaves must not take it from them.
            row_D = await asyncio.shield(task)
        else:
            self._cache.move_to_end(key)
        self._reporter.add(row_D)
        return row_D

    def check_health(self) -> None:
        """Serve replaces the replica where this raises; a loop that hangs does not answer at all."""

    async def _encode_new(self, key: bytes, content: bytes) -> np.ndarray:
        loop = asyncio.get_running_loop()
        pixels_CHW = await loop.run_in_executor(self._decoders, self._prepare, content)
        row_D: np.ndarray = await self._embed(pixels_CHW)
        if self._settings.cache_entries:
            self._cache[key] = row_D
            if len(self._cache) > self._settings.cache_entries:
                self._cache.popitem(last=False)
        return row_D

    def _forget(self, key: bytes, done: asyncio.Task) -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen: nobody may be waiting any more

    def _prepare(self, content: bytes) -> torch.Tensor:
        try:
            image = decode_image(content, max_pixels=self._settings.max_pixels)
        except UndecodableImage as error:
            reason = str(error).partition(" that begin with ")[0]  # no answer quotes an image's bytes
            raise UndecodableImage(f"the image is refused: {reason[:_MAX_REASON]}") from error
        try:
            return self._processor([image], return_tensors="pt")["pixel_values"][0]
        except ValueError as error:  # of the library's processors, as for images of extreme proportions
            raise DataError(f"the encoder does not take the image: {str(error)[:_MAX_REASON]}") from error

    @serve.batch
    async def _embed(self, pixels: list[torch.Tensor]) -> list[np.ndarray]:
        with contextlib.suppress(Exception):  # metrics fail no request
            instruments().batch_size.observe(len(pixels), tags={"part": "image_encoder"})
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._computer, self._compute, pixels))

    @torch.inference_mode()
    def _compute(self, pixels: list[torch.Tensor]) -> np.ndarray:
        """float32 unit rows (B, D)."""
        return self._tower(torch.stack(pixels).to(self._device)).cpu().numpy()
