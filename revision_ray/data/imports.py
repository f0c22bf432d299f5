"""The import job: turn the reference code's pickled embeddings into a store, running nothing in them.

This is the only module that unpickles. It builds only arrays and scalars of numbers and plain containers; a
pickle that names anything else is refused before the name is looked up. NumPy's own reconstruction is not
used: a forged dtype state passes raw bytes off as Python objects there.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import ray

from revision_ray.core import config, storage
from revision_ray.core.cluster import connect, user_errors
from revision_ray.core.config import MISSING
from revision_ray.core.errors import DataError, quote, shorten
from revision_ray.core.observe import progress
from revision_ray.core.stage import StageKind, reads_keys, store_rows_done
from revision_ray.data import shards
from revision_ray.data.fields import is_filled
from revision_ray.data.finish import DuplicateIds, FinishSettings, claim, describe, finish_store
from revision_ray.data.shards import EmbeddingTable, EncoderIdentity, Modality, Rejected, ShardFooter

# The key under which the reference keeps what was embedded, by modality.
ContentKey = Literal["caption", "image_path"]


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is not admitted."""


class _Dtype:
    """A numeric dtype as NumPy pickles it: by name, its byte order in the state."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "fiub":
            raise _RefusedError(f"an array of dtype {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *structure = state
        # Sub-array, field names, fields, size, alignment, flags: a number has none to state.
        if any(part not in (None, -1, 0) for part in structure):
            raise _RefusedError("an array of a structured dtype")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array of numbers as NumPy's protocols 0 to 4 pickle it: first made empty, then filled."""

    def __init__(self) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, content = state
        self.values = _from_buffer(content, dtype, shape, "F" if fortran_order else "C")


def _from_buffer(
    content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]
) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
        raise _RefusedError("an array whose content is not bytes of numbers")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return _from_buffer(content, dtype, (1,), "C")[0]


def _latin1(text: str, encoding: str) -> bytes:
    """What old pickle protocols call to make bytes; other codecs are refused."""
    if encoding != "latin1":
        raise _RefusedError(f"bytes in codec {quote(encoding, 40)}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core", "numpy._core"):  # before and after NumPy 2
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"{_module}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = _from_buffer  # protocol 5


class _Restricted(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise _RefusedError(f"{module_name}.{global_name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("a persistent reference")


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A record of the reference: `embedding` is None where it is no vector of numbers."""

    id: str
    embedding: np.ndarray | None
    content: str  # caption, or image path


def read_reference(uri: str, content_key: ContentKey) -> Iterator[ReferenceRow]:
    """The records of one pickled part: a list of {"id", "embed", `content_key`}.

    The whole part is in memory while it is read: a pickle cannot be streamed.

    Raises:
        DataError: no pickle, damaged, of another structure, or with anything but arrays and containers in it.
    """
    records = _load(uri)
    if not isinstance(records, list):
        raise DataError(f"{uri}: holds a {type(records).__name__}, expected a list of records")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not {"id", "embed", content_key} <= record.keys():
            found = quote(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{uri}: record {number} has {found}, expected id, embed and {content_key}; texts have a "
                "caption and images an image_path: is the modality right?"
            )
        if not is_filled(record["id"]):
            raise DataError(
                f"{uri}: record {number} has the id {record['id']!r:.60}, expected a name or number"
            )
        content = record[content_key]
        yield ReferenceRow(
            id=str(record["id"]),
            embedding=_vector(record["embed"]),
            content=str(content) if is_filled(content) else "",
        )


def _load(uri: str) -> Any:
    try:
        with storage.open_input(uri) as file:
            return _Restricted(io.BufferedReader(file)).load()  # Arrow's files have no readline
    except _RefusedError as error:
        raise DataError(
            f"{uri}: refused: the pickle holds {shorten(error)}; only arrays of numbers and plain "
            f"containers are "
            "admitted, and nothing in it was run"
        ) from error
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError,
        ArithmeticError, RecursionError, OSError,
    ) as error:  # all that damaged bytes were seen to make the unpickler raise  # fmt: skip
        raise DataError(f"{uri}: is no readable pickle ({type(error).__name__}: {shorten(error)})") from error


def _vector(value: Any) -> np.ndarray | None:
    value = value.values if isinstance(value, _Array) else value
    if not isinstance(value, np.ndarray | list | tuple):
        return None
    try:
        vector = np.asarray(value)
    except ValueError:  # a ragged list
        return None
    vector = vector.reshape(-1) if vector.ndim == 2 and len(vector) == 1 else vector
    return vector if vector.ndim == 1 and vector.dtype.kind in "fi" else None


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


def run_import(job: ImportJob) -> str:
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
    finish = FinishSettings(
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
        footer = ShardFooter(
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


STAGE = StageKind(
    name="import_reference",
    job=ImportJob,
    run=run_import,
    reads=reads_keys("input"),
    proof="manifest.json",
    sources=("input",),
    done=store_rows_done,
)
