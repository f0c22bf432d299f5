"""Second moments of a store beside the floor of the matrix product alone; and the kernel without Ray.

    python -m benchmarks.second_moments [folder=runs/bench] [rows=1000000] [repeats=3]

The real path widens float16 rows to float64 and multiplies in float64. The floor is X^T X of as many rows, in
memory already, in products of a row group's size, on all cores, one thread each; the same in float32 is
there to compare with. The real path's time is that of a process, starts of Python and Ray included.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import psutil

from benchmarks.data import make_store
from benchmarks.fit import spread, timed

DIM = 1280

OURS = """
import sys
from revision_ray.align.map_reduce import store_moments
from revision_ray.data.store import open_stores
store = open_stores([sys.argv[1]], "text")
moments, rejected = store_moments(store, "second moments", second=True)
assert moments.count == store.num_rows and not rejected
"""

# Run in a process for each core, of one thread, as the real path is.
PRODUCT = """
import sys, time
import numpy as np
from benchmarks.data import unit_rows
rows, dtype = int(sys.argv[1]), sys.argv[2]
block_ND = unit_rows(2048, int(sys.argv[3]), seed=0).astype(dtype)
out_DD = np.empty((block_ND.shape[1],) * 2, dtype)
np.matmul(block_ND.T, block_ND, out=out_DD)
start = time.perf_counter()
for _ in range(-(-rows // len(block_ND))):
    np.matmul(block_ND.T, block_ND, out=out_DD)  # NumPy sees the transpose and halves the work (syrk)
print(time.perf_counter() - start)
"""

KERNEL = """
import sys, time
from benchmarks.data import unit_rows
from revision_ray.align.moments import RowSums
from revision_ray.core.cluster import one_thread
rows, dim = int(sys.argv[1]), int(sys.argv[3])
block_ND = unit_rows(2048, dim, seed=0)
with one_thread():
    sums = RowSums(dim, second=True)
    sums.add(block_ND)
    start = time.perf_counter()
    for _ in range(-(-rows // len(block_ND))):
        sums.add(block_ND)
print(time.perf_counter() - start)
"""


def on_every_core(program: str, rows: int, dtype: str, cores: int) -> float:
    """Seconds that the slowest of `cores` processes, of one thread each, took for its share of the rows."""
    command = [sys.executable, "-c", program, str(rows // cores), dtype, str(DIM)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=single_threaded())
        for _ in range(cores)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{command} failed")
    return max(map(float, said))


def single_threaded() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def ratio(ones: list[float], others: list[float]) -> str:
    return spread([one / other for one, other in zip(ones, others, strict=True)])


def main(folder: Path, rows: int, repeats: int) -> dict:
    cores = psutil.cpu_count() or 1
    store = make_store(folder / f"text-{rows}", "text", rows, DIM)
    ours, kernel, double, single, peaks = [], [], [], [], []
    for _ in range(repeats):  # interleaved, so that drift of the machine hits all alike
        seconds, peak = timed([sys.executable, "-c", OURS, store])
        ours.append(seconds)
        peaks.append(peak)
        kernel.append(on_every_core(KERNEL, rows, "", cores))
        double.append(on_every_core(PRODUCT, rows, "float64", cores))
        single.append(on_every_core(PRODUCT, rows, "float32", cores))
    return {
        "rows, dimension, cores": f"{rows}, {DIM}, {cores}",
        "second moments of a store (float64), start of Ray included, seconds": spread(ours),
        "the kernel alone, rows in memory as float16, seconds": spread(kernel),
        "floor: the product alone in float64, seconds": spread(double),
        "the product alone in float32, seconds": spread(single),
        "second moments over the float64 floor": ratio(ours, double),
        "the kernel over the float64 floor": ratio(kernel, double),
        "second moments over the float32 product": ratio(ours, single),
        "floor, Gflop/s (N D^2, half of the product)": round(
            rows * DIM**2 / statistics.median(double) / 1e9, 1
        ),
        "largest resident set of a process, MB": round(max(peaks) / 1e6),
    }


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    result = main(
        Path(options.get("folder", "runs/bench")),
        int(options.get("rows", 1_000_000)),
        int(options.get("repeats", 3)),
    )
    print(json.dumps(result, indent=2))
