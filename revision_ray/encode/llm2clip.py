"""LLM2CLIP (arXiv 2411.04997): a CLIP image tower, and a bidirectional mean-pooled Llama with an adapter.

The image checkpoint holds CLIP's `vision_model` and `visual_projection`, and the `text_adapter` that takes
the pooled Llama state into the same space. Its own Python code imports parts that transformers 5 has
removed, and the llm2vec package does not run there either; so both towers are built from the library's
classes, and no code of a checkpoint runs. Only where the weights are laid out otherwise is the checkpoint's
code needed (`trust_remote_code`): then its `get_image_features` and `get_text_features` are called.

Differences from llm2vec, none of which changes a row of ordinary text beyond rounding: padding is on the
right (rotary positions are relative, and padding is masked); the text is tokenised apart from the header in
front of it, so that a leading newline never merges with the header's; a text that is too long is cut at a
token and keeps its end token, where llm2vec drops words in a loop.

Shapes: N rows, D embedding_dim, C channels, H height, W width, T tokens, S hidden size of the language
model.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
)

from revision_ray.core.errors import ConfigError, quote
from revision_ray.data.chat import ControlTokenMarks
from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import EncoderConfig, Tokens, device_of, dtype_of, pad_right, unit_rows
from revision_ray.encode.transformers import (
    ModelImages,
    ProcessorImages,
    load_processor,
    load_tokenizer,
    pixel_scale_of,
)


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


class RemoteCodeImages:
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


_CONTEXT = 512
_HEADER = "<|start_header_id|>user<|end_header_id|>\n\n"  # Llama 3's, of a user's turn
_END = "<|eot_id|>"
_ADAPTER = "text_adapter."
_ADAPTER_KEY = re.compile(r"(?:[a-z_]+\.)?(\d+)\.(?:(?:fn\.[03]|ln)\.)?(?:weight|bias)$")


class _Residual(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # Index 2 is the dropout of training: it keeps the names of the weights.
        self.fn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))
        self.ln = nn.LayerNorm(dim)

    def forward(self, state_NS: torch.Tensor) -> torch.Tensor:
        return state_NS + self.fn(self.ln(state_NS))


class _Adapter(nn.Module):
    """Unit length, residual blocks, layer norm, linear map: (N, S) -> (N, D). Shaped as its weights are."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        last = max(int(name.split(".")[0]) for name in weights)
        layers: list[nn.Module] = []
        with torch.device("meta"):  # the tensors that were read take the places
            for index in range(last - 1):
                hidden, dim = weights[f"{index}.fn.0.weight"].shape
                layers.append(_Residual(dim, hidden))
            dim_out, dim = weights[f"{last}.weight"].shape
            layers += [nn.LayerNorm(dim), nn.Linear(dim, dim_out, bias=f"{last}.bias" in weights)]
        self.layers = nn.Sequential(*layers)
        self.layers.load_state_dict(weights, assign=True)

    def forward(self, state_NS: torch.Tensor) -> torch.Tensor:
        return self.layers(nn.functional.normalize(state_NS, dim=-1))


def _native_adapter(folder: str) -> _Adapter | None:
    """The text adapter, or None where the checkpoint lays it out in a way that we do not know."""
    found = checkpoints.read_tensors(checkpoints.weight_files(folder), lambda name: name.startswith(_ADAPTER))
    weights = {}
    for name, tensor in found.items():
        match = _ADAPTER_KEY.match(name.removeprefix(_ADAPTER))
        if match is None:
            return None
        weights[name.removeprefix(_ADAPTER)[match.start(1) :]] = tensor
    try:
        return _Adapter(weights) if weights else None
    except (KeyError, ValueError, RuntimeError):  # other layers than ours: its own code may know them
        return None


class _Llm2ClipTexts:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._plain = ControlTokenMarks(tokenizer)
        self._header_T = _header_ids(tokenizer)
        self._end_id = tokenizer.convert_tokens_to_ids(_END)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        bodies = [text.rstrip() + _END for text in texts]
        room = _CONTEXT - len(self._header_T)
        rows = []
        encoded = self._tokenizer(bodies, add_special_tokens=False, verbose=False)["input_ids"]
        for text, whole in zip(texts, encoded, strict=True):
            ids = whole
            if self._plain.names_control(text):
                ids = [*self._plain.encode(text.rstrip()), self._end_id]
            body_T = [*ids[: room - 1], self._end_id] if len(ids) > room else ids
            rows.append(
                Tokens(
                    ids=np.asarray([*self._header_T, *body_T], dtype=np.int32),
                    num_tokens=len(self._header_T) + len(ids),
                    limit=_CONTEXT,
                )
            )
        return rows


def _header_ids(tokenizer: Any) -> list[int]:
    """Start token and header: what stands in front of every text and is left out of the mean."""
    unknown = tokenizer.unk_token_id
    if any(
        tokenizer.convert_tokens_to_ids(token) in (None, unknown) for token in (_END, "<|start_header_id|>")
    ):
        raise ConfigError(
            f"the tokenizer of encoder.text_model has no {_END} or no <|start_header_id|>: it is not a Llama "
            "3 Instruct; name the language model that belongs to the LLM2CLIP image checkpoint"
        )
    return list(tokenizer(_HEADER)["input_ids"])


