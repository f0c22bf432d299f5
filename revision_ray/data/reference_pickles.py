"""The reference code's pickled embeddings, read without running anything in them.

The one place that unpickles. Only arrays and scalars of numbers and plain containers may be built; a pickle
that names anything else is refused before that thing is looked up, let alone called. NumPy's own
reconstruction is not used either: a made-up dtype state passes raw bytes off as Python objects there.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from revision_ray import storage
from revision_ray.data.records import is_filled
from revision_ray.errors import DataError, quote, shorten

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
