"""open_clip dual encoders: an architecture with a pretrained tag, a checkpoint file, or a configuration.

A configuration of yours is a JSON (open_clip's model_cfg, or {"model_cfg", "preprocess_cfg"}), or a folder
in open_clip's layout: `open_clip_config.json` beside `open_clip_model.safetensors`. A `tokenizer.json`
beside it is the tokenizer, unless the configuration names one (`text_cfg.hf_tokenizer_name`): open_clip
loads that.

Shapes: N rows, D embedding_dim, C channels, H height, W width, T tokens.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer, default_bpe
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torchvision.transforms import Compose, Normalize
from transformers import PreTrainedTokenizerFast

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, quote, shorten
from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import (
    EncoderConfig,
    PixelScale,
    PlainTexts,
    Tokens,
    device_of,
    dtype_of,
    pad_right,
    unit_rows,
)

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
            "open_clip_pytorch_model.bin", "open_clip_model.pt")  # fmt: skip
_HUB = "hf-hub:"


@dataclass(frozen=True, kw_only=True)
class OpenClipSource:
    """Where everything of one encoder is."""

    model_cfg: dict[str, Any]
    preprocess: PreprocessCfg
    weights: Callable[[], str]
    """Path of the checkpoint file; looked for or downloaded when it is called: a preparer needs none."""
    folder: str | None
    """Where the configuration lies, if it is not one of open_clip's own."""
    name: str
    """How open_clip calls the configuration."""

    @property
    def context(self) -> int:
        """Tokens that the text tower takes, start and end token among them."""
        return self.model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)


def source_of(config: EncoderConfig) -> OpenClipSource:
    """Everything that `config` names, found; nothing of it loaded.

    Raises:
        ConfigError: unknown architecture or tag, missing file, no weights.
    """
    model = config.model
    if model.startswith(_HUB):
        repository = model.removeprefix(_HUB)
        folder = checkpoints.folder_of(repository, config.revision)
        return _local(config, os.path.join(folder, _CONFIG), partial(_download, repository, config.revision))
    model = storage.local_copy(model)
    if os.path.isdir(model):
        return _local(config, os.path.join(model, _CONFIG), None)
    if model.endswith(".json"):
        return _local(config, model, None)
    return _built_in(config)


def _download(repository: str, revision: str | None) -> str:
    try:
        return download_pretrained_from_hf(repository, revision=revision)
    except OSError as error:
        raise checkpoints.damaged(f"{_HUB}{repository}", error) from error


def _local(config: EncoderConfig, path: str, download: Callable[[], str] | None) -> OpenClipSource:
    document = checkpoints.read_json(path)
    model_cfg = document.get("model_cfg", document)
    if "embed_dim" not in model_cfg or not all(
        isinstance(model_cfg.get(part), dict) for part in ("vision_cfg", "text_cfg")
    ):
        raise ConfigError(
            f"{path}: is not an open_clip configuration (expected embed_dim, vision_cfg and text_cfg)"
        )
    folder = os.path.dirname(os.path.abspath(path))
    preprocess: dict[str, Any] = merge_preprocess_dict(PreprocessCfg(), document.get("preprocess_cfg", {}))
    if config.pretrained is not None:
        weights = partial(_file, config.pretrained)
    else:
        weights = partial(_beside, folder, download)
    return OpenClipSource(
        model_cfg=model_cfg,
        preprocess=_sized(preprocess, model_cfg),
        weights=weights,
        folder=folder,
        name=f"local-dir:{folder}",
    )


def _beside(folder: str, download: Callable[[], str] | None) -> str:
    """The weights that lie in `folder`, else those that `download` brings."""
    found = checkpoints.existing_files(folder, _WEIGHTS)
    if found:
        return found[0]
    if download is None:
        raise ConfigError(
            f"{folder}: holds no weights (expected {_WEIGHTS[0]}), and an encoder is never run with random "
            "ones; put them there, or name a checkpoint file as encoder.pretrained"
        )
    return download()


