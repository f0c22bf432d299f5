"""Set up logging: text or JSON lines without secrets; JSON lines name their run and stage.

Text lines look like `12:30:01 INFO ...`. With REVISION_RAY_LOG=json every line is one JSON object for log
collectors: time, level, run, stage, logger, message, and figures and exception, if any.
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
# Shorter values may be ordinary words, such as "none" in AWS_ACCESS_KEY_ID=none.
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
    """Run and stage that a process works for; empty until `work_for` sets them."""

    id: str = ""
    stage: str = ""


_current = RunContext()


def current() -> RunContext:
    return _current


def work_for(stage: str, output: str = "") -> None:
    """Set the stage and run that JSON log lines and metrics of this process name.

    The run's id depends only on the output (see `run_id`), so a job that is resumed is the same run. Without
    an output it is made of the stage and the process id.
    """
    global _current
    _current = RunContext(id=run_id(output) if output else f"{stage}-{os.getpid()}", stage=stage)


def work_as(run: RunContext) -> None:
    """Set the run and stage of this process to those of another process."""
    global _current
    _current = run


@contextmanager
def working_for(stage: str, output: str = "") -> Iterator[None]:
    """Set run and stage as `work_for` does, and restore the former ones on exit."""
    global _current
    former = _current
    work_for(stage, output)
    try:
        yield
    finally:
        _current = former


def run_id(output: str) -> str:
    place = absolute(output)
    # The name of a bucket may follow keys and "@" in the URI.
    return f"{name_of(place).rpartition('@')[2] or 'root'}-{sha256(place.encode())[:6]}"


def set_up(level: int = logging.INFO, text: str = TEXT, stream: TextIO | None = None) -> None:
    """Send log lines of this process to `stream` (default standard error) as text lines or JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    as_json = os.environ.get(FORMAT_VARIABLE, "text") == "json"
    handler.setFormatter(JsonLines() if as_json else TextLines(text, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def shows_traces() -> bool:
    """Return whether to show traces of users' errors on the console (REVISION_RAY_TRACES=1)."""
    return os.environ.get(TRACES_VARIABLE, "0") not in ("", "0")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return `text` with *** for user names, passwords and keys in URIs, and for secrets in `environment`.

    `environment` is os.environ by default.
    """
    for pattern, instead in _IN_URI:
        text = pattern.sub(instead, text)
    for name, value in (os.environ if environment is None else environment).items():
        # A path of a file with a secret is no secret, as in RAY_AUTH_TOKEN_PATH.
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value[0] not in "/~":
            text = text.replace(value, "***")
    return text


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class JsonLines(logging.Formatter):
    """Formatter that writes one JSON object per line; `extra={"figures": {...}}` is copied into it."""

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
