"""Questions about the world's images as LLaVA records, for stage 2. No Ray."""

import json
from dataclasses import dataclass
from typing import Literal

from revision_ray import config, storage
from revision_ray.config import MISSING
from revision_ray.errors import ConfigError, DataError
from revision_ray.miniature import dataset
from revision_ray.miniature.dataset import SPLITS, DatasetConfig

FILE = "conversations.jsonl"


@dataclass(frozen=True, kw_only=True)
class ConversationsJob:
    """Write questions about the images of a rendered world, with their answers, as conversations."""

    world: str = MISSING
    """Output of jobs/render.py."""
    split: Literal["pairs", "heldout", "images", "texts"] = "images"
    """Whose scenes are asked about, from the first one on."""
    num_samples: int = 500
    """Questions, each of them a conversation."""
    output: str = MISSING
    """Directory of conversations.jsonl."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples}; expected 1 or more")


def run(job: ConversationsJob) -> str:
    """The conversations stand at the job's output; how many, about how many images.

    Raises:
        DataError: there is no finished world.
    """
    manifest = storage.join(job.world, "manifest.json")
    if not storage.exists(manifest):
        raise DataError(f"{job.world}: no manifest.json there; name the output of jobs/render.py")
    settings = storage.read_json(manifest)["settings"]
    world = config.from_mapping(DatasetConfig, {**settings, "output": job.world}, manifest)
    output = storage.join(storage.absolute(job.output), FILE)
    num_images = write_conversations(world, job.split, job.num_samples, output)
    return f"{job.num_samples} questions about {num_images} images: {output}"


def write_conversations(world: DatasetConfig, split: str, num_samples: int, output: str) -> int:
    """The JSONL file `output` holds `num_samples` records, a question and its answer each, about the first
    scenes of `split`; returns how many images they are about. A file that holds them already is not touched.

    `image` is the scene's id, which is the image's id in an embedding store of that split.
    """
    first = SPLITS.index(split) * dataset.SCENES_PER_SPLIT
    records: list[dict] = []
    num_images = 0
    while len(records) < num_samples:
        for asked in dataset.questions(world, first + num_images):
            turns = [("human", f"<image>\n{asked['text']}"), ("gpt", asked["answer"])]
            records.append(
                {
                    "id": asked["id"],
                    "image": asked["scene"],
                    "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
                }
            )
        num_images += 1
    content = "".join(json.dumps(record) + "\n" for record in records[:num_samples]).encode()
    # Its time says to later stages whether it has changed.
    if not storage.exists(output) or storage.read_bytes(output) != content:
        storage.write_bytes(output, content)
    return num_images
