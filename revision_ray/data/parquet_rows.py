"""Records of Parquet row groups, row by row; what a footer says of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from revision_ray import storage
from revision_ray.data.records import IMAGE_FIELDS, LOCATION_FIELDS, TEXT_FIELDS, TURN_FIELDS
from revision_ray.errors import DataError, shorten

# Remote column chunks are fetched in pieces of this size; local files are memory-mapped.
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Footer:
    """Columns, and rows and bytes (uncompressed) of each row group."""

    uri: str
    schema: pa.Schema
    rows: list[int]
    bytes: list[int]


def footer(uri: str) -> Footer:
    """The footer of the Parquet file at `uri`; nothing else of it is read.

    Raises:
        DataError: it is no Parquet file.
    """
    try:
        with storage.open_input(uri) as file, pq.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
            return Footer(
                uri,
                parquet.schema_arrow,
                [group.num_rows for group in groups],
                [g.total_byte_size for g in groups],
            )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: is no readable Parquet file: {shorten(error, 400)}; write it again or leave it out"
        ) from error


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns of `schema` that may hold images or their locations."""
    return [name for name in IMAGE_FIELDS if name in schema.names and _holds_images(schema.field(name).type)]


def _holds_images(kind: pa.DataType) -> bool:
    if pat.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    if pat.is_list(kind) or pat.is_large_list(kind):
        return pat.is_integer(kind.value_type)  # the numbers of bytes
    return _is_text(kind) or _is_bytes(kind)


def holds_image_bytes(schema: pa.Schema) -> bool:
    """Whether a column of `schema` may hold images themselves, not only where they lie."""
    columns = set(image_columns(schema)) - set(LOCATION_FIELDS)
    return any(not _is_text(schema.field(name).type) for name in columns)


def is_download_list(schema: pa.Schema) -> bool:
    """Whether `schema` is that of img2dataset's list of downloads, one row a URL, failed ones among them."""
    return {"key", "url", "status", "error_message"} <= set(schema.names)


def text_columns(schema: pa.Schema) -> list[str]:
    """The columns of `schema` that may hold texts."""
    found = [name for name in TEXT_FIELDS if name in schema.names]
    return [name for name in found if _holds_texts(name, schema.field(name).type)]


def _holds_texts(name: str, kind: pa.DataType) -> bool:
    listed = pat.is_list(kind) or pat.is_large_list(kind)
    if name in TURN_FIELDS:
        return listed
    return _is_text(kind) or _is_bytes(kind) or (listed and _is_text(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_binary_view(kind)


def rows(
    uri: str, start: int, stop: int, columns: Sequence[str], batch_size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number in the file, record of `columns`) of row groups [start, stop).

    Columns that the file lacks are left out; a string that is not UTF-8 is given as bytes. Where img2dataset
    wrote images into the table, the rows of failed downloads, which hold none, are left out. Holds
    `batch_size` rows and the pages that they lie in.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        # pre_buffer would load whole column chunks: gigabytes where images lie in the table.
        with (
            storage.open_input(uri) as file,
            pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES) as parquet,
        ):
            number = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
            schema = parquet.schema_arrow
            present = [name for name in columns if name in schema.names]
            with_status = is_download_list(schema) and holds_image_bytes(schema)
            read = dict.fromkeys([*present, "status"] if with_status else present)
            for batch in parquet.iter_batches(
                batch_size, row_groups=list(range(start, stop)), columns=list(read)
            ):
                for i in range(batch.num_rows):
                    if not with_status or batch.column("status")[i].as_py() == "success":
                        yield number, {name: _value(batch.column(name)[i]) for name in present}
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{uri}: row groups {start} to {stop} cannot be read: {shorten(error, 400)}"
        ) from error


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:  # Other writers do not check that a string column holds UTF-8.
        return error.object
