"""Embeddings of served images on their way to the monitor: in bundles, and nobody waits for them."""

import asyncio
from typing import Any

import numpy as np

_EVERY_S = 0.5
# More wait for a monitor that does not answer: then images go uncounted, and memory is safe.
_MOST_WAITING = 10_000


class DriftReporter:
    """Hands embeddings to the monitor's handle every half second. None of its failures reaches a caller."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._rows: list[np.ndarray] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, row_D: np.ndarray) -> None:
        """The embedding (D,) of a served image will be counted."""
        if self._monitor is None or len(self._rows) >= _MOST_WAITING:
            return
        self._rows.append(row_D)
        if self._task is None:
            self._task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._rows:
                await asyncio.sleep(_EVERY_S)
                rows, self._rows = self._rows, []
                await asyncio.wait_for(self._monitor.add.remote(np.stack(rows)), timeout=10)
        except Exception:  # whatever the monitor's trouble is: images are served on
            self._rows.clear()
        finally:
            self._task = None
