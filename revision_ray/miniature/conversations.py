"""Questions about the world's images as LLaVA records, for stage 2. No Ray."""

import json

from revision_ray import storage
from revision_ray.miniature import dataset
from revision_ray.miniature.dataset import SPLITS, DatasetConfig


def write_conversations(config: DatasetConfig, split: str, num_samples: int, output: str) -> int:
    """The JSONL file `output` holds `num_samples` records, a question and its answer each, about the first
    scenes of `split`; returns how many images they are about.

    `image` is the scene's id, which is the image's id in an embedding store of that split.
    """
    first = SPLITS.index(split) * dataset.SCENES_PER_SPLIT
    records: list[dict] = []
    num_images = 0
    while len(records) < num_samples:
        for asked in dataset.questions(config, first + num_images):
            turns = [("human", f"<image>\n{asked['text']}"), ("gpt", asked["answer"])]
            records.append(
                {
                    "id": asked["id"],
                    "image": asked["scene"],
                    "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
                }
            )
        num_images += 1
    lines = [json.dumps(record) + "\n" for record in records[:num_samples]]
    storage.write_bytes(output, "".join(lines).encode())
    return num_images
