"""Puts an image encoder inside a model, so that the saved model answers about a picture by itself."""

import dataclasses
from typing import Any

from revision_ray.core.errors import ConfigError
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.encode.open_clip import source_of
from revision_ray.encode.transformers import ModelImages, ProcessorImages
from revision_ray.model.configuration import check_encoder
from revision_ray.model.modeling import (
    FrozenImageTower,
    ReVisionForConditionalGeneration,
    open_clip_description,
)
from revision_ray.model.processing import OpenClipImageProcessor


def attach_image_tower(model: ReVisionForConditionalGeneration, encoder: EncoderConfig) -> Any:
    """`model` holds the image tower of `encoder`; returns the image processor for a `ReVisionProcessor`.

    The tower takes the model's device and dtype: in float32 its rows are the encoder's within rounding
    (1e-5 of their length), in bfloat16 within 1e-2.

    Raises:
        AlignmentError: the model was trained in the space of another encoder.
        ConfigError: the encoder's dimension is not the model's, or its code cannot live in a checkpoint.
    """
    module = backend(encoder)
    fingerprint = module.fingerprint(encoder)
    check_encoder(model.config, fingerprint)
    # On the CPU and in full, whatever the encoder is run with: the model's dtype is applied once, below.
    tower: Any = module.image_tower(dataclasses.replace(encoder, dtype="float32", device="cpu"))
    if tower.embedding_dim != model.config.embedding_dim:
        raise ConfigError(
            f"encoder.model={encoder.model}: embedding_dim is {tower.embedding_dim}, the model's is "
            f"{model.config.embedding_dim}; attach the encoder that the training embeddings came from"
        )
    if encoder.kind == "open_clip":
        source = source_of(encoder)
        description = open_clip_description(source.model_cfg)
        preprocess = dataclasses.asdict(source.preprocess)
        processor: Any = OpenClipImageProcessor(
            size=preprocess["size"],
            image_mean=list(preprocess["mean"]),
            image_std=list(preprocess["std"]),
            interpolation=preprocess["interpolation"],
            resize_mode=preprocess["resize_mode"],
            fill_color=preprocess["fill_color"],
        )
    elif isinstance(tower, ModelImages):
        description = {"kind": "transformers", "config": tower.model.config.to_diff_dict()}
        preparer = module.image_preparer(encoder)
        assert isinstance(preparer, ProcessorImages)
        processor = preparer.processor
    else:
        raise ConfigError(
            f"encoder.model={encoder.model}: runs Python code of its checkpoint, which a model folder cannot "
            "hold; give image_embeds to this model"
        )
    description["fingerprint"] = fingerprint
    model.image_tower = FrozenImageTower(description, tower.model).to(model.device, model.dtype)
    model.config.image_tower = description
    return processor
