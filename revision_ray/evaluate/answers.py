r"""From what a model said to right or wrong, by fixed rules. Pure: no Ray, no model.

An answer that cannot be parsed is wrong. It is never replaced by a guess, as some evaluation kits do: a model
that says nothing would then score 25 % on four options.

**What is read.** Reasoning blocks (`<think>...</think>` and the like) are removed, one that was never closed
with all that follows it. Full-width characters, curly quotes, dashes, Markdown and LaTeX text macros are
unified first.

**Precedence.** The first of these that is there decides, also where it decides that the answer is ambiguous:

1. A declaration of the answer: `<answer>B</answer>`, `\boxed{B}`, `{"answer": "B"}`, "Final answer: B", "The
   answer is B", "Answer: B", "B is correct", "I choose B", "Therefore, B.", "not A but B". A frame without an
   option in it (`\boxed{42}`) declares nothing. Of several declarations
   - one that is called final, or stands in a frame, takes the place of those before it;
   - so does one that follows a correction ("Actually", "Wait", "No,", "But", "I was wrong");
   - one that names a single option takes the place of those before it that leave several open;
   - what remains must agree, else the answer is ambiguous.
2. A letter alone on the first or on the last line; both, where both are there, must be the same.
3. The label that a line begins with ("B. a dog", "(B) a dog", "B because ..."), if only one label does.
4. The one letter in brackets, or named as an option, at the end of a clause ("it shows a dog (B).").

A mention is no declaration: "option C is wrong", "the answer is not A", "could be B", "if the answer were B",
"is it B?" and "B or C" choose nothing. A list that restates the options ("A. cat", "B. dog", ...) is passed
over. "A" before a noun is an article, "I" before a verb a pronoun.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Scoring = Literal["yes_no", "letter", "letters", "word", "letter_or_word", "open"]
"""yes_no: yes or no. letter: the letter of one option. letters: a set of them. word: equal but for case
and full stop. letter_or_word: as the true answer is. open: a number or a short phrase, see `open_answer`."""

ALL_LETTERS = "ABCDEFGHIJ"

RULES = 2
"""Number of these rules, written beside the verdicts they gave: a change that moves verdicts raises it."""


@dataclass(frozen=True)
class JudgedAnswer:
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
) -> JudgedAnswer:
    """Whether `raw` is one of the true `answers` (one, but for open questions with several spellings).

    `letters` are those of the options there are. `options`, their texts in order, are given where the text
    of an option counts as its letter.
    """
    if scoring == "letter_or_word":
        scoring = "letter" if len(answers[0].strip()) == 1 and answers[0].strip() in letters else "word"
    if scoring == "letters":
        predicted, truth = letter_set(raw, letters), letter_set(answers[0], letters)
        assert truth is not None, f"the true answer {answers[0]!r} is no set of letters"
        return JudgedAnswer(", ".join(sorted(predicted)) if predicted else None, predicted == truth)
    if scoring == "open":
        predicted = open_answer(raw)
        return JudgedAnswer(predicted, predicted is not None and any(_same(predicted, a) for a in answers))
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
    return JudgedAnswer(predicted, predicted is not None and predicted == truth)


def letter(raw: str, letters: str = ALL_LETTERS) -> str | None:
    """The option that the answer names, by the precedence above.

    None where it names none or more than one, or one that is not in `letters`.
    """
    named = _options(raw, letters, several=False)
    return next(iter(named)) if named is not None and len(named) == 1 else None


def letter_set(raw: str, letters: str = ALL_LETTERS) -> frozenset[str] | None:
    """The options that the answer names, by the precedence above, where lists ("A, B", "A and C", "BD") and
    "A is correct ... C is correct" name several. "A or C" names none."""
    return _options(raw, letters, several=True) or None


def yes_no(raw: str) -> str | None:
    """ "yes" or "no".

    A declaration ("Answer: Yes", "The answer is no.", `<answer>`, a box) decides, by the rules for letters;
    else the word that the answer begins with, stands alone on the last line, or follows a comma at the end of
    a sentence ("Based on the image, yes."), where these agree. "Yes and no", "yes or no" and a sentence
    without either word as an answer ("There is no dog": "no" is about the dog) are not parsed.
    """
    text = _EITHER_YES_NO.sub("", _without_marks(_framed(_spoken(raw))))
    declared = _declared(text, lambda position, how: _yes_no_at(text, position, how), lambda _: iter(()))
    if declared is not None:
        return str(declared) or None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or _UNDECIDED.search(text):
        return None
    said = {match[1].lower() for match in _CLAUSE_YES_NO.finditer(text)}
    if match := _LEADING_YES_NO.match(lines[0]):
        said.add(match[1].lower())
    if match := re.fullmatch(r"[\W_]*(yes|no)[\W_]*", lines[-1], re.IGNORECASE):
        said.add(match[1].lower())
    return said.pop() if len(said) == 1 else None


def word(raw: str) -> str | None:
    """The answer in lower case without quotes, marks, surplus white space and full stop; None where empty.

    What a declaration names ("Answer: red", `<answer>`, a box), by the rules for letters; else the first
    line.
    """
    return _phrase(raw) or None


def open_answer(raw: str) -> str | None:
    """The short answer in free text: what a declaration names, else the first line.

    Lower case, without article, final punctuation, or a currency or per-cent sign beside a number.
    """
    text = _phrase(raw)
    text = text.strip("$ ").rstrip("!;,:").rstrip("%").strip()
    return _ARTICLE.sub("", text, count=1) or None


# --- the text as said -------------------------------------------------------------------------------------

_QUOTES = dict.fromkeys(map(ord, "“”„‟«»〝〞"), '"') | dict.fromkeys(map(ord, "‘’‚‛‹›´"), "'")
_DASHES = dict.fromkeys(map(ord, "‐‑‒–−"), "-") | {ord("—"): " - ", ord("―"): " - "}
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f"), "")
_CHARACTERS = str.maketrans(_QUOTES | _DASHES | _INVISIBLE | {"【": "[", "】": "]", "「": '"', "」": '"'})
_THOUGHT = (
    r"[<\[◁]{}(?:seed:|\|begin_of_|\|end_of_)?"
    r"(?:think(?:ing)?|thoughts?|reasoning|scratchpad|reflection)\|?[>\]▷]"
)
_REASONING = re.compile(_THOUGHT.format("/?"), re.IGNORECASE)
_OPENED = re.compile(_THOUGHT.format("(?!/)"), re.IGNORECASE)


def _spoken(raw: str) -> str:
    """`raw` without its reasoning, in plain characters."""
    text = "".join(_plain_character(character) for character in raw.translate(_CHARACTERS))
    # Runs of one character mean nothing here, and searches would take time that grows as their square.
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"([^\w\s]|_)\1{3,}", r"\1\1\1", re.sub(r"(?: ?\n){3,}", "\n\n", text))
    kept, depth, start = [], 0, 0
    for tag in _REASONING.finditer(text):
        opening = _OPENED.fullmatch(tag[0]) is not None and "end_of" not in tag[0]
        if opening:
            if depth == 0:
                kept.append(text[start : tag.start()])
            depth += 1
        elif depth == 0:  # opened in the prompt
            kept = []
        else:
            depth -= 1
        start = tag.end()
    return "".join(kept if depth else [*kept, text[start:]])


def _plain_character(character: str) -> str:
    """Full-width, circled and mathematical letters as ASCII; superscripts and fractions stay."""
    if character.isascii() or unicodedata.category(character) in ("No", "Lm", "Lo"):
        return character
    folded = unicodedata.normalize("NFKC", character)
    return folded if folded.isascii() else character


# A frame's content stands between these two in the text that rules are applied to.
_IN, _OUT = "\x01", "\x02"
_BOX = re.compile(r"\\(?:f?box(?:ed)?|framebox)\s*\{")
_MACRO = re.compile(
    r"\\(?:text|math)(?:bf|rm|sf|it|tt|normal|up|md|bb|cal|frak)?\s*\{([^{}]*)\}"
    r"|\\(?:boldsymbol|bm|operatorname|mbox|textsf|emph)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|bf|rm|[,;:!> ])(?![A-Za-z])|(?<=\d)~|~(?=\d)")
_TAGS = r"(?:final[_ -]?)?(?:answer|conclusion|choice|option)"
_TAG = re.compile(rf"<({_TAGS})>(.*?)(?:</\1>|(?=<(?:{_TAGS})>)|\Z)", re.IGNORECASE | re.DOTALL)
_GLM = re.compile(r"<\|begin_of_(?:box|solution)\|>(.*?)(?:<\|end_of_(?:box|solution)\|>|\Z)", re.DOTALL)
_JSON = re.compile(
    r"""["'](?:final|correct|predicted|selected|my)?[_ ]?(?:answer|choice|option|letter|prediction)"""
    r"""(?:[_ ](?:letter|choice|option))?["']\s*:\s*(?:"([^"\n]*)"|'([^'\n]*)'|(\[[^\]\n]*\])|([\w.+-]+))""",
    re.IGNORECASE,
)
_TOKEN_TAG = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|bos|pad)>")
_HTML_BOLD = re.compile(r"</?(?:b|strong|em|i|u|mark|code)>", re.IGNORECASE)
_HTML_BREAK = re.compile(r"<br\s*/?>|</?(?:p|div|li)>", re.IGNORECASE)


