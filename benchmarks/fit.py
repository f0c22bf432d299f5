"""The fit beside the reference's passes and beside reading alone; its memory, and its cost per row against N.

    python -m benchmarks.fit [folder=runs/bench] [rows=1000000] [most=4000000] [repeats=3]

Every figure is wall time of a process of its own, Ray's start included.
"""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from benchmarks.data import make_pickles, make_store

DIM = 1280
REFERENCE_ROWS = 100_000


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds of `command`, and the largest resident set of any of its processes in bytes."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1.0):  # listing all processes is not free on two cores
            try:
                for child in [process, *process.children(recursive=True)]:
                    memory = child.memory_info()
                    peak = max(peak, memory.rss)
            except psutil.NoSuchProcess:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{errors[-4000:]}")
    return seconds, peak


def fit_once(texts: str, images: str, folder: Path) -> tuple[float, int]:
    output = folder / "fit"
    shutil.rmtree(output, ignore_errors=True)
    return timed([sys.executable, "jobs/fit.py", f"texts={texts}", f"images={images}", f"output={output}"])


READ_ALL = """
import sys, time, pyarrow.parquet as pq, glob
start = time.perf_counter()
for folder in sys.argv[1:]:
    for path in sorted(glob.glob(folder + "/part-*.parquet")):
        pq.read_table(path, columns=["embedding"], memory_map=True)
print(time.perf_counter() - start)
"""


def read_once(*folders: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *folders], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(folder: Path, rows: int, most: int, repeats: int) -> dict:
    text_pickle = make_pickles(folder / "text.pkl", "text", REFERENCE_ROWS, DIM)
    image_pickle = make_pickles(folder / "image.pkl", "image", REFERENCE_ROWS, DIM)
    stores = {
        n: (
            make_store(folder / f"text-{n}", "text", n, DIM),
            make_store(folder / f"image-{n}", "image", n, DIM),
        )
        for n in sorted({REFERENCE_ROWS, rows, most})
    }
    read_once(*stores[rows])  # warm page cache for both sides
    reference, ours, floor, peaks = [], [], [], []
    for _ in range(repeats):  # interleaved, so that drift of the machine hits all alike
        passes = [sys.executable, "benchmarks/reference_passes.py", text_pickle, image_pickle]
        reference.append(timed(passes)[0] * rows / REFERENCE_ROWS)
        floor.append(read_once(*stores[rows]))
        seconds, peak = fit_once(*stores[rows], folder)
        ours.append(seconds)
        peaks.append(peak)
    per_row = {n: min(fit_once(*stores[n], folder)[0] for _ in range(2)) / (2 * n) for n in stores}
    marginal = (per_row[most] * 2 * most - per_row[REFERENCE_ROWS] * 2 * REFERENCE_ROWS) / (
        2 * (most - REFERENCE_ROWS)
    )
    return {
        "rows per side": rows,
        "fit, seconds": spread(ours),
        "reference passes, seconds (100 k rows a side, scaled to N)": spread(reference),
        "times faster": spread([a / b for a, b in zip(reference, ours, strict=True)]),
        "reading alone, seconds": spread(floor),
        "fit over reading": spread([a / b for a, b in zip(ours, floor, strict=True)]),
        "largest resident set of a process, MB": round(max(peaks) / 1e6),
        "microseconds a row by N": {n: round(value * 1e6, 2) for n, value in per_row.items()},
        "microseconds a row without start-up": round(marginal * 1e6, 2),
    }


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    result = main(
        Path(options.get("folder", "runs/bench")),
        int(options.get("rows", 1_000_000)),
        int(options.get("most", 4_000_000)),
        int(options.get("repeats", 3)),
    )
    print(json.dumps(result, indent=2))
