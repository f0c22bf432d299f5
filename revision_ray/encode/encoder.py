"""What an encoder is: a CPU side that prepares rows, a device side that turns them into unit rows.

A dual encoder is used one tower at a time, so that a text job never holds the image tower. The CPU side
(`ImagePreparer`, `TextPreparer`) loads no weights and runs in ordinary tasks; the device side
(`ImageTower`, `TextTower`) lives once in each actor.

Shapes: N rows, D embedding_dim, C channels, H height, W width.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.data.chat import ControlTokenMarks

# One thread per tokenizer: Ray gives a task so many CPUs and counts on it, and a pool of threads does not
# survive a fork (the tokenizers library then warns and goes on with one).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which dual encoder, from where, and how it runs."""

    kind: Literal["open_clip", "transformers", "llm2clip"] = "open_clip"
    """Library that the checkpoint belongs to."""
    model: str = MISSING
    """open_clip: architecture name, path of a config JSON, folder with open_clip_config.json, or hf-hub:ID.
    transformers: hub id or folder (CLIP, SigLIP, SigLIP 2). llm2clip: hub id or folder of the image
    checkpoint."""
    pretrained: str | None = None
    """open_clip only: a pretrained tag, or the path of a checkpoint file (a folder brings its own)."""
    text_model: str | None = None
    """llm2clip only: hub id or folder of the text language model."""
    revision: str | None = None
    """Hub revision of `model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is bfloat16 on a GPU that has it and float32 on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU that the actor was given, else the CPU."""
    trust_remote_code: bool = False
    """llm2clip only: run Python code that the image checkpoint ships, where its weights are not laid out as
    we know them. Off unless you have read that code."""


class ImagePreparer(Protocol):
    """RGB image to the uint8 pixels that the tower takes: resized and cropped, not yet normalised."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (C, H, W), the same shape for every image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One text as the tower takes it, and what it was before the tower's limit cut it."""

    ids: np.ndarray
    """int32 (T,), without padding unless the tower's own tokenizer pads."""
    num_tokens: int
    """Of the whole text: with special tokens, without padding."""
    limit: int
    """Tokens that the tower takes."""

    @property
    def truncated(self) -> bool:
        return self.num_tokens > self.limit

    @property
    def num_taken(self) -> int:
        """Tokens that the tower takes of this text, without padding."""
        return min(self.num_tokens, self.limit)


class PlainTexts:
    """Texts that name a control token (`</s>`, `<|endoftext|>`), as the characters that they consist of.

    All other texts are the tokenizer's own work.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers'."""
        self._texts = ControlTokenMarks(tokenizer)
        whole, alone = (
            list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False)
        )
        starts = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        start = next(starts, 0)
        self._before, self._behind = whole[:start], whole[start + len(alone) :]

    def names_control(self, text: str) -> bool:
        return self._texts.names_control(text)

    def __call__(self, text: str, context: int) -> Tokens:
        """
        Raises:
            UnwritableToken: the tokenizer makes a control token of the text even so.
        """
        body = self._texts.encode(text)
        room = context - len(self._before) - len(self._behind)
        ids = [*self._before, *body[:room], *self._behind]
        num_tokens = len(self._before) + len(body) + len(self._behind)
        return Tokens(ids=np.asarray(ids, dtype=np.int32), num_tokens=num_tokens, limit=context)


class TextPreparer(Protocol):
    def __call__(self, texts: Sequence[str]) -> list[Tokens]: ...


class ImageTower(Protocol):
    embedding_dim: int

    def encode(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        """float32 unit rows (N, D) of uint8 pixels (N, C, H, W)."""
        ...


class TextTower(Protocol):
    embedding_dim: int

    def encode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """float32 unit rows (N, D) of N token sequences; padding changes no row beyond float tolerance."""
        ...


class Backend(Protocol):
    """What each of `open_clip.py`, `transformers.py`, `llm2clip.py` offers as module-level functions."""

    def image_preparer(self, config: EncoderConfig) -> ImagePreparer: ...
    def text_preparer(self, config: EncoderConfig) -> TextPreparer: ...
    def image_tower(self, config: EncoderConfig) -> ImageTower: ...
    def text_tower(self, config: EncoderConfig) -> TextTower: ...
    def fingerprint(self, config: EncoderConfig) -> str: ...


def located(encoder: EncoderConfig) -> EncoderConfig:
    """Local paths made absolute: workers run in folders of their own. Names on a hub stay."""
    paths = {
        name: os.path.abspath(value)
        for name in ("model", "pretrained", "text_model")
        if (value := getattr(encoder, name)) and os.path.exists(value)
    }
    return replace(encoder, **paths)


def backend(config: EncoderConfig) -> Backend:
    """The module that implements `config.kind`."""
    return importlib.import_module(f"revision_ray.encode.{config.kind}")  # type: ignore[return-value]


def device_of(config: EncoderConfig) -> torch.device:
    """The device that `config` and this machine allow.

    Raises:
        ConfigError: CUDA was asked for by name and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "encoder.device=cuda, but this process sees no GPU; give the actors one (num_gpus) or use "
            "device=auto"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def dtype_of(config: EncoderConfig) -> torch.dtype:
    """The compute dtype that `config` and the device allow."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    on_gpu = device_of(config).type == "cuda"
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """How bytes become what an image tower was trained on: (byte * scale - mean) / std, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels_NCHW: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Pixels on `device`: they travel as bytes, a quarter of float32, and are scaled there in float32."""
        # A view of shared memory (Arrow, Ray) is read-only, which torch.from_numpy warns about.
        raw_NCHW = torch.from_numpy(np.require(pixels_NCHW, requirements=["C", "W"])).to(device)
        mean_C11, std_C11 = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std)
        )
        return ((raw_NCHW.float() * self.scale - mean_C11) / std_C11).to(dtype)


def pad_right(tokens: Sequence[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """int64 (N, length): each sequence from the left, `pad_id` behind it."""
    padded_NT = np.full((len(tokens), length), pad_id, dtype=np.int64)
    for row_T, ids in zip(padded_NT, tokens, strict=True):
        row_T[: len(ids)] = ids
    return padded_NT


def unit_rows(features_ND: torch.Tensor) -> np.ndarray:
    """float32 rows of length one in main memory, normalised in float32 whatever the compute dtype was."""
    return torch.nn.functional.normalize(features_ND.float(), dim=-1).cpu().numpy()
