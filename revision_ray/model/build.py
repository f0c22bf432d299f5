"""A ReVision model from a language model: with its weights, or random from its configuration."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig

from revision_ray.core.errors import ConfigError, quote, shorten
from revision_ray.encode import checkpoints
from revision_ray.model.configuration import ReVisionConfig
from revision_ray.model.modeling import ReVisionForConditionalGeneration


def build_model(
    language_model: str | PreTrainedConfig,
    embedding_dim: int,
    image_token_id: int,
    *,
    projector_type: str = "mlp2x_gelu",
    projector_hidden_size: int | None = None,
    num_visual_tokens: int = 1,
    embedding_scale: float = 1.0,
    visual_scale: float = 1.0,
    alignment: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> ReVisionForConditionalGeneration:
    """`language_model` with a new projector in front, in evaluation mode on the CPU.

    `language_model` is a folder or hub id, whose weights and generation settings are taken over bit by bit,
    or a configuration, from which a random model is made (seed torch before; float32 unless `dtype` is set).
    Code of a checkpoint is never run. `attn_implementation` None leaves the choice to transformers.

    Raises:
        ConfigError: the language model cannot be loaded, or a setting is out of range.
    """
    settings: dict[str, Any] = {
        "embedding_dim": embedding_dim,
        "image_token_id": image_token_id,
        "projector_type": projector_type,
        "projector_hidden_size": projector_hidden_size,
        "num_visual_tokens": num_visual_tokens,
        "embedding_scale": embedding_scale,
        "visual_scale": visual_scale,
        "alignment": alignment,
    }
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if isinstance(language_model, str):
        loaded = _load(language_model, dtype=dtype or "auto", revision=revision, **attention)
        settings["attn_implementation"] = loaded.config._attn_implementation
        config = ReVisionConfig(text_config=loaded.config, dtype=loaded.dtype, **settings)
        model = ReVisionForConditionalGeneration(config, loaded)
        model.projector.to(loaded.dtype)
        model.generation_config = loaded.generation_config
    else:
        config = ReVisionConfig(text_config=language_model, **settings)
        model = ReVisionForConditionalGeneration._from_config(
            config, dtype=dtype or torch.float32, **attention
        )
    _never_say(model, image_token_id)
    return model.eval()


def _load(name: str, **kwargs: Any) -> Any:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"language_model={quote(name, 100)}: cannot be loaded as a causal language model "
            f"({shorten(error)}); name a folder "
            "with config.json and weights, or a hub id that this machine can reach or has cached"
        ) from error
    checkpoints.move_off_odd_addresses(loaded)
    return loaded


def _never_say(model: ReVisionForConditionalGeneration, image_token_id: int) -> None:
    """The placeholder is never an answer, where the vocabulary has room for it (many are padded)."""
    if image_token_id < model.config.get_text_config().vocab_size:
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*suppressed, image_token_id})
