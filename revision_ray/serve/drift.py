"""Detect drift: check whether served images are like those that the model's texts were aligned to.

A model trained on aligned texts expects image embeddings around the fit's image centroid. Images of another
domain lie elsewhere, and the model's answers about them are less reliable.

The moments of served images are collected as in a fit. The distance between their centroid and the fit's is
compared with the *sampling floor* (`align.alignment`). For unit rows T = 1 - ||mu||^2, so a change of the
trace also moves the centroid, and the distance alone decides.

Shapes: N rows, D embedding dim.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from revision_ray.align.alignment import FLOORS, MIN_ROWS, Alignment, load_alignment, sampling_floor
from revision_ray.align.moments import NUM_BUCKETS, Moments, jackknife_standard_error, merged, of_block
from revision_ray.core.errors import AlignmentError
from revision_ray.serve.metrics import instruments

TOO_FEW, ALIKE, DRIFTED, NO_FIT = "too few images", "like the fit's images", "drifted", "no fit"

# With enough images any mixture differs from the fit's by more than chance. A distance below this share of
# the spread sqrt(T) still counts as alike. The value is a judgement: modality gaps are half a spread or more.
TOLERANCE = 0.05
# The report covers the last WINDOW images, in NUM_PARTS parts. The oldest part is dropped first, so that a
# change is noticed even after months of service.
WINDOW, NUM_PARTS = 20_000, 8
# Seconds between two settings of the gauges.
_PUBLISH_S = 2.0


class Drift:
    """Moments of the last `window` to 9/8 `window` served images, and their comparison with the fit's.

    Raises:
        AlignmentError: a fit of `others` has another dimension or image encoder than `fit`.
    """

    def __init__(self, fit: Alignment | None, others: Sequence[Alignment] = (), window: int = WINDOW) -> None:
        self.fit, self.others, self.window = fit, others, window
        self.num_invalid = 0
        self._parts: deque[Moments] = deque()
        self._num_blocks = 0
        if fit is not None:
            for other in others:
                _check_comparable(fit, other)

    def add(self, rows_ND: np.ndarray) -> None:
        """Add embeddings (N, D) of served images, of any float dtype and any norm."""
        # Rows that arrived together share a bucket (64 of them), so the jackknife sees how alike they are.
        moments, invalid = of_block(rows_ND, offset=self._num_blocks % NUM_BUCKETS)
        self._num_blocks += 1
        self.num_invalid += len(invalid)
        self.merge(moments)

    def merge(self, moments: Moments) -> None:
        """Add the moments of served images.

        Raises:
            AlignmentError: their dimension is not the fit's.
        """
        if self.fit and moments.embedding_dim != self.fit.embedding_dim:
            raise AlignmentError(
                f"served images have embedding_dim {moments.embedding_dim}, the fit has "
                f"{self.fit.embedding_dim}; give the fit that the model was trained with"
            )
        if self._parts and self._parts[-1].count < self.window / NUM_PARTS:
            self._parts[-1].merge(moments)
        else:
            self._parts.append(merged([moments], moments.embedding_dim))
        while sum(part.count for part in self._parts) - self._parts[0].count >= self.window:
            self._parts.popleft()

    def moments(self) -> Moments | None:
        """Return the moments of the images in the window; None before the first image."""
        if not any(part.count for part in self._parts):
            return None
        return merged(self._parts, self._parts[0].embedding_dim)

    def report(self) -> dict[str, Any]:
        """Return the content of /v1/drift.

        Distances are Euclidean, between centroids of unit rows. Values that need images or a fit are None
        without them.
        """
        moments, fit = self.moments(), self.fit
        report: dict[str, Any] = {
            "verdict": NO_FIT if fit is None else TOO_FEW,
            "num_images": moments.count if moments else 0,
            "num_invalid": self.num_invalid,
            "window": self.window,
            "domain": fit.domain if fit else None,
            "centroid_distance": None,
            "sampling_floor": None,
            "standard_error": None,
            "trace": moments.trace if moments else None,
            "fit_trace": fit.image_trace if fit else None,
            "trace_ratio": None,
            "nearest": None,
        }
        if moments is None or fit is None:
            return report
        distance = float(np.linalg.norm(moments.centroid - fit.image_centroid))
        floor = sampling_floor(fit.image_trace, fit.num_images, moments.count)
        report |= {
            "centroid_distance": distance,
            "sampling_floor": floor,
            "standard_error": _standard_error(moments, fit.image_centroid),
            "trace_ratio": moments.trace / fit.image_trace if fit.image_trace else None,
        }
        if moments.count >= MIN_ROWS:
            bound = max(FLOORS * floor, TOLERANCE * math.sqrt(max(fit.image_trace, 0.0)))
            report["verdict"] = DRIFTED if distance > bound else ALIKE
            report["nearest"] = self._nearest(moments.centroid, distance, floor)
        return report

    def _nearest(self, centroid: np.ndarray, distance: float, floor: float) -> dict[str, Any] | None:
        """Return the nearest fit of another domain if it is nearer than `fit` by more than the floor."""
        found = [(float(np.linalg.norm(centroid - other.image_centroid)), other) for other in self.others]
        if not found:
            return None
        nearest, other = min(found, key=lambda pair: pair[0])
        if nearest >= distance - floor:
            return None
        return {
            "domain": other.domain,
            "fit": other.content_hash[:12],
            "centroid_distance": nearest,
            "hint": f"the images served are nearer to the fit of {_named(other)} ({nearest:.3f}) than to the "
            f"one of this model ({distance:.3f}); serve a model whose texts that fit aligned",
        }


def _standard_error(moments: Moments, centroid: np.ndarray) -> float | None:
    """Return the standard error of the distance between the moments' centroid and a fixed `centroid`.

    None where the images fill fewer than two buckets.
    """
    _, rest_GD = moments.leave_one_out()
    error = float(jackknife_standard_error(np.linalg.norm(rest_GD - centroid, axis=1)))
    return None if math.isnan(error) else error


def _check_comparable(fit: Alignment, other: Alignment) -> None:
    if other.embedding_dim != fit.embedding_dim:
        raise AlignmentError(
            f"fits: the fit of {_named(other)} has embedding_dim {other.embedding_dim}, the model's has "
            f"{fit.embedding_dim}; name fits of the same encoder"
        )
    known = fit.image_encoder.fingerprint and other.image_encoder.fingerprint
    if known and other.image_encoder.fingerprint != fit.image_encoder.fingerprint:
        raise AlignmentError(
            f"fits: the fit of {_named(other)} was made with image encoder {other.image_encoder.name}, the "
            f"model's with {fit.image_encoder.name}; name fits of the same encoder"
        )


def _named(fit: Alignment) -> str:
    return f"domain {fit.domain!r}" if fit.domain else f"content hash {fit.content_hash[:12]}"


class DriftMonitor:
    """Serve deployment with a single replica that collects the embeddings of all served images.

    A replica that is replaced starts to count from zero.

    Raises:
        AlignmentError: a fit cannot be loaded, or `others` cannot be compared with `fit`.
    """

    def __init__(self, fit: str, others: Sequence[str] = (), window: int = WINDOW) -> None:
        self.drift = Drift(
            load_alignment(fit) if fit else None, [load_alignment(uri) for uri in others], window
        )
        self._will_publish = False

    async def add(self, embeddings: np.ndarray) -> None:
        """Add embeddings (N, D) of served images; update the gauges within a few seconds."""
        self.drift.add(embeddings)
        if not self._will_publish:
            self._will_publish = True
            asyncio.get_running_loop().call_later(_PUBLISH_S, self._publish)

    async def report(self) -> dict[str, Any]:
        return self.drift.report()

    def _publish(self) -> None:
        self._will_publish = False
        report, gauges = self.drift.report(), instruments()
        gauges.drift_images.set(report["num_images"])
        for gauge, value in (
            (gauges.drift_centroid_distance, report["centroid_distance"]),
            (gauges.drift_sampling_floor, report["sampling_floor"]),
            (gauges.drift_trace_ratio, report["trace_ratio"]),
        ):
            if value is not None:
                gauge.set(value)


_EVERY_S = 0.5
# Most embeddings that wait for a monitor that does not answer; further images are not counted.
_MOST_WAITING = 10_000


class DriftReporter:
    """Sender of embeddings to the monitor's handle, every half second; its failures never reach a caller."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._rows: list[np.ndarray] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, row_D: np.ndarray) -> None:
        """Queue the embedding (D,) of a served image for the monitor; call it in the event loop."""
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
        except Exception:  # images must be served whatever error the monitor has
            self._rows.clear()
        finally:
            self._task = None