def _framed(text: str) -> str:
    """`text` with the content of every answer tag, box and JSON field between `_IN` and `_OUT`."""
    text = _boxes(_SPACING.sub(" ", text))
    for pattern in (_GLM, _TAG, _JSON):
        text = pattern.sub(lambda match: _frame(next(g for g in match.groups()[::-1] if g is not None)), text)
    text = _HTML_BREAK.sub("\n", _HTML_BOLD.sub("**", _TOKEN_TAG.sub("", text)))
    return _without_macros(text)


def _frame(content: str) -> str:
    return f"{_IN}{content.replace(_IN, '').replace(_OUT, '')}{_OUT}"


def _boxes(text: str) -> str:
    pieces, start = [], 0
    while box := _BOX.search(text, start):
        depth, end = 1, box.end()
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:  # cut off
            break
        pieces += [text[start : box.start()], _frame(text[box.end() : end - 1])]
        start = end
    return "".join([*pieces, text[start:]])


def _without_macros(text: str) -> str:
    text = _FRACTION.sub(r"\1/\2", text)
    while (inner := _MACRO.sub(lambda match: match[1] if match[1] is not None else match[2], text)) != text:
        text = inner
    return re.sub(r"\\([{}()\[\]%$#&_])", r"\1", text)


_EMPHASISED = re.compile(r"(?<!\w)(\*{1,3}|__?)\s*[(\[]?([A-Za-z])[)\]]?([.:,]?)\s*\1(?!\w)")
_CODE = re.compile(r"(`+|\$+)\s*([(\[]?[A-Za-z][)\]]?)\s*\1")
_LINE_MARK = re.compile(r"^[ \t]*(?:(?:[-+•·▪◦]|\d{1,2}[.)])(?=\s)|[>#|*]+|```\w*)[ \t]*", re.MULTILINE)
_UNDERLINE = re.compile(r"(?<!\w)_+|_+(?!\w)")


def _without_marks(text: str) -> str:
    """`text` without Markdown: an emphasised letter is put in brackets, a quoted one in quotes."""
    text = _CODE.sub(r'"\2"', _EMPHASISED.sub(r"(\2)\3", text))
    text = re.sub(r'"\(([A-Za-z])\)"', r"(\1)", text)
    text = _LINE_MARK.sub("", text.replace("`", "")).replace("*", "").replace("$", "")
    return _UNDERLINE.sub("", text)


# --- declarations -----------------------------------------------------------------------------------------

