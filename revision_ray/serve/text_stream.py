"""Tokens to text as they come: never half a character, never a part of a stop string."""

import json
import re
from collections.abc import Sequence
from typing import Any

_UNDECIDED = "\ufffd"
# An incomplete character has at most three bytes, hence three tokens; some tokenizers show each of them, and
# while one is missing, all bytes before it back to the last token of another kind.
_MAX_UNDECIDED = 3
# Tokens that are decoded again with every new one before the window moves on.
_WINDOW = 16
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The text of an answer, token by token."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """A stop string has come; what stands before it has been given out, and nothing comes after."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._held = ""
        # Decoded together: a token's text depends on its left neighbours (spaces, characters of many tokens).
        self._window: list[int] = []
        self._given = 0  # characters of the window's text
        self._boundary = 0  # the last place in the window where every character was complete

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """What `token` adds and is decided. Without `may_stop` a stop string that it completes is text."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        undecided = len(text) - len(text.rstrip(_UNDECIDED))
        held = undecided
        if len(self._window) - self._boundary > _MAX_UNDECIDED:  # these bytes are no text, and never will be
            held = min(undecided, _MAX_UNDECIDED)
        decided = len(text) - held
        new = text[self._given : decided]
        self._given = max(self._given, decided)
        if not undecided:
            if len(self._window) >= _WINDOW and self._boundary:
                del self._window[: self._boundary]
                self._given = len(self._decode(self._window))
            self._boundary = len(self._window)
        return self._before_stop(new, may_stop)

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        text = self._before_stop(self._decode(self._window)[self._given :])
        held, self._held = self._held, ""
        return text + held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _before_stop(self, new: str, may_stop: bool = True) -> str:
        if not self._stop:
            return new
        text = self._held + new
        # Only those that end in what is new: the others came when nothing might stop.
        starts = ((stop, max(0, len(self._held) - len(stop) + 1)) for stop in self._stop)
        found = [place for stop, start in starts if (place := text.find(stop, start)) >= 0]
        if found and may_stop:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class TokenNames:
    """What single tokens are called where log probabilities are reported."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = _byte_alphabet(tokenizer)
        self._known: dict[int, tuple[str, tuple[int, ...]]] = {}

    def of(self, token: int) -> tuple[str, tuple[int, ...]]:
        """Its text, and its bytes, which may be a part of a character (its text then has U+FFFD)."""
        if token not in self._known:
            content = self._content(token)
            self._known[token] = content.decode("utf-8", errors="replace"), tuple(content)
        return self._known[token]

    def _content(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a vocabulary that was padded beyond the tokenizer's
            return b""
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if token in self._tokenizer.all_special_ids:
            return name.encode()
        if self._bytes_of and all(character in self._bytes_of for character in name):
            return bytes(self._bytes_of[character] for character in name)
        if "\u2581" in name:  # decoding would take the space off the front
            return name.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()


def _byte_alphabet(tokenizer: Any) -> dict[str, int]:
    """Character -> byte, of a tokenizer whose vocabulary spells bytes as printable characters; else empty."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    description = json.loads(backend.to_str())
    if '"ByteLevel"' not in json.dumps([description["decoder"], description["pre_tokenizer"]]):
        return {}
    # GPT-2's: printable bytes stand for themselves, the others follow from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}
