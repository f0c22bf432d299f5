"""Evaluation: answers scored by rule, benchmarks read as published, a model asked the same way always."""

import io
import json
import random
import shutil
import time
from pathlib import Path

import answer_table
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_stores import write_store
from PIL import Image
from tiny_encoder import write_encoder
from transformers import AutoModelForImageTextToText, AutoProcessor

from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, CheckpointError, ConfigError, DataError, OutputError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode import open_clip
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.evaluate import answers, ask, picture, prepare, report, scores
from revision_ray.evaluate.answers import judge
from revision_ray.evaluate.benchmarks import (
    BENCHMARKS,
    BenchmarkQuestion,
    LeftOut,
    benchmark,
    content_key,
    parquet_bytes,
    read_unit,
    units,
)
from revision_ray.evaluate.evaluation import EvaluateJob, run_evaluate
from revision_ray.evaluate.responder import Responder
from revision_ray.evaluate.scores import Answered, wilson
from revision_ray.miniature import dataset, documents
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.model import ReVisionProcessor, build_model
from revision_ray.model.attach import attach_image_tower
from revision_ray.train import language_model
from revision_ray.train.language_model import ModelSize

# --- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        (lambda said: answers.letter(said, "ABCD"), answer_table.LETTERS),
        (answers.letter, answer_table.TEN_LETTERS),
        (lambda said: "".join(sorted(answers.letter_set(said) or "")) or None, answer_table.SETS),
        (answers.yes_no, answer_table.YES_NO),
        (answers.word, answer_table.WORDS),
        (answers.open_answer, answer_table.OPEN),
    ],
    ids=["letter", "ten letters", "set", "yes or no", "word", "open"],
)
def test_an_answer_is_read_as_people_write_it(rule, table):
    assert len({said for said, _ in table}) == len(table)
    misread = [(said, meant, rule(said)) for said, meant in table if rule(said) != meant]
    assert not misread


