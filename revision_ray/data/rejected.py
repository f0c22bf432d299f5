"""Rows that did not make it: listed with their reasons, and too many of them an error."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray import storage
from revision_ray.data.schema import Rejected
from revision_ray.errors import DataError, shorten

REJECTED = "rejected.parquet"


def write_rejected(uri: str, rejected: Sequence[Rejected]) -> None:
    """The list of rejected rows with their reasons stands at `uri`, also when it is empty."""
    columns = {
        name: pa.array([getattr(row, name) for row in rejected], pa.string())
        for name in ("id", "uri", "reason")
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(uri, sink.getvalue())


def read_rejected(uri: str) -> list[Rejected]:
    """The list that `write_rejected` wrote."""
    with storage.open_input(uri) as file:
        return [Rejected(**row) for row in pq.read_table(file, columns=["id", "uri", "reason"]).to_pylist()]


def check_rejected(rejected: Sequence[Rejected], num_rows: int, most: float, listed: str) -> None:
    """No more than the share `most` of `num_rows` rows was rejected.

    Raises:
        DataError: more were; the message gives the causes and where the list is.
    """
    if len(rejected) <= most * num_rows:
        return
    causes = Counter(row.reason for row in rejected).most_common(3)
    shown = "; ".join(f"{count} x {shorten(reason)}" for reason, count in causes)
    raise DataError(
        f"{len(rejected)} of {num_rows} rows were rejected ({shown}), more than max_rejected_fraction={most} "
        f"allows; the list is in {listed}; mend the input, or raise max_rejected_fraction"
    )