_WORD = "A-Za-z0-9_\u00c0-\u024f\u0370-\u052f"  # without the scripts that put no space between words
_NOUN = r"(?:options?|choices?|letters?|answers?|alternatives?)"
_SURE = (
    r"(?:therefore|thus|hence|then|so|clearly|obviously|likely|probably|most\s+likely|most\s+probably|indeed|"
    r"definitely|certainly|actually|simply|still|surely|evidently|undoubtedly|in\s+fact|now)"
)
_IS = (
    r"(?:is|are|was|(?:would|will|must|should|has\s+to|have\s+to|can\s+only|seems?\s+to|appears?\s+to|"
    rf"turns\s+out\s+to|ought\s+to)\s+(?:{_SURE}\s+)?be)(?!n't)\b"
)
_QUALITY = (
    r"(?:final|correct|right|best|true|only|chosen|selected|my|overall|ultimate|single|possible|proper|missing|next|matching|"
    r"(?:most\s+)?(?:likely|appropriate|suitable|accurate|plausible|reasonable|probable|fitting|logical))"
)
_SUBJECT = re.compile(
    rf"(?<![{_WORD}'-])(?P<quality>(?:{_QUALITY}\s+)*)(?P<noun>answers?|ans|options?|choices?|one|pick|selections?|"
    rf"guess|letters?|solutions?|conclusion|verdict|response|prediction|correct|statements?|figures?|image|picture|shape|piece|"
    rf"diagram|graph|pattern|alternative|match|item|element|tile|sequence)(?:\s+(?:choice|option|letter))?"
    rf"(?=[\s.:=,(\"'\[{_IN}]|->|$)",
    re.IGNORECASE,
)
_LINK = re.compile(
    rf"\s*(?:\)|\"|')?(?:\s*,\s*{_SURE}\s*,)?\s*(?P<verb>(?:(?<=r)'s|{_IS})\s*(?:{_SURE}\s*,?\s*)*[:=]?|[:=]|->|=>|→|-(?=\s)|\.(?=\s*\(?[A-Z]\b))"
    rf"(?P<filler>(?:\s*(?:{_SURE}|as\s+follows|the\s+following|given\s+by|indicated\s+by|represented\s+by|"
    rf"shown\s+in|found\s+in|labell?ed|marked|both|either|(?:the\s+)?(?:first|second|third|fourth|fifth|last)"
    rf"\s+{_NOUN}|the\s+one|(?:the\s+)?{_NOUN}\s+(?:labell?ed|marked|is)|not\s+{_NOUN}?\s*[A-J]\s*,?\s*but|"
    r"(?:the\s+)?(?:figure|image|picture|shape|diagram|graph|panel|pattern|piece)(?=\s+\W?[A-J]\b)|[-:=,(>](?=\s|\())\s*)*)\s*",
    re.IGNORECASE,
)
_COLON = re.compile(r"\s*:")
_GAP = re.compile(
    r"\s*,?\s*(?:to|for|here|from|in|of|among|given|based|that|which|on|I)\b[^.;?!\n]*?(?=\s)", re.IGNORECASE
)
_HEADING = re.compile(
    rf"^[\W_]*(?:the\s+)?(?P<final>final\s+)?(?:correct\s+)?(?:answer|choice)"
    rf"[^A-Za-z0-9{_IN}?]*\n\s*",
    re.IGNORECASE | re.MULTILINE,
)
_CHOSEN = re.compile(
    rf"(?<![{_WORD}'])(?:(?:I|we|let's|let\s+us|let\s+me)(?:'d|'ll|'m|'ve|'re)?(?:\s+(?:would|will|should|must|"
    rf"can|am|are|have|had|do|to|shall|be|also|finally|ultimately|confidently|personally|rather|{_SURE}))*\s+"
    r"(?:choose|chose|chosen|choosing|select(?:ed|ing)?|pick(?:ed|ing)?|go(?:ing)?\s+(?:with|for)|went\s+with|"
    r"opt(?:ed|ing)?\s+for|answer(?:ed)?|say|vote\s+for|guess|conclude|settle(?:d)?\s+on|believe|think|feel|"
    r"confident|sure|certain|positive|stick(?:ing)?\s+with|lean(?:ing)?\s+(?:towards?|to))|going\s+with|sticking\s+with)"
    rf"(?:\s+that)?(?:\s+(?:it|this)(?:'s|\s+{_IS}))?(?:\s+{_SURE})*\s*[:,]?\s*",
    re.IGNORECASE,
)
_CORRECTING = (
    r"(?:actually|wait|correction|sorry|oops|scratch\s+that|strike\s+that|i\s+mean|on\s+second\s+thought|"
    r"no(?=\s*[,.:;!-]|\s+wait)|hold\s+on)"
)
_LED = re.compile(
    rf"(?:^|(?<=[.!?:;,\n)-]))[ \t\"']*(?:(?:{_SURE}|{_CORRECTING}|in\s+conclusion|to\s+conclude|"
    r"in\s+summary|conclusion|finally|overall|consequently|accordingly|rather|instead|but|sure|okay|ok|well|yes|hmm|oh|"
    rf"(?:it|that)(?:'s|\s+{_IS})|must\s+be|we\s+(?:get|have)|∴|⇒|=>|->|→)(?![{_WORD}'])[\s,.:;!-]*)+",
    re.IGNORECASE | re.MULTILINE,
)
_BUT = re.compile(
    rf"(?<![{_WORD}])not\s+(?:the\s+)?(?:{_NOUN}\s+)?[\"'(]*[A-J][\"')]*\s*(?:,\s*)?but\s+(?:rather\s+)?(?:it's\s+)?",
    re.IGNORECASE,
)
_BY = re.compile(
    rf"\b(?:best|correctly|most\s+accurately)\s+(?:described|represented|answered|matched|explained|completed|"
    rf"shown|depicted|given|expressed|captured)\s+(?:by|as|in|with)\s+(?=(?:the\s+)?{_NOUN}|\(|\")",
    re.IGNORECASE,
)
_ABROAD = re.compile(
    r"(?:答案|正解|答え|回答|正确选项|正確選項|정답|답)(?:应该|應該|应|應)?\s*(?:是|为|為|選|选|は|은|는|:)+\s*[:]?\s*"
    r"|(?<![不没])(?:故|应|應|我)?[选選](?![项項])[择擇]?\s*[:]?\s*"
    r"|\b(?:antwort|antwoord|r[ée]ponse|respuesta|risposta|resposta|ответ|odpowiedź|cevap|svaret?|jawaban)"
    r"(?:\s+(?:correcta|correcte|corretta|correta|final|finale))?\s*"
    r"(?::|(?:ist|lautet|is|est|es|è|é|adalah|jest|är)\b)\s*(?:(?:die|la|le|el|l')\s*)?(?:option|opci[óo]n|opzione)?\s*",
    re.IGNORECASE,
)
_PREDICATE = re.compile(
    rf"(?:\s*[,(]\s*(?![A-J]\b)[^.,;:!?()\n]{{1,60}}[,)]\s*|[.:)]\s+(?![A-J]\b)[^.,;:!?()\n]{{1,60}}\s|\s+){_IS}\s+"
    rf"(?:(?:{_SURE}|both|all)\s+)*(?:(?:the|my|our)\s+(?:{_QUALITY}\s+)*answers?\b|(?:the\s+|my\s+)?"
    rf"(?:{_QUALITY}\s+)+(?:answers?|{_NOUN}|one|match|fit)\b|correct\b(?!\s+(?:in|to|about|only)\b)|"
    r"right(?=\s*(?:[.,;!)]|$|because|since|as\b|and\b))|best(?=\s*(?:[.,;!)]|$|because|since)))",
    re.IGNORECASE | re.MULTILINE,
)
_LABELLED_CORRECT = re.compile(
    r"\s*[.:)-]+\s*(?:this\s+is\s+)?correct\b(?=\s*(?:[.!,-]|$|because))", re.I | re.M
)

