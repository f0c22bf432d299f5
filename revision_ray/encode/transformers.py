"""CLIP, SigLIP and SigLIP 2 dual encoders of the transformers library, one tower at a time.

What differs between them: CLIP pads at will (its text tower looks back only and pools at the end token) and
is cut at 77 tokens; SigLIP reads its padding, so every text goes in at full length (64), lower-cased, without
a mask, as it was trained. Fixed-resolution SigLIP 2 is SigLIP with another tokenizer.

Shapes: N rows, D embedding_dim, C channels, H height, W width, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipTextModel,
    SiglipVisionModel,
)

from revision_ray.core.errors import ConfigError, quote
from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import (
    EncoderConfig,
    PixelScale,
    PlainTexts,
    Tokens,
    device_of,
    dtype_of,
    pad_right,
    unit_rows,
)


@dataclass(frozen=True)
class _Tower:
    """A tower's class, the name of its output, and the name of that output's width in its configuration."""

    model: type[PreTrainedModel]
    output: str
    dim: str


@dataclass(frozen=True)
class _Family:
    config: type[PreTrainedConfig]
    image: _Tower
    text: _Tower
    reads_padding: bool
    lowercase: bool


_FAMILIES = {
    "clip": _Family(
        CLIPConfig,
        _Tower(CLIPVisionModelWithProjection, "image_embeds", "projection_dim"),
        _Tower(CLIPTextModelWithProjection, "text_embeds", "projection_dim"),
        reads_padding=False,
        lowercase=False,  # its tokenizer does
    ),
    "siglip": _Family(
        SiglipConfig,
        _Tower(SiglipVisionModel, "pooler_output", "hidden_size"),
        _Tower(SiglipTextModel, "pooler_output", "projection_size"),
        reads_padding=True,
        lowercase=True,
    ),
}


def _open(folder: str) -> tuple[_Family, Any]:
    """The family of the checkpoint in `folder` and its configuration."""
    document = checkpoints.read_json(f"{folder}/config.json")
    model_type = document.get("model_type")
    if model_type == "siglip2":
        raise ConfigError(
            f"{folder}: is a SigLIP 2 of flexible resolution (NaFlex), whose patches vary from image to "
            "image; use a SigLIP 2 checkpoint of fixed resolution, for example "
            "google/siglip2-base-patch16-224"
        )
    if model_type not in _FAMILIES:
        raise ConfigError(
            f"{folder}/config.json: model_type is {quote(model_type, 80)}; encoder.kind=transformers takes "
            f"{sorted(_FAMILIES)} (SigLIP 2 of fixed resolution is 'siglip'); for others see "
            "encoder.kind=open_clip or llm2clip"
        )
    family = _FAMILIES[model_type]
    try:
        config = family.config.from_dict(document)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise checkpoints.damaged(f"{folder}/config.json", error) from error
    if model_type == "clip":
        # A tower loaded alone reads the width of the joint space from its own part of the configuration,
        # which holds the library's default where the checkpoint leaves it out.
        config.text_config.projection_dim = config.vision_config.projection_dim = config.projection_dim
    return family, config


def load_processor(folder: str) -> Any:
    """The image processor that `folder` describes.

    Raises:
        ConfigError: there is none, or it does not give images of one fixed size.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except checkpoints.DAMAGED as error:
        raise checkpoints.damaged(f"{folder}/preprocessor_config.json", error) from error


def load_tokenizer(folder: str) -> Any:
    """The tokenizer that `folder` describes.

    Raises:
        ConfigError: there is none, or a package that it needs is missing.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (*checkpoints.DAMAGED, ImportError, AttributeError) as error:
        raise checkpoints.damaged(f"{folder} (tokenizer)", error) from error


class ProcessorImages:
    """The library's own processor up to the bytes; scaling and normalising are left to the tower."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return pixels["pixel_values"][0].numpy()


def pixel_scale_of(processor: Any) -> PixelScale:
    """What `ProcessorImages` leaves out of the work of `processor`."""
    return PixelScale(
        scale=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )


