"""From a row of a benchmark to the question that a model is asked.

One function a benchmark, from a row as its publishers' Parquet (or JSONL) holds it to an `Item`. Prompts are
those of the public evaluation kits. The image goes before the prompt; where a text says `<image 1>` it keeps
that reference.
"""

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from revision_ray.errors import DataError, quote, shorten
from revision_ray.evaluate.answers import ALL_LETTERS, Scoring, letter_set, yes_no

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
_CRPE_TAIL = "Please answer directly with only the letter of the correct option and nothing else."
_VISULOGIC_TAIL = "Answer with the option letter only."
_IMAGE_REFERENCE = re.compile(r"<image\s*(\d+)>")
_CRPE_PART = re.compile(r"(?<![a-z])(exist|relation)(?![a-z])")
_OPTION_LINE = re.compile(r"^\s*\(?([A-J])[.):]\s*(.+?)\s*$", re.MULTILINE)

Row = dict[str, Any]
"""A record with every image column as bytes (or None), and two fields of ours: `#file` (the URI of
its file) and `#row` (an id for rows that bring none)."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one image."""

    id: str
    prompt: str
    """What the model is asked, without the image's place."""
    answers: tuple[str, ...]
    """The true answer, or the spellings of it that count."""
    scoring: Scoring
    letters: str = ALL_LETTERS
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    image_id: str = ""
    """Under which an image store may hold the image; empty where only its content identifies it."""
    image: bytes | None = None


def content_key(content: bytes) -> str:
    """20 hex digits that are a function of the bytes: the id that `embed` gives to images that bring none."""
    return hashlib.sha256(content).digest()[:10].hex()


def mme(row: Row) -> Item:
    question = row["question"].replace("Please answer yes or no.", "").strip()
    return Item(
        id=row["#row"],  # the two questions of an image share question_id
        prompt=f"{question}\n{SHORT}",
        answers=(_yes_or_no(row["answer"], row),),
        scoring="yes_no",
        groups={"category": row["category"], "image": str(row["question_id"])},
        image=row["image"],
    )


def mmstar(row: Row) -> Item:
    return Item(
        id=str(row["index"]),
        prompt=f"{row['question']}\n{LETTER}",
        answers=(_letter(row["answer"], "ABCD", row),),
        scoring="letter",
        letters="ABCD",
        groups={"l2_category": row["l2_category"], "category": row["category"]},
        image=row["image"],
    )


def science_qa(row: Row) -> Item:
    hint = (row["hint"] or "").strip()
    options = list(row["choices"])
    lines = [f"Context: {hint}"] if hint else []
    return Item(
        id=row["#row"],
        prompt="\n".join([*lines, row["question"], *_lettered(options), LETTER]),
        answers=(ALL_LETTERS[row["answer"]],),
        scoring="letter",
        letters=ALL_LETTERS[: len(options)],
        groups={"subject": str(row.get("subject") or "")},
        image=row["image"],
    )


def real_world_qa(row: Row) -> Item:
    return Item(
        id=row["#row"],
        prompt=row["question"],
        answers=(str(row["answer"]),),
        scoring="letter_or_word",
        image=row["image"],
    )


def mmmu(row: Row) -> Item | str:
    """Single-image questions alone: exactly one distinct `<image N>` in question and options."""
    options = _list_of(row["options"], row)
    named = sorted(set(_IMAGE_REFERENCE.findall(" ".join([row["question"], *options]))))
    if len(named) != 1:
        return "several images" if named else "names no image"
    column = f"image_{named[0]}"
    groups = {"subject": str(row.get("subject") or "_".join(row["id"].split("_")[1:-1]))}
    if row.get("question_type") == "open":
        answer = str(row["answer"])
        answers = _list_of(answer, row) if answer.startswith("[") else [answer]
        prompt, scoring, letters = f"{row['question']}\n{SHORT}", "open", ALL_LETTERS
    else:
        letters, scoring = ALL_LETTERS[: len(options)], "letter"
        answers = [_letter(row["answer"], letters, row)]
        prompt = "\n".join([row["question"], *_lettered(options), LETTER])
    return Item(
        id=row["id"],
        prompt=prompt,
        answers=tuple(answers),
        scoring=scoring,
        letters=letters,
        groups=groups,
        image=row.get(column),
    )