# What takes a declaration back, in its clause before or in its sentence behind.
_DENIED = re.compile(
    r"\b(?:if|whether|unless|suppose|assum\w+|imagine|thought|might|may|could|doubt|unclear|unsure|tempting|"
    r"(?:not|n't|never)\s+(?:be\s+)?(?:sure|certain|clear|think|believe|say|mean|know|conclude|tell|mean)\w*|"
    r"neither|nor|none\s+of|initially|at\s+first|(?<!only )possible|possibly|perhaps|maybe|incorrect|wrong|"
    r"false|unlikely|worst|says|said|claim\w*|instead\s+of|rather\s+than|not|isn't|why|(?:can|do|does|did|is|was)n't|cannot)\b|n't\b",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"(?:other|another|previous|alternative|potential|candidate|plausible|second|distractor|user's|student's|"
    r"students?|their|his|her|first)\s+$",
    re.IGNORECASE,
)
_UNREAL = re.compile(r"[^.!?\n]*?\b(?:if|unless)\b", re.IGNORECASE)
_SUPPOSED = re.compile(r"\bif\b(?!\s+(?:I|we|you)\s+(?:had|have|were|must|look))", re.IGNORECASE)
_CORRECTED = re.compile(
    rf"\b(?:{_CORRECTING}|second\s+thoughts?|reconsider\w*|re-?(?:examin|check|think|read|evaluat|visit)\w*|"
    r"look(?:ing)?\s+(?:again|closer|more\s+closely)|closer\s+(?:look|inspection|examination)|mistake\w*|"
    r"mistaken|i\s+was\s+wrong|(?:that|this)(?:'s|\s+is|\s+was)\s+(?:wrong|incorrect|not\s+(?:right|correct))|my\s+bad|"
    r"chang(?:e|ing)\s+my\s+(?:answer|mind)|apolog\w+|revis\w+|corrected|let\s+me\s+(?:correct|fix))\b",
    re.IGNORECASE,
)
_TURNED = re.compile(
    r"\b(?:but|however|rather|instead|yet|though|thought|initially|at\s+first)\b", re.IGNORECASE
)


class _Declaration(NamedTuple):
    start: int
    end: int
    value: frozenset[str] | str
    is_final: bool
    open: bool
    """It leaves the answer open: "B or C"."""
    is_verdict: bool = False
    """ "A is correct", of which there may be one for each of several options."""


class _Named(NamedTuple):
    value: frozenset[str] | str
    end: int
    open: bool = False


_Reader = Callable[[int, str], _Named | None]
"""What is named at a position of the text; None where nothing is. The text says how: behind a `label`
(":"), behind a `verb`, or behind words after which the `end` of the clause must follow."""


def _cues(text: str) -> Iterator[tuple[int, int, bool, str]]:
    """(start, position where the answer follows, whether it is called final, how) of every declaration."""
    for frame in re.finditer(rf"{_IN}([^{_OUT}]*){_OUT}", text):
        yield frame.start(), frame.start(1), True, "frame"
    for subject in _SUBJECT.finditer(text):
        noun, quality = subject["noun"].lower(), subject["quality"].lower()
        before = _before(text, subject.start())
        at_line_start = not before.rpartition("\n")[2].strip(" \t\"'([{")
        if _OTHERS.search(before):
            continue
        is_label = _COLON.match(text, subject.end()) is not None
        # "Options: A, B, C" restates them, "correct options: A, C" declares.
        is_declaring_label = at_line_start and is_label and not noun.endswith("s")
        if not noun.startswith("ans") and not quality and not is_declaring_label:
            continue
        if noun == "correct" and not is_label:
            continue
        is_final = "final" in quality
        if link := _LINK.match(text, subject.end()):
            yield subject.start(), link.end(), is_final, _how(link)
            continue
        if gap := _GAP.match(text, subject.end()):
            limit = re.compile(r"[.;?!](?=\s)|\n|$").search(text, subject.end())
            stop = limit.start() if limit else len(text)
            for verb in re.compile(rf"\s{_IS}|:").finditer(text, gap.end(), stop):
                if link := _LINK.match(text, verb.start()):
                    yield subject.start(), link.end(), is_final, "gap"
    for heading in _HEADING.finditer(text):
        yield heading.start(), heading.end(), bool(heading["final"]), "label"
    for pattern, how in (
        (_CHOSEN, "clause"),
        (_LED, "clause"),
        (_BUT, "verb"),
        (_BY, "verb"),
        (_ABROAD, "verb"),
    ):
        for cue in pattern.finditer(text):
            yield cue.start(), cue.end(), False, how


def _how(link: re.Match[str]) -> str:
    if re.search(r"\b(?:either)\b", link["filler"], re.IGNORECASE):
        return "either"
    return "label" if link["verb"].rstrip()[-1] in ":=>→-." else "verb"


