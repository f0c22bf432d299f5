"""Sizes that stand somewhere: rows of listings and footers, parameters in headers, samples of a run."""

import json
import math
from collections.abc import Sequence
from typing import Any

from revision_ray import storage
from revision_ray.data import sources
from revision_ray.data.parquet_rows import footer


def listed_rows(uri: str, images: bool) -> int | None:
    """Rows of a source as far as its listing tells: image files and Parquet; None of anything else."""
    splits = sources.image_splits([uri]) if images else sources.text_splits([uri])
    counted: list[int | None] = []
    for split in splits:
        if split.files:
            counted.append(len(split.files))
        elif split.kind.endswith("_parquet"):
            counted.append(sum(footer(split.uri).rows[split.start : split.stop]))
        else:
            counted.append(None)
    return whole_sum(counted)


def seen_samples(rows: int, optimisation: Any) -> int:
    """Samples that a run sees: of whole epochs all rows, of a broken one whole batches."""
    size = optimisation.global_batch_size
    per_epoch = math.ceil(rows / size)
    steps = math.ceil(per_epoch * optimisation.num_epochs)
    if optimisation.max_steps is not None:
        steps = min(steps, optimisation.max_steps)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    return epochs * rows + min(rest * size, rows)


def counted_parameters(folder: str) -> float | None:
    """Of the language model in a folder of safetensors, from the files' headers; None where there is none."""
    files = [uri for uri, _ in storage.list_files(folder, "*.safetensors")]
    shapes: dict[str, list[int]] = {}
    for uri in files:
        with storage.open_input(uri) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    inner = {name: shape for name, shape in shapes.items() if "language_model" in name}
    counts = [math.prod(shape) for shape in (inner or shapes).values()]
    return float(sum(counts)) if counts else None


def whole_sum(values: Sequence[int | None]) -> int | None:
    """None where a part is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def first_known(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
