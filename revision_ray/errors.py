"""The errors that a user can cause and mend. Broken invariants of our own are `assert`."""

import re

MAX_QUOTED = 200
"""Characters of a user's content that a message may hold in one piece."""
_LONG_WORD = re.compile(rf"\S{{{MAX_QUOTED + 1},}}")


class RevisionError(Exception):
    """Base of all errors whose message says what was found, where, and what to do.

    A path, an id or another word of more than MAX_QUOTED characters is shortened in every message; longer
    text of a user's is brought in by `quote` or `shorten`.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(shorten_words(part) if isinstance(part, str) else part for part in args))


def shorten(text: object, limit: int = MAX_QUOTED) -> str:
    """Return `text` with at most `limit` characters: its beginning, its end, and how long it is."""
    text = str(text)
    if len(text) <= limit:
        return text
    mark = f"...({len(text)} characters)..."
    tail = max(limit - len(mark), 0) // 3
    return text[: max(limit - len(mark) - tail, 0)] + mark + text[len(text) - tail :]


def quote(value: object, limit: int = MAX_QUOTED) -> str:
    """Return `value` as Python writes it, for a message, with at most `limit` characters."""
    if isinstance(value, str | bytes) and len(value) > limit:  # its repr would cost as much as it holds
        mark = f"... ({len(value)} long)"
        return repr(value[:limit])[: limit - len(mark)] + mark
    return shorten(repr(value), limit)


def shorten_words(text: str) -> str:
    """Return `text` with every word of more than MAX_QUOTED characters shortened."""
    return _LONG_WORD.sub(lambda word: shorten(word[0]), text)


class ConfigError(RevisionError):
    """The configuration names something that does not exist or cannot be."""


class DataError(RevisionError):
    """Input data, or storage that holds it, cannot be read or written as asked."""


class AlignmentError(RevisionError):
    """A fit cannot be made, loaded, or applied to these embeddings."""


class CheckpointError(RevisionError):
    """A checkpoint is missing, damaged, or of another model."""


class ClusterError(RevisionError):
    """The cluster lacks what a job needs."""
