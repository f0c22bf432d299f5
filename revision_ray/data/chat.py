"""Texts and conversations to token ids: only a tokenizer and its chat template write control tokens.

Training, evaluation and serving render and encode through this module, so that all three read the same
tokens. What people write is text: the name of a control token in it (`</s>`, `<|im_end|>`) is encoded as the
characters that it consists of.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _get_template_literal_text,
    mark_control_tokens,
)

from revision_ray.core.errors import ConfigError, shorten
from revision_ray.data.conversations import IMAGE_MARK

Message = Mapping[str, Any]
Span = tuple[int, int]

# Private characters around a control token that is text (those of transformers' `mark_control_tokens`), and
# around what the template marks as generated.
_AS_TEXT, _TEXT_AGAIN = "\U000f0000", "\U000f0001"
_GENERATED, _WRITTEN_AGAIN = "\U000f0002", "\U000f0003"
_BREAKS = re.compile(f"[{_AS_TEXT}{_TEXT_AGAIN}]")
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_TAG = re.compile(r"</?([^<>/\s]+)>")
_STAND_IN = re.compile(r"qz(\d+)zq")
_USER, _ASSISTANT = "user", "assistant"


class ChatRefusal(Exception):  # noqa: N818  # a verdict on the conversation, not a failure
    """This conversation cannot be rendered or encoded with this template and tokenizer."""


class UnwritableToken(ChatRefusal):
    """A text holds a control token's name, of which the tokenizer makes that token in any case."""


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as text. Private characters in it surround control tokens that are text.

    `marked`: where the template's `{% generation %}` marks are.
    """

    text: str
    marked: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """Token ids (T,), and the characters (T, 2) that each stands for; none of a tokenizer without offsets."""

    input_ids: np.ndarray
    offsets: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class TurnSpan:
    """Characters of one assistant's turn: what follows its generation prompt, and the mark of its end."""

    start: int
    content_end: int
    end: int


def as_date(today: str) -> date | None:
    """Return the date that a setting names; None where it is empty.

    Raises:
        ConfigError: it is no date.
    """
    try:
        return date.fromisoformat(today) if today else None
    except ValueError as error:
        raise ConfigError(f"today={today}: {error}; expected a date as 2026-01-31") from error


def prints_date(tokenizer: Any) -> bool:
    """Whether the chat template reads the clock, so that its text depends on the date."""
    return bool(tokenizer.chat_template) and "strftime_now" in str(tokenizer.get_chat_template())


def control_tokens(tokenizer: Any, role: str = _USER) -> tuple[str, ...]:
    """Return the tokens that are text where a person wrote them.

    These are all special tokens, and those other added tokens that the chat template itself writes. White
    space is no control token. In an assistant's turn, neither are pairs such as `<think>` and `</think>` that
    are not special: a model writes them as part of its answer.
    """
    try:
        written = _get_template_literal_text(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    except (TemplateError, ValueError):  # no template that could be used: there are no conversations then
        written = ""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added}
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)

    def is_control(name: str) -> bool:
        if name in special:
            return True
        if name not in written or name.isspace():
            return False
        tag = _TAG.fullmatch(name)
        pair = tag is not None and {f"<{tag[1]}>", f"</{tag[1]}>"} <= names
        return not (role == _ASSISTANT and pair)

    return tuple(sorted((name for name in names | special if is_control(name)), key=lambda n: (-len(n), n)))


