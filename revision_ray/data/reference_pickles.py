"""The reference code's pickled embeddings, read without running anything in them.

The one place that unpickles. Only NumPy arrays, NumPy scalars and plain containers may be built; a pickle
that names anything else is refused before that thing is looked up, let alone called.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

from revision_ray import storage
from revision_ray.errors import DataError


def _latin1(text: str, encoding: str) -> bytes:
    """What old pickle protocols call to make bytes; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in codec {encoding!r}")
    return text.encode("latin1")


def _numeric_dtype(*arguments: Any) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.kind not in "fiub":
        raise pickle.UnpicklingError(f"an array of dtype {dtype}")
    return dtype


_ALLOWED = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _numeric_dtype,
}
for _module in ("numpy.core", "numpy._core"):  # before and after NumPy 2
    _ALLOWED[f"{_module}.multiarray", "_reconstruct"] = multiarray._reconstruct
    _ALLOWED[f"{_module}.multiarray", "scalar"] = multiarray.scalar
    _ALLOWED[f"{_module}.numeric", "_frombuffer"] = numeric._frombuffer


class _Restricted(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent reference")


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A record of the reference: `embedding` is None where it is no vector of floats."""

    id: str
    embedding: np.ndarray | None
    content: str  # caption, or image path


def read_reference(uri: str) -> Iterator[ReferenceRow]:
    """The records of one pickled part: a list of {"id", "embed", "caption" | "image_path"}.

    The whole part is in memory while it is read: a pickle cannot be streamed.

    Raises:
        DataError: not a pickle, damaged, of another structure, or with anything but arrays and containers in it.
    """
    try:
        with storage.open_input(uri) as file:
            records = _Restricted(file).load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{uri}: refused: the pickle holds {error}, and only NumPy arrays and plain containers are admitted; "
            "nothing in it was run"
        ) from error
    except (EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError, MemoryError) as error:
        raise DataError(f"{uri}: is no readable pickle ({type(error).__name__}: {error})") from error
    if not isinstance(records, list):
        raise DataError(f"{uri}: holds a {type(records).__name__}, expected a list of records")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or "id" not in record or "embed" not in record:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{uri}: record {number} has {found}, expected id, embed, and caption or image_path"
            )
        content = record.get("caption", record.get("image_path", ""))
        yield ReferenceRow(id=str(record["id"]), embedding=_vector(record["embed"]), content=str(content))


def _vector(value: Any) -> np.ndarray | None:
    if not isinstance(value, np.ndarray | list | tuple):
        return None
    try:
        vector = np.asarray(value)
    except ValueError:  # a ragged list
        return None
    vector = vector.reshape(-1) if vector.ndim == 2 and len(vector) == 1 else vector
    return vector if vector.ndim == 1 and vector.dtype.kind in "fi" else None
