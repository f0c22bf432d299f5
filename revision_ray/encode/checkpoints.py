"""A checkpoint is a folder of weights, configuration, tokenizer and preprocessing; hub ids become one."""

import contextlib
import hashlib
import itertools
import os
import pickle
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import huggingface_hub
import safetensors
import torch
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError, quote, shorten

METADATA = ("*.json", "*.txt", "*.model", "*.py")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

# What damaged or foreign files raise in safetensors, torch.load(weights_only=True) and load_state_dict.
DAMAGED = (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError,
           ValueError, TypeError)  # fmt: skip

Model = TypeVar("Model", bound=PreTrainedModel)


def folder_of(model: str, revision: str | None, patterns: Sequence[str] = METADATA) -> str:
    """The local folder of checkpoint `model`: itself, or a copy of what lies at a URI, or of those files of a
    hub id that match `patterns`.

    Raises:
        ConfigError: neither a folder nor a hub repository that can be reached or is cached.
        DataError: nothing lies at the URI.
    """
    if os.path.isdir(model):
        return model
    if "://" in model:
        return storage.local_copy(model)
    try:
        # Checkpoints keep copies for other runtimes in subfolders: nobody here reads those.
        return huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except (HFValidationError, OSError) as error:
        raise ConfigError(
            f"encoder checkpoint {quote(model, 100)}: no such folder, and the hub did not give it "
            f"({_shortened(error)}); name a folder, or a hub id that this machine can reach or has cached "
            "(and its revision)"
        ) from error


def folder_with_weights(model: str, revision: str | None) -> str:
    """As `folder_of`, with the weights of a transformers checkpoint; safetensors where the hub has them."""
    folder = folder_of(model, revision, (*METADATA, *_SAFETENSORS))
    if not os.path.isdir(model) and not _existing(folder, _SAFETENSORS[:2]):
        folder = folder_of(model, revision, (*METADATA, *_PICKLED))
    return folder


def weight_files(folder: str) -> list[str]:
    """Paths of the files that hold the weights of a transformers checkpoint, sorted, safetensors preferred.

    Raises:
        ConfigError: there are none: an encoder without its weights would give random rows.
    """
    for single, index in (_SAFETENSORS[:2], _PICKLED[:2]):
        if _existing(folder, [single]):
            return [os.path.join(folder, single)]
        if _existing(folder, [index]):
            shards = set(read_json(os.path.join(folder, index)).get("weight_map", {}).values())
            return [os.path.join(folder, shard) for shard in sorted(shards)]
    raise ConfigError(
        f"{folder}: has no weights (expected {_SAFETENSORS[0]} or {_PICKLED[0]}, or their index); "
        "an encoder is never run with random weights: complete the checkpoint"
    )


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a checkpoint file.

    Raises:
        ConfigError: no such file, or it is not a JSON object.
    """
    try:
        document = storage.read_json(path)
    except DataError as error:
        raise ConfigError(
            f"encoder checkpoint: {shorten(error)}; complete or replace the checkpoint"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def tensor_names(paths: Iterable[str]) -> set[str]:
    """The names of the tensors in weight files, none of which is read."""
    names: set[str] = set()
    read_tensors(paths, lambda name: names.add(name) is not None)
    return names


def read_tensors(paths: Iterable[str], wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors whose name is `wanted`; the others are never read from a safetensors file.

    Raises:
        ConfigError: a file is missing, damaged, or a pickle of more than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            if path.endswith(".safetensors"):
                with safetensors.safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors |= {name: tensor for name, tensor in loaded.items() if wanted(name)}
        except DAMAGED as error:
            raise damaged(path, error) from error
    return tensors


def move_off_odd_addresses(model: torch.nn.Module) -> None:
    """Copy weights that do not begin a cache line, as torch's own do, to memory of their own, one at a time.

    Weights mapped from a safetensors file lie where it has them. On some processors (AMD's) the matrix
    library then sums in another order: the same weights would give other bits than before they were saved.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _CACHE_LINE:
            tensor.data = tensor.data.clone()


_CACHE_LINE = 64


def load_model(model_class: type[Model], folder: str, config: Any, dtype: torch.dtype) -> Model:
    """`model_class` with its weights from `folder`, in evaluation mode; other weights there are not read.

    Raises:
        ConfigError: weights are missing, of another shape, or damaged.
    """
    files = weight_files(folder)
    try:
        with _quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=files[0].endswith(".safetensors"),
                weights_only=True,
            )
    except DAMAGED as error:
        raise damaged(folder, error) from error
    model, report = loaded
    move_off_odd_addresses(model)
    for problem, names in (
        ("lacks", report["missing_keys"]),
        ("has another shape for", report["mismatched_keys"]),
    ):
        if names:
            raise ConfigError(
                f"{folder}: {problem} {len(names)} weights of {model_class.__name__}, among them "
                f"{sorted(map(str, names))[0]}; the checkpoint does not match its config.json"
            )
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, and no table of the other tower's weights, which are left out on purpose."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def damaged(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be loaded as a checkpoint ({type(error).__name__}: {_shortened(error)}); "
        "download or save it again, as safetensors where possible (pickles are read only if they hold "
        "tensors alone)"
    )


def fingerprint_of(kind: str, contents: Iterable[tuple[str, bytes]], files: Iterable[str]) -> str:
    """64 hex digits over named contents and whole files, in that order; files are streamed.

    Only a file's name and bytes count, not its folder.

    Raises:
        ConfigError: a file is missing.
    """
    parts = [kind.encode()]
    for name, content in contents:
        parts += [name.encode(), content]
    for path in files:
        try:
            with open(path, "rb") as file:
                parts += [os.path.basename(path).encode(), hashlib.file_digest(file, "sha256").digest()]
        except OSError as error:
            raise damaged(path, error) from error
    return storage.sha256(*parts)


def existing_files(folder: str, names: Sequence[str]) -> list[str]:
    """Paths of those of `names` that `folder` holds, in the order of `names`."""
    return [os.path.join(folder, name) for name in _existing(folder, names)]


def _existing(folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if os.path.isfile(os.path.join(folder, name))]


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or "no message"
