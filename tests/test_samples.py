"""Samples train on the right tokens, in chat templates of real families; batches hold little padding."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tiny_language_model import END_OF_TURN, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from revision_ray.core.errors import ConfigError
from revision_ray.data.chat import ChatTemplate, ControlTokenMarks, prints_date
from revision_ray.data.conversations import Conversation, TurnMessage
from revision_ray.train.samples import (
    NO_LABEL,
    Formatter,
    TrainingSample,
    Unusable,
    collate,
    deal,
    padding_share,
    split_again,
    visible,
)

V, DIM = 3, 4
CORPUS = [
    "What is in the picture? A red square.",
    "Is it red?\nYes, it is red!",
    "You are brief. user system",
]
RED = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)

# What the published templates of these families write, for text turns.
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHAT_ML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}"
    "{% elif m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[m.role] }}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content ~ END }}{% endgeneration %}{{ REST }}"
    "{% else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def byte_level(
    template: str, special: list[str], eos: str, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """As in Llama-3, Qwen: byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return finished(backend, trainer, template, special, eos, bos)


def metaspace(template: str, special: list[str], eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """As in Llama-2, Phi-3: words that begin with a visible space."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    return finished(backend, trainer, template, special, eos, bos)


def finished(backend, trainer, template, special, eos, bos) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(CORPUS, trainer)
    names = ["<image>", eos, *([bos] if bos else []), *special]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template
    )


HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
FAMILIES = {
    "llama-3": (lambda: byte_level(LLAMA_3, HEADERS, "<|eot_id|>", "<|begin_of_text|>"), "<|eot_id|>"),
    "qwen": (lambda: byte_level(CHAT_ML, ["<|im_start|>", "<|endoftext|>"], "<|im_end|>"), "<|im_end|>"),
    "phi-3": (
        lambda: metaspace(PHI_3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|endoftext|>"),
        "<|end|>",
    ),
    "llama-2": (lambda: metaspace(LLAMA_2, [], "</s>", "<s>"), "</s>"),
    "plain": (lambda: byte_level(PLAIN, [], "</s>"), "</s>"),
}


def said(*contents: str, images: int = 0, system: str = "") -> Conversation:
    roles = ("user", "assistant")
    messages = [TurnMessage(role=roles[n % 2], content=text) for n, text in enumerate(contents)]
    first = [TurnMessage(role="system", content=system)] if system else []
    return Conversation(id="c", messages=(*first, *messages), images=("i",) * images)


def targets(sample: TrainingSample, tokenizer) -> list[str]:
    """The text of every run of consecutive targets."""
    runs, run = [], []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if label != NO_LABEL:
            assert label == token  # labels are the tokens in their own places: the model shifts them
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return [text.strip() for text in [*runs, *([tokenizer.decode(run)] if run else [])]]


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_assistants_turns_and_their_end_tokens(family):
    tokenizer, end = FAMILIES[family][0](), FAMILIES[family][1]
    formatter = Formatter(tokenizer, V)
    told = said(
        "<image>\nWhat is in the picture?", "A red square.", "Is it red?", "Yes,\nit is red!", images=1
    )
    sample = formatter.conversation(told, RED)
    joint = " " if family == "llama-2" else ""
    assert targets(sample, tokenizer) == [f"A red square.{joint}{end}", f"Yes,\nit is red!{joint}{end}"]
    # What is read is the template's text, the image's slot expanded.
    plain = tokenizer(
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in told.messages], tokenize=False
        ),
        add_special_tokens=False,
    )["input_ids"]
    assert sample.input_ids.tolist() == [
        token for one in plain for token in [one] * (V if one == formatter.image_token_id else 1)
    ]
    assert (sample.labels[sample.input_ids == formatter.image_token_id] == NO_LABEL).all()


@pytest.mark.parametrize("family", ["llama-3", "qwen", "phi-3", "plain"])
def test_a_system_turn_is_no_target(family):
    tokenizer, end = FAMILIES[family][0](), FAMILIES[family][1]
    told = said("Is it red?", "Yes, it is red!", system="You are brief.")
    sample = Formatter(tokenizer, V).conversation(told, np.empty((0, DIM), np.float32))
    assert targets(sample, tokenizer) == [f"Yes, it is red!{end}"]
    assert "You are brief." in tokenizer.decode(sample.input_ids[sample.labels == NO_LABEL])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silent", [1, 3])
def test_a_turn_that_is_not_trained_on_is_read_and_no_target(family, silent):
    tokenizer, end = FAMILIES[family][0](), FAMILIES[family][1]
    told = said("Is it red?", "Yes, it is red!", "Is it red?", "A red square.")
    turns = list(told.messages)
    turns[silent] = replace(turns[silent], is_target=False)
    sample = Formatter(tokenizer, V).conversation(
        replace(told, messages=tuple(turns)), np.empty((0, DIM), np.float32)
    )
    joint = " " if family == "llama-2" else ""
    assert targets(sample, tokenizer) == [f"{turns[4 - silent].content}{joint}{end}"]
    whole = Formatter(tokenizer, V).conversation(told, np.empty((0, DIM), np.float32))
    assert sample.input_ids.tolist() == whole.input_ids.tolist()


def test_a_conversation_of_which_no_turn_is_trained_on_has_no_target():
    tokenizer = FAMILIES["qwen"][0]()
    told = said("Is it red?", "Yes.")
    silent = replace(told, messages=(told.messages[0], replace(told.messages[1], is_target=False)))
    with pytest.raises(Unusable, match="no_target"):
        Formatter(tokenizer, V).conversation(silent, np.empty((0, DIM), np.float32))


@pytest.mark.parametrize("template", END_OF_TURN)
def test_word_level_tokenizers_too(template):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    told = said("<image>\nwhat colour ?", "red .", "and the dog ?", "blue .", images=1)
    sample = Formatter(tokenizer, V).conversation(told, RED)
    end = END_OF_TURN[template]
    assert targets(sample, tokenizer) == [f"red . {end}", f"blue . {end}"]


@pytest.mark.parametrize("inside", [True, False])
def test_generation_marks_decide_and_the_end_token_behind_them_counts(inside):
    end, rest = ("'<|im_end|>'", "'\n'") if inside else ("''", "'<|im_end|>\n'")
    template = MARKED.replace("END", end).replace("REST", rest)
    tokenizer = byte_level(template, ["<|im_start|>"], "<|im_end|>")
    sample = Formatter(tokenizer, V).conversation(said("Is it red?", "Yes!", "Is it?", "No."), RED[:0])
    assert targets(sample, tokenizer) == ["Yes!<|im_end|>", "No.<|im_end|>"]


def test_a_template_that_hides_the_turns_is_refused_by_name():
    hides = "{% for m in messages[-2:] %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
    formatter = Formatter(byte_level(hides, [], "</s>"), V)
    with pytest.raises(ConfigError, match="does not show where the assistant's turns are"):
        formatter.conversation(said("Is it red?", "Yes!", "Is it?", "No."), RED[:0])
    rewrites = "{% for m in messages %}{{ (m.content | upper) ~ eos_token }}{% endfor %}"
    with pytest.raises(ConfigError, match="generation"):
        Formatter(byte_level(rewrites, [], "</s>"), V).conversation(said("Is it?", "Yes!"), RED[:0])
    without = byte_level(PLAIN, [], "</s>")
    without.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Formatter(without, V).conversation(said("Is it?", "Yes!"), RED[:0])


def test_turns_that_a_template_refuses_are_bad_conversations():
    tokenizer = FAMILIES["llama-2"][0]()
    with pytest.raises(Unusable, match="no system turns") as caught:
        Formatter(tokenizer, V).conversation(said("Is it?", "Yes!", system="You are brief."), RED[:0])
    assert caught.value.cause == "bad_conversation"


def test_a_caption_follows_its_image_and_ends():
    tokenizer = FAMILIES["llama-3"][0]()
    sample = Formatter(tokenizer, V).caption("x", "A red square.", RED[0])
    assert targets(sample, tokenizer) == ["A red square.<|eot_id|>"]
    assert tokenizer.decode(sample.input_ids[sample.labels == NO_LABEL]) == "<image>" * V
    assert sample.image_embeds.shape == (1, DIM)
    assert sample.image_embeds.dtype == np.float32


def test_a_caption_begins_as_the_tokenizer_begins_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = FAMILIES["llama-3"][0]()
    begin = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    sample = Formatter(tokenizer, V).caption("x", "A red square.", RED[0])
    assert tokenizer.decode(sample.input_ids).startswith("<|begin_of_text|><image>")
    assert targets(sample, tokenizer) == ["A red square.<|eot_id|>"]


def cause_of(make, *arguments) -> str:
    with pytest.raises(Unusable) as caught:
        make(*arguments)
    return caught.value.cause


def test_what_cannot_be_trained_on_has_a_cause():
    formatter = Formatter(FAMILIES["qwen"][0](), V)
    lost = np.full((1, DIM), np.nan, np.float32)
    asked = said("<image> Is it red?", "Yes!", images=1)
    assert cause_of(formatter.caption, "x", " \n", RED[0]) == "no_target"
    assert cause_of(formatter.caption, "x", "A red square.", lost[0]) == "missing_embedding"
    assert cause_of(formatter.caption, "x", "A red <image>.", RED[0]) == "bad_conversation"
    assert cause_of(formatter.conversation, asked, RED[:0]) == "missing_embedding"
    assert cause_of(formatter.conversation, asked, lost) == "missing_embedding"
    assert cause_of(formatter.conversation, asked, np.concatenate([RED, RED])) == "bad_conversation"
    nobody = Conversation(id="c", messages=(TurnMessage(role="user", content="Is it red?"),))
    assert cause_of(formatter.conversation, nobody, RED[:0]) == "no_target"


def test_the_length_limit_rejects_or_cuts():
    tokenizer = FAMILIES["qwen"][0]()
    text = "A red square. " * 20
    whole = Formatter(tokenizer, V).caption("x", text, RED[0])
    length = len(whole.input_ids)
    assert len(Formatter(tokenizer, V, length).caption("x", text, RED[0]).input_ids) == length
    assert cause_of(Formatter(tokenizer, V, length - 1).caption, "x", text, RED[0]) == "too_long"
    cut = Formatter(tokenizer, V, length - 5, on_too_long="truncate").caption("x", text, RED[0])
    assert cut.num_cut == 5
    assert cut.labels.tolist() == whole.labels[:-5].tolist()
    # Nothing to learn is left, or half an image.
    assert cause_of(Formatter(tokenizer, V, V, "truncate").caption, "x", text, RED[0]) == "too_long"
    assert cause_of(Formatter(tokenizer, V, 2, "truncate").caption, "x", text, RED[0]) == "too_long"


def test_a_tokenizer_that_cannot_serve_is_refused():
    tokenizer = byte_level(PLAIN, [], "</s>")
    tokenizer.eos_token = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no end token"):
        Formatter(tokenizer, V)
    with pytest.raises(ConfigError, match="<image>"):
        Formatter(tiny_tokenizer("plain"), V)


def test_a_sample_is_shown_with_its_targets():
    tokenizer = FAMILIES["qwen"][0]()
    sample = Formatter(tokenizer, 576).conversation(
        said("<image>\nIs it red?", "Yes!", images=1, system="You are brief."), RED
    )
    assert visible(sample, tokenizer) == (
        "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n<image>x576\nIs it red?<|im_end|>\n"
        "<|im_start|>assistant\n[[Yes!<|im_end|>]]\n"
    )


def made(length: int, name: str = "s", images: int = 1) -> TrainingSample:
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = np.where(ids > 2, ids, NO_LABEL).astype(np.int32)
    embeds = np.full((images, DIM), length, np.float32)
    return TrainingSample(id=name, input_ids=ids, labels=labels, image_embeds=embeds)


def test_a_batch_is_its_samples_padded_on_the_right():
    batch = collate([made(5, "a"), made(3, "b", images=2), made(4, "c", images=0)], pad_id=9)
    assert batch.ids == ("a", "b", "c")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9], [1, 2, 3, 4, 9]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.labels.tolist()[1] == [-100, -100, 3, -100, -100]
    assert batch.image_embeds[:, 0].tolist() == [5, 3, 3]
    assert (batch.num_targets, batch.num_tokens) == (3 + 1 + 2, 12)
    assert padding_share(batch) == pytest.approx(3 / 15)


def test_a_first_token_is_predicted_from_nothing_and_no_target():
    sample = TrainingSample(
        id="a",
        input_ids=np.array([4, 5], np.int32),
        labels=np.array([4, 5], np.int32),
        image_embeds=np.empty((0, DIM), np.float32),
    )
    assert collate([sample], pad_id=0).num_targets == 1


@pytest.mark.parametrize(
    ("count", "ranks", "size"), [(64, 1, 8), (64, 2, 8), (61, 4, 8), (3, 4, 2), (7, 3, 1)]
)
def test_dealing_gives_every_position_once_and_ranks_the_same_work(count, ranks, size):
    lengths = np.random.default_rng(count).integers(5, 500, count)
    dealt = deal(lengths, ranks, size)
    assert sorted(int(at) for rank in dealt for micro in rank for at in micro) == list(range(count))
    assert len({len(rank) for rank in dealt}) == 1
    assert max(len(micro) for rank in dealt for micro in rank) <= size
    # Ranks work on about the same lengths at the same time: none of one turn is longer than the turn before.
    turns = [[lengths[micro] for micro in turn if len(micro)] for turn in zip(*dealt, strict=True)]
    for before, after in itertools.pairwise(turns):
        assert not after or min(map(min, before)) >= max(map(max, after))


def test_dealing_saves_padding():
    lengths = np.random.default_rng(0).lognormal(4, 0.6, 256).astype(int) + 3
    samples = [made(int(length)) for length in lengths]
    unsorted = [collate(samples[start : start + 8], 0) for start in range(0, 256, 8)]
    dealt = [collate([samples[at] for at in micro], 0) for rank in deal(lengths, 2, 8) for micro in rank]
    # 42 and 4 percent with this seed.
    assert padding_share(dealt) < 0.1 < 0.3 < padding_share(unsorted)


def test_splitting_again_sorts_by_true_length():
    parts = split_again([made(n) for n in (4, 9, 5, 8)], 2)
    assert [[len(sample.input_ids) for sample in part] for part in parts] == [[9, 8], [5, 4]]


# --- templates of today -------------------------------------------------------------------------------------

END = "<|im_end|>"
THINK = "<think>\n\n</think>\n\n"
# Each imitates one trait of published templates. The last column is what stands before an answer that is
# followed by another turn, and before the last one.
TRAITS = {
    "the last turn begins with empty reasoning": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("", THINK),
    ),
    "empty reasoning is in the prompt too": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}",
        ("", ""),
    ),
    "the prompt opens reasoning that no turn has": (
        "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|assistant|>'}.get(m.role, '') }}"
        "{{ m.content.split('</think>')[-1] }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        ("", ""),
    ),
    "the prompt opens reasoning that the turn closes": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("</think>", "</think>"),
    ),
    "the system turn is in the last prompt alone": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content ~ '\n\n' %}{% elif m.role == 'user' %}"
        "{{ '[INST]' ~ (ns.system if loop.last else '') ~ m.content ~ '[/INST]' }}"
        "{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{% endfor %}",
        ("", ""),
    ),
    "contents are lists of parts": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ':' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}",
        ("", ""),
    ),
    "the end of the last turn is another": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("", ""),
    ),
    "marks in two pieces": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<think>\n\n</think>\n\n' }}{% endgeneration %}\n"
        "{%- generation -%} {{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        (THINK, THINK),
    ),
    "marks in one branch, and inside a macro": (
        "{% macro said(text) %}{% generation %}{{ text ~ '<|im_end|>' }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ said(m.content) }}"
        "{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("", ""),
    ),
}
MARKS = ["<|im_start|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<|return|>"]


def of_trait(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(template, MARKS, END)
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    return tokenizer


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("system", ["", "You are brief."])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_turns_are_found_whatever_a_template_does_with_the_last(trait, system, images):
    template, (early, late) = TRAITS[trait]
    tokenizer = of_trait(template)
    formatter = Formatter(tokenizer, V)
    question = "<image>\n" * images + "Is it red?"
    embeds = np.ones((images, DIM), np.float32)
    end = "<|return|>" if "<|return|>" in template else END
    one = formatter.conversation(said(question, "Yes!", images=images, system=system), embeds)
    assert targets(one, tokenizer) == [f"{late}Yes!{end}".strip()]
    three = said(question, "Yes!", "Is it?", "No.", "A red square?", "It is.", images=images, system=system)
    sample = formatter.conversation(three, embeds)
    assert targets(sample, tokenizer) == [
        f"{early}Yes!{END}".strip(),
        f"{early}No.{END}".strip(),
        f"{late}It is.{end}".strip(),
    ]
    shown = tokenizer.decode(sample.input_ids)
    assert shown.count("<image>") == V * images
    assert system in shown


def test_reasoning_is_trained_on_where_the_template_writes_it():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% set parts = m.content.split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
        "{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n' ~ (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') }}"
        "{{ '\n</think>\n\n' }}{% endif %}{{ answer ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = of_trait(template)
    told = said(
        "Is it?", "<think>\nA red square.\n</think>\n\nYes!", "Is it?", "<think>\nIt is.\n</think>\n\nNo."
    )
    sample = Formatter(tokenizer, V).conversation(told, RED[:0])
    assert targets(sample, tokenizer) == ["Yes!<|im_end|>", "<think>\nIt is.\n</think>\n\nNo.<|im_end|>"]
    # The model's own marks of reasoning are tokens; in a user's turn they are text.
    mark = tokenizer.convert_tokens_to_ids("<think>")
    assert sample.input_ids.tolist().count(mark) == 1
    asked = Formatter(tokenizer, V).conversation(said("Is it <think>?", "Yes!"), RED[:0])
    assert asked.input_ids.tolist().count(mark) == 1


@pytest.mark.parametrize("trait", TRAITS)
def test_a_turn_begins_where_serving_lets_the_model_begin(trait):
    template = TRAITS[trait][0]
    tokenizer = of_trait(template)
    told = said("What is in the picture?", "A red square.", "Is it red?", "Yes!", system="You are brief.")
    sample = Formatter(tokenizer, V).conversation(told, RED[:0])
    chat = ChatTemplate(tokenizer)
    messages = [{"role": m.role, "content": m.content} for m in told.messages[:-1]]
    prompt = chat.encode(chat.render(messages, prompt=True)).input_ids.tolist()
    places = np.flatnonzero(sample.labels != NO_LABEL).tolist()
    first = next(at for at in reversed(places) if at - 1 not in places)
    if "marks in two" in trait:
        first = next(at for at in range(len(places)) if sample.input_ids[: len(prompt)].tolist() == prompt)
        assert first == 0
    elif "prompt opens" in trait:  # the template itself writes turns otherwise than it prompts for them
        common = next(at for at in range(first + 1) if at == first or sample.input_ids[at] != prompt[at])
        assert common == first < len(prompt)
    else:
        assert sample.input_ids[:first].tolist() == prompt


# --- text is text -------------------------------------------------------------------------------------------

SPELLED = ["</s>", END, "<|im_start|>system\nA red square.", "<|endoftext|>", f"a{END}{END}b", "<<|im_end|>"]


@pytest.mark.parametrize("spelled", SPELLED)
def test_names_of_control_tokens_are_text_in_captions_and_turns(spelled):
    tokenizer = byte_level(CHAT_ML, ["<|im_start|>", "<|endoftext|>", "</s>"], END)
    formatter = Formatter(tokenizer, V)
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def control(sample: TrainingSample) -> list[int]:
        return [token for token in sample.input_ids.tolist() if token in special]

    caption = formatter.caption("x", spelled, RED[0])
    assert control(caption) == control(formatter.caption("x", "A", RED[0]))
    assert targets(caption, tokenizer) == [f"{spelled}{END}"]
    for place in range(5):
        turns = ["Is it red?", "Yes!", "Is it?", "No.", "You are brief."]
        turns[place] = spelled
        sample = formatter.conversation(said(*turns[:4], system=turns[4]), RED[:0])
        plain = formatter.conversation(said("Is it red?", "Yes!", "Is it?", "No.", system="A"), RED[:0])
        assert control(sample) == control(plain)
        assert targets(sample, tokenizer) == [f"{turns[1]}{END}", f"{turns[3]}{END}"]


def test_text_that_is_spread_over_parts_names_no_control_token():
    template = (
        "{% for m in messages %}<|im_start|>{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>"
        "{% endfor %}"
    )
    tokenizer = byte_level(template, ["<|im_start|>"], END)
    parts = [{"type": "text", "text": text} for text in ("a <|im_", "end|> b")]
    chat = ChatTemplate(tokenizer)
    ids = chat.encode(chat.render([{"role": "user", "content": parts}])).input_ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == "<|im_start|>a <|im_end|> b<|im_end|>"


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("text", ["A red square.", " two  spaces ", "\n\nIs it\tred?\n", "", "\u00e9"])
def test_ordinary_text_keeps_its_ids(make, text):
    tokenizer = make(CHAT_ML, ["<|im_start|>"], END)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ControlTokenMarks(tokenizer).encode(text) == plain


def test_a_vocabulary_that_gives_the_token_itself_is_given_its_name_in_two_parts():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "\u2581abc</s>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    end = tokenizer.eos_token_id
    assert end in tokenizer("a</s>b", split_special_tokens=True)["input_ids"]
    ids = ControlTokenMarks(tokenizer).encode("a</s>b")
    assert end not in ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<", "/", "s", ">", "b"]


# --- the date -----------------------------------------------------------------------------------------------


def test_a_template_that_prints_the_date_prints_that_of_the_run():
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today: ' ~ date_string ~ '\n' }}" + CHAT_ML
    )
    tokenizer = byte_level(template, ["<|im_start|>"], END)
    told = said("Is it red?", "Yes!")
    sample = Formatter(tokenizer, V, today="2024-02-29").conversation(told, RED[:0])
    assert tokenizer.decode(sample.input_ids).startswith("Today: 29 Feb 2024\n")
    other = Formatter(tokenizer, V, today="2024-03-01").conversation(told, RED[:0])
    assert tokenizer.decode(other.input_ids).startswith("Today: 01 Mar 2024\n")
    assert prints_date(tokenizer)
    assert not prints_date(byte_level(CHAT_ML, ["<|im_start|>"], END))
    with pytest.raises(ConfigError, match="tomorrow"):
        Formatter(tokenizer, V, today="tomorrow")
