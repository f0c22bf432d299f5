"""Log lines that say which run and stage they belong to, and hold no secret.

A person reads `12:30:01 INFO ...`; with REVISION_RAY_LOG=json every line is one JSON object, as log
collectors take them: time, level, run, stage, message, and the figures behind the message, if any.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from revision_ray.core.storage import absolute, name_of, sha256

FORMAT_VARIABLE = "REVISION_RAY_LOG"
TRACES_VARIABLE = "REVISION_RAY_TRACES"
TEXT = "%(asctime)s %(levelname)s %(message)s"

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# Shorter values are words that stand in many a line, such as AWS_ACCESS_KEY_ID=none.
_SHORTEST_SECRET = 8
_IN_URI = (
    (re.compile(r"(\w+://)[^/\s@\"']+@"), r"\1***@"),
    (
        re.compile(
            r"([?&][\w.%-]*(?:key|token|secret|password|credential|signature)[\w.%-]*=)[^&\s\"']+", re.I
        ),
        r"\1***",
    ),
)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a process works for; both are empty until `work_for` says."""

    id: str = ""
    stage: str = ""


_current = RunContext()


def current() -> RunContext:
    return _current


def work_for(stage: str, output: str = "") -> None:
    """Log lines and metrics of this process name `stage` and its run from now on.

    The run is a function of the output, so that every process knows it, and a job that goes on after a
    failure is the same run: the output's last name and six digits of its hash (a URI may hold a key, these
    do not).
    """
    global _current
    _current = RunContext(id=run_id(output) if output else f"{stage}-{os.getpid()}", stage=stage)


def work_as(run: RunContext) -> None:
    """As another process that works for `run`."""
    global _current
    _current = run


@contextmanager
def working_for(stage: str, output: str = "") -> Iterator[None]:
    """As `work_for`, for as long as this is entered: one stage of several in a process."""
    global _current
    former = _current
    work_for(stage, output)
    try:
        yield
    finally:
        _current = former


def run_id(output: str) -> str:
    place = absolute(output)
    # A bucket by itself stands behind the keys of its URI.
    return f"{name_of(place).rpartition('@')[2] or 'root'}-{sha256(place.encode())[:6]}"


def set_up(level: int = logging.INFO, text: str = TEXT, stream: TextIO | None = None) -> None:
    """Lines of this process go to `stream` (standard error), as text in the format `text`, or as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    as_json = os.environ.get(FORMAT_VARIABLE, "text") == "json"
    handler.setFormatter(JsonLines() if as_json else TextLines(text, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def shows_traces() -> bool:
    """Whether traces of errors that a user can mend are wanted on the console (REVISION_RAY_TRACES=1)."""
    return os.environ.get(TRACES_VARIABLE, "0") not in ("", "0")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with *** for user names, passwords and keys in URIs, and for secrets of the environment."""
    for pattern, instead in _IN_URI:
        text = pattern.sub(instead, text)
    for name, value in (os.environ if environment is None else environment).items():
        # Files that hold a secret may be named, as in RAY_AUTH_TOKEN_PATH.
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value[0] not in "/~":
            text = text.replace(value, "***")
    return text


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class JsonLines(logging.Formatter):
    """One JSON object a line; `extra={"figures": {...}}` of a log call stands in it as it is."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "run": _current.id,
            "stage": _current.stage,
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
        }
        if figures := getattr(record, "figures", None):
            line["figures"] = figures
        if record.exc_info:
            line["exception"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line, default=str)
