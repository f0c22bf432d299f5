"""Which open_clip encoder a configuration names: architecture, preprocessing, weights; found, not loaded."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from revision_ray import storage
from revision_ray.encode import checkpoints
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.errors import ConfigError, quote, shorten

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
            "open_clip_pytorch_model.bin", "open_clip_model.pt")  # fmt: skip
_HUB = "hf-hub:"


@dataclass(frozen=True, kw_only=True)
class Source:
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


def source_of(config: EncoderConfig) -> Source:
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


def _local(config: EncoderConfig, path: str, download: Callable[[], str] | None) -> Source:
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
    return Source(
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


def _built_in(config: EncoderConfig) -> Source:
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
    return Source(
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
