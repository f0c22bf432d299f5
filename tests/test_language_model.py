"""The miniature's language model: its documents are true and look like chats, its folder loads, it learns."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from revision_ray.core.errors import ConfigError, OutputError
from revision_ray.miniature import dataset, documents, world
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.documents import DocumentConfig, document, examination, told_scene
from revision_ray.miniature.language_model import LanguageTraining, _right, examine, train_language_model
from revision_ray.train import language_model
from revision_ray.train.language_model import ModelSize, learning_rate_factor

CONFIG = DocumentConfig(num_documents=400)
READ = [document(CONFIG, i) for i in range(CONFIG.num_documents)]


@pytest.fixture(scope="module")
def tokenizer():
    return language_model.build_tokenizer(READ)


def text_of(pieces) -> str:
    return " ".join(text for text, _ in pieces)


def training_of(output, **settings) -> LanguageTraining:
    small = {
        "documents": CONFIG,
        "size": ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48),
        "num_steps": 30,
        "rows_per_batch": 4,
        "warmup_steps": 2,
        "num_heldout": 20,
        "cpus_per_worker": 1.0,
    }
    return LanguageTraining(output=str(output), **{**small, **settings})


# --- documents --------------------------------------------------------------------------------------------


def chats(number: int):
    """(question, answer) pairs of training document `number`, read back from its text."""
    return re.findall(r"<q> (.*?) <a> (.*?) <e>", text_of(READ[number]))


def test_answers_are_true():
    """Checked against the scene by rules of this test's own."""
    checked = 0
    for number in range(CONFIG.num_documents):
        scene = told_scene(CONFIG, number)
        things, background = scene.things, scene.background
        for asked, answer in chats(number):
            if found := re.fullmatch(r"what colour (?:is|are) the (\w+?)s?\?", asked):
                assert {thing.colour for thing in things if thing.shape == found[1]} == {answer}
            elif found := re.fullmatch(r"what shape (?:is|are) the (\w+) things?\?", asked):
                assert {thing.shape for thing in things if thing.colour == found[1]} == {answer}
            elif found := re.fullmatch(r"how many (\w+?)s are there\?", asked):
                count = sum(found[1] in ("thing", thing.shape) for thing in things)
                assert answer == ["no", "one", "two", "three", "four"][count]
            elif found := re.fullmatch(r"is there an? (\w+) (\w+)\?", asked):
                there = any((thing.colour, thing.shape) == found.groups() for thing in things)
                assert answer == ("yes" if there else "no")
            elif found := re.fullmatch(r"where is the (\w+) (\w+), seen from the (\w+) (\w+)\?", asked):
                one, other = (
                    next(thing for thing in things if (thing.colour, thing.shape) == look)
                    for look in (found.groups()[:2], found.groups()[2:])
                )
                assert answer == world.relation(one, other)
            else:
                assert asked in ("what is the background?", "what is behind it?")
                assert answer == background
            checked += 1
    assert checked > CONFIG.num_documents


def test_captions_and_paraphrases_are_of_the_scene():
    """Every caption of a document names a colour and a shape of its scene, in one of their words."""
    words = {**{c: (c,) for c in world.COLOURS}, "purple": ("purple", "violet"), "red": ("red", "crimson")}
    for number, pieces in enumerate(READ):
        colours = {thing.colour for thing in told_scene(CONFIG, number).things}
        for said, _ in pieces:
            if not said.startswith("<q>") and len(said.split()) > 2:
                named = {name for name, ways in words.items() for way in ways if way in said.split()}
                assert named == colours, said


def test_documents_have_the_planned_forms_and_shares():
    forms = [re.sub(r"<q> .*? <a> \w+ <e>", "Q", text_of(pieces)) for pieces in READ]
    questions = [form.count("Q") for form in forms]
    assert max(questions) == CONFIG.questions_per_document
    blind = np.mean([form.startswith("Q") for form in forms])
    paraphrases = np.mean([count == 0 for count in questions])
    assert all(text_of(pieces).endswith(" <e>") for pieces in READ)
    # Shares of 400 draws: four standard deviations of a binomial are 0.044 and 0.087.
    assert blind == pytest.approx(CONFIG.blind_fraction, abs=0.045)
    assert paraphrases == pytest.approx(CONFIG.paraphrase_fraction, abs=0.09)
    no_blind = dataclasses.replace(CONFIG, blind_fraction=0.0, paraphrase_fraction=0.0)
    assert not any(text_of(document(no_blind, i)).startswith("<q>") for i in range(100))


def test_a_document_is_a_function_of_settings_and_index():
    assert READ[:20] == [document(CONFIG, i) for i in range(20)]
    other = dataclasses.replace(CONFIG, world=world.WorldConfig(seed=1))
    assert READ[:20] != [document(other, i) for i in range(20)]


