"""The errors that a user can cause and mend. Broken invariants of our own are `assert`."""

import re
import sys

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


class OutputError(ConfigError):
    """The output holds a result of other settings or data, or files of something else. See core.artifact."""


class DataError(RevisionError):
    """Input data, or storage that holds it, cannot be read or written as asked."""


class AlignmentError(RevisionError):
    """A fit cannot be made, loaded, or applied to these embeddings."""


class CheckpointError(RevisionError):
    """A checkpoint is missing, damaged, or of another model."""


class ClusterError(RevisionError):
    """The cluster lacks what a job needs."""


def user_error(error: BaseException) -> RevisionError | None:
    """Return the error of the user's that `error` is, or that Ray brought from another process inside of it.

    Ray wraps what a task raises in an error of its own, Ray Train once more. Of what an actor or a Serve
    replica raises as it starts, Ray keeps nothing but the trace's text.
    """
    waiting, seen = [error], set()
    while waiting:
        found = waiting.pop(0)
        # Ray's error of a task has a cause, and is an instance of its class as well.
        cause = getattr(found, "cause", None)
        if isinstance(found, RevisionError) and not isinstance(cause, BaseException):
            found.args = tuple(_RAY_DATAS.sub("", arg) if isinstance(arg, str) else arg for arg in found.args)
            return found
        if id(found) in seen or not _is_rays(found):
            continue
        seen.add(id(found))
        inner = [cause, *(getattr(found, name, None) for name in _INNER), found.__cause__]
        inner += getattr(found, "worker_failures", {}).values()
        waiting += [each for each in inner if isinstance(each, BaseException)]
    return _in_trace(str(error)) if _is_rays(error) else None


# What Ray Data writes behind the message of what its tasks raise: how to have it tried again.
_RAY_DATAS = re.compile(r"\nFailed to apply UDF .*", re.DOTALL)
_INNER = ("controller_failure", "_base_exc", "base_exception")


def _is_rays(error: BaseException) -> bool:
    # serve.run says with a RuntimeError that no replica starts.
    module = type(error).__module__
    return module == "ray" or module.startswith("ray.") or "Deploying application" in str(error)[:100]


def _in_trace(text: str) -> RevisionError | None:
    """The error of the user's that a trace ends with."""
    named = re.findall(rf"\b{re.escape(__name__)}\.(\w+): (.*)", text)
    kind = getattr(sys.modules[__name__], named[-1][0], None) if named else None
    return kind(named[-1][1]) if isinstance(kind, type) and issubclass(kind, RevisionError) else None