def _built_in(config: EncoderConfig) -> OpenClipSource:
    name = config.model.replace("/", "-")
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        raise ConfigError(
            f"encoder.model={quote(config.model, 100)}: open_clip has no such architecture (nearest: "
            f"{', '.join(near) or 'none'}), and it is no folder and no config JSON here; "
            "open_clip.list_models() gives all names"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if config.pretrained is None:
        raise ConfigError(
            f"encoder.pretrained: required with the architecture {name}, a tag (one of "
            f"{', '.join(tags) or 'none'}) or the path of a checkpoint file; an encoder is never run with "
            "random weights"
        )
    tag = open_clip.get_pretrained_cfg(name, config.pretrained)
    quick = bool(tag.get("quick_gelu"))
    if tag and quick != bool(model_cfg.get("quick_gelu")):
        twin = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise ConfigError(
            f"encoder.pretrained={config.pretrained}: these weights were trained with "
            f"{'QuickGELU' if quick else 'GELU'}, {name} is built with the other, and the rows would be "
            f"wrong; use the architecture {twin}"
        )
    if not tag and not os.path.isfile(config.pretrained):
        raise ConfigError(
            f"encoder.pretrained={quote(config.pretrained, 100)}: is neither a file nor a tag of {name} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    return OpenClipSource(
        model_cfg=model_cfg,
        preprocess=_sized(merge_preprocess_dict(PreprocessCfg(), tag), model_cfg),
        weights=partial(_download_tag, name, tag) if tag else partial(_file, config.pretrained),
        folder=None,
        name=name,
    )


def _download_tag(model: str, tag: dict[str, Any]) -> str:
    try:
        return open_clip.download_pretrained(tag)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{model}: its weights cannot be downloaded ({shorten(error)}); check the network, or "
            f"download the file "
            "elsewhere and name it as encoder.pretrained"
        ) from error


def _file(path: str) -> str:
    path = storage.local_copy(path)
    if not os.path.isfile(path):
        raise ConfigError(
            f"encoder.pretrained={quote(path, 100)}: no such file; with a configuration of your own it "
            f"is a path"
        )
    return path


def _sized(preprocess: dict[str, Any], model_cfg: dict[str, Any]) -> PreprocessCfg:
    """The preprocessing at the size that the image tower takes, which has the last word in open_clip too."""
    size = model_cfg["vision_cfg"].get("image_size", open_clip.CLIPVisionCfg.image_size)
    sized: dict[str, Any] = preprocess | {"size": tuple(size) if isinstance(size, list) else size}
    return PreprocessCfg(**sized)


