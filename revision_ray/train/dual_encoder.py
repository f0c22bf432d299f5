"""Dual encoders trained from scratch: architectures, tokenizer, contrastive loss and measures. No Ray.

Shapes: B rows of this worker's batch, N rows of all workers, D embedding_dim, T tokens, H height, W width,
C colour channels.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, quote

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # A ResNet of 64 px and a text transformer, 1.8 M parameters together.
    "miniature": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
        "text_cfg": {"context_length": 26, "width": 128, "heads": 4, "layers": 2},
    },
}
"""open_clip model configurations that open_clip does not bring."""


def build_tokenizer(captions: Iterable[str], max_words: int) -> Tokenizer:
    """Return a word-level tokenizer of the `max_words` most frequent words, in lower case.

    Punctuation is a word. Ids: padding 0, unknown 1, start 2, words in order of (frequency, alphabet), and
    last the end token: CLIP pools where the id is highest. The post-processor adds start and end, the end
    also when the text is cut.
    """
    counts = Counter(word for text in captions for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, START, *words, END])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, vocabulary[token]) for token in (START, END)]
    )
    return tokenizer


def set_context(tokenizer: Tokenizer, context_length: int) -> None:
    """Make `tokenizer` cut and pad every text to `context_length` tokens."""
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=context_length)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 (B, T); `set_context` sets T."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def model_config(name: str, vocab_size: int, context_length: int | None) -> dict[str, Any]:
    """Return open_clip's model configuration `name` with a text tower for the tokenizer.

    Raises:
        ConfigError: no such architecture or file, or its text tower brings a tokenizer of its own.
    """
    config: Any
    if name.endswith(".json"):
        document = storage.read_json(name)
        config = document.get("model_cfg", document)
    else:
        config = ARCHITECTURES.get(name) or open_clip.get_model_config(name)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ConfigError(
            f"model {quote(name, 80)} is no open_clip model configuration; name "
            f"{', '.join(ARCHITECTURES)}, an architecture of open_clip, or a JSON with embed_dim, vision_cfg "
            "and text_cfg"
        )
    square = isinstance(config["vision_cfg"].get("image_size", 224), int)
    if "hf_model_name" in config["text_cfg"] or not square:
        raise ConfigError(
            f"model {quote(name, 80)}: expected square images, and a text tower without hf_model_name, "
            "which takes the captions' words"
        )
    text = {**config["text_cfg"], "vocab_size": vocab_size, "hf_tokenizer_name": "words"}
    if context_length is not None:
        text["context_length"] = context_length
    return {**config, "text_cfg": text}


def build_model(config: dict[str, Any], temperature: float) -> torch.nn.Module:
    """Build the dual encoder at a fixed temperature, its weights drawn from torch's global seed."""
    towers = {key: value for key, value in config.items() if key != "custom_text"}
    model_class = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = model_class(**towers, init_logit_scale=math.log(1 / temperature))
    model.logit_scale.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def normalised(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """Return float32 (B, 3, H, W), normalised as open_clip's preprocessing does it, of uint8 pixels."""
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=pixels_BHWC.device)
    deviation = torch.tensor(OPENAI_DATASET_STD, device=pixels_BHWC.device)
    return ((pixels_BHWC.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


def checkpoint_files(
    model: torch.nn.Module, config: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, bytes]:
    """Return name -> bytes of the files that open_clip loads as `local-dir:FOLDER`, tokenizer included."""
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.no_padding()
    saved.no_truncation()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    preprocess = {
        "size": config["vision_cfg"].get("image_size", 224),
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": START, "eos_token": END}
    return {
        "open_clip_model.safetensors": safetensors.torch.save(weights),
        "tokenizer.json": saved.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **names}),
        "open_clip_config.json": _json({"model_cfg": config, "preprocess_cfg": preprocess}),
    }


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


class _GatherRows(torch.autograd.Function):
    """Gather the rows of all workers in rank order; sum the gradients that all workers have of a row."""

    @staticmethod
    def forward(ctx: Any, rows_BD: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows_BD.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        # Not reduce_scatter, which gloo lacks; the rows are few.
        gradient_ND = gradients[0].clone()
        dist.all_reduce(gradient_ND)
        return gradient_ND.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_loss(image_BD: torch.Tensor, text_BD: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the symmetric InfoNCE of this worker's unit rows against the rows of all workers.

    It is the mean over this worker's rows. Every worker brings equally many rows. The mean of this loss over
    the workers, and the mean of its parameter gradients (what DistributedDataParallel takes), are those of
    one worker with the whole batch.
    """
    image_ND, text_ND, first = image_BD, text_BD, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        # One collective for both, so that its gradient comes before the first of any parameter.
        both_N2D = _GatherRows.apply(torch.cat([image_BD, text_BD], dim=1))
        image_ND, text_ND = both_N2D.chunk(2, dim=1)
        first = dist.get_rank() * len(image_BD)
    target_B = torch.arange(first, first + len(image_BD), device=image_BD.device)
    to_text = F.cross_entropy(image_BD @ text_ND.T / temperature, target_B)
    to_image = F.cross_entropy(text_BD @ image_ND.T / temperature, target_B)
    return (to_text + to_image) / 2


def pair_metrics(image_ND: torch.Tensor, text_ND: torch.Tensor) -> dict[str, float]:
    """Measure retrieval and geometry of N paired unit rows.

    `image_to_text_r1`, `text_to_image_r1`: share whose partner is nearest of all N. `modality_gap`: distance
    between the centroids. `image_trace`, `text_trace`: mean squared distance to the own centroid.
    """
    similarity_NN = image_ND @ text_ND.T
    target_N = torch.arange(len(image_ND), device=image_ND.device)
    image_centroid, text_centroid = image_ND.double().mean(0), text_ND.double().mean(0)
    return {
        "num_pairs": len(image_ND),
        "image_to_text_r1": float((similarity_NN.argmax(1) == target_N).double().mean()),
        "text_to_image_r1": float((similarity_NN.argmax(0) == target_N).double().mean()),
        "modality_gap": float((image_centroid - text_centroid).norm()),
        "image_trace": float(1 - image_centroid.square().sum()),
        "text_trace": float(1 - text_centroid.square().sum()),
    }