class ControlTokenMarks:
    """Marks the control tokens of texts that people wrote in one role; see `control_tokens`."""

    def __init__(self, tokenizer: Any, role: str = _USER) -> None:
        self._tokenizer = tokenizer
        names = control_tokens(tokenizer, role)
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Ordinary text gives the unknown token too.
        unknown = {tokenizer.unk_token, getattr(getattr(backend, "model", None), "unk_token", None)}
        self._names = {tokenizer.convert_tokens_to_ids(name): name for name in names if name not in unknown}
        self._normalizer = getattr(backend, "normalizer", None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without the tokens that the tokenizer puts around texts.

        Raises:
            UnwritableToken: the tokenizer makes a control token of it even so.
        """
        ids = encode(self._tokenizer, self.marked(text)).input_ids.tolist()
        self.check(ids)
        return ids

    def names_control(self, text: str) -> bool:
        """Whether a control token is named in `text`."""
        return self.pattern.search(text) is not None

    def marked(self, text: str, keep: str = "") -> str:
        """Return `text` with private characters around its control tokens, but for `keep`.

        Raises:
            UnwritableToken: a control token appears only when the tokenizer normalizes the text.
        """
        text = text.replace(_GENERATED, "").replace(_WRITTEN_AGAIN, "")
        parts = text.split(keep) if keep else [text]
        return keep.join(self._marked(part) for part in parts)

    def _marked(self, text: str) -> str:
        if self._normalizer is not None:
            normal = self._normalizer.normalize_str(text)
            if normal != text and len(self.pattern.findall(normal)) > len(self.pattern.findall(text)):
                self.check(_encoded(self._tokenizer, self.pattern.sub("", text)).input_ids.tolist())
        return mark_control_tokens(text, self.pattern)

    def check(self, ids: Sequence[int]) -> None:
        """Refuse ids of a text among which there is a control token.

        Raises:
            UnwritableToken: there is one; with its name.
        """
        for token_id in ids:
            if token_id in self._names:
                raise _unwritable(self._names[token_id])


class ChatTemplate:
    """The chat template of one tokenizer.

    `today` is the date that the template may print; without one it is the day on which it renders.
    """

    def __init__(self, tokenizer: Any, today: date | None = None) -> None:
        """
        Raises:
            ConfigError: no chat template, or one that Jinja cannot read.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template, so conversations cannot be "
                "put to the model; save one with it (chat_template.jinja)"
            )
        self.tokenizer, self._today = tokenizer, today
        template = tokenizer.get_chat_template()
        try:
            self._texts = {role: ControlTokenMarks(tokenizer, role) for role in (_USER, _ASSISTANT)}
            self._plain = _compile_jinja_template(template)
            self.has_marks = _GENERATION_TAG.search(template) is not None
            self._marked = _compile_jinja_template(_GENERATION_TAG.sub(_visible_mark, template))
        except TemplateError as error:
            raise ConfigError(f"{tokenizer.name_or_path}: chat template: {shorten(error)}") from error
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        self._takes_parts = self._needs_parts()

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False, slots: bool = False
    ) -> RenderedChat:
        """Return `messages` as text; with the header of an assistant's turn after them where `prompt` is set.

        `slots`: `<image>` in a text stands for an image; else it is text, and only parts of the type image
        stand for images.

        Raises:
            ChatRefusal: the template does not take these messages; with what it says.
        """
        return self._rendered([self._as_text(message, slots) for message in messages], prompt)

    def encode(self, rendered: RenderedChat) -> EncodedText:
        """Return the ids of a rendered conversation.

        Raises:
            UnwritableToken: it holds a control token that the tokenizer cannot write as text.
        """
        return encode(self.tokenizer, rendered.text)

    def turns(
        self, messages: Sequence[Message], *, slots: bool = False
    ) -> tuple[RenderedChat, list[TurnSpan]]:
        """Return the conversation as text, and where the assistant's turns are in it.

        A turn is what the model has to write behind the generation prompt, its end included. Stand-ins for
        the contents show which text the template writes around each of them; these texts are then looked up
        in the conversation itself. Where a template leaves a turn out that its generation prompt shows (some
        of Mistral's: the system turn), the text is that prompt and the last answer.

        Raises:
            ChatRefusal: the template does not take these messages, or rewrites or leaves out one of them.
            ConfigError: the template does not show where the assistant's turns are.
        """
        texts = [self._as_text(message, slots) for message in messages]
        rendered = self._rendered(texts)
        skeleton = self._skeleton(tuple(str(message["role"]) for message in messages))
        if skeleton.before is not None:
            return self._joined(texts, rendered, skeleton, skeleton.before)
        places = _places(skeleton.frame, texts, rendered.text)
        if places is not None:
            return rendered, [
                TurnSpan(
                    start=places[slot][0] - len(skeleton.frame.literals[slot]) + header,
                    content_end=places[slot][1],
                    end=places[slot][1] + closing,
                )
                for slot, header, closing in skeleton.turns
            ]
        return rendered, [
            self._looked_up(texts, rendered.text, skeleton.frame, slot, header, closing)
            for slot, header, closing in skeleton.turns
        ]

    def _as_text(self, message: Message, slots: bool) -> dict[str, Any]:
        """The message with its control tokens marked as text, its content in the form the template takes."""
        role, content = str(message["role"]), message.get("content")
        texts = self._texts.get(role, self._texts[_USER])
        if content is None:
            content = ""
        if isinstance(content, str):
            content = texts.marked(content, keep=IMAGE_MARK if slots else "")
            return {**message, "content": [_text_part(content)] if self._takes_parts else content}
        parts = [{**part, "text": texts.marked(part["text"])} if "text" in part else part for part in content]
        for one, following in pairwise(parts):
            if (
                "text" in one
                and "text" in following
                and _joins(one["text"], following["text"], texts.pattern)
            ):
                one["text"] += _TEXT_AGAIN
        return {**message, "content": parts}

    def _rendered(
        self, messages: Sequence[Message], prompt: bool = False, marks: bool = True
    ) -> RenderedChat:
        template = self._marked if marks else self._plain
        variables: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        if self._today is not None:
            day = datetime.combine(self._today, time())
            variables["strftime_now"] = day.strftime
        try:
            text = template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            )
        except TemplateError as error:
            raise ChatRefusal(f"the chat template refuses it: {shorten(error)}") from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ) as error:  # of an expression
            raise ChatRefusal(f"the chat template fails on it: {shorten(error)}") from error
        return _without_marks(text)

    def _needs_parts(self) -> bool:
        """Whether the template shows a content only where it is a list of parts."""

        def shows(content: Any) -> bool:
            try:
                text = self._rendered([{"role": _USER, "content": content}], prompt=True).text
            except ChatRefusal:
                return False
            return _stand_in(0) in text

        return not shows(_stand_in(0)) and shows([_text_part(_stand_in(0))])

    def _stand_in(self, number: int) -> Any:
        return [_text_part(_stand_in(number))] if self._takes_parts else _stand_in(number)

    def _frame(self, roles: Sequence[str], prompt: bool = False) -> "_Frame":
        """What the template writes around the contents of turns of these roles."""
        messages = [
            {
                "role": role,
                "content": [_text_part(_stand_in(number))] if self._takes_parts else _stand_in(number),
            }
            for number, role in enumerate(roles)
        ]
        text = self._rendered(messages, prompt).text
        if self.has_marks and text != self._rendered(messages, prompt, marks=False).text:
            raise ConfigError(
                "the chat template writes another text where its {% generation %} marks are left out; set no "
                "variables inside of them"
            )
        pieces = _STAND_IN.split(text)
        return _Frame(literals=tuple(pieces[::2]), slots=tuple(map(int, pieces[1::2])))

    def _skeleton(self, roles: tuple[str, ...]) -> "_Skeleton":
        if roles not in self._skeletons:
            self._skeletons[roles] = self._new_skeleton(roles)
        return self._skeletons[roles]

    def _new_skeleton(self, roles: tuple[str, ...]) -> "_Skeleton":
        frame = self._frame(roles)
        numbers = [number for number, role in enumerate(roles) if role == _ASSISTANT]
        left_out = set(range(len(roles))) - set(frame.slots)
        for number in left_out:
            if roles[number] != "system":
                raise _hidden(f"the content of turn {number} is not in its text")
        if not left_out:
            turns = tuple(self._turn(roles, frame, number) for number in numbers)
            return _Skeleton(frame=frame, before=None, turns=turns)
        before = self._frame(roles[:-1], prompt=True)
        last = self._turn(roles, frame, len(roles) - 1)
        if left_out & set(before.slots) != left_out or last[1] < len(before.literals[-1]):
            raise ChatRefusal("the chat template leaves out the system turn")
        turns = tuple(self._turn(roles, before, number) for number in numbers[:-1])
        return _Skeleton(frame=frame, before=before, turns=(*turns, last))

    def _turn(self, roles: Sequence[str], frame: "_Frame", number: int) -> tuple[int, int, int]:
        """The slot of turn `number`, and how many characters in front of it are prompt, behind it its end."""
        if frame.slots.count(number) != 1:
            raise _hidden(f"the content of turn {number} is {frame.slots.count(number)} times in its text")
        slot = frame.slots.index(number)
        gap, behind = frame.literals[slot], frame.literals[slot + 1]
        if number == 0:
            raise ChatRefusal("the conversation begins with the assistant's turn")
        before = self._frame(roles[:number], prompt=True)
        if before.slots[-1:] != frame.slots[slot - 1 : slot]:
            raise _hidden(f"the turns before turn {number} are in another order in its generation prompt")
        tail = before.literals[-1]
        header = _header(tail, gap)
        if tail.strip() and not gap[:header].strip():
            raise _hidden(f"turn {number} does not begin as the generation prompt {tail!r:.80} does")
        alone = self._frame(roles[: number + 1])
        end = alone.literals[-1] if alone.slots[-1:] == (number,) else behind
        try:
            followed = self._frame([*roles[: number + 1], _USER])
            if number in followed.slots:
                end = end[: _common(end, followed.literals[followed.slots.index(number) + 1])]
        except ChatRefusal:
            pass
        return slot, header, _common(end, behind)

    def _joined(
        self, texts: list[dict[str, Any]], rendered: RenderedChat, skeleton: "_Skeleton", before: "_Frame"
    ) -> tuple[RenderedChat, list[TurnSpan]]:
        """The generation prompt of the last turn, and that turn from the whole text."""
        prompt = self._rendered(texts[:-1], prompt=True)
        in_prompt = _places(before, texts, prompt.text)
        in_whole = _places(skeleton.frame, texts, rendered.text)
        if in_prompt is None or in_whole is None:
            raise ChatRefusal("the chat template rewrites one of the turns")
        turns = []
        for slot, header, closing in skeleton.turns[:-1]:
            start, content_end = in_prompt[slot]
            turns.append(
                TurnSpan(
                    start=start - len(before.literals[slot]) + header,
                    content_end=content_end,
                    end=content_end + closing,
                )
            )
        slot, header, closing = skeleton.turns[-1]
        start = in_whole[slot][0] - len(skeleton.frame.literals[slot]) + header
        shift = len(prompt.text) - start
        content_end = in_whole[slot][1] + shift
        turns.append(TurnSpan(start=start + shift, content_end=content_end, end=content_end + closing))
        marked = [span for span in prompt.marked if span[1] > span[0]]
        marked += [(one + shift, end + shift) for one, end in rendered.marked if one >= start]
        return RenderedChat(text=prompt.text + rendered.text[start:], marked=tuple(marked)), turns

    def _looked_up(
        self,
        texts: list[dict[str, Any]],
        text: str,
        frame: "_Frame",
        slot: int,
        header: int,
        closing: int,
    ) -> TurnSpan:
        """The turn in a text whose form depends on its contents (reasoning that is written or removed)."""
        number = frame.slots[slot]
        behind_previous = self._behind(texts, frame.slots[slot - 1])
        behind = self._behind(texts, number)
        previous_end, content_end = len(text) - len(behind_previous), len(text) - len(behind)
        start, end = previous_end + header, content_end + closing
        refused = ChatRefusal(f"the chat template rewrites turn {number} (assistant)")
        if not text.endswith(behind) or not text.endswith(behind_previous) or not start <= content_end:
            raise refused
        if text[previous_end:start] != frame.literals[slot][:header]:
            raise refused
        if text[content_end:end] != frame.literals[slot + 1][:closing]:
            raise refused
        content = _text_of(texts[number])
        answer = _BREAKS.sub("", content.rpartition("</think>")[2]).strip()
        shown = _BREAKS.sub("", text[start:content_end]).strip()
        if content.strip() not in text[start:content_end] and not (answer and shown.endswith(answer)):
            raise refused
        return TurnSpan(start=start, content_end=content_end, end=end)

    def _behind(self, texts: list[dict[str, Any]], number: int) -> str:
        """What stands behind the content of a turn: found with a stand-in for this content alone."""
        replaced = [{**message} for message in texts]
        replaced[number]["content"] = self._stand_in(number)
        return self._rendered(replaced).text.rpartition(_stand_in(number))[2]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a template writes around contents: a literal before each slot, and one behind the last."""

    literals: tuple[str, ...]
    slots: tuple[int, ...]  # numbers of the turns, in the order of their contents in the text


@dataclass(frozen=True, kw_only=True)
class _Skeleton:
    """The frame of a conversation, and (slot, header, closing) of every turn of the assistant's.

    With `before`, all turns but the last are those of that frame, the last one's generation prompt.
    """

    frame: _Frame
    before: _Frame | None
    turns: tuple[tuple[int, int, int], ...]


def encode(tokenizer: Any, text: str) -> EncodedText:
    """Return the ids of `text`, where private characters surround the control tokens that are text.

    Ordinary text is encoded in one piece, as the tokenizer does by itself. Else the pieces between the
    private characters are encoded each behind a line break, so that no tokenizer takes them for the beginning
    of a text.

    Raises:
        UnwritableToken: the tokenizer makes a control token of its characters.
    """
    if _BREAKS.search(text) is None:
        return _encoded(tokenizer, text)
    ids: list[int] = []
    offsets: list[Span] = []
    known = set(tokenizer.added_tokens_encoder)
    cuts = [0, *(at for match in _BREAKS.finditer(text) for at in match.span()), len(text)]
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        piece = text[start:end]
        if not piece:
            continue
        closed = text[start - 1 : start] == _AS_TEXT and text[end : end + 1] == _TEXT_AGAIN
        if closed and piece in known:
            piece_ids = _as_characters(tokenizer, piece)
            ids += piece_ids
            offsets += [(start, end)] * len(piece_ids)
            continue
        encoded = _encoded(tokenizer, piece) if not start else _behind_line_break(tokenizer, piece)
        ids += encoded.input_ids.tolist()
        if encoded.offsets is not None:
            offsets += [(start + one, start + other) for one, other in encoded.offsets.tolist()]
    return EncodedText(
        input_ids=np.array(ids, np.int32),
        offsets=np.array(offsets, np.int64).reshape(-1, 2) if tokenizer.is_fast else None,
    )


def _encoded(tokenizer: Any, text: str) -> EncodedText:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2) if tokenizer.is_fast else None
    return EncodedText(input_ids=np.array(found["input_ids"], np.int32), offsets=offsets)


def _behind_line_break(tokenizer: Any, piece: str) -> EncodedText:
    line_break = _encoded(tokenizer, "\n").input_ids
    found = _encoded(tokenizer, "\n" + piece)
    count = len(line_break)
    if not np.array_equal(found.input_ids[:count], line_break):
        return _encoded(tokenizer, piece)
    offsets = None if found.offsets is None else np.maximum(found.offsets[count:] - 1, 0)
    return EncodedText(input_ids=found.input_ids[count:], offsets=offsets)


def _as_characters(tokenizer: Any, token: str) -> list[int]:
    """The ids of a control token's name as text.

    A vocabulary of whole words or of pieces by likelihood (T5's) may give the token itself: then its name is
    encoded in two parts.
    """
    control = tokenizer.convert_tokens_to_ids(token)
    line_break = tokenizer._encode_without_added_tokens("\n")

    def characters(text: str) -> list[int]:
        ids = tokenizer._encode_without_added_tokens("\n" + text)
        if ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
        return tokenizer._encode_without_added_tokens(text)

    for cut in range(len(token)):
        ids = [token_id for part in (token[:cut], token[cut:]) if part for token_id in characters(part)]
        if ids and control not in ids:
            return ids
    raise _unwritable(token)


def _unwritable(token: str) -> UnwritableToken:
    return UnwritableToken(f"it holds {token}, which this tokenizer cannot write as text; take it out")


def _joins(one: str, following: str, control: re.Pattern[str]) -> bool:
    """Whether a control token begins in one text and ends in the next."""
    return any(match.start() < len(one) < match.end() for match in control.finditer(one + following))


def _visible_mark(tag: re.Match[str]) -> str:
    """A Jinja block that writes a private character in the place of a generation tag.

    A block and no expression, because Jinja removes white space around blocks.
    """
    mark = _WRITTEN_AGAIN if tag[2] else _GENERATED
    return f"{{%{tag[1]} if true %}}{mark}{{% endif {tag[3]}%}}"


def _without_marks(text: str) -> RenderedChat:
    """The text without the characters of the generation marks, and where they were."""
    if _GENERATED not in text:
        return RenderedChat(text=text)
    pieces, spans, length, opened = [], [], 0, 0
    for piece in re.split(f"([{_GENERATED}{_WRITTEN_AGAIN}])", text):
        if piece == _GENERATED:
            opened = length
        elif piece == _WRITTEN_AGAIN:
            spans.append((opened, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return RenderedChat(text="".join(pieces), marked=tuple(span for span in spans if span[1] > span[0]))


def _stand_in(number: int) -> str:
    return f"qz{number}zq"


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _places(frame: _Frame, texts: Sequence[Message], whole: str) -> list[Span] | None:
    """Where the contents are in a text that is the frame around them, each as it is or stripped."""
    at = len(frame.literals[0])
    if not whole.startswith(frame.literals[0]):
        return None
    places = []
    for number, literal in zip(frame.slots, frame.literals[1:], strict=True):
        content = _text_of(texts[number])
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        fitting = next((form for form in forms if whole.startswith(form + literal, at)), None)
        if fitting is None:
            return None
        places.append((at, at + len(fitting)))
        at += len(fitting) + len(literal)
    return places if at == len(whole) else None


def _header(prompt: str, gap: str) -> int:
    """How many characters of `gap` are the generation prompt, or the part of it that both have.

    White space may differ, and the prompt may go on (`<think>`) where the turn does not.
    """
    exact = _common(prompt, gap)
    if exact == len(prompt):
        return exact
    words, at = prompt.split(), 0
    for word in words:
        found = len(gap) - len(gap[at:].lstrip())
        if not gap.startswith(word, found):
            break
        at = found + len(word)
    return max(exact, at)


def _common(first: str, second: str) -> int:
    """How many characters both begin with, a token such as `<|end|>` in one piece."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    if count == len(first) and count == len(second):
        return count
    for opening, closing in ("<>", "[]"):
        begun = first.rfind(opening, 0, count)
        if begun >= 0 and closing not in first[begun:count]:
            rest = first[count:] + "\0" + second[count:]
            if closing in rest:
                count = begun
    return count


def _hidden(what: str) -> ConfigError:
    return ConfigError(
        f"the chat template does not show where the assistant's turns are: {what}; mend the template "
        "({% generation %} and {% endgeneration %} mark those turns)"
    )
