"""ReVision as a transformers model; importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from revision_ray.model.build import build_model
from revision_ray.model.configuration import ReVisionConfig, check_encoder
from revision_ray.model.ending import declare_ends
from revision_ray.model.modeling import ReVisionForConditionalGeneration, target_positions
from revision_ray.model.processing import (
    IMAGE_TOKEN,
    OpenClipImageProcessor,
    ReVisionProcessor,
    add_image_token,
)

__all__ = [
    "IMAGE_TOKEN",
    "OpenClipImageProcessor",
    "ReVisionConfig",
    "ReVisionForConditionalGeneration",
    "ReVisionProcessor",
    "add_image_token",
    "build_model",
    "check_encoder",
    "declare_ends",
    "target_positions",
]

AutoConfig.register(ReVisionConfig.model_type, ReVisionConfig)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto.register(ReVisionConfig, ReVisionForConditionalGeneration)
AutoProcessor.register(ReVisionConfig, ReVisionProcessor)
# One class under both names: it runs open_clip's own transform, which has one implementation.
AutoImageProcessor.register(
    ReVisionConfig,
    image_processor_classes={"pil": OpenClipImageProcessor, "torchvision": OpenClipImageProcessor},
)
