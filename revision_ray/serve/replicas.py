"""Replicas that compute: the language model, the image encoder and the text encoder.

Plain classes, which run without Serve too; `app` deploys them.

Shapes: N texts, B images of a batch, D embedding_dim, C channels, H height, W width.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from revision_ray.align.alignment import load_alignment
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError
from revision_ray.data.images import UndecodableImage, decode_image
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode.checkpoints import read_tensors, weight_files
from revision_ray.encode.encoder import EncoderConfig, Tokens, backend
from revision_ray.model import ReVisionConfig, ReVisionForConditionalGeneration
from revision_ray.model.modeling import FrozenImageTower
from revision_ray.serve.calls import refusals_as_values
from revision_ray.serve.continuous import ContinuousEngine
from revision_ray.serve.drift import DriftReporter
from revision_ray.serve.engine import AnswerPiece, GenerationEngine, GroupedEngine, Prompt
from revision_ray.serve.images import digest
from revision_ray.serve.metrics import instruments
from revision_ray.serve.sampling import Sampling
from revision_ray.serve.settings import EngineConfig, ImageSettings

# --- language model -----------------------------------------------------------------------------------------


class _WithoutTower(ReVisionForConditionalGeneration):
    """Images come as embeddings: the tower's weights stay on the disk."""

    _keys_to_ignore_on_load_unexpected = [r"^image_tower\."]  # noqa: RUF012


class LanguageModel:
    """Prompts with image embeddings in, pieces of text out."""

    def __init__(self, model: str, engine: EngineConfig) -> None:
        """
        Raises:
            ConfigError: the folder holds no ReVision model, or the engine cannot run this one.
        """
        if engine.num_threads is not None:
            torch.set_num_threads(engine.num_threads)
        transformers_logging.disable_progress_bar()  # of the weights: in a replica's log it is noise
        folder = storage.local_copy(model)
        config = _configuration(folder)
        self._description = _described(model, config)
        config.image_tower = None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention: dict[str, Any] = (
            {} if engine.attention is None else {"attn_implementation": engine.attention}
        )
        loaded = _WithoutTower.from_pretrained(
            folder, config=config, dtype=_dtype(engine, device), **attention
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._engine = make_engine(loaded.to(device), tokenizer, engine)  # type: ignore[arg-type]
        self._description["context_length"] = self._engine.context_length
        self._timeout_s = engine.token_timeout_s

    @refusals_as_values
    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[AnswerPiece, None]:
        """As `Engine.stream`, and the queue's metrics are up to date when it begins, speaks and ends."""
        begun = False
        self._report()
        try:
            async with contextlib.aclosing(self._engine.stream(prompt, sampling)) as pieces:
                async for piece in pieces:
                    if not begun:
                        begun = True
                        self._report(begun)
                    yield piece
        finally:
            self._report()

    def check_health(self) -> None:
        """Raises RuntimeError when a step hangs: Serve then replaces the replica."""
        step_s = self._engine.figures()["step_s"]
        if step_s > self._timeout_s:
            raise RuntimeError(f"a step of the language model has run for {step_s:.0f} s")

    def figures(self) -> dict[str, float]:
        """running, waiting and slots of this replica."""
        return self._engine.figures()

    def describe(self) -> dict[str, Any]:
        """What is served: id (the folder's name), context_length, embedding_dim, num_visual_tokens, strategy
        and domain of the alignment, image_fingerprint and text_fingerprint of its encoder ("" if unknown)."""
        return dict(self._description)

    async def close(self) -> None:
        await self._engine.close()

    def _report(self, begun: bool = False) -> None:
        figures = self._engine.figures()
        metrics = instruments()
        metrics.queue_depth.set(figures["waiting"])
        metrics.running.set(figures["running"])
        if begun:  # once an answer: once a step would cost more than it says
            metrics.batch_size.observe(max(1, figures["running"]), tags={"part": "language_model"})


def _configuration(folder: str) -> ReVisionConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={folder}: no model can be loaded from there; name a folder that jobs/finetune.py or "
            "jobs/export.py wrote"
        ) from error
    if not isinstance(config, ReVisionConfig):
        raise ConfigError(f"model={folder}: its model_type is {config.model_type}, expected revision")
    return config


def _described(model: str, config: ReVisionConfig) -> dict[str, Any]:
    alignment, tower = config.alignment or {}, config.image_tower or {}
    return {
        "id": storage.name_of(model),
        "embedding_dim": config.embedding_dim,
        "num_visual_tokens": config.num_visual_tokens,
        "strategy": alignment.get("strategy", ""),
        "domain": alignment.get("domain", ""),
        "image_fingerprint": tower.get("fingerprint") or alignment.get("image_fingerprint") or "",
        "text_fingerprint": alignment.get("text_fingerprint") or "",
    }


def _dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    if engine.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[engine.dtype]


def make_engine(model: Any, tokenizer: Any, config: EngineConfig) -> GenerationEngine:
    """Return the engine of `config.kind`; `model` belongs to it from now on.

    Raises:
        ConfigError: the engine cannot run this model; the message names one that can.
    """
    engine_class = {"continuous": ContinuousEngine, "generate": GroupedEngine}[config.kind]
    return engine_class(model, tokenizer, config)


# --- image encoder ------------------------------------------------------------------------------------------

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

    @refusals_as_values
    async def encode(self, content: bytes) -> np.ndarray:
        """float32 (D,) of length one. Every call counts as an image served, cached or not.

        Raises:
            UndecodableImage: damaged, too large, or of a format that is not known.
        """
        key = digest(content)
        row_D = self._cache.get(key)
        task = self._under_way.get(key)
        known = row_D is not None or task is not None
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
        instruments().batch_size.observe(len(pixels), tags={"part": "image_encoder"})
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._computer, self._compute, pixels))

    @torch.inference_mode()
    def _compute(self, pixels: list[torch.Tensor]) -> np.ndarray:
        """float32 unit rows (B, D)."""
        return self._tower(torch.stack(pixels).to(self._device)).cpu().numpy()


# --- text encoder -------------------------------------------------------------------------------------------

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

    @refusals_as_values
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
        instruments().batch_size.observe(len(tokens), tags={"part": "text_encoder"})
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._worker, self._tower.encode, tokens))