def test_training_and_examination_share_no_scene_with_each_other_or_any_split():
    sizes: dict[str, Any] = {f"num_{split}": 10**9 for split in dataset.SPLITS}
    largest = DatasetConfig(output="out", rows_per_file=10**9, **sizes)
    last_of_splits = max(part.first + part.num_rows for part in dataset.parts(largest))
    first = documents.FIRST_TRAINING_SCENE
    assert last_of_splits <= first < first + 2 * 10**9 <= documents.FIRST_HELDOUT_SCENE
    asked = examination(CONFIG, 5)
    shown = world.scene(CONFIG.world, documents.FIRST_HELDOUT_SCENE)
    count = next(pieces for kind, pieces in zip(asked.kinds, asked.sighted, strict=True) if kind == "count")
    assert text_of(count).split()[-2] in {
        ["one", "two", "three", "four"][n - 1]
        for n in (len(shown.things), *(sum(a.shape == b.shape for b in shown.things) for a in shown.things))
    }


@pytest.mark.parametrize(
    "settings",
    [{"num_documents": 0}, {"questions_per_document": 0}, {"blind_fraction": 0.8}, {"blind_fraction": -0.1}],
)
def test_documents_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="expected"):
        DocumentConfig(**settings)


# --- tokenizer and chat template --------------------------------------------------------------------------


def rendered(tokenizer, messages, **settings) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **settings)


def chat(*turns: str):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]


def test_documents_match_the_chat_template_token_by_token(tokenizer):
    """What follows the caption is what follows the image; without a caption, the whole."""
    image, compared = tokenizer.convert_tokens_to_ids("<image>"), 0
    encoded = language_model.encode(tokenizer, READ)
    for number, (ids, _) in enumerate(encoded):
        turns = [word for pair in chats(number) for word in pair]
        if turns and READ[number][0][0].startswith("<q>"):
            assert rendered(tokenizer, chat(*turns)) == ids
        elif turns:
            caption = tokenizer(READ[number][0][0])["input_ids"]
            assert ids[: len(caption)] == caption
            turns[0] = f"<image>\n{turns[0]}"
            assert rendered(tokenizer, chat(*turns)) == [image, *ids[len(caption) :]]
        else:
            said, paraphrase = (text for text, _ in READ[number])
            wanted = [image, *ids[len(tokenizer(said)["input_ids"]) :]]
            assert rendered(tokenizer, chat("<image>", paraphrase.removesuffix(" <e>"))) == wanted
            assert tokenizer(f"<image> {paraphrase}")["input_ids"] == wanted
        compared += 1
    assert compared == len(READ)


def test_the_prompt_is_the_beginning_of_the_whole_and_masks_are_the_answers(tokenizer):
    turns = chat("<image>\nhow many things are there?", "two", "what is behind it?", "snow")
    whole = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    prompt = rendered(tokenizer, turns[:3], add_generation_prompt=True)
    assert whole["input_ids"][: len(prompt)] == prompt
    answers = [i for i, inside in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if inside]
    assert tokenizer.convert_ids_to_tokens(answers) == ["two", "<e>", "snow", "<e>"]


def test_parts_system_messages_and_several_images(tokenizer):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is behind it?"}]
    as_parts = rendered(tokenizer, [{"role": "user", "content": parts}])
    assert as_parts == rendered(tokenizer, chat("<image>\n<image>\nwhat is behind it?"))
    assert tokenizer.convert_ids_to_tokens(as_parts)[:3] == ["<image>", "<image>", "<q>"]
    system = [{"role": "system", "content": "a picture of"}, *chat("what is behind it?")]
    assert tokenizer.convert_ids_to_tokens(rendered(tokenizer, system))[:4] == ["a", "picture", "of", "<q>"]
    with pytest.raises(TemplateError, match="expected system, user or assistant"):
        rendered(tokenizer, [{"role": "tool", "content": "x"}])