def _declared(text: str, named: _Reader, verdicts: Callable[[str], Iterator[_Declaration]]):
    """What the declarations in `text` agree on; None where there is none, "" where it is ambiguous."""
    found = list(verdicts(text))
    taken: set[int] = set()
    for start, position, is_final, how in _cues(text):
        if how == "gap" and start in taken:
            continue
        if how != "frame" and _is_denied(text, start, position):
            continue
        if (name := named(position, how)) is None or _is_asked(text, name.end):
            continue
        if "would" in text[start:position]:
            sentence = re.split(r"[.!?\n]", _before(text, start))[-1]
            if _UNREAL.match(text, name.end) or _SUPPOSED.search(sentence):
                continue
        taken.add(start)
        found.append(_Declaration(start, name.end, name.value, is_final, name.open or how == "either"))
    if not found:
        return None
    standing: list[_Declaration] = []
    for declaration in sorted(_outermost(found), key=lambda each: (each.end, each.start)):
        if standing and declaration.value != standing[-1].value:
            overrides = declaration.is_final and not any(each.is_final for each in standing)
            if overrides or _is_corrected(text, standing[-1], declaration):
                standing = []
            elif not declaration.open:
                standing = [each for each in standing if not each.open]
        standing.append(declaration)
    if len(standing) > 1 and all(each.is_verdict for each in standing):
        united: frozenset[str] = frozenset().union(*(each.value for each in standing))
        return united
    values = {each.value for each in standing}
    return values.pop() if len(values) == 1 and not any(each.open for each in standing) else ""


def _outermost(found: Sequence[_Declaration]) -> list[_Declaration]:
    """One of the declarations that end at the same place: the final one, or the longest."""
    best: dict[int, _Declaration] = {}
    for each in found:
        other = best.get(each.end)
        if other is None or (each.is_final, -each.start) > (other.is_final, -other.start):
            best[each.end] = each
    return list(best.values())


def _before(text: str, position: int) -> str:
    """As much of the text before `position` as rules look at; more would take time that grows as a square."""
    return text[max(0, position - 200) : position]


def _is_denied(text: str, start: int, position: int) -> bool:
    clause = re.split(r"[.!?;:,\n]|\bbut\b|\bso\b", _before(text, start))[-1]
    if re.search(r"\bonly\s+possible\b", text[start:position], re.IGNORECASE):
        return bool(_DENIED.search(clause))
    inside = text[start:position]
    return bool(_DENIED.search(clause) or re.search(r"(?<!only )\bpossible\b", inside, re.IGNORECASE))


def _is_asked(text: str, end: int) -> bool:
    return re.compile(r"[^\S\n]*[\"')\]}.]*[^\S\n]*\?").match(text, end) is not None


def _is_corrected(text: str, former: _Declaration, later: _Declaration) -> bool:
    between = text[former.end : later.end]
    sentence = re.split(r"[.!?\n]\s", between)[-1]
    return bool(_CORRECTED.search(between) or _TURNED.search(sentence))


# --- options ----------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    rf"[^\S\n]*(?:(?:the\s+)?(?P<noun>(?:answer\s+)?{_NOUN})(?=[\s:#(\[\"'])\s*(?:labell?ed\s+|marked\s+)?[:#]?\s*)?"
    rf"(?P<open>[\"'(\[{{<]*)\s?(?P<letter>[A-Za-z])(?![{_WORD}]|'[a-z]|-\w)(?:\.?[^\S\n]?(?P<close>[\"')\]}}>]+))?",
    re.IGNORECASE,
)
_STOP = re.compile(
    r"[^\S\n]*(?:$|\n|\.(?![A-Za-z0-9])|[,;:!?()\[\]{}\"/&|#\x01\x02]|'(?![a-z])|-\s|[^\x00-\u024f\u0370-\u052f])"
)
_REASON = re.compile(
    r"\s+(?:because|since|as|rather|not|instead|over|due|which|and|or|based|according|given\s+(?:that|the))\b",
    re.IGNORECASE,
)
_FUNCTION = re.compile(
    r"\s+(?:because|since|as|rather|not|instead|due|which|and|or|based|according|given\s+(?:that|the)|that|where|"
    r"while|but|so|for|in|on|by|from|with|to|if|is|was|here|above|below|it|its|this|there|these|the|an?|they|he|she|"
    r"we|you|i|although|though)\b",
    re.IGNORECASE,
)
_JOIN = re.compile(
    r"[^\S\n]*\(?(?:[,;]?\s*\b(?P<or>and/or|or|oder|ou)\b|(?P<slash>/)|[,;]?\s*(?:\b(?:and|as\s+well\s+as|und|et)\b|"
    r"[&+、和与及])|(?P<oder>或)|[,;])\s*(?:also\s+|both\s+|(?P<maybe>(?:maybe|perhaps|possibly|potentially|even)\s+))?",
    re.IGNORECASE,
)
_ALTERNATIVES = ("or", "slash", "oder", "maybe")
_VERB = re.compile(
    r"[^\S\n]+(?:is|are|was|were|does|do|did|has|have|had|can|could|would|will|looks?|shows?|seems?|appears?|"
    r"depicts?|contains?|represents?|describes?|isn't|aren't|doesn't|don't|cannot|can't|might|may)\b",
    re.IGNORECASE,
)
_OR_LATER = re.compile(
    r"[^\S\n]*(?:(?!(?:because|since|as|not|than|rather|instead|unlike|while|whereas|but|so|if|whether)\b)[\w'(),-]+\s+)"
    rf"{{1,7}}?or\s+(?:(?:{_NOUN})\s+)?[(\[\"']?[A-J][)\]\"'.]?(?=\s|[.,;!)]|$)",
    re.IGNORECASE,
)
_RUN = re.compile(rf"[^\S\n]*[\"'(\[]*([A-J]{{2,10}})(?![{_WORD}'-])")
_BARE_BEFORE = re.compile(
    r"(?:^|[.,;:!?(\n\x01\"-]\s*|(?:therefore|thus|so|hence|then|that|think|believe|only|because|and|but|conclude|"
    r"say|clearly|since|means|both|either|yes|actually|or|nor|neither|if|answer|option|here|now|overall|makes?)\s+)$",
    re.IGNORECASE,
)
_THING = re.compile(
    r"\b(?:fig(?:ure)?s?\.?|panels?|images?|pictures?|graphs?|diagrams?|points?|statements?|lines?|persons?|objects?|"
    r"parts?|regions?|steps?|curves?|plots?|charts?|tables?|items?|sets?|cases?|scenes?|views?|triangles?|circles?|"
    r"angles?|groups?|class|types?|vitamins?|plans?|hepatitis|in|see|the\s+letters?|boxe?s?|shapes?|arrows?|labels?|"
    r"labell?ed|marked|section|appendix|vertex|node|city|team|row|column)\s*[\"']?$",
    re.IGNORECASE,
)


