"""Labels of rows by id: JSONL or Parquet with a column `id` and one column an attribute.

Ids are kept as 64-bit hashes, so that a label costs the same few bytes whatever its id looks like, and tasks
share one copy. Shapes: N labelled ids, A attributes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray import storage
from revision_ray.errors import DataError
from revision_ray.geometry.rows import id_keys

_MOST_CLASSES = 1000
_BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Codes into the classes of every attribute, -1 where an id has no label of it."""

    classes: dict[str, list[str]]  # attribute -> its classes, both in order
    keys_N: np.ndarray  # uint64, ascending: hashes of the ids
    codes_NA: np.ndarray  # int16

    @property
    def attributes(self) -> list[str]:
        return list(self.classes)

    @property
    def num_classes(self) -> list[int]:
        return [len(classes) for classes in self.classes.values()]

    def of(self, keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions among `keys_N` that have a label, their codes (.., A))."""
        if not len(self.keys_N):
            return np.empty(0, np.int64), self.codes_NA
        at_N = np.minimum(np.searchsorted(self.keys_N, keys_N), len(self.keys_N) - 1)
        known_N = np.flatnonzero(self.keys_N[at_N] == keys_N)
        return known_N, self.codes_NA[at_N[known_N]]


def read_labels(uris: Sequence[str], attributes: Sequence[str] = ()) -> Labels:
    """The labels of all files, of these attributes (of all, where none are named).

    Raises:
        DataError: a file is missing or damaged, a row has no id, an id has two different labels, an attribute
            is unknown or has more than a thousand classes, or nothing is labelled.
    """
    found: dict[str, dict[str, str]] = {}
    for uri in uris:
        for where, row in _rows(uri):
            row_id, values = _parsed(where, row)
            former = found.setdefault(row_id, values)
            if former != values:
                raise DataError(f"{where}: id {row_id} has labels {values}, and {former} in another row")
    named = sorted({name for values in found.values() for name in values})
    where = ", ".join(uris)
    unknown = sorted(set(attributes) - set(named))
    if unknown:
        raise DataError(f"{where}: no row has a label of {', '.join(unknown)}; there are {', '.join(named)}")
    if not named:
        raise DataError(f"{where}: nothing is labelled; expected rows with an id and one column an attribute")
    wanted = list(attributes) or named
    classes = {name: sorted({v[name] for v in found.values() if name in v}) for name in wanted}
    for name, values in classes.items():
        if len(values) > _MOST_CLASSES:
            raise DataError(
                f"{where}: {name} has {len(values)} classes; more than {_MOST_CLASSES} is no attribute to "
                "probe; name the attributes in probe.attributes"
            )
    codes = {name: {value: code for code, value in enumerate(values)} for name, values in classes.items()}
    codes_NA = np.array(
        [[codes[name].get(values.get(name, ""), -1) for name in wanted] for values in found.values()],
        np.int16,
    )
    keys_N = id_keys(list(found))
    order_N = np.argsort(keys_N)
    return Labels(classes=classes, keys_N=keys_N[order_N], codes_NA=codes_NA[order_N])


def _parsed(where: str, row: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(row, dict) or row.get("id") in (None, ""):
        raise DataError(
            f"{where}: expected a row with an id and one field an attribute, found {str(row)[:80]}"
        )
    values = {name: value for name, value in row.items() if name != "id" and value is not None}
    nested = [name for name, value in values.items() if isinstance(value, list | dict)]
    if nested:
        raise DataError(f"{where}: {nested[0]} is {values[nested[0]]!r:.80}; a label is one text or number")
    return str(row["id"]), {name: str(value) for name, value in values.items()}


def _rows(uri: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of every row of a file."""
    if storage.name_of(uri).endswith(".parquet"):
        yield from _parquet_rows(uri)
        return
    for number, line in enumerate(storage.read_bytes(uri).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{uri}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: is not JSON: {error}; labels are JSONL or .parquet") from error


def _parquet_rows(uri: str) -> Iterator[tuple[str, Any]]:
    try:
        with storage.open_input(uri) as file:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{uri}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: is no readable Parquet file: {error}") from error
