"""Small embedding stores with a modality gap, for the tests of everything that reads one."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from revision_ray.core import storage
from revision_ray.data import shards
from revision_ray.data.shards import EmbeddingTable, EncoderIdentity, Manifest, Modality, ShardFooter

ENCODER = EncoderIdentity(name="tiny", fingerprint="f" * 64)


def cloud(num_rows: int, dim: int, modality: Modality, seed: int = 0) -> np.ndarray:
    """float16 (N, D): anisotropic rows around the modality's own centre, nearly of unit length."""
    centres = np.random.default_rng(7).standard_normal((2, dim)) * 1.5
    spread_D = np.arange(1, dim + 1) ** (-0.5 if modality == "text" else -0.8)
    generator = np.random.default_rng([seed, modality == "text"])
    rows_ND = generator.standard_normal((num_rows, dim)) * spread_D * 2 + centres[int(modality == "text")]
    return (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float16)


def unit(rows_ND: np.ndarray) -> np.ndarray:
    """float64 rows of length one."""
    rows_ND = rows_ND.astype(np.float64)
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def write_store(
    folder: Path,
    rows_ND: np.ndarray,
    modality: Modality = "text",
    *,
    rows_per_shard: int = 700,
    ids: list[str] | None = None,
    encoder: EncoderIdentity = ENCODER,
    domain: str = "tests",
    texts: list[str] | None = None,
) -> str:
    """A finished store of these rows, in their dtype; its URI."""
    ids = ids or [f"{modality}{row}" for row in range(len(rows_ND))]
    entries = []
    for start in range(0, len(rows_ND), rows_per_shard):
        name = f"part-{start:06d}.parquet"
        chosen = slice(start, start + rows_per_shard)
        said = texts[chosen] if texts else None
        entries.append(write_part(folder / name, rows_ND[chosen], ids[chosen], modality, encoder, said))
    manifest = Manifest(
        modality=modality,
        embedding_dim=rows_ND.shape[1],
        dtype=str(rows_ND.dtype),
        num_rows=len(rows_ND),
        num_rejected=0,
        num_truncated=0,
        domain=domain,
        encoder=encoder,
        shards=tuple(entries),
    )
    storage.write_json(str(folder / shards.MANIFEST), asdict(manifest))
    return str(folder)


def write_part(
    path: Path, rows_ND: np.ndarray, ids: list[str], modality: Modality = "text",
    encoder: EncoderIdentity = ENCODER, texts: list[str] | None = None,
) -> shards.ShardEntry:  # fmt: skip
    """One shard; the texts are the ids' unless given."""
    footer = ShardFooter(
        modality=modality,
        embedding_dim=rows_ND.shape[1],
        dtype=str(rows_ND.dtype),
        encoder=encoder,
        split=storage.sha256(path.name.encode())[:16],
        split_uri=path.name,
    )
    contents = pa.array(texts or [f"a text named {row_id}" for row_id in ids])
    columns = {"text": contents, "truncated": pa.array([False] * len(ids))}
    columns = columns if modality == "text" else {"uri": contents}
    return shards.write_shard(
        str(path), EmbeddingTable(ids=ids, embedding_ND=rows_ND, columns=columns), footer
    )
