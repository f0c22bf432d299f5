"""What a ReVision model is made of, and which encoder and alignment it was trained with."""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from revision_ray.core.errors import AlignmentError, ConfigError

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")


@strict
class ReVisionConfig(PreTrainedConfig):
    """Configuration of `ReVisionForConditionalGeneration` (arXiv 2602.07026 sec. 5).

    Raises:
        ConfigError: an unknown projector, or a size below one.
    """

    model_type = "revision"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    """The language model: configuration of any causal LM of transformers."""
    embedding_dim: int = 1280
    """Dimension of the image embeddings."""
    projector_type: str = "mlp2x_gelu"
    """"linear", or "mlpNx_gelu": N linear layers with GELU between them."""
    projector_hidden_size: int | None = None
    """Width between the projector's layers; None is the width of the language model's token embeddings."""
    num_visual_tokens: int = 1
    """Copies of the projected embedding that stand for one image."""
    embedding_scale: float | int = 1.0
    """Factor on the unit row before the projector."""
    visual_scale: float | int = 1.0
    """Factor on the projector's output."""
    image_token_id: int = 0
    """Id of the placeholder. It may lie above the language model's vocabulary: it is never looked up."""
    image_tower: dict | None = None
    """The frozen image encoder inside the checkpoint: {"kind", "config", "fingerprint"}; None without one."""
    alignment: dict | None = None
    """Which fit stage 1 used: {"strategy", "content_hash", "text_fingerprint", "image_fingerprint",
    "domain"}; {} if none."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.alignment = dict(self.alignment or {})
        self.projector_depth  # noqa: B018  (raises)
        for name in ("embedding_dim", "num_visual_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")

    @property
    def projector_depth(self) -> int:
        """Linear layers of the projector."""
        if self.projector_type == "linear":
            return 1
        match = _MLP.fullmatch(self.projector_type)
        if match is None:
            raise ConfigError(
                f"projector_type={self.projector_type!r:.80}: expected 'linear' or 'mlpNx_gelu' with N "
                f"layers, "
                "for example 'mlp2x_gelu'"
            )
        return int(match[1])


def check_encoder(config: ReVisionConfig, fingerprint: str) -> None:
    """The encoder with `fingerprint` is the one whose image space this model was trained on.

    A model that names no image encoder (trained on embeddings of unknown origin) accepts every one.

    Raises:
        AlignmentError: it is another encoder.
    """
    expected = (config.alignment or {}).get("image_fingerprint")
    if expected and expected != fingerprint:
        raise AlignmentError(
            f"the image encoder's fingerprint is {fingerprint[:12]}..., the model was trained in the space "
            f"of {expected[:12]}...: the same picture has another embedding there; use the encoder of the "
            "stores that the alignment was fitted on"
        )
