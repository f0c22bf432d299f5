"""What both stages of training take: stores, a fit, a language model, and conversations about the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from embedding_stores import cloud, write_store
from tiny_language_model import WORDS, write_language_model

from revision_ray.align.fit import FitJob
from revision_ray.align.fit import run_fit as fit

DIM = 16


def write_training_data(folder: Path, num_rows: int, num_conversations: int) -> list[dict[str, Any]]:
    """`folder` holds texts, images, fit, language_model and data.jsonl; the records of the last."""
    generator = np.random.default_rng(0)
    captions = [" ".join(generator.choice(WORDS[:-1], generator.integers(2, 9))) for _ in range(num_rows)]
    texts = write_store(folder / "texts", cloud(num_rows, DIM, "text"), rows_per_shard=80, texts=captions)
    images = write_store(folder / "images", cloud(num_rows, DIM, "image"), "image")
    fit(FitJob(texts=texts, images=images, output=str(folder / "fit")))
    write_language_model(folder / "language_model", template="base")
    records: list[dict[str, Any]] = [
        {
            "id": f"c{number}",
            "image": f"image{number}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{captions[number]}"},
                {"from": "gpt", "value": captions[(7 * number) % num_rows]},
            ],
        }
        for number in range(num_conversations)
    ]
    write_records(folder / "data.jsonl", records)
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