class FileTokens:
    """A `tokenizers` file whose post-processor adds start and end token; cut texts keep the end token."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(context)
        self._tokenizer, self._context = tokenizer, context
        self._plain = PlainTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        self._num_special = tokenizer.num_special_tokens_to_add(False)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        rows = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(list(texts)), strict=True):
            if self._plain.names_control(text):
                rows.append(self._plain(text, self._context))
                continue
            # What was cut off lies in parts, each with special tokens of its own.
            cut_off = sum(len(part.ids) - self._num_special for part in encoding.overflowing)
            rows.append(
                Tokens(
                    ids=np.asarray(encoding.ids, dtype=np.int32),
                    num_tokens=len(encoding.ids) + cut_off,
                    limit=self._context,
                )
            )
        return rows


class ClipTokens:
    """The ids of open_clip's SimpleTokenizer by way of the tokenizers library.

    The original merges a word's pairs in a Python loop that is quadratic in the word: minutes for 100 kB
    without a space.
    """

    def __init__(self, original: SimpleTokenizer, context: int) -> None:
        assert original.context_length is not None
        # The original takes the names of its special tokens in a text for these tokens; here they are text.
        special = "|".join(original.decoder[token_id] for token_id in original.all_special_ids)
        words = original.pat.pattern.removeprefix(f"{special}|")
        merges = [pair for pair in original.bpe_ranks if len(pair) == 2]
        self._words = Tokenizer(models.BPE(original.encoder, merges, end_of_word_suffix="</w>"))
        self._words.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(f"(?i){words}"), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._original, self._context = original, context

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        start, end = self._original.sot_token_id, self._original.eot_token_id
        rows = []
        for encoding in self._words.encode_batch([self._original.clean_fn(text) for text in texts]):
            words_T = encoding.ids
            rows.append(
                Tokens(
                    ids=np.asarray([start, *words_T[: self._context - 2], end], dtype=np.int32),
                    num_tokens=len(words_T) + 2,
                    limit=self._context,
                )
            )
        return rows


class LibraryTokens:
    """Whatever tokenizer open_clip chose, padded by itself to full length: its text tower may read that."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._plain = PlainTexts(tokenizer.tokenizer)
        tokenizer.tokenizer.split_special_tokens = True  # a special token's name in a text is text

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        ids_NT = self._tokenizer(list(texts), context_length=self._context).numpy().astype(np.int32)
        clean = getattr(self._tokenizer, "clean_fn", str)
        cleaned = [clean(text) for text in texts]
        whole = self._tokenizer.tokenizer(cleaned, verbose=False)["input_ids"]
        # The mode "clips" adds a class token behind the padding.
        clips = getattr(self._tokenizer, "tokenizer_mode", "") == "clips"
        rows = []
        for text, row_T, ids in zip(cleaned, ids_NT, whole, strict=True):
            num_tokens = len(ids) + clips
            if not clips and self._plain.names_control(text):
                plain = self._plain(text, self._context)
                row_T[:] = self._tokenizer.tokenizer.pad_token_id
                row_T[: len(plain.ids)] = plain.ids
                num_tokens = plain.num_tokens
            rows.append(Tokens(ids=row_T, num_tokens=num_tokens, limit=self._context))
        return rows


def tokenizer_of(source: OpenClipSource) -> Any:
    """A `tokenizers` file beside the configuration, else what open_clip chooses for it.

    Raises:
        ConfigError: the tokenizer cannot be read, or knows more tokens than the text tower.
    """
    text_cfg = source.model_cfg["text_cfg"]
    named = text_cfg.get("hf_tokenizer_name")
    file = os.path.join(source.folder, "tokenizer.json") if source.folder else ""
    kwargs = text_cfg.get("tokenizer_kwargs") or {}
    try:
        if source.folder is None:
            return open_clip.get_tokenizer(source.name)
        if named:
            mode = text_cfg.get("tokenizer_mode")
            origin = source.folder if os.path.isfile(file) else named
            return HFTokenizer(origin, context_length=source.context, tokenizer_mode=mode, **kwargs)
    except (*checkpoints.DAMAGED, ImportError) as error:
        raise checkpoints.damaged(f"{source.name} (tokenizer)", error) from error
    if not os.path.isfile(file):
        return SimpleTokenizer(context_length=source.context, **kwargs)
    tokenizer = _read_tokenizer(file)
    known, taken = tokenizer.get_vocab_size(), text_cfg.get("vocab_size", open_clip.CLIPTextCfg.vocab_size)
    if known > taken:
        raise ConfigError(
            f"{file}: knows {known} tokens, but the text tower beside it takes {taken} "
            "(text_cfg.vocab_size); they do not belong together"
        )
    return tokenizer


