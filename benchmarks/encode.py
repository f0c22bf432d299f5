"""Embedding through the whole pipeline beside the bare encoder on the same rows.

    python -m benchmarks.encode [folder=runs/bench] [rows=4096] [repeats=3]

Both load the same untrained ViT-S-sized image tower (22 M parameters, 112 px) in a process of their own, one
thread each. The rate of the pipeline is over its steady state: from the first shard that stands to the last.
"""

import json
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import ray
import torch
from PIL import Image
from safetensors.torch import save_file

from revision_ray.encode import embed
from revision_ray.encode.embed import EmbedJob
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.encode.pipeline import Resources, encode_images

MODEL = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 112, "layers": 12, "width": 384, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1},
}
ROWS_PER_SHARD = 256
BATCH = 64


def write_encoder(folder: Path) -> EncoderConfig:
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": {"size": 112}})
    )
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return EncoderConfig(kind="open_clip", model=str(folder))


def write_images(folder: Path, number: int) -> Path:
    if len(list(folder.glob("*.jpg"))) != number:
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        for row in range(number):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((160, 160), Image.Resampling.BICUBIC).save(
                folder / f"{row:05d}.jpg"
            )
    return folder


@ray.remote(num_cpus=1)
def bare(encoder: EncoderConfig, folder: str, number: int) -> float:
    """Rows a second of the tower alone, pixels prepared before the clock starts."""
    torch.set_num_threads(1)
    module = backend(encoder)
    prepare, tower = module.image_preparer(encoder), module.image_tower(encoder)
    paths = sorted(Path(folder).glob("*.jpg"))[:number]
    pixels_NCHW = np.stack([prepare(Image.open(path).convert("RGB")) for path in paths])
    encode_images(tower, pixels_NCHW[:BATCH], BATCH)
    start = time.perf_counter()
    encode_images(tower, pixels_NCHW, BATCH)
    return len(pixels_NCHW) / (time.perf_counter() - start)


def piped(encoder: EncoderConfig, images: Path, output: Path) -> float:
    """Rows a second of the pipeline between its first shard and its last, from the shards' times."""
    embed.run_embed(
        EmbedJob(
            images=str(images),
            output=str(output),
            encoder=encoder,
            batch_size=BATCH,
            rows_per_shard=ROWS_PER_SHARD,
            resources=Resources(cpus_per_actor=1, cpus_per_task=0.5, max_actors=1),
        )
    )
    times = sorted(path.stat().st_mtime_ns for path in output.glob("part-*"))
    return (len(times) - 1) * ROWS_PER_SHARD / ((times[-1] - times[0]) / 1e9)


def main(folder: Path, rows: int, repeats: int) -> dict:
    encoder, images = write_encoder(folder / "encoder"), write_images(folder / f"photos-{rows}", rows)
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    alone, whole = [], []
    for repeat in range(repeats):
        alone.append(ray.get(bare.remote(encoder, str(images), min(rows, 1024))))
        whole.append(piped(encoder, images, folder / f"encoded-{time.time_ns()}-{repeat}"))
    ratios = [a / b for a, b in zip(whole, alone, strict=True)]
    return {
        "rows": rows,
        "bare encoder, rows a second": round(statistics.median(alone), 1),
        "pipeline, rows a second": round(statistics.median(whole), 1),
        "pipeline over bare": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
    }


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    result = main(
        Path(options.get("folder", "runs/bench")).absolute(),
        int(options.get("rows", 4096)),
        int(options.get("repeats", 3)),
    )
    print(json.dumps(result, indent=2))
