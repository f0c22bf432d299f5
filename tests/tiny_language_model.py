"""Tiny random language models in folders, with word-level tokenizers and chat templates of real families."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_TEXT = """a an the is are of on in at and or no yes what which how many colour shape there picture photo red
blue green yellow purple small large square circle ring cross left right top bottom dog cat two three four one
you helpful assistant user system describe . , ? : !"""
WORDS = [*_TEXT.split(), "\n"]

# Chat templates that write what those of the families write.
TEMPLATES = {
    "plain": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "qwen": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nyou are a helpful assistant .<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "phi": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
TEMPLATES["base"] = TEMPLATES["qwen"]  # as of a model before chat training: its own end token is </s>
# The token that ends an assistant's turn, and the other special tokens.
END_OF_TURN = {
    "plain": "</s>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "phi": "<|end|>",
    "base": "<|im_end|>",
}
_SPECIAL = {
    "plain": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "qwen": ["<|im_start|>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>"],
    "base": ["<|im_start|>"],
}


def tiny_tokenizer(template: str = "plain", words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Word-level, newlines kept; ids: padding 0, unknown 1, start 2, end 3, `words`, then special tokens."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3}
    for word in [*(words or WORDS), *_SPECIAL[template], END_OF_TURN[template]]:
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    special = dict.fromkeys(["<pad>", "<s>", "</s>", *_SPECIAL[template], END_OF_TURN[template]])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>" if template == "base" else END_OF_TURN[template],
        chat_template=TEMPLATES[template],
    )


def _config(family: str, vocab_size: int) -> PreTrainedConfig:
    """Two layers, width 32. Tied: qwen2, gemma, gemma2, gpt2, opt, bloom."""
    size: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # so that a random model's answers depend on what it reads
    }
    heads = {"head_dim": 8}
    narrow = {key: value for key, value in size.items() if not key.startswith(("num_key", "intermediate"))}
    made = {
        "llama": lambda: LlamaConfig(**size),
        "qwen2": lambda: Qwen2Config(**size, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**size, **heads),
        "mistral": lambda: MistralConfig(**size),
        "mixtral": lambda: MixtralConfig(**size, num_local_experts=4),
        "phi": lambda: PhiConfig(**size),
        "phi3": lambda: Phi3Config(**size),
        "gemma": lambda: GemmaConfig(**size, **heads, tie_word_embeddings=True),
        "gemma2": lambda: Gemma2Config(**size, **heads, tie_word_embeddings=True),
        "gpt2": lambda: GPT2Config(**narrow),
        # Token embeddings narrower than the layers, as in OPT-350m.
        "opt": lambda: OPTConfig(**narrow, ffn_dim=48, word_embed_proj_dim=16),
        "bloom": lambda: BloomConfig(**narrow),
    }
    return made[family]()


def tiny_config(family: str = "llama", vocab_size: int = 80) -> PreTrainedConfig:
    return _config(family, vocab_size)


def write_language_model(folder: Path, family: str = "llama", template: str = "plain", seed: int = 0) -> str:
    """A random model of `family` with its tokenizer, as one has them before ReVision: without `<image>`."""
    tokenizer = tiny_tokenizer(template)
    config = _config(family, len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
