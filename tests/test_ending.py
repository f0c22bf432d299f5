"""A model ends its answers where its training targets end: in its settings, in evaluate, in both engines."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_samples import CHAT_ML, FAMILIES, RED, byte_level, metaspace, said
from tiny_language_model import TEMPLATES, WORDS, tiny_config
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from revision_ray.evaluate.responder import Responder
from revision_ray.model.ending import declare_ends, end_ids, turn_ends, unknown_ends, until_end
from revision_ray.serve.app import checked
from revision_ray.serve.engine import Prompt
from revision_ray.serve.replicas import LanguageModel
from revision_ray.serve.sampling import Sampling
from revision_ray.serve.settings import EngineConfig, ServeJob
from revision_ray.train import export
from revision_ray.train.models import Architecture, load_model, new_model
from revision_ray.train.samples import NO_LABEL, Formatter, collate

DIM, V = 4, 2

_TURNS = "{% for m in messages %}"
# Written for these tests in the manner of each family: template, its control tokens, the
# tokenizer's own end, and the ends of a turn.
STYLES: dict[str, tuple[str, list[str], str, list[str]]] = {
    "chat_ml_of_a_base_model": (CHAT_ML, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>", ["<|im_end|>"]),
    "gemma": (
        _TURNS + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        ["<end_of_turn>"],
    ),
    "mistral": (
        "{{ bos_token }}" + _TURNS + "{% if m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}"
        "{% elif m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
        "{% else %}{{ raise_exception('user and assistant alone') }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
        "</s>",
        ["</s>"],
    ),
    "the_last_turn_ends_otherwise": (  # gpt-oss
        _TURNS + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
        ["<|start|>", "<|message|>", "<|end|>", "<|return|>"],
        "<|endoftext|>",
        ["<|end|>", "<|return|>"],
    ),
    "the_last_turn_alone_has_an_end": (
        _TURNS + "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[m.role] ~ m.content }}"
        "{{ eos_token if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        [],
        "</s>",
        ["</s>"],
    ),
    "words_before_the_end": (
        _TURNS + "<|{{ m.role }}|>{{ m.content }}{{ ' Over.<|stop|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|stop|>"],
        "</s>",
        ["<|stop|>"],
    ),
    "the_end_stands_behind_the_marks": (
        _TURNS + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|stop|>{% endfor %}",
        ["<|user|>", "<|assistant|>", "<|stop|>"],
        "</s>",
        ["<|stop|>"],
    ),
    "thoughts_of_the_last_turn_alone": (  # Qwen3
        _TURNS + "<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|endoftext|>",
        ["<|im_end|>"],
    ),
    "a_system_turn_is_wanted": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('say who you are') }}{% endif %}"
        + _TURNS + "<|{{ m.role }}|>{{ m.content }}<|stop|>\n{% endfor %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|stop|>"],
        "</s>",
        ["<|stop|>"],
    ),
    "the_next_role_ends_a_turn": (  # GLM-4
        "[gMASK]<sop>" + _TURNS + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"],
        "<|endoftext|>",
        ["<|user|>"],
    ),
    "contents_in_parts": (  # SmolVLM
        _TURNS + "{{ m.role | capitalize }}: {% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}",
        ["<end_of_utterance>"],
        "</s>",
        ["<end_of_utterance>"],
    ),
    "text_ends_a_turn": (
        _TURNS + "### {{ {'user': 'Human', 'assistant': 'Assistant', 'system': 'Task'}[m.role] }}:"
        " {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}",
        [],
        "</s>",
        [],
    ),
}  # fmt: skip
ONE_TURN, TWO_TURNS = ("Is it red?", "Yes!"), ("Is it red?", "Yes!", "Is it?", "No.")


@pytest.mark.parametrize("build", [byte_level, metaspace])
@pytest.mark.parametrize("style", STYLES)
def test_the_ends_of_a_template(style, build):
    template, control, eos, ends = STYLES[style]
    tokenizer = build(template, control, eos, "<s>")
    assert sorted(tokenizer.convert_ids_to_tokens(turn_ends(tokenizer))) == ends


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("turns", [ONE_TURN, TWO_TURNS])
def test_targets_end_with_them_or_the_sample_says_that_they_do_not(style, turns):
    template, control, eos, _ = STYLES[style]
    tokenizer = byte_level(template, control, eos, "<s>")
    declared = GenerationConfig()
    declare_ends(declared, tokenizer)
    told = said(*turns, system="Be brief." if style == "a_system_turn_is_wanted" else "")
    sample = Formatter(tokenizer, V).conversation(told, RED[:0])
    last = int(sample.labels[sample.labels != NO_LABEL][-1])
    assert (last in end_ids(declared)) == sample.ended
    assert sample.ended == (style not in ("the_next_role_ends_a_turn", "text_ends_a_turn"))


def test_where_the_next_role_ends_a_turn_a_turn_before_the_last_learns_it():
    template, control, eos, _ = STYLES["the_next_role_ends_a_turn"]
    tokenizer = byte_level(template, control, eos)
    sample = Formatter(tokenizer, V).conversation(said(*TWO_TURNS), RED[:0])
    assert tokenizer.decode(sample.labels[sample.labels != NO_LABEL]) == "Yes!<|user|>No."


def test_a_cut_is_no_missing_end():
    tokenizer = FAMILIES["qwen"][0]()
    told = said("Is it red?", "Yes! " * 30)
    assert Formatter(tokenizer, V, 60, "truncate").conversation(told, RED[:0]).ended


def test_ends_are_added_to_those_that_the_model_has():
    tokenizer = byte_level(CHAT_ML, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>")
    own, turn = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    for before, after in ((None, [own, turn]), (own, [own, turn]), ([7, turn], [7, turn, own])):
        declared = GenerationConfig(eos_token_id=before)
        for _ in range(2):  # once is enough
            declare_ends(declared, tokenizer)
            assert declared.eos_token_id == after
    assert until_end([5, 6, turn, 8], declared) == [5, 6]
    tokenizer.chat_template = None
    declared = GenerationConfig()
    declare_ends(declared, tokenizer)
    assert declared.eos_token_id == own


# --- a base model that has learnt to answer ---------------------------------------------------------------

ASKED, ANSWERED = "what colour ?", "red ."


def base_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML over an end token </s>; <|im_end|> is an added token that no decoding hides."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *WORDS, "<|im_start|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    special = ["<pad>", "<s>", "</s>", "<|im_start|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        chat_template=TEMPLATES["qwen"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """Stage 1's model and, trained from it to say ANSWERED and to end, stage 2's."""
    folder = tmp_path_factory.mktemp("taught")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a model this small a second one only waits
    tokenizer = base_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer))  # its eos_token_id is that of </s>
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    options: Any = {"dtype": torch.float32, "attention": None}
    model, processor = new_model(
        str(folder / "language_model"), Architecture(num_visual_tokens=V), embedding_dim=DIM, alignment={},
        image_tower=None, **options,
    )  # fmt: skip
    export.write(model, processor, str(folder / "stage one"))
    model, processor = load_model(str(folder / "stage one"), **options)
    formatter = Formatter(processor.tokenizer, V)
    batch = collate([formatter.conversation(said(ASKED, ANSWERED), RED[:0])], 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss < 0.05
    export.write(model.eval(), processor, str(folder / "stage two"))
    return folder


@pytest.mark.parametrize("stage", ["stage one", "stage two"])
def test_a_written_model_knows_its_own_end_and_the_templates(taught, stage):
    settings = json.loads((taught / stage / "generation_config.json").read_text())
    tokenizer = base_tokenizer()
    assert tokenizer.convert_ids_to_tokens(settings["eos_token_id"]) == ["</s>", "<|im_end|>"]
    assert unknown_ends(str(taught / stage)) == ""


def test_evaluate_hears_the_answer_and_no_end(taught):
    responder = Responder(str(taught / "stage two"), dtype="float32", max_new_tokens=12, num_threads=1)
    assert responder.answer([ASKED, ASKED], None) == [ANSWERED] * 2


def test_settings_for_sampling_that_a_model_brings_do_not_draw_answers(taught, tmp_path):
    export.put(str(taught / "stage two"), str(tmp_path))
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 50.0, "top_p": 1.0, "top_k": 0, "num_beams": 3}
    settings |= {"max_length": 3, "max_new_tokens": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    responder = Responder(str(tmp_path), dtype="float32", max_new_tokens=12, num_threads=1)
    assert responder.answer([ASKED] * 20, None) == [ANSWERED] * 20


def prompt_of(folder: Path) -> list[int]:
    asked = [{"role": "user", "content": ASKED}]
    processor: Any = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_generate_stops(taught):
    model: Any = AutoModelForImageTextToText.from_pretrained(taught / "stage two")
    prompt_BT = torch.tensor([prompt_of(taught / "stage two")])
    out_BT = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=12)
    answer = out_BT[0, prompt_BT.shape[1] :]
    assert base_tokenizer().decode(answer) == f"{ANSWERED} <|im_end|>"


@pytest.mark.parametrize("kind", ["continuous", "generate"])
def test_serving_stops_and_says_why(taught, kind):
    folder = taught / "stage two"
    prompt = Prompt(input_ids=tuple(prompt_of(folder)), image_embeds=np.empty((0, DIM), np.float32))
    config = EngineConfig(kind=kind, max_length=64, num_slots=2, num_threads=1)

    async def answer() -> list[Any]:
        model = LanguageModel(str(folder), config)
        try:
            return [piece async for piece in model.stream(prompt, Sampling(max_tokens=12, temperature=0))]
        finally:
            await model.close()

    pieces = asyncio.run(answer())
    assert "".join(piece.text for piece in pieces).strip() == ANSWERED
    assert pieces[-1].finish_reason == "stop"


def test_a_model_of_before_is_warned_of_and_exported_again_it_stops(taught, tmp_path, caplog):
    old, new = tmp_path / "old", tmp_path / "new"
    export.put(str(taught / "stage two"), str(old))
    settings = json.loads((old / "generation_config.json").read_text())
    (old / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 3}))
    with caplog.at_level(logging.WARNING):
        checked(ServeJob(model=str(old)))
    end = base_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for fact in (str(old), f"<|im_end|> ({end})", "</s> (3)", "eos_token_id", "jobs/export.py"):
        assert fact in caplog.text
    export.copy(str(old), str(new))
    assert json.loads((new / "generation_config.json").read_text())["eos_token_id"] == [3, end]
    assert {path.name for path in new.iterdir()} == {path.name for path in old.iterdir()}
    (old / "generation_config.json").unlink()  # the language model's configuration says as much
    assert "</s> (3)" in unknown_ends(str(old))
