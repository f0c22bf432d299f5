"""The sums of 10,000 tasks to one: merged for real, flat and as a tree, and simulated on a cluster's clock.

    python -m benchmarks.reduction [partials=10000] [dim=1280] [fan_in=32]

The fit merges flat: its driver adds every task's sums. The tree is what would relieve it: tasks merge
`fan_in` results into one, until no more than that many are left for the driver. Merging is exact, so both
give the same bits, in any order.
"""

import heapq
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from revision_ray.align.moments import Moments, of_block

_DISTINCT = 64  # results that are really made; the others repeat them


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What one partial result costs where it is merged."""

    num_bytes: int
    seconds: float
    """Of parsing and adding it."""
    bytes_per_second: float
    """At which it arrives."""

    @property
    def service(self) -> float:
        return self.seconds + self.num_bytes / self.bytes_per_second


def partial_results(dim: int, second: bool, number: int = _DISTINCT) -> list[bytes]:
    """Serialised moments of random unit rows, as tasks return them."""
    generator = np.random.default_rng(0)
    return [
        of_block(generator.standard_normal((512, dim), np.float32), second=second, offset=index)[0].to_bytes()
        for index in range(number)
    ]


def merged(parts: Sequence[bytes], dim: int, second: bool) -> Moments:
    total = Moments.zeros(dim, second)
    for part in parts:
        total.merge(Moments.from_bytes(part))
    return total


def tree_merged(parts: Sequence[bytes], dim: int, second: bool, fan_in: int) -> tuple[Moments, list[int]]:
    """As `merged`, level by level; and how many merges each level made."""
    levels = []
    while len(parts) > fan_in:
        parts = [
            merged(parts[start : start + fan_in], dim, second).to_bytes()
            for start in range(0, len(parts), fan_in)
        ]
        levels.append(len(parts))
    return merged(parts, dim, second), [*levels, 1]


def same_bits(first: Moments, second: Moments) -> bool:
    return first.to_bytes() == second.to_bytes()


def task_ends(number: int, slots: int, task_seconds: float, seed: int = 0) -> np.ndarray:
    """When each of `number` tasks ends on `slots` workers: durations vary by a fifth, one in a hundred takes
    three times as long."""
    generator = np.random.default_rng(seed)
    durations = task_seconds * generator.lognormal(0.0, 0.2, number)
    durations[generator.random(number) < 0.01] *= 3
    free = [0.0] * min(slots, number)
    ends = np.empty(number)
    for index, duration in enumerate(durations):
        ends[index] = heapq.heappop(free) + duration
        heapq.heappush(free, ends[index])
    return np.sort(ends)


def flat(ends: np.ndarray, merge: Merge) -> dict[str, float]:
    """The driver takes results one after the other, as they come."""
    done, finished = 0.0, []
    for end in ends:
        done = max(done, float(end)) + merge.service
        finished.append(done)
    return _summary(ends, done, len(ends) * merge.service, _waiting(ends, finished, 1) * merge.num_bytes)


def tree(ends: np.ndarray, merge: Merge, fan_in: int) -> dict[str, float]:
    """Any `fan_in` results of a level that are there become one of the next, on a worker."""
    level, waiting = ends, 0
    while len(level) > fan_in:
        groups = [level[start : start + fan_in] for start in range(0, len(level), fan_in)]
        finished = np.sort([float(group[-1]) + len(group) * merge.service for group in groups])
        waiting, level = max(waiting, _waiting(level, finished, fan_in)), finished
    done = 0.0
    for end in level:
        done = max(done, float(end)) + merge.service
    return _summary(ends, done, len(level) * merge.service, waiting * merge.num_bytes)


def _waiting(ends: np.ndarray, finished: Sequence[float] | np.ndarray, taken: int) -> int:
    """The most results that have come and are not merged yet, `taken` at each time in `finished`."""
    gone = np.minimum(np.searchsorted(finished, ends) * taken, np.arange(len(ends)))
    return int(np.max(np.arange(1, len(ends) + 1) - gone))


def _summary(ends: np.ndarray, done: float, driver_busy: float, waiting_bytes: float) -> dict[str, float]:
    return {
        "tasks end after, s": round(float(ends[-1]), 2),
        "total stands, s later": round(done - float(ends[-1]), 2),
        "driver busy, s": round(driver_busy, 2),
        "most bytes waiting": int(waiting_bytes),
    }


def measured(dim: int, second: bool, number: int, fan_in: int) -> dict[str, float | bool | list[int]]:
    """`number` results merged flat in a random order and as a tree, in this process."""
    distinct = partial_results(dim, second, min(number, _DISTINCT if not second else 8))
    chosen = np.random.default_rng(1).integers(len(distinct), size=number)
    parts = [distinct[index] for index in chosen]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    total = merged(parts, dim, second)
    flat_seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    as_tree, levels = tree_merged(parts, dim, second, fan_in)
    tree_seconds = time.perf_counter() - start
    return {
        "partial results": number,
        "bytes of one": len(parts[0]),
        "flat, s": round(flat_seconds, 3),
        "milliseconds a merge": round(flat_seconds / number * 1e3, 3),
        "memory grew by, MB": round((after - before) / 1e3, 1),
        "tree, s in all": round(tree_seconds, 3),
        "merges of each level": levels,
        "same bits": same_bits(total, as_tree),
    }


def main(partials: int, dim: int, fan_in: int) -> dict[str, object]:
    found: dict[str, object] = {"fan-in": fan_in, "dim": dim}
    for name, second, number in (("means", False, partials), ("second moments", True, min(partials, 300))):
        real = measured(dim, second, number, fan_in)
        merge = Merge(
            num_bytes=int(real["bytes of one"]),  # type: ignore[arg-type]
            seconds=float(real["milliseconds a merge"]) / 1e3,  # type: ignore[arg-type]
            bytes_per_second=12.5e9 / 8,
        )
        # 100 nodes of 32 CPUs; a task reads 336 MB over its share of 12.5 Gbit/s.
        ends = task_ends(partials, 3200, 64 * 2048 * dim * 2 / (12.5e9 / 8 / 32))
        found[name] = {
            "measured": real,
            "simulated, flat": flat(ends, merge),
            "simulated, tree": tree(ends, merge, fan_in),
            "levels": 1 + max(0, math.ceil(math.log(partials, fan_in)) - 1),
        }
    return found


if __name__ == "__main__":
    options = {key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])}
    result = main(options.get("partials", 10_000), options.get("dim", 1280), options.get("fan_in", 32))
    print(json.dumps(result, indent=2))