def mmmu_pro_vision(row: Row) -> Item:
    """Question and options stand in the image."""
    letters = ALL_LETTERS[: len(_list_of(row["options"], row))]
    return Item(
        id=row["id"],
        prompt=LETTER,
        answers=(_letter(row["answer"], letters, row),),
        scoring="letter",
        letters=letters,
        groups={"subject": str(row.get("subject") or "")},
        image=row.get("image") or row.get("image_1"),
    )


def visulogic(row: Row) -> Item:
    return Item(
        id=str(row.get("id") or row["#row"]),
        prompt=f"{row['question']}\n{_VISULOGIC_TAIL}",
        answers=(_letter(row["label"], "ABCD", row),),
        scoring="letter",
        letters="ABCD",
        groups={"tag": str(row["tag"])},
        image=row["image_path"],
    )


def logic_vista(row: Row) -> Item:
    if letter_set(str(row["answer"])) is None:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(row['answer'], 80)}, expected letters "
            f"such as 'A, C'"
        )
    return Item(
        id=row["#row"],
        prompt=row["question"],
        answers=(row["answer"],),
        scoring="letters",
        image=row["image"],
    )


def crpe(row: Row) -> Item:
    """The same question occurs with its options in several orders: those rows are one `question`."""
    text = row["text"]
    options = _OPTION_LINE.findall(text)
    stem = _OPTION_LINE.split(text)[0] + "|".join(sorted(option for _, option in options))
    letters = ALL_LETTERS[: len(options)] or "ABCD"
    # The file's own name tells its part; where it does not ("relation/test.parquet"), its folder's does.
    named = _CRPE_PART.findall("/".join(row["#file"].lower().split("/")[-2:]))
    part = named[-1] if named else ""
    return Item(
        id=row["#row"],
        prompt=f"{text}\n{_CRPE_TAIL}",
        answers=(_letter(row["correct_option"], letters, row),),
        scoring="letter",
        letters=letters,
        options=tuple(option for _, option in options),
        groups={
            "part": part,
            "question": content_key((row["image"] or b"") + stem.encode()),
            "category": str(row.get("category") or part),
        },
        image=row["image"],
    )


def pope(row: Row) -> Item:
    return Item(
        id=f"{row['category']}/{row['question_id']}",
        prompt=f"{row['question']}\n{SHORT}",
        answers=(_yes_or_no(row["answer"], row),),
        scoring="yes_no",
        groups={"category": row["category"], "image_source": row["image_source"]},
        image=row["image"],
    )


def hallusion_bench(row: Row) -> Item:
    unit = {
        "category": row["category"],
        "subcategory": row["subcategory"],
        "set": str(row["set_id"]),
        "figure": str(row["figure_id"]),
        "question": str(row["question_id"]),
    }
    truth = {"0": "no", "1": "yes"}.get(str(row["gt_answer"]).strip())
    return Item(
        id="/".join(unit.values()),
        prompt=row["question"],
        answers=(truth or _yes_or_no(row["gt_answer"], row),),
        scoring="yes_no",
        groups=unit,
        image=row["image"],
    )


def miniature(row: Row) -> Item:
    return Item(
        id=row["id"],
        prompt=row["text"],
        answers=(row["answer"],),
        scoring="word",
        groups={"kind": row["kind"]},
        image_id=row["scene"],
        image=row["image"],
    )


def _letter(answer: Any, letters: str, row: Row) -> str:
    """The true option, of which there are `letters`; a test split without answers has none."""
    found = str(answer).strip().strip("()").upper()
    if len(found) != 1 or found not in letters:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(answer, 80)}, expected one of the "
            f"letters {letters}"
        )
    return found


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"{label}. {option}" for label, option in zip(ALL_LETTERS, options, strict=False)]


def _yes_or_no(answer: Any, row: Row) -> str:
    found = yes_no(str(answer))
    if found is None:
        raise DataError(
            f"{row['#file']}: row {row['#row']}: answer is {quote(answer, 80)}, expected yes or no"
        )
    return found


def _list_of(value: Any, row: Row) -> list[str]:
    """A list, also where the file holds it as the text of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(
                f"{row['#file']}: row {row['#row']}: {quote(value, 80)} is no list: {shorten(error)}"
            ) from error
    return [str(entry) for entry in value]
