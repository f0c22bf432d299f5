"""A tiny random ReVision model in a folder, as training saves one: real parts, a word-level tokenizer."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_encoder import write_encoder
from tiny_language_model import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from revision_ray.encode.encoder import EncoderConfig
from revision_ray.model import ReVisionProcessor, add_image_token, build_model
from revision_ray.model.attach import attach_image_tower

EMBEDDING_DIM = 16  # of the tiny encoder


def tiny_model(
    folder: Path,
    *,
    family: str = "llama",
    template: str = "qwen",
    tower: bool = True,
    num_visual_tokens: int = 3,
    context: int = 256,
    alignment: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """`folder`/model: processor with chat template, projector, language model and image tower, float32.

    `folder`/encoder is the dual encoder (open_clip, 32 pixels, D = 16) whose image tower the model holds.
    `tower=False` leaves the tower out, with its processor. `context` is max_position_embeddings. Prompts
    are made of the words in `tiny_language_model.WORDS`; other words become <unk>.
    """
    tokenizer = tiny_tokenizer(template)
    config = tiny_config(family, len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    config.max_position_embeddings = context
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language_model")
    model = build_model(
        str(folder / "language_model"),
        EMBEDDING_DIM,
        add_image_token(tokenizer),
        num_visual_tokens=num_visual_tokens,
        embedding_scale=EMBEDDING_DIM**0.5,
        alignment=alignment,
        dtype=torch.float32,
    )
    encoder = EncoderConfig(kind="open_clip", model=write_encoder(folder / "encoder", seed))
    image_processor = attach_image_tower(model, encoder) if tower else None
    model.save_pretrained(folder / "model")
    ReVisionProcessor(tokenizer, image_processor, num_visual_tokens=num_visual_tokens).save_pretrained(
        folder / "model"
    )
    return folder / "model"


def unit_rows(num: int, seed: int = 1) -> np.ndarray:
    """float32 (num, EMBEDDING_DIM)."""
    rows_ND = np.random.default_rng(seed).standard_normal((num, EMBEDDING_DIM)).astype(np.float32)
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def picture(seed: int = 0, size: tuple[int, int] = (40, 48), kind: str = "PNG") -> bytes:
    """An encoded random RGB picture of `size` (width, height); another seed gives another one."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind)
    return encoded.getvalue()
