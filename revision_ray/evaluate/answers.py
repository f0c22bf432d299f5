"""From what a model said to right or wrong, by fixed rules. Pure: no Ray, no model.

An answer that cannot be parsed is wrong. It is never replaced by a guess, as some evaluation kits do: a model
that says nothing would then score 25 % on four options.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scoring = Literal["yes_no", "letter", "letters", "word", "letter_or_word", "open"]
"""yes_no: the first word. letter: the letter of one option. letters: a set of them. word: equal but for case
and full stop. letter_or_word: as the true answer is. open: a number or a short phrase, see `open_answer`."""

ALL_LETTERS = "ABCDEFGHIJ"

_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf)\s*\{)?([^{}]*)\}")
_YES_NO = re.compile(r"[\W_]*(yes|no)\b(?!\s*(?:/|or\b)\s*(?:yes|no)\b)", re.IGNORECASE)
# "Answer: B", "the correct answer is (B).", "option B". Not "the answer is A cat", where A is an article, and
# not "B or C", which leaves it open.
_SAID = re.compile(
    r"\b(?:answer|option|choice)\b\s*(?:(?:is|was|would be|:|=)\s*)*(?:(?:option|choice|letter)\s+)?"
    r"[\"'*({\[\s]*(?:([A-J])(?=\s*[\"')\]}*.,:;]|\s*$)|([B-HJ])(?![\w'-]))"
    r"(?![\"')\]}*]*\s*(?:,|/|or\b|and\b)\s*[\"'(\[*]*[A-J]\b)",
    re.IGNORECASE | re.MULTILINE,
)
_CORRECT = re.compile(r"(?<![\w'])([A-J])[)\]*]*\s+is\s+(?:the\s+)?(?:correct|right|best)\b")
_LONE = re.compile(r"[\W_]*([A-Ja-j])[\W_]*")
_LABEL = re.compile(
    r"^[ \t\"'*]*[(\[]?[ \t]*([A-J])[ \t]*(?:[.):\]*]|$|,(?!\s*(?:or\s|and\s)?\s*[A-J]\b))", re.MULTILINE
)
_RESTATED = re.compile(r"(?:^|\s)[(\[]?A[.):\]]\s.*?\s[(\[]?B[.):\]]\s", re.DOTALL)
_BRACKETED = re.compile(r"[(\[]([A-J])[)\]]")
_LISTED = re.compile(r"[A-J](?:\s*(?:,|;|&|/|\band\b|\s)\s*(?:and\s+)?[A-J])*", re.IGNORECASE)
_ANSWER_PHRASE = re.compile(r"\banswer\s*(?:is|:)\s*:?", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an|a)\s+")


@dataclass(frozen=True)
class Verdict:
    """`predicted` is None where the answer could not be parsed."""

    predicted: str | None
    correct: bool


def judge(
    scoring: Scoring,
    raw: str,
    answers: Sequence[str],
    *,
    letters: str = ALL_LETTERS,
    options: Sequence[str] = (),
) -> Verdict:
    """Whether `raw` is one of the true `answers` (one, but for open questions with several spellings).

    `letters` are those of the options there are. `options`, their texts in order, are given where the text
    of an option counts as its letter.
    """
    if scoring == "letter_or_word":
        scoring = "letter" if len(answers[0].strip()) == 1 and answers[0].strip() in letters else "word"
    if scoring == "letters":
        predicted, truth = letter_set(raw, letters), letter_set(answers[0], letters)
        assert truth is not None, f"the true answer {answers[0]!r} is no set of letters"
        return Verdict(", ".join(sorted(predicted)) if predicted else None, predicted == truth)
    if scoring == "open":
        predicted = open_answer(raw)
        return Verdict(predicted, predicted is not None and any(_same(predicted, a) for a in answers))
    if scoring == "yes_no":
        predicted, truth = yes_no(raw), yes_no(answers[0])
        assert truth is not None, f"the true answer {answers[0]!r} is neither yes nor no"
    elif scoring == "letter":
        predicted = letter(raw, letters)
        if predicted is None:
            predicted = _letter_of_option(raw, options)
        truth = answers[0].strip().strip("()").upper()
    else:
        predicted, truth = word(raw), word(answers[0])
    return Verdict(predicted, predicted is not None and predicted == truth)


def yes_no(raw: str) -> str | None:
    """ "yes" or "no" where the answer begins with it, whatever follows; None for "yes or no" and all else."""
    found = _YES_NO.match(raw)
    return found[1].lower() if found else None


def letter(raw: str, letters: str = ALL_LETTERS) -> str | None:
    r"""The option that the answer names; None where it names none or more than one, or one not in `letters`.

    In this order: the last `\boxed{B}`; an answer that is nothing but a letter ("b", "(B).", "**B**"); the
    last "answer is B", "Answer: (B)", "option B" or "B is correct"; the label that a line begins with ("B. a
    dog"), if only one label does; the one bracketed letter in the text ("it must be (B)").
    """
    boxed = _BOXED.findall(raw)
    if boxed:
        raw = boxed[-1]
    found: str | None = None
    if lone := _LONE.fullmatch(raw):
        found = lone[1].upper()
    elif said := [*_SAID.finditer(raw), *_CORRECT.finditer(raw)]:
        last = max(said, key=lambda match: match.end())
        found = next(group for group in last.groups() if group).upper()
    elif not _RESTATED.search(raw):
        for pattern in (_LABEL, _BRACKETED):
            if named := set(pattern.findall(raw)):
                found = named.pop() if len(named) == 1 else None
                break
    return found if found is not None and found in letters else None


def letter_set(raw: str, letters: str = ALL_LETTERS) -> frozenset[str] | None:
    """The options that the answer names: a list of letters ("A, B", "A and C", "BD"), else as `letter`."""
    boxed = _BOXED.findall(raw)
    text = boxed[-1] if boxed else raw
    phrases = list(_ANSWER_PHRASE.finditer(text))
    tail = text[phrases[-1].end() :] if phrases else text
    tail = tail.strip().strip("\"'*()[].").strip()
    found: set[str] = set()
    if _LISTED.fullmatch(re.sub(r"[().\[\]]", "", tail)):
        found = {label.upper() for label in re.findall(r"\b[A-J]\b", tail, re.IGNORECASE)}
    # "BD" but not "BAD": letters in a run stand in their order.
    elif tail.isupper() and len(tail) > 1 and "".join(sorted(set(tail) & set(ALL_LETTERS))) == tail:
        found = set(tail)
    if found:
        return frozenset(found) if found <= set(letters) else None
    one = letter(raw, letters)
    return frozenset(one) if one else None


def _letter_of_option(raw: str, options: Sequence[str]) -> str | None:
    said = word(raw)
    same = [position for position, option in enumerate(options) if word(option) == said]
    return ALL_LETTERS[same[0]] if said is not None and len(same) == 1 else None


def word(raw: str) -> str | None:
    """The answer in lower case without quotes, surplus white space and full stop; None where it is empty."""
    return " ".join(raw.split()).strip("\"'").rstrip(".").strip().casefold() or None


def open_answer(raw: str) -> str | None:
    """The short answer in free text: what follows the last "answer is" or "answer:", else the first line.

    Lower case, without article, final punctuation, or a currency or per-cent sign beside a number.
    """
    boxed = _BOXED.findall(raw)
    if boxed:
        raw = boxed[-1]
    phrases = list(_ANSWER_PHRASE.finditer(raw))
    text = (raw[phrases[-1].end() :] if phrases else raw).strip()
    text = text.splitlines()[0] if text else ""
    text = " ".join(text.casefold().split()).strip("\"'*$ ").rstrip(".!;,:").rstrip("%").strip()
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else (text or None)


def _same(predicted: str, answer: str) -> bool:
    """Numbers are equal at two decimals, with any words around the one number said; texts as such."""
    truth = open_answer(answer)
    if truth is None:
        return False
    expected = _number(truth)
    if expected is None:
        return predicted == truth
    said = {value for found in _NUMBER.findall(predicted) if (value := _number(found)) is not None}
    return len(said) == 1 and round(said.pop(), 2) == round(expected, 2)


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "e5" and the like
        return None
