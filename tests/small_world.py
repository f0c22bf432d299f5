"""A few pairs of the miniature world on disk, and a monitor of training on so few."""

import json
from pathlib import Path

from revision_ray.miniature import dataset
from revision_ray.train.monitor import MonitorConfig

MONITOR = MonitorConfig(
    every_steps=2, num_probe=51, freeze_step=2, gradient_batches=2, late_window=2, top_components=16
)


def write_world(output: Path, num_pairs: int, num_heldout: int) -> Path:
    """`output`, with the pairs in `pairs` and `heldout`."""
    settings = dataset.DatasetConfig(
        output=str(output), num_pairs=num_pairs, num_heldout=num_heldout, num_images=0, num_texts=0
    )
    for part in dataset.parts(settings):
        dataset.write_part(settings, part)
    return output


def lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
