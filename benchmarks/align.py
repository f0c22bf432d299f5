"""Aligning in a Ray Data pipeline beside reading the same rows alone.

python -m benchmarks.align [folder=runs/bench] [rows=200000] [repeats=3]
"""

import json
import logging
import statistics
import sys
import time
from pathlib import Path

import ray

from benchmarks.data import make_store
from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import AlignRows, read_rows
from revision_ray.align.fit import FitJob, run_fit
from revision_ray.align.maps import Affine
from revision_ray.core.cluster import data_context
from revision_ray.data.store import Store, open_stores

DIM = 1280


def seconds(store: Store, affine: Affine | None) -> float:
    """Wall seconds to stream every row to a consumer that drops it."""
    start = time.perf_counter()
    with data_context():
        dataset = read_rows(store)
        if affine is not None:
            dataset = dataset.map_batches(AlignRows(affine), batch_size=None, zero_copy_batch=True)
        for bundle in dataset.iter_internal_ref_bundles():
            del bundle
    return time.perf_counter() - start


def main(folder: Path, rows: int, repeats: int) -> dict:
    texts = make_store(folder / f"text-{rows}", "text", rows, DIM)
    images = make_store(folder / f"image-{rows}", "image", rows, DIM)
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    store = open_stores([texts], "text")
    run_fit(FitJob(texts=texts, images=images, output=str(folder / f"fit-{rows}")))
    affine = load_alignment(str(folder / f"fit-{rows}")).affine
    seconds(store, None)
    alone, aligned = [], []
    for _ in range(repeats):
        alone.append(seconds(store, None))
        aligned.append(seconds(store, affine))
    ratios = [a / b for a, b in zip(aligned, alone, strict=True)]
    return {
        "rows": rows,
        "reading alone, microseconds a row": round(statistics.median(alone) / rows * 1e6, 2),
        "reading and aligning, microseconds a row": round(statistics.median(aligned) / rows * 1e6, 2),
        "aligning over reading": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
    }


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    result = main(
        Path(options.get("folder", "runs/bench")).absolute(),
        int(options.get("rows", 200_000)),
        int(options.get("repeats", 3)),
    )
    print(json.dumps(result, indent=2))