def _read_tokenizer(file: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing narrower for a file that it cannot parse
        raise checkpoints.damaged(file, error) from error


def vocabulary_of(tokenizer: Any) -> bytes:
    """What tells this tokenizer from every other, for the fingerprint."""
    if isinstance(tokenizer, SimpleTokenizer):
        with open(default_bpe(), "rb") as file:
            return file.read()
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.tokenizer.backend_tokenizer
    return backend.to_str().encode()


def _build(source: OpenClipSource, dtype: torch.dtype) -> Any:
    """The whole model on the CPU with its weights: open_clip builds and loads both towers or none."""
    cfg = json.loads(json.dumps(source.model_cfg))
    cfg["vision_cfg"].pop("timm_model_pretrained", None)  # no weights but the checkpoint's
    custom_text = cfg.pop("custom_text", False)
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
        custom_text = True
    path = source.weights()
    if not path.endswith((".safetensors", ".pt", ".pth", ".bin")):
        raise ConfigError(
            f"{path}: unknown kind of checkpoint; expected .safetensors (or .pt, .pth, .bin of tensors)"
        )
    model_class: Any = open_clip.CLIP
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    try:
        model = model_class(**cfg)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise checkpoints.damaged(f"{source.name} (configuration)", error) from error
    try:
        open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except (*checkpoints.DAMAGED, StopIteration, AttributeError, AssertionError) as error:
        raise checkpoints.damaged(path, error) from error
    return model.to(dtype).eval()


class _Images:
    """open_clip's own transform up to the bytes; scaling and normalising are left to the tower."""

    def __init__(self, preprocess: PreprocessCfg) -> None:
        whole = image_transform_v2(preprocess, is_train=False)
        assert isinstance(whole, Compose), whole
        transforms = whole.transforms
        assert isinstance(transforms[-1], Normalize), transforms
        self._transform = Compose(transforms[:-2])

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(self._transform(image)).transpose(2, 0, 1))


class _ImageTower:
    def __init__(
        self, visual: torch.nn.Module, source: OpenClipSource, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = visual.to(device)
        self.embedding_dim = source.model_cfg["embed_dim"]
        self._dtype, self._device = dtype, device
        preprocess = source.preprocess
        self._scale = PixelScale(scale=1 / 255, mean=tuple(preprocess.mean), std=tuple(preprocess.std))

    @torch.inference_mode()
    def encode(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        features = self.model(self._scale(pixels_NCHW, self._device, self._dtype))
        return unit_rows(features[0] if isinstance(features, tuple) else features)  # with patch tokens behind


class _TextTower:
    def __init__(self, model: Any, source: OpenClipSource, device: torch.device) -> None:
        self.model = model.to(device)
        self.embedding_dim = source.model_cfg["embed_dim"]
        self._context, self._device = source.context, device

    @torch.inference_mode()
    def encode(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        # At full length always, as in open_clip: some of its text towers read what is behind the end token.
        ids_NT = torch.from_numpy(pad_right(tokens, self._context, 0)).to(self._device)
        return unit_rows(self.model.encode_text(ids_NT))


def image_preparer(config: EncoderConfig) -> _Images:
    return _Images(source_of(config).preprocess)


def text_preparer(config: EncoderConfig) -> FileTokens | ClipTokens | LibraryTokens:
    source = source_of(config)
    tokenizer = tokenizer_of(source)
    if isinstance(tokenizer, Tokenizer):
        return FileTokens(tokenizer, source.context)
    if not isinstance(tokenizer, SimpleTokenizer):
        return LibraryTokens(tokenizer, source.context)
    if tokenizer.reduction_fn is not None:
        raise ConfigError(
            f"{config.model}: its tokenizer drops words of long texts at random (reduction_mask), so rows "
            "would differ between runs; remove text_cfg.tokenizer_kwargs.reduction_mask from a copy of the "
            "configuration"
        )
    return ClipTokens(tokenizer, source.context)


def image_tower(config: EncoderConfig) -> _ImageTower:
    source, dtype = source_of(config), dtype_of(config)
    return _ImageTower(_build(source, dtype).visual, source, dtype, device_of(config))


def text_tower(config: EncoderConfig) -> _TextTower:
    source = source_of(config)
    model = _build(source, dtype_of(config))
    for part in ("visual", "text_decoder"):  # CoCa's decoder captions images
        if hasattr(model, part):
            delattr(model, part)
    return _TextTower(model, source, device_of(config))


def fingerprint(config: EncoderConfig) -> str:
    """Hash of weights file, architecture, tokenizer and preprocessing: what decides the rows."""
    source = source_of(config)
    contents = [
        ("model_cfg", json.dumps(source.model_cfg, sort_keys=True).encode()),
        ("preprocess_cfg", json.dumps(dataclasses.asdict(source.preprocess), sort_keys=True).encode()),
        ("tokenizer", vocabulary_of(tokenizer_of(source))),
    ]
    return checkpoints.fingerprint_of("open_clip", contents, [source.weights()])
