"""The multimodal model: a frozen image tower, a projector, and a causal language model.

Each image is one unit embedding, projected once, in place of its tokens (arXiv 2602.07026 sec. 5).

Shapes: B samples, T tokens, I images of the whole batch, V visual tokens an image, D embedding dim, H width
of the token embeddings, C channels, N slots of the whole batch (N = I V).
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CLIPVisionModelWithProjection,
    GenerationMixin,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.encode import checkpoints
from revision_ray.model.configuration import ReVisionConfig

# model_type of the tower's configuration -> its class, and what it calls the embedding.
_TRANSFORMERS: dict[str, tuple[type[PreTrainedModel], str]] = {
    "clip_vision_model": (CLIPVisionModelWithProjection, "image_embeds"),
    "siglip_vision_model": (SiglipVisionModel, "pooler_output"),
}


class FrozenImageTower(nn.Module):
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

    def train(self, mode: bool = True) -> "FrozenImageTower":
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


_IGNORED = -100


def target_positions(labels_BT: torch.Tensor) -> torch.Tensor:
    """bool (B, T): where the next token is a target.

    As `logits_to_keep` beside `labels` it gives the same loss from those positions' logits alone, which
    saves the language model's head (often most of the memory of a step) at every image and prompt token.
    """
    return _shifted(labels_BT) != _IGNORED


def _shifted(labels_BT: torch.Tensor) -> torch.Tensor:
    """The label that each position is to predict: its right neighbour's."""
    return F.pad(labels_BT, (0, 1), value=_IGNORED)[:, 1:]


class ReVisionForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Causal language model that reads images as projected embeddings in place of their tokens."""

    config: ReVisionConfig
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    # The wrapper has no attention of its own: the language model inside says what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: ReVisionConfig, language_model: PreTrainedModel | None = None) -> None:
        """`language_model` is used as it is; without one it is made from the configuration."""
        super().__init__(config)
        self.language_model: Any = language_model
        if language_model is None:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        embeddings = self.language_model.get_input_embeddings()
        # Not the configuration's hidden_size: some models (OPT) have narrower token embeddings.
        self.projector = _projector(config, embeddings.embedding_dim)
        self.image_tower = None if config.image_tower is None else FrozenImageTower(config.image_tower)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model as transformers does, with the bits of the saved one on every processor.

        Raises:
            ConfigError: a file of weights is damaged.
        """
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            raise checkpoints.damaged(str(args[0]), error) from error
        checkpoints.move_off_odd_addresses(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """The projector starts as torch starts linear layers, as the reference does; the rest is done."""
        if isinstance(module, nn.Linear) and any(module is layer for layer in self.projector):
            module.reset_parameters()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float32 unit rows (I, D) of preprocessed pixels (I, C, H, W), without gradient.

        Raises:
            ConfigError: the model holds no image tower.
        """
        if self.image_tower is None:
            raise ConfigError(
                "pixel_values were given, but this model holds no image tower; attach one with "
                "revision_ray.model.attach.attach_image_tower, or give image_embeds"
            )
        return self.image_tower(pixel_values)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` is (I, V, H): each image projected once, then shown V times (method sec. 5).

        Raises:
            ConfigError: pixel values, but no image tower.
            DataError: both, or neither, or an embedding of another dimension.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise DataError("give each image as pixel_values or as image_embeds, one of the two")
        embeds_ID = image_embeds if pixel_values is None else self.encode_images(pixel_values)
        assert embeds_ID is not None
        dim = self.config.embedding_dim
        if embeds_ID.ndim != 2 or embeds_ID.shape[1] != dim:
            raise DataError(
                f"image_embeds has shape {tuple(embeds_ID.shape)}, expected (images, {dim}): the model was "
                f"built for an encoder with embedding_dim={dim}"
            )
        weight = next(self.projector.parameters())
        scaled_ID = embeds_ID.to(weight.device).float() * self.config.embedding_scale
        visual_I1H = self.projector(scaled_ID.to(weight.dtype))[:, None] * self.config.visual_scale
        return BaseModelOutputWithPooling(
            pooler_output=visual_I1H.expand(-1, self.config.num_visual_tokens, -1)
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given.

        `input_ids` (B, T) hold `image_token_id` V times in a row for each image; `image_embeds` (I, D) are
        unit rows, and `pixel_values` (I, C, H, W) preprocessed images, of all samples in the order of their
        placeholders. `labels` (B, T) are -100 where not a target; they are shifted inside. The loss is the
        sum of the cross entropies divided by `num_items_in_batch`, or their mean where it is None.
        `logits_to_keep` may be `target_positions(labels)`: logits are then (targets, vocabulary).

        Raises:
            ConfigError: pixel values, but no image tower.
            DataError: placeholders and images do not match, or an embedding of another dimension.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give input_ids or inputs_embeds, one of the two")
        features = (mm_encoder_outputs or {}).get("image")
        if features is None and (pixel_values is not None or image_embeds is not None):
            features = self.get_image_features(pixel_values, image_embeds)
        if input_ids is not None:
            cached = past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds = self._embedded(input_ids, features, cached)
        elif features is not None:
            raise DataError(
                "images were given with inputs_embeds, which show no placeholders; give input_ids with them"
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        loss = None
        if labels is not None:
            targets = slice_logits_to_keep(_shifted(labels)[..., None], logits_to_keep)[..., 0]
            loss = _loss(outputs.logits, targets, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embedded(
        self, input_ids: torch.Tensor, features: BaseModelOutputWithPooling | None, cached: bool
    ) -> torch.Tensor:
        """(B, T, H): token embeddings, with the visual tokens in the places of the placeholders."""
        embed: Any = self.get_input_embeddings()
        if features is None and cached and input_ids.shape[1] == 1:  # a decoding step, not worth a look
            return embed(input_ids)
        slots_BT = input_ids == self.config.image_token_id
        num_slots = int(slots_BT.sum())
        # The placeholder may lie above the vocabulary; the row looked up instead is overwritten.
        tokens_BTH = embed(input_ids.masked_fill(slots_BT, 0))
        if features is None:
            self._check_slots(num_slots, 0)
            return self._with_idle_projector(tokens_BTH)
        assert features.pooler_output is not None
        visual_NH = features.pooler_output.flatten(0, 1)
        self._check_slots(num_slots, len(visual_NH))
        return tokens_BTH.masked_scatter(slots_BT[..., None], visual_NH.to(tokens_BTH))

    def _check_slots(self, num_slots: int, num_visual: int) -> None:
        if num_slots == num_visual:
            return
        per_image = self.config.num_visual_tokens
        raise DataError(
            f"the batch has {num_slots} image placeholders (id {self.config.image_token_id}) and "
            f"{num_visual // per_image} images of {per_image} visual tokens each, expected "
            f"{num_visual} placeholders; give one image for each <image> in the text, in order, as "
            "pixel_values or image_embeds, and let the processor expand <image>"
        )

    def _with_idle_projector(self, tokens_BTH: torch.Tensor) -> torch.Tensor:
        """The same values; in training they depend, with gradient zero, on the projector.

        Every rank must run the same modules in a step, also one whose batch holds no image: ZeRO-3 gathers
        weights, and DDP averages gradients, in step.
        """
        weight = next(self.projector.parameters())
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return tokens_BTH
        no_image_1D = torch.zeros(1, self.config.embedding_dim, device=weight.device, dtype=weight.dtype)
        return tokens_BTH + (self.projector(no_image_1D).sum() * 0).to(tokens_BTH)

    def _prepare_multimodal_encoder_kwargs_for_generation(
        self, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Images are encoded and projected once a prompt, however many beams or steps follow."""
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_embeds")}
        if any(value is not None for value in images.values()):
            model_kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**images)}
        return model_kwargs


def _projector(config: ReVisionConfig, output_size: int) -> nn.Sequential:
    hidden = config.projector_hidden_size or output_size
    depth = config.projector_depth
    sizes = [config.embedding_dim, *[hidden] * (depth - 1), output_size]
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for size_in, size_out in itertools.pairwise(sizes[1:]):
        layers += [nn.GELU(), nn.Linear(size_in, size_out)]
    return nn.Sequential(*layers)


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Sum of cross entropies over `num_items_in_batch`, in float32; their mean where that is None."""
    summed = F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten().to(logits.device),
        ignore_index=_IGNORED,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return summed
    return summed / torch.as_tensor(num_items_in_batch, device=summed.device)
