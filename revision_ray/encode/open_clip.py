"""open_clip dual encoders: any architecture with a pretrained tag, a checkpoint file, or a config of yours.

A configuration of yours is a JSON (open_clip's model_cfg, or {"model_cfg", "preprocess_cfg"}), or a folder
in open_clip's layout: `open_clip_config.json` beside `open_clip_model.safetensors`. A `tokenizer.json` beside
it is the tokenizer, unless the configuration names one (`text_cfg.hf_tokenizer_name`): open_clip loads that.

Shapes: N rows, D embedding_dim, C channels, H height, W width, T tokens.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer
from torchvision.transforms import Compose, Normalize

from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import (
    EncoderConfig,
    PixelScale,
    device_of,
    dtype_of,
    pad_right,
    unit_rows,
)
from revision_ray.encode.open_clip_source import Source, source_of
from revision_ray.encode.open_clip_tokens import (
    ClipTokens,
    FileTokens,
    LibraryTokens,
    tokenizer_of,
    vocabulary_of,
)
from revision_ray.errors import ConfigError


def _build(source: Source, dtype: torch.dtype) -> Any:
    """The whole model on the CPU with its weights: open_clip builds and loads both towers or none."""
    cfg = json.loads(json.dumps(source.model_cfg))
    cfg["vision_cfg"].pop("timm_model_pretrained", None)  # no weights but the checkpoint's
    custom_text = cfg.pop("custom_text", False)
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
        custom_text = True
    path = source.weights()
    if not path.endswith((".safetensors", ".pt", ".pth", ".bin")):
        raise ConfigError(
            f"{path}: unknown kind of checkpoint; expected .safetensors (or .pt, .pth, .bin of tensors)"
        )
    model_class: Any = open_clip.CLIP
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    try:
        model = model_class(**cfg)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise checkpoints.damaged(f"{source.name} (configuration)", error) from error
    try:
        open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except (*checkpoints.DAMAGED, StopIteration, AttributeError, AssertionError) as error:
        raise checkpoints.damaged(path, error) from error
    return model.to(dtype).eval()


class _Images:
    """open_clip's own transform up to the bytes; scaling and normalising are left to the tower."""

    def __init__(self, preprocess: PreprocessCfg) -> None:
        whole = image_transform_v2(preprocess, is_train=False)
        assert isinstance(whole, Compose), whole
        transforms = whole.transforms
        assert isinstance(transforms[-1], Normalize), transforms
        self._transform = Compose(transforms[:-2])

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self._transform(image)).transpose(2, 0, 1))


class _ImageTower:
    def __init__(
        self, visual: torch.nn.Module, source: Source, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = visual.to(device)
        self.embedding_dim = source.model_cfg["embed_dim"]
        self._dtype, self._device = dtype, device
        preprocess = source.preprocess
        self._scale = PixelScale(scale=1 / 255, mean=tuple(preprocess.mean), std=tuple(preprocess.std))

    @torch.inference_mode()
    def encode(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        features = self.model(self._scale(pixels_NCHW, self._device, self._dtype))
        return unit_rows(features[0] if isinstance(features, tuple) else features)  # with patch tokens behind


class _TextTower:
    def __init__(self, model: Any, source: Source, device: torch.device) -> None:
        self.model = model.to(device)
        self.embedding_dim = source.model_cfg["embed_dim"]
        self._context, self._device = source.context, device

    @torch.inference_mode()
    def encode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        # At full length always, as in open_clip: some of its text towers read what is behind the end token.
        ids_NT = torch.from_numpy(pad_right(tokens, self._context, 0)).to(self._device)
        return unit_rows(self.model.encode_text(ids_NT))


def image_preparer(config: EncoderConfig) -> _Images:
    return _Images(source_of(config).preprocess)


def text_preparer(config: EncoderConfig) -> FileTokens | ClipTokens | LibraryTokens:
    source = source_of(config)
    tokenizer = tokenizer_of(source)
    if isinstance(tokenizer, Tokenizer):
        return FileTokens(tokenizer, source.context)
    if not isinstance(tokenizer, SimpleTokenizer):
        return LibraryTokens(tokenizer, source.context)
    if tokenizer.reduction_fn is not None:
        raise ConfigError(
            f"{config.model}: its tokenizer drops words of long texts at random (reduction_mask), so rows "
            "would differ between runs; remove text_cfg.tokenizer_kwargs.reduction_mask from a copy of the "
            "configuration"
        )
    return ClipTokens(tokenizer, source.context)


def image_tower(config: EncoderConfig) -> _ImageTower:
    source, dtype = source_of(config), dtype_of(config)
    return _ImageTower(_build(source, dtype).visual, source, dtype, device_of(config))


def text_tower(config: EncoderConfig) -> _TextTower:
    source = source_of(config)
    model = _build(source, dtype_of(config))
    for part in ("visual", "text_decoder"):  # CoCa's decoder captions images
        if hasattr(model, part):
            delattr(model, part)
    return _TextTower(model, source, device_of(config))


def fingerprint(config: EncoderConfig) -> str:
    """Hash of weights file, architecture, tokenizer and preprocessing: what decides the rows."""
    source = source_of(config)
    contents = [
        ("model_cfg", json.dumps(source.model_cfg, sort_keys=True).encode()),
        ("preprocess_cfg", json.dumps(dataclasses.asdict(source.preprocess), sort_keys=True).encode()),
        ("tokenizer", vocabulary_of(tokenizer_of(source))),
    ]
    return checkpoints.fingerprint_of("open_clip", contents, [source.weights()])
