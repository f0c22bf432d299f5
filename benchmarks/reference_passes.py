"""The baseline: the reference's four passes over pickles in one process, float64, plainly in NumPy.

    python -m benchmarks.reference_passes TEXT.pkl IMAGE.pkl

Pass 1: means of both; pass 2: traces of both; pass 3: mu' of the mapped texts; pass 4: the aligned texts, of
which only the mean is kept, for the gap after. The second copy that the reference writes is left out.
Prints the seconds.
"""

import io
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# What a pickle of arrays names; nothing else is looked up, so that a file of a stranger runs nothing.
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


class Arrays(pickle.Unpickler):
    """At the speed of `pickle.load`: names are looked up once a file."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module_name}.{global_name}: not a part of an array")
        return super().find_class(module_name, global_name)


def rows(path: str) -> Iterator[np.ndarray]:
    for record in Arrays(io.BytesIO(Path(path).read_bytes())).load():
        row = record["embed"].astype(np.float64)
        yield row / np.linalg.norm(row)


def mean(path: str) -> tuple[np.ndarray, int]:
    total, count = 0.0, 0
    for row in rows(path):
        total, count = total + row, count + 1
    return np.asarray(total) / count, count


def trace(path: str, centroid: np.ndarray) -> float:
    total, count = 0.0, 0
    for row in rows(path):
        difference = row - centroid
        total, count = total + difference @ difference, count + 1
    return float(total / count)


def fit(text: str, image: str) -> float:
    """The modality gap after alignment."""
    text_mean, count = mean(text)
    image_mean, _ = mean(image)
    scale = np.sqrt(trace(image, image_mean) / (trace(text, text_mean) + 1e-10))
    drifted = np.zeros_like(text_mean)
    for row in rows(text):
        mapped = image_mean + scale * (row - text_mean)
        drifted += mapped / np.linalg.norm(mapped)
    drifted /= count
    aligned_mean = np.zeros_like(text_mean)
    for row in rows(text):
        mapped = image_mean + scale * (row - text_mean)
        centred = mapped / np.linalg.norm(mapped) - drifted + image_mean
        aligned_mean += centred / np.linalg.norm(centred)
    return float(np.linalg.norm(image_mean - aligned_mean / count))


if __name__ == "__main__":
    start = time.perf_counter()
    fit(sys.argv[1], sys.argv[2])
    print(time.perf_counter() - start)