@pytest.mark.parametrize(
    "text",
    [
        "answer is unclear. so, ",
        "(",
        " ",
        "\n",
        "A, B or ",
        "the answer to ",
        "\\boxed{",
        "<think>",
        "not **A** ",
    ],
)
def test_an_answer_without_end_is_read_in_no_time(text):
    """What a model says that repeats itself up to the longest answer."""
    started = time.perf_counter()
    for rule in (answers.letter, answers.letter_set, answers.yes_no, answers.word, answers.open_answer):
        rule(text * (4000 // len(text)))
    assert time.perf_counter() - started < 5  # a tenth of it here; rules that backtrack take minutes


@pytest.mark.parametrize(
    ("scoring", "said", "truth", "correct"),
    [
        ("word", "Red.", "red", True),
        ("word", " red ", "red", True),
        ("word", "dark red", "red", False),
        ("word", "redder", "red", False),
        ("word", "", "red", False),
        ("letter_or_word", "A. the left one", "A", True),
        ("letter_or_word", "Yes.", "Yes", True),
        ("letter_or_word", "3", "3", True),
        ("letter_or_word", "three", "3", False),
        ("letters", "B, A", "A, B", True),
        ("letters", "A", "A, B", False),
        ("open", "3.14", "3.14", True),
        ("open", "The answer is 3.141.", "3.14", True),
        ("open", "$1,200", "1200", True),
        ("open", "about 12 cm", "12", True),
        ("open", "12 or 13", "12", False),
        ("open", "The Nile", "nile", True),
        ("open", "the answer is: a parabola.", "parabola", True),
        ("open", "I do not know", "nile", False),
        ("open", "-5", "5", False),
        ("open", "The answer is not 5.", "5", False),
        ("open", "It is not 5", "5", False),
        ("open", "more than 5", "5", False),
        ("open", "at least 5", "5", False),
        ("open", "5 million", "5", False),
        ("open", "5 million", "5,000,000", True),
        ("open", "the 5th", "5", False),
        ("open", "H2O", "2", False),
        ("open", "The answer is 5. The answer is 6.", "6", False),
        ("open", "I count them. Answer: 5 dogs", "5", True),
        ("word", "The answer is red.", "red", True),
        ("word", "The answer is not red.", "red", False),
        ("open", "", "5", False),
    ],
)
def test_answers_are_scored_by_the_rule(scoring, said, truth, correct):
    assert judge(scoring, said, [truth]).correct == correct


def test_an_open_question_has_several_spellings_and_an_option_its_text():
    assert judge("open", "0.5", ["1/2", "0.5"]).correct
    assert judge("letter", "the dog.", ["B"], letters="AB", options=["the cat", "The dog"]).predicted == "B"
    assert (
        judge("letter", "the dog", ["B"], letters="AB").predicted is None
    )  # only where the benchmark says so


def test_nothing_said_is_wrong_under_every_rule():
    """Some kits draw a letter at random here."""
    truths = {"yes_no": "yes", "letter": "A", "letters": "A", "word": "a", "letter_or_word": "A", "open": "a"}
    for scoring, truth in truths.items():
        verdict = judge(scoring, "?!", [truth], letters="ABCD")
        assert not verdict.correct, scoring


# --- figures ----------------------------------------------------------------------------------------------


def test_wilson_intervals_are_the_published_ones():
    # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3 (score without continuity correction), 4 digits.
    for right, num, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right, num) == pytest.approx((low, high), abs=5.1e-5)  # printed to 4 digits
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def answered(*rows) -> list[Answered]:
    """Rows of (correct, groups, answer, predicted); the last two only where they matter."""
    full = [(*row, "yes", "yes") if len(row) == 2 else row for row in rows]
    return [
        Answered(id=str(number), correct=correct, groups=groups, answer=answer, predicted=predicted)
        for number, (correct, groups, answer, predicted) in enumerate(full)
    ]


def test_acc_plus_wants_both_questions_of_an_image():
    rows = answered(
        (True, {"category": "count", "image": "1"}),
        (True, {"category": "count", "image": "1"}),
        (True, {"category": "count", "image": "2"}),
        (False, {"category": "count", "image": "2"}),
        (False, {"category": "ocr", "image": "1"}),  # the same name in another category
        (False, {"category": "ocr", "image": "1"}),
    )
    found = scores.mme(rows)
    assert found["acc_plus"] == pytest.approx(1 / 3)
    assert found["acc_plus_by_category"] == {"count": 0.5, "ocr": 0.0}


def test_the_mean_of_categories_weighs_them_equally():
    rows = answered(*[(True, {"l2_category": "a"})] * 9, (False, {"l2_category": "b"}))
    assert scores.mmstar(rows) == {"mean_of_l2_categories": 0.5}
    assert scores.accuracy(rows)["accuracy"] == 0.9


def test_f1_and_the_share_of_yes():
    group = {"category": "random"}
    rows = answered(
        (True, group, "yes", "yes"),
        (True, group, "yes", "yes"),
        (False, group, "yes", "no"),
        (False, group, "no", "yes"),
        (True, group, "no", "no"),
        (False, group, "yes", None),
    )
    found = scores.pope(rows)
    # precision 2/3, recall 2/4
    assert found["f1"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found["yes_ratio"] == 0.5
    assert found["by_category"]["random"]["f1"] == found["f1"]


def test_figures_and_questions_of_hallusion_bench():
    unit = {"category": "VD", "subcategory": "chart", "set": "0"}
    rows = answered(
        (True, {**unit, "figure": "0", "question": "0"}),
        (True, {**unit, "figure": "0", "question": "1"}),
        (True, {**unit, "figure": "1", "question": "0"}),
        (False, {**unit, "figure": "1", "question": "1"}),
        (True, {**unit, "set": "1", "figure": "1", "question": "1"}),  # of another set
    )
    assert scores.hallusion_bench(rows) == {
        "aAcc": 0.8,
        "fAcc": pytest.approx(2 / 3),
        "qAcc": pytest.approx(2 / 3),
    }


# --- files ------------------------------------------------------------------------------------------------


def png(colour) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(sink, "PNG")
    return sink.getvalue()


RED, BLUE = png("red"), png("blue")
CRPE = "What is on the table?\n(A) a cat\n(B) a dog\n(C) a cup\n(D) nothing"
CRPE_TURNED = "What is on the table?\n(A) a dog\n(B) a cup\n(C) nothing\n(D) a cat"
MMMU = {f"image_{number}": None for number in range(1, 8)}

# Rows with exactly the columns of the published files; what follows is expected of the first question.
FILES = {
    "mme": (
        [
            {"question_id": "code/0020.png", "image": {"bytes": RED, "path": None}, "answer": "Yes",
             "question": "Is it red? Please answer yes or no.", "category": "color"},
            {"question_id": "code/0020.png", "image": {"bytes": RED, "path": None}, "answer": "No",
             "question": "Is it blue? Please answer yes or no.", "category": "color"},
        ],
        ("Is it red?\nAnswer the question using a single word or phrase.", "Yes.", "no"),
    ),
    "mmstar": (
        [{"index": 7, "question": "What?\nOptions: A: x, B: y, C: z, D: w", "image": RED, "answer": "B",
          "category": "math", "l2_category": "geometry"}],
        ("What?\nOptions: A: x, B: y, C: z, D: w\nAnswer with the option's letter from the given choices "
         "directly.", "B", "A"),
    ),
    "science_qa": (
        [{"image": {"bytes": RED, "path": "x.png"}, "question": "Which?", "choices": ["one", "two", "three"],
          "answer": 2, "hint": "Look."},
         {"image": None, "question": "Which?", "choices": ["one", "two"], "answer": 0, "hint": ""}],
        ("Context: Look.\nWhich?\nA. one\nB. two\nC. three\nAnswer with the option's letter from the given "
         "choices directly.", "C. three", "D"),
    ),
    "real_world_qa": (
        [{"image": {"bytes": RED, "path": None}, "answer": "3",
          "question": "How many? Answer with a number."}],
        ("How many? Answer with a number.", "3.", "4"),
    ),
    "mmmu": (
        [{"id": "validation_Art_Theory_1", "question": "What is <image 1>?", **MMMU,
          "options": "['x', \"it's y\"]",
          "image_1": {"bytes": RED, "path": None}, "answer": "B", "question_type": "multiple-choice"},
         {"id": "validation_Math_2", "question": "Compare <image 1> and <image 2>", **MMMU,
          "options": "['x']", "image_1": {"bytes": RED, "path": None}, "answer": "A",
          "question_type": "multiple-choice"},
         {"id": "validation_Math_3", "question": "What is x?", **MMMU, "options": "['<image 2>', 'y']",
          "image_2": {"bytes": BLUE, "path": None}, "answer": "A", "question_type": "multiple-choice"},
         {"id": "validation_Math_4", "question": "<image 1> What is x?", "options": "[]", **MMMU,
          "image_1": {"bytes": RED, "path": None}, "answer": "['1/2', '0.5']", "question_type": "open"}],
        ("What is <image 1>?\nA. x\nB. it's y\nAnswer with the option's letter from the given choices "
         "directly.", "(B)", "C"),
    ),
    "mmmu_pro_standard": (
        [{"id": "test_History_1", "question": "What is <image 1>?", **MMMU,
          "options": str([f"o{n}" for n in range(10)]), "answer": "J", "subject": "History",
          "image_1": {"bytes": RED, "path": None}}],
        ("What is <image 1>?\n" + "\n".join(f"{'ABCDEFGHIJ'[n]}. o{n}" for n in range(10))
         + "\nAnswer with the option's letter from the given choices directly.", "J", "I"),
    ),
    "mmmu_pro_vision": (
        [{"id": "test_History_1", "image": {"bytes": RED, "path": None}, "options": "['a', 'b', 'c']",
          "answer": "C", "subject": "History"}],
        ("Answer with the option's letter from the given choices directly.", "C", "D"),
    ),
    "visulogic": (
        [{"image_path": "images/0.png", "question": "Which comes next?", "label": "D", "tag": "Spatial"}],
        ("Which comes next?\nAnswer with the option letter only.", r"\boxed{D}", "A"),
    ),
    "logic_vista": (
        [{"question": "Which two? A, B, C or D", "image": {"bytes": RED, "path": None}, "answer": "A, C"}],
        ("Which two? A, B, C or D", "C, A", "A"),
    ),
    "crpe": (
        [{"image": {"bytes": RED, "path": None}, "text": CRPE, "correct_option": "B"},
         {"image": {"bytes": RED, "path": None}, "text": CRPE_TURNED, "correct_option": "A"},
         {"image": {"bytes": BLUE, "path": None}, "text": CRPE, "correct_option": "B"}],
        (CRPE + "\nPlease answer directly with only the letter of the correct option and nothing else.",
         "A dog.", "A"),
    ),
    "pope": (
        [{"question_id": "1", "question": "Is there a dog?", "answer": "yes", "image_source": "COCO_1",
          "image": {"bytes": RED, "path": None}, "category": "adversarial"},
         {"question_id": "1", "question": "Is there a cat?", "answer": "no", "image_source": "COCO_1",
          "image": {"bytes": RED, "path": None}, "category": "popular"}],
        ("Is there a dog?\nAnswer the question using a single word or phrase.", "Yes.", "No"),
    ),
    "hallusion_bench": (
        [{"category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": "1", "question_id": "2",
          "question": "Is it bent?", "gt_answer": "0", "image": {"bytes": RED, "path": None}}],
        ("Is it bent?", "No, it is straight.", "Yes"),
    ),
}  # fmt: skip


def write_rows(folder: Path, name: str) -> str:
    """The benchmark as its publishers lay it out: a Parquet file of the split, and one of another split."""
    rows = FILES[name][0]
    spec = BENCHMARKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / f"{spec.splits[0]}-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 1), folder / "dev-00000-of-00001.parquet")
    if name == "visulogic":
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "0.png").write_bytes(RED)
    return str(folder)


def read(name: str, uri: str) -> list[BenchmarkQuestion | LeftOut]:
    return [item for unit in units(name, uri) for item in read_unit(unit)]


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_is_read_from_exactly_its_columns(name, tmp_path):
    rows, (prompt, right, wrong) = FILES[name]
    assert set(benchmark(name).columns) <= set(rows[0])
    items = read(name, write_rows(tmp_path, name))
    assert len(items) == len(rows)  # none of the other split
    first = items[0]
    assert isinstance(first, BenchmarkQuestion)
    assert first.prompt == prompt
    assert first.image == RED
    for said, correct in ((right, True), (wrong, False)):
        verdict = judge(first.scoring, said, first.answers, letters=first.letters, options=first.options)
        assert verdict.correct == correct


def test_every_benchmark_but_the_miniature_is_tested_above():
    assert {*FILES, "miniature"} == set(BENCHMARKS)


def test_single_image_questions_alone_are_asked(tmp_path):
    items = read("mmmu", write_rows(tmp_path, "mmmu"))
    assert [item.id for item in items if isinstance(item, BenchmarkQuestion)] == [
        "validation_Art_Theory_1", "validation_Math_3", "validation_Math_4"
    ]  # fmt: skip
    assert items[1] == LeftOut(id="validation_Math_2", reason="several images")
    assert isinstance(items[2], BenchmarkQuestion) and items[2].image == BLUE  # noqa: PT018
    assert isinstance(items[3], BenchmarkQuestion) and items[3].answers == ("1/2", "0.5")  # noqa: PT018
    assert items[0].groups == {"subject": "Art_Theory"}  # type: ignore[union-attr]


def test_a_question_without_image_is_left_out(tmp_path):
    assert isinstance(read("science_qa", write_rows(tmp_path, "science_qa"))[1], LeftOut)


def test_orders_of_options_are_one_question_of_an_image(tmp_path):
    first, turned, other = (
        item.groups["question"]  # type: ignore[union-attr]
        for item in read("crpe", write_rows(tmp_path, "crpe"))
    )
    assert first == turned != other


@pytest.mark.parametrize("published", ["crpe_exist.jsonl", "exist/test-00000-of-00001.jsonl"])
def test_parts_of_crpe_are_told_apart_by_their_files(tmp_path, published):
    row = {"image": "images/0.png", "text": CRPE, "correct_option": "B", "question_id": 4}
    root = tmp_path / "relation-and-existing"  # no file's own folder: tells nothing
    for part in ("exist", "relation"):
        path = root / published.replace("exist", part)
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
        (path.parent / "images" / "0.png").write_bytes(RED)
        kind = {"category": "predicate"} if part == "relation" else {}
        path.write_text(json.dumps({**row, **kind}) + "\n")
    groups = {item.groups["part"]: item.groups["category"] for item in read("crpe", str(root))}  # type: ignore[union-attr]
    assert groups == {"exist": "exist", "relation": "predicate"}
    (root / published).write_text(json.dumps({**row, "correct_option": "Q"}) + "\n")
    with pytest.raises(DataError, match=rf"{published}: row .*'Q'.*ABCD"):
        read("crpe", str(root))


def test_visulogic_is_read_from_its_jsonl(tmp_path):
    uri = write_rows(tmp_path, "visulogic")
    expected = read("visulogic", uri)[0]
    for parquet in tmp_path.glob("*.parquet"):
        parquet.unlink()
    (tmp_path / "data.jsonl").write_text(json.dumps({**FILES["visulogic"][0][0], "id": "00007"}) + "\n")
    found = read("visulogic", uri)[0]
    assert isinstance(found, BenchmarkQuestion) and found.id == "00007"  # noqa: PT018
    assert isinstance(expected, BenchmarkQuestion) and found.prompt == expected.prompt  # noqa: PT018
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"row 0.*no such file.*unpack"):
        read("visulogic", uri)


