"""The frozen image encoder inside a checkpoint: its architecture from the configuration, its weights saved.

Shapes: I images, C channels, H height, W width, D embedding_dim.
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection, PreTrainedModel, SiglipVisionModel

from revision_ray.errors import ConfigError

# model_type of the tower's configuration -> its class, and what it calls the embedding.
_TRANSFORMERS: dict[str, tuple[type[PreTrainedModel], str]] = {
    "clip_vision_model": (CLIPVisionModelWithProjection, "image_embeds"),
    "siglip_vision_model": (SiglipVisionModel, "pooler_output"),
}


class ImageTower(nn.Module):
    """Unit rows of preprocessed images; always frozen, always in evaluation mode."""

    def __init__(self, description: dict[str, Any], model: nn.Module | None = None) -> None:
        """`model` holds the weights already; without one the architecture is built from `description`.

        Raises:
            ConfigError: a kind of tower, or a model type, that is not known here.
        """
        super().__init__()
        kind, config = description["kind"], description["config"]
        self._output: str | None = None
        if kind == "open_clip":
            self.model = model or _open_clip_visual(config)
            # transformers builds a model without memory and fills in what the checkpoint holds: what
            # open_clip and timm compute once and do not save (rotary tables) would be lost.
            for module in self.model.modules():
                module._non_persistent_buffers_set.clear()
        elif kind == "transformers" and config.get("model_type") in _TRANSFORMERS:
            model_class, self._output = _TRANSFORMERS[config["model_type"]]
            assert model_class.config_class is not None
            # Without its dtype: parts of the tower would be built in it, whatever the model is loaded in.
            known = {key: value for key, value in config.items() if key != "dtype"}
            self.model = model or model_class(model_class.config_class.from_dict(known))
        else:
            raise ConfigError(
                f"image_tower of kind {kind!r} and model_type {config.get('model_type')!r}: expected kind "
                f"'open_clip', or 'transformers' with model_type one of {sorted(_TRANSFORMERS)}"
            )
        self.eval()

    def train(self, mode: bool = True) -> "ImageTower":
        """Frozen, and in evaluation mode: its embeddings must stay those of the encoder.

        Freezing belongs here because `from_pretrained` makes new parameters, which train, and then calls
        `eval()`.
        """
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float32 unit rows (I, D) of (I, C, H, W), normalised in float32 whatever the weights are."""
        weight = next(self.model.parameters())
        features = self.model(pixel_values.to(weight.device, weight.dtype))
        if self._output is not None:
            features = getattr(features, self._output)
        elif isinstance(features, tuple):  # with patch tokens behind
            features = features[0]
        return nn.functional.normalize(features.float(), dim=-1)


def open_clip_description(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The part of open_clip's `model_cfg` that the image tower is built from."""
    keys = ("embed_dim", "vision_cfg", "quick_gelu")
    config = {key: model_cfg[key] for key in keys if key in model_cfg}
    # No weights but the checkpoint's are ever fetched.
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    return {"kind": "open_clip", "config": config}


def _open_clip_visual(config: dict[str, Any]) -> nn.Module:
    # Imported here: it costs a second, and most models are loaded without a tower of this kind.
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
