"""The model of a run: built from a language model (stage 1) or loaded (stage 2), and what of it trains."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoProcessor, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, shorten
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.model.build import build_model
from revision_ray.model.ending import declare_ends
from revision_ray.model.modeling import ReVisionForConditionalGeneration
from revision_ray.model.processing import ReVisionProcessor, add_image_token
from revision_ray.train.settings import Lora, optional

# Bars of their own between our lines; a folder is read in a moment, and what takes long says so elsewhere.
disable_progress_bar()

Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What stage 1 puts between the encoder and the language model."""

    num_visual_tokens: int = 1
    """Places that an image takes in the language model's input; all are equal. The paper's preset is 576."""
    projector_type: str = "mlp2x_gelu"
    """mlp2x_gelu (the paper's), mlpNx_gelu with N layers, or linear."""
    projector_hidden_size: int | None = None
    """Width of the projector's inner layers; the language model's if not given."""
    embedding_scale: float = 1.0
    """Unit embeddings are multiplied by this before the projector."""
    visual_scale: float = 1.0
    """The projector's output is multiplied by this."""


def new_model(
    language_model: str,
    architecture: Architecture,
    *,
    embedding_dim: int,
    alignment: dict[str, Any],
    image_tower: EncoderConfig | None,
    dtype: torch.dtype,
    attention: str | None,
) -> tuple[ReVisionForConditionalGeneration, ReVisionProcessor]:
    """The language model with a fresh projector, from torch's global seed, and its processor.

    Raises:
        ConfigError: the language model, its tokenizer or the image tower cannot be loaded.
        AlignmentError: the image tower is of another encoder than the fit.
    """
    language_model = storage.local_copy(language_model)
    tokenizer = load_tokenizer(language_model)
    processor = ReVisionProcessor(tokenizer, num_visual_tokens=architecture.num_visual_tokens)
    model = build_model(
        language_model,
        embedding_dim=embedding_dim,
        image_token_id=processor.image_token_id,
        num_visual_tokens=architecture.num_visual_tokens,
        projector_type=architecture.projector_type,
        projector_hidden_size=architecture.projector_hidden_size,
        embedding_scale=architecture.embedding_scale,
        visual_scale=architecture.visual_scale,
        alignment=alignment,
        dtype=dtype,
        attn_implementation=attention,
    )
    if image_tower is not None:
        from revision_ray.model.attach import attach_image_tower  # imports open_clip, which takes seconds

        images = attach_image_tower(model, image_tower)
        processor = ReVisionProcessor(tokenizer, images, num_visual_tokens=architecture.num_visual_tokens)
    declare_ends(model.generation_config, tokenizer)
    return model, processor


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in `folder` with the image token, an end token, and a token to pad with.

    Raises:
        ConfigError: there is none, or it has no end token.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(storage.local_copy(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={folder}: its tokenizer cannot be loaded: {shorten(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model={folder}: its tokenizer names no eos_token, which ends every answer")
    add_image_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: str, *, dtype: torch.dtype, attention: str | None
) -> tuple[ReVisionForConditionalGeneration, ReVisionProcessor]:
    """The model that an earlier stage exported, and its processor.

    Raises:
        ConfigError: no such model. DataError: nothing lies at its URI.
    """
    local = storage.local_copy(folder)
    try:
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        model = ReVisionForConditionalGeneration.from_pretrained(local, dtype=dtype, **options)
        processor = AutoProcessor.from_pretrained(local)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={folder}: is no model of jobs/pretrain.py ({shorten(error)}); name its OUTPUT/model"
        ) from error
    declare_ends(model.generation_config, processor.tokenizer)
    return model, processor


def freeze(model: Any, stage: Stage, lora: Lora | None) -> None:
    """What does not train in `stage` has no gradients.

    Stage 1 trains the projector alone, stage 2 the projector and the language model, or adapters in its
    place. An image tower never trains.
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if stage == "finetune" and lora is None:
        model.language_model.requires_grad_(True)
    elif stage == "finetune" and lora is not None:
        add_lora(model, lora)


def add_lora(model: Any, lora: Lora) -> None:
    """The language model has trainable adapters and is otherwise frozen."""
    peft: Any = optional("peft", "lora")
    targets: Any = lora.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.language_model = peft.get_peft_model(model.language_model, settings)


def merge_lora(model: Any) -> None:
    """Adapters, if there are any, have become part of the language model's weights."""
    if hasattr(model.language_model, "merge_and_unload"):
        model.language_model = model.language_model.merge_and_unload()


def set_modes(model: Any, stage: Stage, gradient_checkpointing: bool) -> None:
    """Dropout is off in all that is frozen; what trains is in training mode."""
    model.train()
    if model.image_tower is not None:
        model.image_tower.eval()
    if stage == "pretrain":
        model.language_model.eval()
    if gradient_checkpointing:
        # transformers checkpoints layers in training mode only. The flag of the layer itself switches that;
        # dropout reads the flags of the modules inside, which stay as they are.
        for module in model.language_model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
