"""The import job: the reference code's pickled parts to an embedding store."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import ray

from revision_ray import config, storage
from revision_ray.cluster import connect, user_errors
from revision_ray.config import MISSING
from revision_ray.data import shards
from revision_ray.data.finish import DuplicateIds, Finish, claim, describe, finish_store
from revision_ray.data.reference_pickles import ContentKey, ReferenceRow, read_reference
from revision_ray.data.schema import Rejected
from revision_ray.data.shards import EmbeddingTable, EncoderIdentity, Footer, Modality
from revision_ray.errors import DataError
from revision_ray.progress import progress

_ROWS_PER_SHARD = 8192
_ENDINGS = (".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """Turn the reference code's pickled embeddings into an embedding store; rows keep values and length."""

    input: str = MISSING
    """A pickle, or a directory of them (.pkl, .pickle)."""
    output: str = MISSING
    """Directory of the store."""
    modality: Modality = MISSING
    """text (records with a caption) or image (records with an image_path)."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored embeddings; the reference writes float16."""
    domain: str = ""
    """What the data are about."""
    encoder_name: str = ""
    """The encoder that made them, if you know it."""
    encoder_fingerprint: str = ""
    """Its fingerprint, if jobs/embed.py has given it one: then the store goes with others of that encoder."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of rows is NaN, infinite, zero, or of another dimension."""
    duplicate_ids: DuplicateIds = "reject"
    """Rows of other content under an id that exists: reject them, or keep them under a numbered id."""


def run(job: ImportJob) -> str:
    """Every record of the input is a row of the store or on its list of rejected rows.

    Raises:
        DataError: no pickles there, one that is refused or damaged, or too many rows rejected.
    """
    output = storage.absolute(job.output)
    files = _files(job.input)
    encoder = EncoderIdentity(name=job.encoder_name, fingerprint=job.encoder_fingerprint)
    claim(
        output,
        {
            "modality": job.modality,
            "dtype": job.dtype,
            "input": files,
            "domain": job.domain,
            "encoder": asdict(encoder),
        },
    )
    connect()
    load = ray.remote(num_cpus=1)(_import_file)
    with user_errors(), progress("import", len(files), "files") as shown:
        waiting = [load.remote(uri, output, job.modality, job.dtype, encoder) for uri in files]
        while waiting:
            ready, waiting = ray.wait(waiting)
            shown.advance(len(ray.get(ready)))
    config.save_resolved(job, storage.join(output, "config.yaml"))
    finish = Finish(
        domain=job.domain,
        layout="binary",
        max_rejected_fraction=job.max_rejected_fraction,
        duplicate_ids=job.duplicate_ids,
    )
    return describe(finish_store(output, finish), output)


def _files(uri: str) -> list[str]:
    kind = storage.info(uri).type
    if kind == pafs.FileType.File:
        return [storage.absolute(uri)]
    if kind == pafs.FileType.NotFound:
        raise DataError(f"{uri}: no such file or directory")
    listed = storage.list_files(storage.absolute(uri))
    files = [path for path, _ in listed if storage.name_of(path).endswith(_ENDINGS)]
    if not files:
        raise DataError(f"{uri}: no pickles there (expected files that end in {' or '.join(_ENDINGS)})")
    return files


def _import_file(uri: str, output: str, modality: Modality, dtype: str, encoder: EncoderIdentity) -> None:
    split, identity = storage.sha256(uri.encode())[:16], _identity(uri)
    if _stands(uri, output, split, identity):
        return
    content_key: ContentKey = "caption" if modality == "text" else "image_path"
    rows = list(read_reference(uri, content_key))
    lengths = np.array([len(row.embedding) if row.embedding is not None else 0 for row in rows], np.int64)
    dim = int(np.bincount(lengths[lengths > 0]).argmax()) if (lengths > 0).any() else 0
    if not dim:
        raise DataError(f"{uri}: none of its {len(rows)} records holds an embedding")
    for index, start in enumerate(range(0, len(rows), _ROWS_PER_SHARD)):
        target = storage.join(output, f"part-{split}-{index:05d}.parquet")
        if storage.exists(target):
            continue
        part = rows[start : start + _ROWS_PER_SHARD]
        faults = [_fault(row, dim, dtype) for row in part]
        kept = [row for row, fault in zip(part, faults, strict=True) if not fault]
        footer = Footer(
            modality=modality,
            embedding_dim=dim,
            dtype=dtype,
            encoder=encoder,
            split=split,
            split_uri=uri,
            identity=identity,
            index=index,
            last=start + _ROWS_PER_SHARD >= len(rows),
            rejected=tuple(
                Rejected(id=row.id, uri=f"{uri}:record {start + number}", reason=fault)
                for number, (row, fault) in enumerate(zip(part, faults, strict=True))
                if fault
            ),
        )
        shards.write_shard(target, _table(kept, dim, dtype, modality), footer)


def _identity(uri: str) -> str:
    """Changes when the file may have changed."""
    info = storage.info(uri)
    return f"{info.size}-{info.mtime_ns}"


def _stands(uri: str, output: str, split: str, identity: str) -> bool:
    """Whether all shards of this file are written, so that it need not be read again.

    Raises:
        DataError: the file has changed since some were.
    """
    written = [path for path, _ in storage.list_files(output, f"part-{split}-*.parquet")]
    if not written:
        return False
    footer = shards.read_footer(written[-1])
    if footer.identity != identity:
        raise DataError(f"{uri}: has changed since it was imported into {output}; name another output")
    return footer.last


def _fault(row: ReferenceRow, dim: int, dtype: str) -> str:
    """Why this row cannot be stored; empty where it can."""
    if row.embedding is None:
        return "embed is no vector of numbers"
    if len(row.embedding) != dim:
        return f"dimension {len(row.embedding)}, expected {dim}"
    if np.isnan(row.embedding).any():
        return "NaN"
    with np.errstate(over="ignore"):
        stored = row.embedding.astype(dtype)
    if not np.isfinite(stored).all():
        return f"infinite in {dtype}"
    return "" if stored.any() else "zero vector"


def _table(rows: list[ReferenceRow], dim: int, dtype: str, modality: Modality) -> EmbeddingTable:
    contents = pa.array([row.content for row in rows], pa.string())
    columns = {"uri": contents}
    if modality == "text":
        columns = {"text": contents, "truncated": pa.array([False] * len(rows), pa.bool_())}
    stacked_ND = np.array([row.embedding for row in rows], dtype).reshape(-1, dim)
    return EmbeddingTable(ids=[row.id for row in rows], embedding_ND=stacked_ND, columns=columns)
