"""The embedding column of a Parquet shard, in each form that it may have, as NumPy rows.

Shapes: N rows, D embedding_dim.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from revision_ray.errors import DataError


def binary_rows(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    """The rows of a `fixed_size_binary` column that holds little-endian `dtype`; one chunk is not copied."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        for chunk in column.chunks
        if len(chunk)
    ]
    flat = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint8)])
    return flat.view(dtype.newbyteorder("<")).reshape(-1, width // dtype.itemsize)


def list_rows(uri: str, column: pa.ChunkedArray, embedding_dim: int | None) -> np.ndarray:
    """The rows of a list or tensor column of floats; null rows and those of another length are NaN.

    `embedding_dim` None stands for the most common length. `uri` names errors.

    Raises:
        DataError: not such a column.
    """
    arrow_type = column.type
    if isinstance(arrow_type, pa.BaseExtensionType):  # tensor columns of Arrow and of Ray store a list below
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], arrow_type.storage_type)
        arrow_type = arrow_type.storage_type
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(arrow_type) for is_kind in listed) or not pa.types.is_floating(arrow_type.value_type):
        raise DataError(
            f"{uri}: column embedding is {arrow_type}; expected fixed_size_binary, or a list of floats"
        )
    rows = column.combine_chunks()
    if pa.types.is_fixed_size_list(arrow_type):
        rows = rows.cast(pa.large_list(arrow_type.value_type))
    lengths = np.asarray(rows.value_lengths().fill_null(-1))
    dim = embedding_dim
    if dim is None:
        dim = int(np.bincount(lengths[lengths >= 0]).argmax()) if (lengths >= 0).any() else 0
    dtype = np.float64 if pa.types.is_float64(arrow_type.value_type) else np.float32
    values_ND = np.full((len(lengths), dim), np.nan, dtype)
    good_N = lengths == dim
    flat = rows.filter(pa.array(good_N)).flatten()
    # A null number reads as NaN.
    values_ND[good_N] = flat.to_numpy(zero_copy_only=False).reshape(np.count_nonzero(good_N), dim)
    return values_ND


def describe_row(value: Sequence[float | None] | np.ndarray | None, embedding_dim: int) -> str:
    """Why a row has no direction: null, wrong dimension, NaN, infinite, zero, or too large to be squared."""
    if value is None or any(number is None for number in value):
        return "null"
    if len(value) != embedding_dim:
        return f"dimension {len(value)}, expected {embedding_dim}"
    row_D = np.asarray(value, np.float64)
    if np.isnan(row_D).any():
        return "NaN"
    if not np.isfinite(row_D).all():
        return "infinite"
    return f"values up to {np.abs(row_D).max():.0e}, out of range" if row_D.any() else "zero vector"
