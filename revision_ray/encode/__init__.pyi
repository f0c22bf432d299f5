"""Embed images and texts with a dual encoder (open_clip, transformers, LLM2CLIP) on Ray Data."""

from .embed import EmbedJob, run_embed
from .encoder import EncoderConfig

__all__ = [
    "EmbedJob",
    "EncoderConfig",
    "run_embed",
]