def test_a_row_without_a_true_answer_is_named(tmp_path):
    for name, broken in (
        ("mmstar", {"answer": "?"}),
        ("mme", {"answer": "perhaps"}),
        ("mmmu", {"options": "x y"}),
    ):
        spec, row = (
            benchmark(name),
            {**FILES[name][0][0], **broken, "image": RED, "#file": "f", "#row": "r-3"},
        )
        with pytest.raises(DataError, match="f: row r-3: "):
            spec.item(row)


def test_what_is_no_benchmark_is_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean mmstar"):
        benchmark("mmstarr")
    with pytest.raises(DataError, match=r"no column .*category.*found"):
        read("pope", write_rows(tmp_path / "a", "real_world_qa"))
    with pytest.raises(DataError, match="no such file"):
        units("mme", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no rows of mmstar"):
        units("mmstar", write_rows(tmp_path / "b", "pope"))  # a test split, not a val split
    with pytest.raises(ConfigError, match=r"data\.pope=DIRECTORY"):
        EvaluateJob(model="m", benchmarks=["pope"], output="o")


# --- controls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3, 10, 501])
def test_no_image_keeps_its_place_and_none_is_lost(num):
    keys = [f"{number:04d}" for number in range(num)]
    moved = ask.derangement(keys, seed=3)
    assert all(moved[key] != key for key in keys)
    assert sorted(moved.values()) == keys
    shuffled = random.Random(0).sample(keys, num)
    assert ask.derangement(shuffled, seed=3) == moved  # of the set of images, not of their order
    assert num < 10 or ask.derangement(keys, seed=4) != moved


def test_one_image_has_no_other():
    with pytest.raises(DataError, match="two different images"):
        ask.derangement(["a"], seed=0)


# --- comparisons ------------------------------------------------------------------------------------------


def finished_run(
    folder: Path, said: dict[str, list[str]], per_image: int = 1, prompt: str = "Is it red?"
) -> str:
    """What a run leaves: questions with the true answer yes, and what the model said under each condition."""
    num = len(next(iter(said.values())))
    questions = [
        BenchmarkQuestion(id=f"q{i}", prompt=f"{prompt} {i}", answers=("yes",), scoring="yes_no", groups={})
        for i in range(num)
    ]
    keys = [f"image-{i // per_image}" for i in range(num)]
    rows = {key: np.zeros(2, np.float32) for key in keys}
    prepared = prepare.PreparedBenchmark(questions=questions, keys=keys, embeddings=rows, left_out={})
    prepare._write(str(folder), "pope", prepared)
    prompts, positions = [question.prompt for question in questions], list(range(num))
    for condition, texts in said.items():
        part = ask.BenchmarkCondition(
            benchmark="pope",
            condition=condition,
            prepared=prepared,
            positions=positions,
            prompts=prompts,
            shown=keys if condition == "image" else None,
        )
        table = ask._scored(part, dict(enumerate(texts)))
        storage.write_bytes(ask.answers_path(str(folder), "pope", condition), parquet_bytes(table))
    return str(folder)


def compared(output: Path, *runs: str, **settings) -> tuple[dict, str]:
    text = run_evaluate(EvaluateJob(compare=list(runs), output=str(output), **settings))
    return json.loads((output / "comparison.json").read_text()), text


def test_two_runs_are_compared_by_pairs_of_answers(tmp_path):
    # Both right 6, the first alone 8, the second alone 2, none 4.
    first = finished_run(tmp_path / "a", {"image": ["Yes"] * 14 + ["No"] * 6, "blind": ["No"] * 20})
    second = finished_run(tmp_path / "b", {"image": ["Yes"] * 6 + ["No"] * 8 + ["yes"] * 2 + ["?"] * 4})
    found, text = compared(tmp_path / "out", first, second)
    between, within = found["comparisons"]
    assert (between["only_first_right"], between["only_second_right"]) == (8, 2)
    assert between["accuracy"] == [0.7, 0.4]
    assert between["difference"] == pytest.approx(0.3)
    assert between["mcnemar_p"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # both tails of 2 or fewer of 10
    assert between["sign_flip_p"] == pytest.approx(between["mcnemar_p"])  # the same test where images differ
    # +1 of 8, -1 of 2, 0 of 10: variance 0.5 - 0.09 of one question; resampled means lie on a grid of 0.05.
    half = 1.96 * np.sqrt(0.41 / 20)
    assert between["interval"] == pytest.approx([0.3 - half, 0.3 + half], abs=0.051)
    assert (within["first"], within["second"], within["difference"]) == ("image", "blind", 0.7)
    assert found["skipped"] == ["pope blind, which only run 1 holds"]
    assert between["num_unparsed"] == [0, 4]
    assert "0 and 4 answers could not be parsed" in text
    assert "+30.0" in text
    alone, _ = compared(tmp_path / "alone", first)
    assert [each["difference"] for each in alone["comparisons"]] == [0.7]


def test_more_questions_about_the_same_images_tell_nothing_more(tmp_path):
    said = [["Yes"] * 14 + ["No"] * 6, ["Yes"] * 6 + ["No"] * 8 + ["Yes"] * 2 + ["No"] * 4]
    figures = []
    for times in (1, 4):
        runs = [
            finished_run(
                tmp_path / f"{times}-{number}",
                {"image": np.repeat(texts, times).tolist()},
                times,
            )
            for number, texts in enumerate(said)
        ]
        figures.append(compared(tmp_path / f"out-{times}", *runs)[0]["comparisons"][0])
    once, often = figures
    assert (often["num"], often["num_images"]) == (80, 20)
    assert often["interval"] == pytest.approx(once["interval"])
    assert often["sign_flip_p"] == once["sign_flip_p"]
    assert often["mcnemar_p"] < once["mcnemar_p"] / 100  # which is why it is not the one to trust


def test_one_image_alone_has_no_interval(tmp_path):
    run_uri = finished_run(tmp_path / "a", {"image": ["Yes"] * 3, "blind": ["No"] * 3}, per_image=3)
    (only,) = compared(tmp_path / "out", run_uri)[0]["comparisons"]
    assert only["interval"] is only["sign_flip_p"] is None


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = finished_run(tmp_path / "a", {"image": ["Yes"] * 3})
    for name, other, said in (
        ("more", finished_run(tmp_path / "more", {"image": ["Yes"] * 5}), "2 only in .*more.*q3"),
        (
            "words",
            finished_run(tmp_path / "words", {"image": ["Yes"] * 3}, prompt="Is it?"),
            "q0 .* prompt",
        ),
        (
            "images",
            finished_run(tmp_path / "images", {"image": ["Yes"] * 3}, per_image=3),
            "q1 .* image",
        ),
    ):
        with pytest.raises(DataError, match=said):
            compared(tmp_path / f"{name}-out", first, other)
    with pytest.raises(DataError, match="nothing to compare"):
        compared(tmp_path / "out", first)
    with pytest.raises(DataError, match="holds no answers"):
        compared(tmp_path / "out", first, str(tmp_path))
    with pytest.raises(DataError, match="asked for were mme"):
        compared(tmp_path / "out", first, first, benchmarks=["mme"])
    with pytest.raises(ConfigError, match="names 3 runs"):
        compared(tmp_path / "out", first, first, first)
    path = ask.answers_path(first, "pope", "image")
    pq.write_table(pq.read_table(path).drop_columns(["image"]), path)
    with pytest.raises(DataError, match=r"image\.parquet: does not say which image"):
        compared(tmp_path / "out", first, str(tmp_path / "words"))
    with pytest.raises(ConfigError, match="model: a value is required"):
        EvaluateJob(benchmarks=["pope"], data={"pope": "x"}, output="o")


def test_verdicts_of_other_rules_are_given_anew(tmp_path):
    first = finished_run(tmp_path / "a", {"image": ["The answer is yes."] * 3, "blind": ["No"] * 3})
    path = ask.answers_path(first, "pope", "image")
    right = pq.read_table(path)
    wrong = right.set_column(right.schema.get_field_index("correct"), "correct", pa.array([False] * 3))
    pq.write_table(wrong.replace_schema_metadata(None), path)
    assert compared(tmp_path / "out", first)[0]["comparisons"][0]["difference"] == 1.0
    prepared = prepare.load_prepared(first, "pope")
    for part in ask.conditions("pope", prepared, [], 0):
        assert ask._stands(first, part)
    assert pq.read_table(path).equals(right, check_metadata=True)


# --- picture ----------------------------------------------------------------------------------------------


def test_the_picture_holds_every_image_on_white():
    long = "a very long caption " * 40 + "x" * 300
    cells = [
        picture.PictureCell(image=png(colour), caption=long, questions=(("what?", "red", "blue", False),))
        for colour in ("red", "lime", "blue", "red", "lime")
    ]
    sheet = Image.open(io.BytesIO(picture.contact_sheet(cells))).convert("RGB")
    counts = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    assert max(counts, key=lambda colour: counts[colour]) == (255, 255, 255)
    side = 256  # each image is enlarged to this
    assert counts[255, 0, 0] == 2 * side**2
    assert counts[0, 0, 255] == side**2
    # Nothing is cut off: the last row and column of the sheet are margin.
    edges = np.asarray(sheet)
    assert (edges[-8:] == 255).all()
    assert (edges[:, -8:] == 255).all()
    one = Image.open(io.BytesIO(picture.contact_sheet(cells[:1])))
    assert one.width < sheet.width / 3


# --- the whole job ----------------------------------------------------------------------------------------

WORLD = DatasetConfig(
    output="", num_pairs=0, num_heldout=12, num_images=0, num_texts=0, rows_per_file=5, cpus_per_task=0.5
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> str:
    """A world of 12 held-out scenes, written without Ray."""
    folder = tmp_path_factory.mktemp("world")
    for part in dataset.parts(WORLD):
        for path, content in dataset.contents(WORLD, part).items():
            storage.write_bytes(str(folder / path), content)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> EncoderConfig:
    model = write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")
    return EncoderConfig(kind="open_clip", model=model)


@pytest.fixture(scope="module")
def model(tmp_path_factory, world, encoder) -> str:
    """A tiny model with the encoder's image tower that has learnt the answers to this world's questions."""
    config = documents.DocumentConfig(num_documents=300)
    texts = [documents.document(config, documents.FIRST_TRAINING_SCENE + i) for i in range(300)]
    tokenizer = language_model.build_tokenizer(texts)
    torch.manual_seed(0)
    size = ModelSize(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    made = build_model(
        language_model.build_model(size, tokenizer).config,
        16,
        tokenizer.convert_tokens_to_ids("<image>"),
        num_visual_tokens=2,
        embedding_scale=4.0,
    )
    processor = ReVisionProcessor(tokenizer, attach_image_tower(made, encoder), num_visual_tokens=2)
    learn(made, processor, [item for item in read("miniature", world) if isinstance(item, BenchmarkQuestion)])
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def learn(made, processor, items: list[BenchmarkQuestion]) -> None:
    """Gradient steps on all of `items` at once, until answers depend on the image."""
    embeds = made.encode_images(
        processor(images=[opened(item) for item in items], return_tensors="pt")["pixel_values"]
    )
    texts = [f"<image> <q> {item.prompt} <a> {item.answers[0]} <e>" for item in items]
    tokens = processor(
        text=texts, image_embeds=embeds, padding=True, padding_side="right", return_tensors="pt"
    )
    ids = tokens["input_ids"]
    behind = (ids == processor.tokenizer.convert_tokens_to_ids("<a>")).cumsum(1).bool()[:, :-1]
    labels = torch.full_like(ids, -100)
    labels[:, 1:][behind] = ids[:, 1:][behind]
    labels[tokens["attention_mask"] == 0] = -100
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 5e-3)
    made.train()
    for _ in range(120):
        loss = made(**tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()


def opened(item: BenchmarkQuestion) -> Image.Image:
    assert item.image is not None
    return Image.open(io.BytesIO(item.image))


def save_again(model: str, folder: Path, alignment: dict, tower: bool) -> str:
    """A copy of `model` with another alignment, and without its image tower unless `tower`."""
    made = AutoModelForImageTextToText.from_pretrained(model)
    processor = AutoProcessor.from_pretrained(model)
    made.config.alignment = alignment
    if not tower:
        made.image_tower = made.config.image_tower = None
        processor = ReVisionProcessor(processor.tokenizer, num_visual_tokens=2)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def job(model: str, world: str, output: Path, **settings) -> EvaluateJob:
    return EvaluateJob(
        model=model,
        benchmarks=["miniature"],
        data={"miniature": world},
        output=str(output),
        **{"max_new_tokens": 4, "cpus_per_actor": 0.5, "num_pictures": 3, **settings},
    )


def rows_of(output: Path, condition: str, name: str = "miniature") -> list[dict]:
    return pq.read_table(output / "answers" / name / f"{condition}.parquet").to_pylist()


@pytest.fixture(scope="module")
def evaluated(cluster, model, world, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("evaluated")
    return output, run_evaluate(job(model, world, output))


def test_every_held_out_question_is_asked_under_every_condition(evaluated, world):
    output, _ = evaluated
    asked = [
        json.loads(line)
        for file in sorted(Path(world).glob("questions/heldout-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    for condition in ("image", "blind", "shuffled"):
        rows = rows_of(output, condition)
        assert [row["id"] for row in rows] == [question["id"] for question in asked]
        assert [row["answer"] for row in rows] == [question["answer"] for question in asked]
        assert [json.loads(row["groups"])["kind"] for row in rows] == [question["kind"] for question in asked]
        for row in rows:
            assert row["predicted"] == answers.word(row["raw"])
            assert row["correct"] == (row["predicted"] == row["answer"])


def test_conditions_show_their_own_another_and_no_image(evaluated):
    output, _ = evaluated
    own, blind, other = (rows_of(output, condition) for condition in ("image", "blind", "shuffled"))
    assert all(row["shown"] == row["image"] for row in own)
    assert all(row["shown"] is None for row in blind)
    assert all(row["shown"] != row["image"] for row in other)
    # And the model, which knows these images, does see what the table says it was shown.
    right = [sum(row["correct"] for row in rows) / len(rows) for rows in (own, blind, other)]
    # Many questions are about one scene alone, so their words tell much of the answer even so.
    assert right[0] > 0.8
    assert max(right[1:]) < right[0] - 0.05


def test_results_are_the_answers_counted(evaluated):
    output, text = evaluated
    found = json.loads((output / "results.json").read_text())["benchmarks"]["miniature"]
    for condition in ("image", "blind", "shuffled"):
        rows = rows_of(output, condition)
        figures = found["conditions"][condition]
        assert figures["num"] == len(rows)
        assert figures["accuracy"] == sum(row["correct"] for row in rows) / len(rows)
        assert figures["interval"] == list(wilson(sum(row["correct"] for row in rows), len(rows)))
        kinds = found["groups"]["kind"]
        assert sum(kinds[kind][condition]["num"] for kind in kinds) == len(rows)
    assert "miniature" in text
    assert "relation" in text
    line = next(line for line in text.splitlines() if line.startswith("miniature"))
    assert f"{100 * found['conditions']['blind']['accuracy']:.1f}" in line


@pytest.mark.slow
def test_images_are_encoded_as_the_encoder_encodes_them(evaluated, model, world, encoder, tmp_path):
    """With a store of the same encoder instead of its tower the model answers the same.

    With the store of the same encoder, joined by id, the model says the same."""
    output, _ = evaluated
    tower, prepare = open_clip.image_tower(encoder), open_clip.image_preparer(encoder)
    contents = {
        item.image_id: opened(item)
        for item in read("miniature", world)
        if isinstance(item, BenchmarkQuestion)
    }
    pixels = np.stack([prepare(image) for image in contents.values()])
    identity = EncoderIdentity(name="tiny", fingerprint=open_clip.fingerprint(encoder))
    store = write_store(
        tmp_path / "store", tower.encode(pixels), "image", ids=list(contents), encoder=identity
    )
    alignment = {"image_fingerprint": identity.fingerprint}
    plain = save_again(model, tmp_path / "model", alignment, tower=False)
    run_evaluate(job(plain, world, tmp_path / "out", images=store, controls=[], num_pictures=0))
    # The same weights, but no tower: only rounding separates the embeddings.
    assert [row["raw"] for row in rows_of(tmp_path / "out", "image")] == [
        row["raw"] for row in rows_of(output, "image")
    ]
    # A store that lacks an image, one of another encoder, and none at all.
    few = write_store(
        tmp_path / "few", tower.encode(pixels)[1:], "image", ids=list(contents)[1:], encoder=identity
    )
    with pytest.raises(DataError, match=r"questions have no image in the image store"):
        run_evaluate(job(plain, world, tmp_path / "few-out", images=few))
    foreign = write_store(tmp_path / "foreign", tower.encode(pixels), "image", ids=list(contents))
    with pytest.raises(AlignmentError, match="fingerprint"):
        run_evaluate(job(plain, world, tmp_path / "foreign-out", images=foreign))
    with pytest.raises(ConfigError, match=r"without an image tower.*images=STORE"):
        run_evaluate(job(plain, world, tmp_path / "no-out"))


def test_answers_are_those_of_the_model_asked_by_hand(evaluated, model, world):
    """One question at a time, the chat template written out, the picture itself: no batch, no padding, no
    embedding made before, and the same answers."""
    output, _ = evaluated
    loaded = AutoModelForImageTextToText.from_pretrained(model)
    processor = AutoProcessor.from_pretrained(model)
    items = [item for item in read("miniature", world) if isinstance(item, BenchmarkQuestion)]
    images = {content_key(item.image): item.image for item in items if item.image is not None}
    assert len({len(item.prompt) for item in items}) > 3  # so that the batches were padded
    for condition in ("image", "blind", "shuffled"):
        for item, row in zip(items, rows_of(output, condition), strict=True):
            slot = "" if condition == "blind" else "<image> "
            shown = None if condition == "blind" else [Image.open(io.BytesIO(images[row["shown"]]))]
            inputs = processor(images=shown, text=f"{slot}<q> {item.prompt} <a>", return_tensors="pt")
            said = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
            said = processor.tokenizer.decode(said[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert said.strip() == row["raw"]


@pytest.mark.slow
def test_what_is_finished_is_not_asked_again(evaluated, model, world):
    """An evaluation that is run again asks only what is missing."""
    output, text = evaluated
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    assert len(kept) == 3 + 1 + 2  # conditions, captions, questions and images
    (output / "answers" / "miniature" / "blind.parquet").unlink()
    assert run_evaluate(job(model, world, output)) == text
    for path, written in kept.items():
        assert (path.stat().st_mtime_ns == written) == (path.name != "blind.parquet")


def test_answers_of_another_model_are_not_mixed_in(evaluated, model, world, tmp_path):
    output, _ = evaluated
    other = save_again(model, tmp_path, {"strategy": "none"}, tower=True)
    with pytest.raises(OutputError, match="model was "):
        run_evaluate(job(other, world, output))
    with pytest.raises(OutputError, match="max_items was None, is now 3"):
        run_evaluate(job(model, world, output, max_items=3))


def test_the_picture_shows_captions_and_answers(evaluated):
    output, text = evaluated
    assert str(output / "picture.png") in text
    sheet = Image.open(output / "picture.png")
    assert sheet.width > 3 * 256
    captions = rows_of(output, next(output.glob("answers/miniature/captions-*")).stem)
    assert len(captions) == 3
    assert all(row["correct"] is None for row in captions)


@pytest.mark.slow
def test_another_model_can_write_the_captions(evaluated, cluster, model, world, tmp_path, caplog):
    """Another model can write the captions."""
    mine = next(evaluated[0].glob("answers/miniature/captions-*")).stem
    before = {row["raw"] for row in rows_of(evaluated[0], mine)}
    other = shutil.copytree(model, tmp_path / "other")
    found = AutoModelForImageTextToText.from_pretrained(other)
    with torch.no_grad():
        found.projector[-1].bias.add_(5 * torch.randn_like(found.projector[-1].bias))
    found.generation_config.eos_token_id = 0  # as if written before models knew their template's end
    found.save_pretrained(other)
    run_evaluate(job(model, world, tmp_path / "out", caption_model=str(other), controls=[], max_items=10))
    warnings = [record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()]
    assert [f"caption_model={other}" in warning and "<e> (2)" in warning for warning in warnings] == [True]
    captions = rows_of(tmp_path / "out", next((tmp_path / "out").glob("answers/miniature/captions-*")).stem)
    assert len(captions) == 3
    assert {row["raw"] for row in captions} != before


@pytest.mark.slow
def test_benchmarks_together_are_averaged_and_sampled(cluster, model, world, tmp_path):
    """Several benchmarks in one run are sampled, averaged, and say what was left out."""
    names = ["pope", "mme", "crpe", "mmmu", "miniature"]
    data = {name: write_rows(tmp_path / name, name) for name in names[:-1]}
    settings = {
        "benchmarks": names,
        "data": {**data, "miniature": world},
        "max_items": 2,
        "controls": ["blind"],
    }
    output = tmp_path / "out"
    text = run_evaluate(
        EvaluateJob(model=model, output=str(output), max_new_tokens=3, cpus_per_actor=0.5, **settings)
    )
    found = json.loads((output / "results.json").read_text())
    accuracies = [found["benchmarks"][name]["conditions"]["image"]["accuracy"] for name in names]
    assert found["average"]["image"] == pytest.approx(np.mean(accuracies))
    assert [len(rows_of(output, "image", name)) for name in names] == [2] * 5
    assert found["benchmarks"]["mmmu"]["left_out"] == {"several images": 1}
    assert "several images" in text
    assert "f1" in text
    assert {"circular"} == set(found["benchmarks"]["crpe"]["metrics"]["image"])


def test_variants_weigh_as_one_in_the_average():
    figures = {"mmmu_pro_standard": 0.2, "mmmu_pro_vision": 0.4, "pope": 0.9}
    benchmarks = {name: {"conditions": {"image": {"accuracy": value}}} for name, value in figures.items()}
    assert report._average(benchmarks, "image") == pytest.approx((0.3 + 0.9) / 2)


def test_a_folder_that_is_no_model_is_refused(cluster, world, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model_type is 'llama', expected 'revision'"):
        run_evaluate(job(str(tmp_path), world, tmp_path / "out"))


def test_left_padding_is_invisible(model):
    """Prompts of very different lengths in one batch are answered as alone."""
    responder = Responder(model, dtype="float32", max_new_tokens=6, num_threads=1)
    prompts = ["how many things are there?", "", "where is the red circle, seen from the blue square? " * 3]
    images_BD = np.eye(3, 16, dtype=np.float32)
    alone = [responder.answer([p], images_BD[i : i + 1])[0] for i, p in enumerate(prompts)]
    assert responder.answer(prompts, images_BD) == alone
    assert responder.answer(prompts[::-1], images_BD[::-1].copy()) == alone[::-1]
    assert len(set(alone)) > 1