def _options(raw: str, letters: str, *, several: bool) -> frozenset[str] | None:
    """The options that `raw` names, all of them in `letters`; None where none is, or it is ambiguous."""
    text = _without_marks(_framed(_spoken(raw)))
    named, _ = _named_options(text, letters, several, weak=True)
    return named if named and named <= set(letters) else None


def _named_options(text: str, letters: str, several: bool, weak: bool) -> tuple[frozenset[str], bool]:
    """(options, whether anything was read): no options but True where what was read is ambiguous.

    `weak`: also where a letter only stands in brackets somewhere.
    """
    foreign: list[str] = []

    def read(position: int, how: str) -> _Named | None:
        if how != "frame":
            return _listed_at(text, position, how, several)
        end = text.index(_OUT, position)
        named, is_read = _named_options(text[position:end].strip(), letters, several, weak=False)
        if named and not named <= set(letters):
            foreign.extend(named)
            return None
        return _Named(named, end, open=not named) if is_read else None

    declared = _declared(text, read, lambda said: _verdicts(said, several))
    if isinstance(declared, frozenset):
        return declared, True
    if declared == "" or foreign:
        return frozenset(), True
    lines = [line.strip() for line in _without_list(text).splitlines() if line.strip(" \t\"'.|-_:")]
    if (lone := _of_lone_lines(lines, several)) is not None:
        return lone, True
    if (labelled := _of_labels(lines, several)) is not None:
        return labelled, True
    if weak and (bracketed := _bracketed(text)):
        return (bracketed if len(bracketed) == 1 else frozenset()), True
    return frozenset(), False


def _listed_at(text: str, position: int, how: str, several: bool) -> _Named | None:
    """The letter at `position`, or the list of letters that begins there."""
    first = _TOKEN.match(text, position)
    if first is None or not _is_letter(text, first, how):
        run = _RUN.match(text, position)
        if several and run and "".join(sorted(set(run[1]))) == run[1] and _STOP.match(text, run.end()):
            return _Named(frozenset(run[1]), run.end())
        return None
    names, end, is_open = [first["letter"].upper()], first.end(), False
    while (
        len(names) < len(ALL_LETTERS)
        and (join := _JOIN.match(text, end))
        and (token := _TOKEN.match(text, join.end()))
    ):
        if not _is_letter(text, token, "list" if token["letter"].isupper() or token["open"] else how):
            break
        names.append(token["letter"].upper())
        is_open = is_open or any(join[alternative] for alternative in _ALTERNATIVES)
        end = token.end()
    if len(names) > 1 and _VERB.match(
        text, end
    ):  # "B, and C is wrong" says B; "so B and C are wrong" nothing
        if how == "clause":
            return None
        names, end, is_open = names[:1], first.end(), False
    is_open = is_open or _OR_LATER.match(text, end) is not None
    value = frozenset(names)
    return _Named(value, end, is_open or (len(value) > 1 and not several))


def _is_letter(text: str, token: re.Match[str], how: str) -> bool:
    """Whether a token is the letter of an option, and no article, pronoun, unit or name."""
    name, end = token["letter"], token.end()
    stops = token["close"] is not None or _STOP.match(text, end) is not None
    if token["close"] is not None and not token["open"] and token["close"].startswith(("'", '"')):
        stops = _STOP.match(text, end) is not None
    if how == "clause":
        ends = _STOP.match(text, end) is not None or _REASON.match(text, end) is not None
        return ends and (name.isupper() or bool(token["open"]) or bool(token["noun"]))
    if stops or (token["open"] and token["close"]):
        return True
    if name.islower():
        return re.match(r"\s+(?:because|since)\b", text[end:]) is not None
    if token["noun"] is not None:
        return True
    if name == "I" or how == "list":
        return _REASON.match(text, end) is not None or (how == "list" and _VERB.match(text, end) is not None)
    if _FUNCTION.match(text, end):
        return True
    return how == "label" and name != "A" and re.match(r"[^\S\n]+[A-Z][a-z]", text[end:]) is not None


def _verdicts(text: str, several: bool) -> Iterator[_Declaration]:
    """Declarations such as "B is correct", "(A) and (C) are the right answers", "B: correct."."""
    behind = 0
    for token in _TOKEN.finditer(text):
        start = token.start() + len(token[0]) - len(token[0].lstrip())
        before = text[start - 1 : start]
        if start < behind or re.match(rf"[{_WORD}'-]", before):
            continue
        if not (token["letter"].isupper() or token["open"] or token["noun"]):
            continue
        names, end, is_open, join_text = [token["letter"].upper()], token.end(), False, ""
        while (
            len(names) < len(ALL_LETTERS)
            and (join := _JOIN.match(text, end))
            and (more := _TOKEN.match(text, join.end()))
        ):
            join_text = join[0].strip()
            names.append(more["letter"].upper())
            is_open = is_open or any(join[alternative] for alternative in _ALTERNATIVES)
            end = more.end()
        at_line_start = not _before(text, start).rpartition("\n")[2].strip(" \t\"'(")
        judged = _PREDICATE.match(text, end) or (at_line_start and _LABELLED_CORRECT.match(text, end)) or None
        if judged is None:
            continue
        behind = judged.end()
        if join_text == "," and judged[0].lstrip().startswith("is"):  # "Unlike A and B, C is correct."
            names, is_open = names[-1:], False
        is_bare = token["noun"] is None and not _BARE_BEFORE.search(text, max(0, start - 200), start)
        if is_bare and (not token["open"] or _THING.search(_before(text, start))):
            continue
        if (
            _is_denied(text, start, start)
            or _UNREAL.match(text, judged.end())
            or _is_asked(text, judged.end())
        ):
            continue
        value = frozenset(names)
        is_open = is_open or (len(value) > 1 and not several)
        yield _Declaration(start, end, value, False, is_open, is_verdict=several)


_LONE = re.compile(
    rf"[\W_]*(?:(?:the\s+)?(?:answer\s+)?{_NOUN}\s*[:#]?\s*)?[^\w\s]*\s*([A-Za-z])[\W_]*", re.IGNORECASE
)
_LIST_LINE = re.compile(r"[A-J](?:\s*(?:,|;|&|/|、|\band\b|\s)\s*(?:and\s+)?[A-J])+", re.IGNORECASE)


