"""Synthetic embeddings for benchmarks: offset clouds of unit rows, written as stores and as pickles."""

import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from revision_ray.core import storage
from revision_ray.data import shards
from revision_ray.data.shards import EmbeddingTable, EncoderIdentity, Manifest, Modality, ShardFooter

ROWS_PER_SHARD = 20_000
ENCODER = EncoderIdentity(name="synthetic", fingerprint="0" * 64)


def unit_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    """float16 (N, D): a decaying spectrum around an offset centroid, scaled to unit length."""
    generator = np.random.default_rng(seed)
    spread_D = np.arange(1, dim + 1) ** -0.7
    rows_ND = generator.standard_normal((num_rows, dim), np.float32) * spread_D.astype(np.float32)
    rows_ND += generator.standard_normal(dim).astype(np.float32) * 2 / dim**0.5
    return (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float16)


def make_store(
    folder: Path, modality: Modality, num_rows: int, dim: int, texts: list[str] | None = None
) -> str:
    """A store of `num_rows` rows; shards are one random block with its columns rotated, so all differ."""
    manifest_path = folder / shards.MANIFEST
    if manifest_path.exists():
        return str(folder)
    block_ND = unit_rows(ROWS_PER_SHARD, dim, seed=len(modality))
    footer = ShardFooter(modality=modality, embedding_dim=dim, dtype="float16", encoder=ENCODER)
    entries = []
    for start in range(0, num_rows, ROWS_PER_SHARD):
        size = min(ROWS_PER_SHARD, num_rows - start)
        # Rotated rows of both clouds differ in nothing that costs time; the rotation keeps content distinct.
        rows_ND = np.roll(block_ND[:size], start // ROWS_PER_SHARD, axis=1)
        ids = [f"{row:09d}" for row in range(start, start + size)]
        uri = str(folder / f"part-{start:09d}.parquet")
        said = texts[start : start + size] if texts else ["a caption"] * size
        columns = {"text": pa.array(said), "truncated": pa.array([False] * size)}
        table = EmbeddingTable(ids=ids, embedding_ND=rows_ND, columns=columns if modality == "text" else {})
        entries.append(shards.write_shard(uri, table, footer))
    manifest = Manifest(
        modality=modality,
        embedding_dim=dim,
        dtype="float16",
        num_rows=num_rows,
        num_rejected=0,
        num_truncated=0,
        domain="synthetic",
        encoder=ENCODER,
        shards=tuple(entries),
    )
    storage.write_json(str(manifest_path), asdict(manifest))
    return str(folder)


def make_pickles(path: Path, modality: Modality, num_rows: int, dim: int) -> str:
    """One part in the reference's format: a pickled list of records."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows_ND = unit_rows(num_rows, dim, seed=len(modality))
        content = "caption" if modality == "text" else "image_path"
        records = [{"id": str(n), "embed": row, content: "x"} for n, row in enumerate(rows_ND)]
        path.write_bytes(pickle.dumps(records))
    return str(path)