class _LlamaTexts:
    def __init__(
        self, language_model: LlamaModel, adapter: nn.Module, header: int, device: torch.device
    ) -> None:
        self.language_model = language_model.to(device)  # type: ignore[arg-type]
        self.adapter = adapter.to(device)
        self._header = header
        state = torch.zeros(1, language_model.config.hidden_size, dtype=language_model.dtype, device=device)
        with torch.inference_mode():
            self.embedding_dim = self.adapter(state).shape[1]

    @torch.inference_mode()
    def encode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        return unit_rows(self.adapter(self.pooled(tokens)))

    def pooled(self, tokens: Sequence[np.ndarray]) -> torch.Tensor:
        """(N, S): mean of the last layer's states over text and end token, every token seeing every other."""
        device = self.language_model.device
        length_N = torch.tensor([len(ids) for ids in tokens], dtype=torch.long, device=device)
        ids_NT = torch.from_numpy(pad_right(tokens, max(map(len, tokens), default=1), 0)).to(device)
        position_T = torch.arange(ids_NT.shape[1], device=device)
        real_NT = position_T < length_N[:, None]
        states = self.language_model(
            input_ids=ids_NT, attention_mask=real_NT.long(), is_causal=False, use_cache=False
        ).last_hidden_state
        text_NT1 = (real_NT & (position_T >= self._header))[..., None]
        mean_NS = (states.float() * text_NT1).sum(1) / text_NT1.sum(1)
        return mean_NS.to(states.dtype)


def _vision_config(folder: str) -> CLIPVisionConfig:
    document = checkpoints.read_json(os.path.join(folder, "config.json"))
    vision = document.get("vision_config")
    if not isinstance(vision, dict):
        raise ConfigError(
            f"{folder}/config.json: has no vision_config; encoder.model of kind llm2clip is the *image* "
            "checkpoint, for example microsoft/LLM2CLIP-Openai-L-14-336, and encoder.text_model the "
            "language model"
        )
    if "projection_dim" in document:
        vision = vision | {"projection_dim": document["projection_dim"]}
    return CLIPVisionConfig.from_dict(vision)


def _processor(folder: str) -> Any:
    """The checkpoint's image processor; where it ships none, as Microsoft's do not, CLIP's at its size."""
    if checkpoints.existing_files(folder, checkpoints.PREPROCESSOR_FILES):
        return load_processor(folder)
    size: Any = _vision_config(folder).image_size
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _text_model(config: EncoderConfig) -> str:
    if config.text_model is None:
        raise ConfigError(
            "encoder.text_model: required for encoder.kind=llm2clip, the hub id or folder of the language "
            "model, for example microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
        )
    return config.text_model


def image_preparer(config: EncoderConfig) -> ProcessorImages:
    return ProcessorImages(_processor(checkpoints.folder_of(config.model, config.revision)))


def text_preparer(config: EncoderConfig) -> _Llm2ClipTexts:
    return _Llm2ClipTexts(load_tokenizer(checkpoints.folder_of(_text_model(config), None)))


def image_tower(config: EncoderConfig) -> ModelImages | RemoteCodeImages:
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    names = checkpoints.tensor_names(checkpoints.weight_files(folder))
    processor, device = _processor(folder), device_of(config)
    if "visual_projection.weight" not in names:
        return RemoteCodeImages(remote_model(config, folder, "text"), processor, device)
    vision = _vision_config(folder)
    model = checkpoints.load_model(CLIPVisionModelWithProjection, folder, vision, dtype_of(config))
    return ModelImages(model, "image_embeds", vision.projection_dim, pixel_scale_of(processor), device)


def text_tower(config: EncoderConfig) -> _LlamaTexts:
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    text_folder = checkpoints.folder_with_weights(_text_model(config), None)
    document = checkpoints.read_json(os.path.join(text_folder, "config.json"))
    if document.get("model_type") != "llama":
        raise ConfigError(
            f"{text_folder}/config.json: model_type is {quote(document.get('model_type'), 80)}; "
            f"encoder.text_model "
            "takes a Llama"
        )
    header = len(_header_ids(load_tokenizer(text_folder)))
    adapter = _native_adapter(folder)
    if adapter is None:
        adapter = RemoteAdapter(remote_model(config, folder, "vis"))
    dtype = dtype_of(config)
    language_model = checkpoints.load_model(LlamaModel, text_folder, LlamaConfig.from_dict(document), dtype)
    return _LlamaTexts(language_model, adapter.to(dtype).eval(), header, device_of(config))


def fingerprint(config: EncoderConfig) -> str:
    """Hash of both checkpoints' weights, configurations and code, of tokenizer and image preprocessing."""
    folder = checkpoints.folder_with_weights(config.model, config.revision)
    text_folder = checkpoints.folder_with_weights(_text_model(config), None)
    code = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    image_files = checkpoints.existing_files(folder, ("config.json", *checkpoints.PREPROCESSOR_FILES, *code))
    text_files = checkpoints.existing_files(text_folder, ("config.json", *checkpoints.TOKENIZER_FILES))
    return checkpoints.fingerprint_of(
        "llm2clip",
        [("header", _HEADER.encode()), ("end", _END.encode()), ("context", str(_CONTEXT).encode())],
        [
            *image_files,
            *checkpoints.weight_files(folder),
            *text_files,
            *checkpoints.weight_files(text_folder),
        ],
    )