def _of_lone_lines(lines: Sequence[str], several: bool) -> frozenset[str] | None:
    """The letters (or, of `several`, the list) that the first or the last line consists of."""
    if not lines:
        return None
    found = [_lone(line, several) for line in lines]
    if found[0] is None and found[-1] is None:
        return None
    distinct = {each for each in found if each is not None}
    return distinct.pop() if len(distinct) == 1 else frozenset()


def _lone(line: str, several: bool) -> frozenset[str] | None:
    if re.search(r"[?≠¬]|[A-Za-z][+#°%]", line):
        return None
    if match := _LONE.fullmatch(line):
        return frozenset(match[1].upper())
    bare = re.sub(r"[()\[\]{}\"'.]", "", line).strip(" ,;:!-")
    bare = re.sub(rf"^(?:the\s+)?{_NOUN}\s+", "", bare, flags=re.IGNORECASE)
    if not several:
        # A list on the line leaves the answer open.
        return frozenset() if _LIST_LINE.fullmatch(bare) or re.fullmatch(r"[A-J] or [A-J]", bare) else None
    if _LIST_LINE.fullmatch(bare) and "/" not in bare:
        return frozenset(name.upper() for name in re.findall(r"\b[A-J]\b", bare, re.IGNORECASE))
    # "BD" but not "BAD": letters in a run stand in their order.
    is_run = bare.isupper() and len(bare) > 1 and "".join(sorted(set(bare) & set(ALL_LETTERS))) == bare
    return frozenset(bare) if is_run else None


_LABEL = re.compile(
    rf"[\s\"']*(?P<noun>{_NOUN}\s+)?(?P<open>[(\[{{]?)\s*(?P<letter>[A-Za-z])\s?(?P<mark>[.):\]}}\"']+(?=\s|$|[(\[])|[)\]:](?=[A-Za-z])|,|"
    r"\s?-\s|(?=\s+(?:because|since|due\s+to|rather\s+than|instead\s+of|it\s+is)\b)|(?=\s*\([^()]*\)\.?\s*$))(?P<rest>.*)",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"\W*(?:(?:this|it|that|which)\s+)?(?:(?:is|was|can|does)\s+)?(?:not\b(?!\s+\W?[A-J]\b)|n't|isn't|incorrect|wrong|false|no\b|cannot|can't|"
    r"eliminated|ruled\s+out|unlikely|possible|maybe|perhaps|\?)",
    re.IGNORECASE,
)
_TELLS = re.compile(
    r"\s*(?:shows?|depicts?|looks?|seems?|appears?|contains?|represents?|describes?|would|might|may)\b"
)
_LISTED_LINE = re.compile(r"[\s\"'(\[{]*([A-Ja-j])\s?[.):\]}]+\s*\S")
_INLINE_LABEL = re.compile(r"(?:^|\s)[(\[]?([A-J])[.):\]]+(?=\s)")


def _without_list(text: str) -> str:
    """`text` without lines that restate the options: labels in a row from A on, in lines or within one."""
    lines = text.splitlines()
    dropped: set[int] = set()
    block: list[int] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        label = _LISTED_LINE.match(line)
        position = ALL_LETTERS.find(label[1].upper()) if label else -1
        if position != len(block):
            dropped.update(block if len(block) > 1 else ())
            block = [number] if position == 0 else []
        else:
            block.append(number)
        inline = _INLINE_LABEL.findall(line)
        if len(inline) > 1 and inline == list(ALL_LETTERS[: len(inline)]):
            dropped.add(number)
    dropped.update(block if len(block) > 1 else ())
    return "\n".join(line for number, line in enumerate(lines) if number not in dropped)


def _of_labels(lines: Sequence[str], several: bool) -> frozenset[str] | None:
    """The option whose label a line begins with; of `several`, those of all lines."""
    found: list[str] = []
    is_open = False
    asked = any(re.match(r"Q(?:uestion)?\s*:", line) for line in lines)
    for line in lines:
        if (label := _LABEL.match(line)) is None:
            continue
        name, mark, rest = label["letter"], label["mark"], label["rest"]
        if name.islower() and not ((label["open"] or mark[:1] in ").:") and mark[:1] != ","):
            continue
        if name.islower() and name == "i":
            continue
        if name == "Q" and asked:
            continue
        if name in ("I", "A") and mark == "," and re.match(r"\s*(?:I|we|in|on|at)\b", rest):
            continue
        if name == "I" and mark in (",", "'", ""):
            continue
        if name == "A" and mark == ":" and (asked or _lone(rest, several=False)):  # "A:" stands for "answer"
            found += _lone(rest, several=False) or ()
            continue
        if re.match(r"\s*\?", rest) or _REFUSED.match(rest):
            continue
        if mark[-1:] in (")", "]") and (label["noun"] or _TELLS.match(rest)):  # "option (A) shows a cat"
            continue
        listed = _listed_at(line, label.start("open"), "verb", several)
        following = [each for each in _INLINE_LABEL.findall(rest) if ord(each) == ord(name.upper()) + 1]
        more = listed is not None and len(listed.value) > 1
        or_later = mark[:1] == "," and re.match(r"\s*(?:or|and)\b", rest)
        is_open = is_open or bool(following) or bool(or_later) or (listed is not None and listed.open) or more
        found.append(name.upper())
    if not found:
        return None
    names = frozenset(found)
    if is_open:
        return frozenset()
    if several and len(names) > 1:
        return names if found == sorted(names) else frozenset()
    return names if len(names) == 1 else frozenset()


_BRACKET = re.compile(r"(?<=\s)[(\[]([A-J])[)\]](?=[^\S\n]*(?:[.,;!]|$|\n|because\b|since\b))", re.MULTILINE)
_POINTED = re.compile(
    rf"(?:\b(?:correspond(?:s|ing)?|match(?:es|ing)|equals|equivalent|leads?|points?|which\s+is|continues?|namely)\s*(?:to|with)?|,)"
    rf"\s+(?:the\s+)?{_NOUN}\s+[\"'(\[]?([A-J])[\"')\]]?(?=[^\S\n]*(?:[.!](?!\w)|$|\n))",
    re.MULTILINE,
)
_DOUBTED = re.compile(
    r"\b(?:incorrect|wrong|not|eliminat\w+|rul(?:e|ed|ing)\s+out|exclud\w+|reject\w*|discard\w*|however|could|might|may|"
    r"maybe|perhaps|possibly|if|unlike|except|either|neither|nor|or|consider\w*|look|looking|compar\w+|examin\w+|suppose|"
    r"false|cannot|unclear)\b|n't\b|\?",
    re.IGNORECASE,
)


