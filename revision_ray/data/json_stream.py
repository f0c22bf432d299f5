"""Records of one large JSON document, one after the other, in bounded memory."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from revision_ray import storage
from revision_ray.errors import DataError, quote, shorten

MAX_RECORD_CHARACTERS = 64 * 2**20
_READ_BYTES = 2**20
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Element:
    """A value of the list, the bytes it was parsed from, and the byte offset where they begin."""

    offset: int
    raw: bytes
    value: Any


def elements(uri: str, list_key: str) -> Iterator[Element]:
    """The values of the list that the JSON document at `uri` is, or that its object has under `list_key`.

    Memory is bounded by the largest value (MAX_RECORD_CHARACTERS at most). Bytes that are not UTF-8 are given
    as lone surrogates inside the values; `raw` shows them as they are.

    Raises:
        DataError: no such list; or the document breaks: everything before that byte was given, nothing after
            it can be known.
    """
    with storage.open_input(uri) as file:
        text = _Text(file, uri)
        opening = text.peek()
        if opening == "[":
            yield from _list(text)
        elif opening == "{":
            yield from _member(text, list_key)
        else:
            raise text.broken("expected a list of records, or an object that holds one")
        if text.peek():
            raise text.broken(
                "text follows the end of the JSON document; if it has one record a line, name it .jsonl"
            )


def _list(text: "_Text") -> Iterator[Element]:
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _member(text: "_Text", list_key: str) -> Iterator[Element]:
    keys = []
    text.take("{")
    while text.peek() != "}":
        keys.append(text.value().value)
        text.take(":")
        if text.peek() == "[":
            for element in _list(text):  # Lists of other names are walked through too, an element at a time.
                if keys[-1] == list_key:
                    yield element
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if list_key not in keys:
        raise DataError(
            f"{text.uri}: is an object with the keys {quote(keys[:20])}; expected a list of records, or "
            f"an object with the list {list_key!r}; a file of one record a line is named .jsonl"
        )


class _Text:
    """The text of a JSON file from a position on: grows by reading, forgets what was taken."""

    def __init__(self, file: pa.NativeFile, uri: str) -> None:
        self.uri = uri
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._buffer = ""
        self._position = 0
        self._offset = 0  # bytes of the file before self._position
        self._ended = False
        self._grow()
        if self._buffer.startswith("\ufeff"):
            self._position, self._offset = 1, 3

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        if self._position < len(self._buffer) and self._buffer[self._position] not in " \t\r\n":
            return self._buffer[self._position]
        while True:
            match = _WHITESPACE.match(self._buffer, self._position)
            assert match is not None
            self._offset += match.end() - self._position
            self._position = match.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if self._ended:
                return ""
            self._grow()

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.broken(f"expected {character!r}", cut_off=not found)
        self._position += 1
        self._offset += 1

    def value(self) -> Element:
        """The next JSON value."""
        if not self.peek():
            raise self.broken("expected a value", cut_off=True)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
                # A number near the end of the buffer may go on behind it: 12|34, 12.|5, 12e+|3.
                if end + 3 <= len(self._buffer) or self._ended:
                    break
            except RecursionError as error:
                raise self.broken("values are nested too deeply") from error
            except ValueError as error:
                # An error far from the end of the buffer is not for want of text; an open string may be.
                at = getattr(error, "pos", self._position)
                unfinished = at > len(self._buffer) - 32 or str(error).startswith("Unterminated string")
                if self._ended or not unfinished:
                    raise self.broken(str(error).partition(":")[0], at, cut_off=unfinished) from error
            if len(self._buffer) - self._position > MAX_RECORD_CHARACTERS:
                raise self.broken(f"a value has more than {MAX_RECORD_CHARACTERS} characters")
            self._grow()
        raw = self._buffer[self._position : end].encode("utf-8", "surrogateescape")
        element = Element(self._offset, raw, value)
        self._position = end
        self._offset += len(raw)
        return element

    def _grow(self) -> None:
        # Twice what is there, so that a long value is parsed again only a few times.
        unread = len(self._buffer) - self._position
        try:
            read = self._file.read(max(_READ_BYTES, unread))
        except OSError as error:
            raise DataError(
                f"{self.uri}: cannot be read near byte {self._offset}: {shorten(error, 400)}"
            ) from error
        self._ended = not read
        self._buffer = self._buffer[self._position :] + self._decoder.decode(read, final=self._ended)
        self._position = 0

    def broken(self, reason: str, position: int | None = None, *, cut_off: bool = False) -> DataError:
        """The error that this document breaks at `position` of the buffer (where it stands, if None)."""
        position = self._position if position is None else position
        before = self._buffer[self._position : position].encode("utf-8", "surrogateescape")
        near = self._buffer[position : position + 40]
        state = "the file ends there, cut off" if cut_off else f"found {near!r}"
        return DataError(
            f"{self.uri}: malformed JSON at byte {self._offset + len(before)}: {reason}, but {state}; "
            "restore the file, for what follows cannot be known"
        )