def test_words_come_back_and_the_image_is_beyond_the_vocabulary(tokenizer):
    assert tokenizer.decode(tokenizer("What colour is the star?")["input_ids"]) == "what colour is the star?"
    names = ("<pad>", "<unk>", "<e>", "<q>", "<a>")
    assert [tokenizer.convert_tokens_to_ids(name) for name in names] == [0, 1, 2, 3, 4]
    model = language_model.build_model(ModelSize(), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.vocab_size == len(tokenizer) - 1
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    shown = tokenizer.decode(tokenizer("<q> red <a> yes <e>")["input_ids"], skip_special_tokens=True)
    assert shown == "red yes"
    again = language_model.build_tokenizer(READ[::-1])
    assert again.get_vocab() == tokenizer.get_vocab()


# --- weights and rows -------------------------------------------------------------------------------------


def test_answers_weigh_most_and_the_first_token_nothing(tokenizer):
    pieces = [("a red star", 0.2), ("<q> what colour is the star? <a>", 0.2), ("red <e>", 3.0)]
    [(ids, weights)] = language_model.encode(tokenizer, [pieces])
    assert weights == [0.0, 0.2, 0.2, *[0.2] * 8, 3.0, 3.0]
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == ["red", "<e>"]
    by_kind = {weight for document in READ for _, weight in document}
    assert by_kind == {0.2, 1.0, 3.0}


def test_rows_hold_every_document_whole_and_waste_little(tokenizer):
    encoded = language_model.encode(tokenizer, READ)
    rows = language_model.pack(encoded, 256)
    found = []
    for tokens, positions, weights in zip(rows.token_RT, rows.position_RT, rows.weight_RT, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), 256]
        for first, last in itertools.pairwise(starts):
            assert positions[first:last].tolist() == list(range(last - first))
            if weights[first:last].any():
                found.append((tokens[first:last].tolist(), pytest.approx(weights[first:last].tolist())))
    assert sorted(ids for ids, _ in found) == sorted(ids for ids, _ in encoded)
    assert all((ids, weights) in encoded for ids, weights in found[:20])
    used = sum(len(ids) for ids, _ in encoded) / rows.token_RT.numel()
    assert used > 0.97
    with pytest.raises(ConfigError, match="row_length=20, but a document has"):
        language_model.pack(encoded, 20)


def test_the_loss_of_packed_rows_is_that_of_documents_alone(tokenizer):
    """Nothing attends across documents: each alone, by torch's own formula, gives the same sum."""
    torch.manual_seed(0)
    model = language_model.build_model(ModelSize(num_layers=2), tokenizer)
    encoded = language_model.encode(tokenizer, READ[:30])
    rows = language_model.pack(encoded, 256)
    with torch.no_grad():
        batch = rows.take(np.arange(len(rows.token_RT)), torch.device("cpu"))
        packed = language_model.weighted_loss(model, batch).item()
        total = weight_sum = 0.0
        for ids, weights in encoded:
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
            losses = F.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]), reduction="none")
            total += float(losses @ torch.tensor(weights[1:]))
            weight_sum += sum(weights)
    # float32 sums in another order.
    assert packed == pytest.approx(total / weight_sum, rel=1e-5)


def test_greedy_answers_are_what_generation_gives(tokenizer):
    """The one forward pass of the examination agrees with generating token after token."""
    torch.manual_seed(0)
    model: Any = language_model.build_model(ModelSize(num_layers=1), tokenizer).eval()
    compared = 0
    for ids, weights in language_model.encode(tokenizer, examination(CONFIG, 8).sighted):
        prompt = torch.tensor([ids[:-2]])
        mask = torch.ones_like(prompt)
        said = model.generate(prompt, attention_mask=mask, max_new_tokens=2, do_sample=False)[0].tolist()
        if len(said) == len(ids):  # else it ended at once
            documents_of_it = [(said, weights), (ids, weights)]
            assert _right(model, documents_of_it) == [True, said == ids]
            compared += said != ids
    assert compared > 10


# --- training ---------------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero(tmp_path):
    training = training_of(tmp_path, num_steps=20, warmup_steps=5)
    factors = [learning_rate_factor(training, step) for step in range(21)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert np.diff(factors[5:]) == pytest.approx(-1 / 15)
    assert factors[20] == 0


@pytest.mark.slow
def test_training_writes_a_folder_that_transformers_loads_and_is_kept(cluster, tmp_path):
    """A language model from scratch loads in transformers with the same figures, and is kept."""
    training = training_of(tmp_path / "model")
    metrics, trained = train_language_model(training)
    assert trained
    assert metrics["last_loss"] < metrics["first_loss"] - 0.5
    assert set(metrics["heldout"]["answers"]) == {
        "background", "colour", "count", "existence", "relation", "shape",
    }  # fmt: skip

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.vocab_size
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    # The same weights give the same figures to the last bit that argmax sees; the loss to float32 rounding.
    again = examine(model, tokenizer, CONFIG, training.num_heldout)
    assert again["answers"] == metrics["heldout"]["answers"]
    assert again["paraphrase_loss"] == pytest.approx(metrics["heldout"]["paraphrase_loss"], rel=1e-5)
    turns = chat("how many things are there?")
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").glob("*.*")}
    former, trained = train_language_model(training)
    assert (former, trained) == (json.loads((tmp_path / "model/metrics.json").read_text()), False)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(OutputError, match="num_steps was 30, is now 31"):
        train_language_model(dataclasses.replace(training, num_steps=31))
    changed = dataclasses.replace(CONFIG, questions_per_document=2)
    with pytest.raises(OutputError, match="text_sha256"):
        train_language_model(dataclasses.replace(training, documents=changed))
