"""An image checkpoint of LLM2CLIP by way of the code that it ships, where that is trusted."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel

from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import EncoderConfig, dtype_of, unit_rows
from revision_ray.encode.transformers import ProcessorImages, pixel_scale_of
from revision_ray.errors import ConfigError


def remote_model(config: EncoderConfig, folder: str, other_side: str) -> Any:
    """The checkpoint's own model without the parts named `other_side*`, whose weights are not read.

    Raises:
        ConfigError: its code is not allowed to run, or does not run with this transformers.
    """
    if not config.trust_remote_code:
        raise ConfigError(
            f"{folder}: its weights are not laid out as LLM2CLIP's (vision_model, visual_projection, "
            "text_adapter), so the Python code that it ships would have to run; read that code, then set "
            "encoder.trust_remote_code=true"
        )
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_config(model_config, trust_remote_code=True)
    except (*checkpoints.DAMAGED, ImportError, AttributeError) as error:
        raise checkpoints.damaged(f"{folder} (its own code)", error) from error
    for name, _ in list(model.named_children()):
        if name.startswith(other_side):
            delattr(model, name)
    names = set(model.state_dict())
    weights = checkpoints.read_tensors(checkpoints.weight_files(folder), names.__contains__)
    if missing := names - set(weights):
        raise ConfigError(
            f"{folder}: lacks {len(missing)} weights, among them {min(missing)}; complete the checkpoint"
        )
    model.load_state_dict(weights)
    return model.to(dtype_of(config)).eval()


def _features(output: Any) -> torch.Tensor:
    # Models of transformers 4 return the tensor, those of 5 an output that holds it.
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class RemoteImages:
    """Image tower of a model that has `get_image_features`."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model = model.to(device)
        self._scale = pixel_scale_of(processor)
        blank_CHW = ProcessorImages(processor)(Image.new("RGB", (64, 64)))
        self.embedding_dim = self.encode(blank_CHW[None]).shape[1]

    @torch.inference_mode()
    def encode(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        pixels = self._scale(pixels_NCHW, self.model.device, self.model.dtype)
        return unit_rows(_features(self.model.get_image_features(pixels)))


class RemoteAdapter(nn.Module):
    """(N, S) -> (N, D) by way of a model that has `get_text_features`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, state_NS: torch.Tensor) -> torch.Tensor:
        return _features(self.model.get_text_features(state_NS))
