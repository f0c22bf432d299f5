"""Every published chat template that lies on this machine gives right targets.

Those of the package trl, and those of a directory of yours:
CHAT_TEMPLATES=DIRECTORY python -m pytest tests/test_chat_templates.py -v. Writes nothing.
"""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from test_samples import byte_level, said, targets
from tokenizers import AddedToken

from revision_ray.train.samples import Formatter, Unusable

# What looks like a token in a template; those that models write into answers are no special tokens.
TOKEN = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]{1,40}[|\uff5c]>|</?[a-zA-Z_:]{1,30}>|<\|?[a-z]+\|?>|<[a-z]+_of_[a-z]+>|\[/?[A-Z_]{3,20}\]"
)
WRITTEN_BY_MODELS = re.compile(r"</?(think|tool_call|tool_response|answer|tools|response)>")
ENDS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<|end_of_text|>",
    "<|endoftext|>",
]
CONVERSATIONS = {
    "one turn": said("Is it red?", "Yes, it is red!"),
    "several turns": said(
        "Is it red?", "Yes, it is red!", "And the dog?", "Blue.\nAs the sky.", "Sure?", "No."
    ),
    "system": said("Is it red?", "Yes, it is red!", "Sure?", "No.", system="You are brief."),
    "one image": said("<image>\nIs it red?", "Yes!", images=1),
    "two images": said("<image>\n<image>\nAre both red?", "Yes!", "Sure?", "No.", images=2),
}
# trl's templates that refuse a system turn: their models have none.
WITHOUT_SYSTEM = {"gemma.jinja", "gemma_training.jinja"}


def published() -> list[Path]:
    files = importlib.metadata.files("trl") or []
    found = [Path(str(file.locate())) for file in files if file.match("trl/chat_templates/*.jinja")]
    if folder := os.environ.get("CHAT_TEMPLATES"):
        found += [path for path in Path(folder).iterdir() if path.suffix in (".jinja", ".json")]
    return sorted(found)


def template_of(path: Path) -> str:
    """Of a .jinja file, or of a tokenizer_config.json under any name."""
    text = path.read_text()
    return str(json.loads(text)["chat_template"]) if path.suffix == ".json" else text


@pytest.mark.parametrize("path", published(), ids=lambda path: path.name)
def test_targets_are_the_answers(path):
    template = template_of(path)
    tokens = sorted(set(TOKEN.findall(template)) - {"<image>"})
    end = next((name for name in ENDS if name in tokens), "</s>")
    special = [name for name in tokens if not WRITTEN_BY_MODELS.fullmatch(name) and name != end]
    tokenizer = byte_level(template, [*special, "<|user|>", "<|assistant|>"], end, "<BOS>")
    tokenizer.add_tokens([AddedToken(name) for name in tokens if WRITTEN_BY_MODELS.fullmatch(name)])
    formatter = Formatter(tokenizer, 3, 8192, today="2024-02-29")
    for kind, conversation in CONVERSATIONS.items():
        embeds = np.ones((len(conversation.images), 4), np.float32)
        if kind == "system" and path.name in WITHOUT_SYSTEM:
            with pytest.raises(Unusable, match="bad_conversation"):
                formatter.conversation(conversation, embeds)
            continue
        sample = formatter.conversation(conversation, embeds)
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        found = targets(sample, tokenizer)
        assert len(found) == len(answers), kind
        for written, answer in zip(found, answers, strict=True):
            before, answered, behind = written.partition(answer)
            assert answered, kind
            # Around an answer are tokens (empty reasoning, the end), and the names of channels.
            assert TOKEN.sub("", before).strip() in ("", "final", "to=user"), kind
            assert TOKEN.sub("", behind).strip() == "", kind
        assert sample.input_ids.tolist().count(formatter.image_token_id) == 3 * len(conversation.images)