def _bracketed(text: str) -> frozenset[str]:
    """Letters in brackets, or named as options, that end a clause in which nothing speaks against them."""
    found: set[str] = set()
    sentences = re.split(r"(?<=[.!?])\s+|\n+", _without_list(text).replace("i.e.", "namely"))
    for sentence, following in zip(sentences, [*sentences[1:], ""], strict=True):
        if _DOUBTED.search(sentence) or re.match(
            r"(?:this|it|that|but)\b[^.]*?\b(?:not|incorrect|wrong)\b|but\b", following, re.I
        ):
            continue
        found.update(match[1] for match in _POINTED.finditer(sentence))
        for match in _BRACKET.finditer(sentence):
            if not _THING.search(_before(sentence, match.start())):
                found.add(match[1])
    return frozenset(found)


def _letter_of_option(raw: str, options: Sequence[str]) -> str | None:
    said = word(raw)
    same = [position for position, option in enumerate(options) if word(option) == said]
    return ALL_LETTERS[same[0]] if said is not None and len(same) == 1 else None


# --- yes and no -------------------------------------------------------------------------------------------

_LEADING_YES_NO = re.compile(
    r"[\W_]*(?:(?:well|hmm|sure|okay|ok|oh|so)[\W_]+)?(yes|no)\b(?!'|-\w|\s*\?|\.\s*\d|\s+(?:idea|clue|comment|answer|way\s+"
    r"(?:to|of)|information|doubt|question|problem|matter|longer|more|less)\b)",
    re.IGNORECASE,
)
_STRICT_YES_NO = re.compile(
    r"\s*(?:an?\s+|definitely\s+|a\s+definite\s+)?[\"'(\[]*(yes|no)\b[\"')\]]*"
    r"(?=[^\S\n]*(?:$|\n|[.,;:!?)\x02]|-\s|(?:because|since|as|there|it|the)\b))",
    re.IGNORECASE,
)
_EITHER_YES_NO = re.compile(r"\b(?:yes|no)\s*(?:/|,?\s*or\b)\s*(?:yes|no)\b\s*\??", re.IGNORECASE)
_UNDECIDED = re.compile(r"\b(?:yes\s+and\s+no|no\s+and\s+yes)\b", re.IGNORECASE)
_CLAUSE_YES_NO = re.compile(
    r"[,:;]\s*(?:(?:so|thus|hence|therefore|then)\s*,?\s*)?(yes|no)\b(?=[^\S\n]*(?:[.,;!]|$))",
    re.IGNORECASE | re.MULTILINE,
)


def _yes_no_at(text: str, position: int, how: str) -> _Named | None:
    if how == "frame":
        end = text.index(_OUT, position)
        said = yes_no(text[position:end])
        return _Named(said, end) if said else None
    if re.search(r"\b(?:yes|no)\W*$", _before(text, position), re.IGNORECASE):  # "Yes, no."
        return None
    match = (_LEADING_YES_NO if how == "label" else _STRICT_YES_NO).match(text, position)
    return _Named(match[1].lower(), match.end()) if match else None


# --- phrases and numbers ----------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an|a)\s+")
_PHRASE = re.compile(r"\s*([^\n?]+?)(?=\.(?:\s|$)|[?\n\x02]|$|,?\s+(?:because|since)\b)")
_NEGATED = re.compile(
    r"[\W_]*(?:not(?!\s+applicable)|n't|neither|either|unclear|unknowable)\b", re.IGNORECASE
)
_RANGE = re.compile(
    r"\b(?:not|n't|isn't|never|cannot|less\s+than|more\s+than|fewer\s+than|greater\s+than|larger\s+than|smaller\s+than|"
    r"at\s+least|at\s+most|between)\b|n't\b|[<>≤≥≠]"
)
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0}


def _phrase(raw: str) -> str:
    """The phrase that a declaration names, else the first line; in lower case, without marks."""
    text = re.sub(r"\*\*|__|`", "", _framed(_spoken(raw)))
    text = re.sub(r"^[ \t]*(?:#+|[-*•])[ \t]+", "", text, flags=re.MULTILINE)

    def read(position: int, how: str) -> _Named | None:
        if how == "clause":
            return None
        if how == "frame":
            end = text.index(_OUT, position)
            inner = text[position:end].strip()
            return _Named(_phrase(inner), end) if inner else None
        match = _PHRASE.match(text, position)
        said = _bare(match[1]) if match else ""
        return _Named(said, match.end()) if match and said and not _NEGATED.match(said) else None

    declared = _declared(text, read, lambda _: iter(()))
    if declared is not None:
        return str(declared)
    return _bare(next((line for line in text.splitlines() if line.strip()), ""))


def _bare(text: str) -> str:
    plain = (
        " ".join(text.replace(_IN, " ").replace(_OUT, " ").split()).strip("\"'* ").rstrip(".").strip("\"'* ")
    )
    return plain.casefold()


def _same(predicted: str, answer: str) -> bool:
    """Numbers are equal at two decimals, with any words around the one number said but those that deny or
    bound it ("not 5", "more than 5"); texts as such."""
    truth = open_answer(answer)
    if truth is None:
        return False
    expected = _number(truth)
    if expected is None:
        return predicted == truth
    if _RANGE.search(predicted):
        return False
    said = set()
    for match in _NUMBER.finditer(predicted):
        value = _number(match[0])
        if value is None or re.match(r"(?:st|nd|rd|th|d)\b", predicted[match.end() :]):
            continue
        scale = re.match(r"\s*(hundred|thousand|million|billion|trillion|dozen)\b", predicted[match.end() :])
        said.add(value * (_SCALES[scale[1]] if scale else 1.0))
    return len(said) == 1 and round(said.pop(), 2) == round(expected, 2)


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "e5" and the like
        return None
