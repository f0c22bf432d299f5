"""A tiny untrained open_clip dual encoder in a folder: real towers, a word-level tokenizer, few pixels."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"word{number}" for number in range(60)]
CONTEXT = 12


def write_encoder(folder: Path, seed: int = 0, image_size: int = 32) -> str:
    """The folder, in open_clip's own layout; another seed gives other weights."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<start>": 2}
    vocabulary |= {word: 3 + number for number, word in enumerate(WORDS)}
    vocabulary["<end>"] = len(vocabulary)  # the highest id: CLIP pools there
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": image_size,
            "layers": 1,
            "width": 16,
            "patch_size": 16,
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(vocabulary),
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**model_cfg)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": image_size}})
    )
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)
