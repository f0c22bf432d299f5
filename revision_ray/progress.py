"""Progress as a person or a job log wants it: a bar on a terminal, one clean line at intervals elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from revision_ray.metrics import record_progress

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `unit`s towards `total` and shows them; `note` holds further figures to show.

    They are counted for Prometheus, too, unless another of the workers that share the progress does that.
    Work that a run before has `already_done` counts towards the total, not for the speed.
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
