"""Small Parquet tables, read and written whole."""

import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray import storage
from revision_ray.errors import DataError, shorten


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def read_parquet(uri: str) -> pa.Table:
    """The table at `uri`.

    Raises:
        DataError: it is not there, or damaged.
    """
    with storage.open_input(uri) as file:
        try:
            return pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{uri}: is no readable Parquet file: {shorten(error)}; remove it to make it again"
            ) from error