class _TransformersTexts:
    def __init__(self, tokenizer: Any, context: int, lowercase: bool) -> None:
        self._tokenizer, self._context, self._lowercase = tokenizer, context, lowercase
        self._plain = PlainTexts(tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        texts = [text.lower() for text in texts] if self._lowercase else list(texts)
        rows = []
        for text, whole in zip(texts, self._tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if self._plain.names_control(text):
                rows.append(self._plain(text, self._context))
                continue
            ids, num_tokens = whole, len(whole)
            if num_tokens > self._context:
                # By the tokenizer itself: which special tokens stay is its knowledge.
                ids = self._tokenizer(text, truncation=True, max_length=self._context)["input_ids"]
            ids = np.asarray(ids, dtype=np.int32)
            rows.append(Tokens(ids=ids, num_tokens=num_tokens, limit=self._context))
        return rows


class ModelImages:
    """An image tower of the library on its device; `output` names what it returns the embedding as."""

    def __init__(
        self, model: PreTrainedModel, output: str, dim: int, scale: PixelScale, device: torch.device
    ) -> None:
        self.model = model.to(device)  # type: ignore[arg-type]
        self.embedding_dim = dim
        self._output, self._scale = output, scale

    @torch.inference_mode()
    def encode(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        pixels = self._scale(pixels_NCHW, self.model.device, self.model.dtype)
        return unit_rows(getattr(self.model(pixel_values=pixels), self._output))


class _ModelTexts:
    def __init__(self, model: PreTrainedModel, family: _Family, pad_id: int, device: torch.device) -> None:
        self.model = model.to(device)  # type: ignore[arg-type]
        self.embedding_dim = getattr(model.config, family.text.dim)
        self._family, self._pad_id = family, pad_id

    @torch.inference_mode()
    def encode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        context = self.model.config.max_position_embeddings
        length = context if self._family.reads_padding else max(map(len, tokens), default=1)
        ids_NT = torch.from_numpy(pad_right(tokens, length, self._pad_id)).to(self.model.device)
        return unit_rows(getattr(self.model(input_ids=ids_NT), self._family.text.output))


def image_preparer(config: EncoderConfig) -> ProcessorImages:
    folder = checkpoints.folder_of(config.model, config.revision)
    _open(folder)
    return ProcessorImages(load_processor(folder))


def text_preparer(config: EncoderConfig) -> _TransformersTexts:
    folder = checkpoints.folder_of(config.model, config.revision)
    family, model_config = _open(folder)
    context = model_config.text_config.max_position_embeddings
    return _TransformersTexts(load_tokenizer(folder), context, family.lowercase)


def image_tower(config: EncoderConfig) -> ModelImages:
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    family, model_config = _open(folder)
    vision, tower = model_config.vision_config, family.image
    model = checkpoints.load_model(tower.model, folder, vision, dtype_of(config))
    scale = pixel_scale_of(load_processor(folder))
    return ModelImages(model, tower.output, getattr(vision, tower.dim), scale, device_of(config))


def text_tower(config: EncoderConfig) -> _ModelTexts:
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    family, model_config = _open(folder)
    model = checkpoints.load_model(family.text.model, folder, model_config.text_config, dtype_of(config))
    # CLIP reads nothing behind the end token; 0 is never above that token, by whose height old CLIPs find it.
    pad_id = load_tokenizer(folder).pad_token_id if family.reads_padding else 0
    if pad_id is None:
        raise ConfigError(
            f"{folder}: its tokenizer names no pad_token, which SigLIP reads; complete the checkpoint"
        )
    return _ModelTexts(model, family, pad_id, device_of(config))


def fingerprint(config: EncoderConfig) -> str:
    """Hash of weights, configuration, tokenizer and preprocessing files: what decides the rows."""
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    _open(folder)
    files = checkpoints.existing_files(
        folder, ("config.json", *checkpoints.PREPROCESSOR_FILES, *checkpoints.TOKENIZER_FILES)
    )
    return checkpoints.fingerprint_of("transformers", [], [*files, *checkpoints.weight_files(folder)])
