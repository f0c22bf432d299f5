"""Random models in folders, as training saves them: the demo's architecture at any size."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from revision_ray.encode.encoder import EncoderConfig
from revision_ray.model import ReVisionProcessor, build_model
from revision_ray.model.attach import attach_image_tower
from revision_ray.train import dual_encoder, language_model
from revision_ray.train.language_model import ModelSize

WORDS = [f"w{number}" for number in range(4000)]
NUM_VISUAL_TOKENS = 4
DEMO = ModelSize()
LARGE = ModelSize(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2432)
"""99 M parameters: 12 x (4 x 768^2 + 3 x 768 x 2432) and 4000 tied embeddings."""


def write_model(folder: Path, size: ModelSize) -> Path:
    """`folder`/model: a Llama of `size`, projector, and the demo's image tower (64 px); float32.

    It answers with words alone and never ends by itself, so that every answer has the length asked for.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer: Any = language_model.build_tokenizer([[(" ".join(WORDS), 1.0)]])
    llama = language_model.build_model(size, tokenizer)
    words = {tokenizer.convert_tokens_to_ids(word) for word in WORDS}
    llama.generation_config.suppress_tokens = sorted(set(range(llama.config.vocab_size)) - words)
    llama.save_pretrained(folder / "language_model")
    dim = dual_encoder.ARCHITECTURES["miniature"]["embed_dim"]
    model = build_model(
        str(folder / "language_model"),
        dim,
        tokenizer.convert_tokens_to_ids("<image>"),
        num_visual_tokens=NUM_VISUAL_TOKENS,
        embedding_scale=dim**0.5,
    )
    image_processor = attach_image_tower(model, write_encoder(folder / "encoder"))
    model.save_pretrained(folder / "model")
    processor = ReVisionProcessor(tokenizer, image_processor, num_visual_tokens=NUM_VISUAL_TOKENS)
    processor.save_pretrained(folder / "model")
    return folder / "model"


def write_encoder(folder: Path) -> EncoderConfig:
    """The demo's dual encoder, untrained."""
    tokenizer = dual_encoder.build_tokenizer(WORDS[:100], 100)
    config = dual_encoder.model_config("miniature", tokenizer.get_vocab_size(), None)
    folder.mkdir(parents=True)
    for name, content in dual_encoder.checkpoint_files(
        dual_encoder.build_model(config, temperature=0.01), config, tokenizer
    ).items():
        (folder / name).write_bytes(content)
    return EncoderConfig(kind="open_clip", model=str(folder))
