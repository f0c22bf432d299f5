"""Metrics of every stage for Prometheus, and progress bars for terminals and job logs.

Every process records into Ray's metrics. The agent of each node exports them over HTTP at the node's metrics
port; it puts `ray_` before the name and adds tags of its own (node, worker). A value appears after at most
one report interval (10 s by default, `metrics_report_interval_ms`). Values recorded in the last interval
before a process ends may be lost, so read results and manifests, not metrics, for what a finished stage did.
Work that is repeated after a failure is counted again. Outside a Ray process the instruments do nothing.
"""

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ray.util import metrics
from tqdm import tqdm

from revision_ray.core import logs

PREFIX = "revision_ray_"
STAGE_PREFIX = PREFIX + "stage_"

Tags = Mapping[str, str] | None
log = logging.getLogger(__name__)


def _record(record: Callable[[float, dict[str, str]], None], value: float, tags: Tags) -> None:
    """Record `value`; log an error of Ray's metrics instead of raising it."""
    try:
        record(float(value), dict(tags or {}))
    except Exception:
        log.debug("a metric was not recorded", exc_info=True)


class Counter:
    """A sum that only grows; adding 0 does nothing, whereas Ray's own counter refuses it."""

    kind = "counter"

    def __init__(self, name: str, about: str, tags: tuple[str, ...] = ()) -> None:
        self.exported, self.tags = "ray_" + name, tags
        self._counter = metrics.Counter(name, about, tags)

    def inc(self, value: float = 1, tags: Tags = None) -> None:
        if value > 0:
            _record(self._counter.inc, value, tags)


class Gauge:
    """The last value of each process; Ray's tags tell the processes apart."""

    kind = "gauge"

    def __init__(self, name: str, about: str, tags: tuple[str, ...] = ()) -> None:
        self.exported, self.tags = "ray_" + name, tags
        self._gauge = metrics.Gauge(name, about, tags)

    def set(self, value: float, tags: Tags = None) -> None:
        if math.isfinite(value):
            _record(self._gauge.set, value, tags)


class Histogram:
    """Counts of values between given boundaries."""

    kind = "histogram"

    def __init__(
        self, name: str, about: str, boundaries: Sequence[float], tags: tuple[str, ...] = ()
    ) -> None:
        self.exported, self.tags = "ray_" + name, tags
        self._histogram = metrics.Histogram(name, about, list(boundaries), tags)

    def observe(self, value: float, tags: Tags = None) -> None:
        if math.isfinite(value):
            _record(self._histogram.observe, value, tags)


@dataclass(frozen=True, kw_only=True)
class StageInstruments:
    """Metrics of all stages, which the tags run and stage tell apart; a stage records those that apply."""

    done: Counter
    """Rows, scenes, questions or steps that are done. Tags: part (its name in the progress line), unit."""
    planned: Gauge
    """Total number to do, where it is known. Tags: part, unit."""
    seconds: Gauge
    """Seconds from the start of the part to its last progress. Tag: part."""
    samples: Counter
    """Rows or samples that were used."""
    rejected: Counter
    """Rows or samples that could not be used."""
    truncated: Counter
    """Texts or samples that were cut off."""
    tokens: Counter
    """Tokens that were encoded or trained on, without padding."""
    padding_share: Gauge
    """Latest share of padding among the computed tokens."""


@functools.cache
def stage_instruments() -> StageInstruments:
    """Return the stage instruments of this process; they are made once."""
    of = ("run", "stage")
    return StageInstruments(
        done=Counter(
            STAGE_PREFIX + "done_total", "Rows, scenes, questions or steps done.", (*of, "part", "unit")
        ),
        planned=Gauge(STAGE_PREFIX + "planned", "How many there are to do.", (*of, "part", "unit")),
        seconds=Gauge(STAGE_PREFIX + "seconds", "Since the part began.", (*of, "part")),
        samples=Counter(STAGE_PREFIX + "samples_total", "Rows or samples that were used.", of),
        rejected=Counter(STAGE_PREFIX + "rejected_total", "Rows or samples that could not be used.", of),
        truncated=Counter(STAGE_PREFIX + "truncated_total", "Texts or samples that were cut off.", of),
        tokens=Counter(STAGE_PREFIX + "tokens_total", "Tokens without padding.", of),
        padding_share=Gauge(STAGE_PREFIX + "padding_share", "Share of padding lately.", of),
    )


def instruments_in(made: object) -> list[Counter | Gauge | Histogram]:
    """Return the instruments in the fields of the dataclass instance `made`."""
    return [getattr(made, field.name) for field in fields(made)]  # type: ignore[arg-type]


def record(
    *,
    samples: int = 0,
    rejected: int = 0,
    truncated: int = 0,
    tokens: int = 0,
    padding_share: float = math.nan,
) -> None:
    """Record figures for the run and stage of this process; a `padding_share` of NaN is not recorded."""
    made, tags = stage_instruments(), _tags()
    made.samples.inc(samples, tags)
    made.rejected.inc(rejected, tags)
    made.truncated.inc(truncated, tags)
    made.tokens.inc(tokens, tags)
    made.padding_share.set(padding_share, tags)


def record_progress(part: str, unit: str, amount: int, total: int | None, seconds: float) -> None:
    """Record that `amount` more `unit`s of a part are done, `seconds` after its start."""
    made, tags = stage_instruments(), {**_tags(), "part": part}
    made.done.inc(amount, {**tags, "unit": unit})
    if total is not None:
        made.planned.set(total, {**tags, "unit": unit})
    made.seconds.set(seconds, tags)


def _tags() -> dict[str, str]:
    run = logs.current()
    return {"run": run.id, "stage": run.stage}


_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A progress bar on a terminal, or log lines elsewhere, that count `unit`s towards `total`.

    They are recorded for Prometheus, too, unless `counted` is False, for instance because another worker
    records the same progress. Units `already_done` by an earlier run count towards the total, but not for the
    speed.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, counted: bool = True, already_done: int = 0
    ) -> None:
        self.name, self.total, self.unit, self.counted = name, total, unit, counted
        self.done = self._before = already_done
        if counted and already_done:
            record_progress(name, unit, already_done, total, 0.0)
        self._said = -1
        self._note = ""
        self._start = self._shown = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=already_done, desc=name, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        self._note = note
        if self.counted:
            record_progress(self.name, self.unit, amount, self.total, time.monotonic() - self._start)
        if self._bar is not None:
            self._bar.update(amount)
            self._bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._line()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._said != self.done:
            self._line()

    def _line(self) -> None:
        self._shown, self._said = time.monotonic(), self.done
        seconds = max(self._shown - self._start, 1e-9)
        share = f" of {self.total:,}" if self.total else ""
        rate = (self.done - self._before) / seconds
        counted = f"{self.done:,}{share} {self.unit}"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        figures = {"done": self.done, "total": self.total, "unit": self.unit, "seconds": round(seconds, 3)}
        note = f", {self._note}" if self._note else ""
        log.info(
            "%s: %s, %.1f s, %s/s%s", self.name, counted, seconds, speed, note, extra={"figures": figures}
        )


@contextmanager
def progress(
    name: str, total: int | None, unit: str, counted: bool = True, already_done: int = 0
) -> Iterator[Progress]:
    shown = Progress(name, total, unit, counted, already_done)
    try:
        yield shown
    finally:
        shown.finish()
