"""Inputs of the studies: stores, the rows that no fit sees, labels by id, and labelled samples. Ray.

Labels are JSONL or Parquet with a column `id` and one column an attribute. Ids are kept as 64-bit hashes, so
each label costs the same few bytes, and tasks share one copy. Which rows are taken is a function of their
ids and a seed (the lowest hashes win), so it does not depend on shards or on the order of tasks.

Shapes: N rows or labelled ids, D embedding dim, A attributes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from revision_ray.align.map_reduce import (
    UniformSample,
    checked_moments,
    draw_sample,
    moments_here,
    read_sampled,
)
from revision_ray.align.maps import Affine, chunks
from revision_ray.align.moments import Moments
from revision_ray.align.strategies import STRATEGIES, StrategyConfig, centroid_steps, fit_map
from revision_ray.core import storage
from revision_ray.core.cluster import connect, one_thread, user_errors
from revision_ray.core.errors import DataError
from revision_ray.data.store import RowGroup, Store, read_group, read_group_ids, shares
from revision_ray.geometry.spectra import id_keys

_MOST_CLASSES = 1000
_BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class RowLabels:
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


def read_labels(uris: Sequence[str], attributes: Sequence[str] = ()) -> RowLabels:
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
    return RowLabels(classes=classes, keys_N=keys_N[order_N], codes_NA=codes_NA[order_N])


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


_FEWEST_HELD_OUT = 8
# Row groups that a task of a study reads.
GROUPS_PER_TASK = 16


@dataclass(frozen=True, kw_only=True)
class StudyStores:
    """Texts and images of one encoder, and the rows of each that are kept from every fit."""

    texts: Store
    images: Store
    heldout_texts: UniformSample
    heldout_images: UniformSample

    @property
    def num_rest(self) -> int:
        """Rows that a fit may use, of the side that has fewer."""
        return min(
            side.num_rows - num_rows(held)
            for side, held in ((self.texts, self.heldout_texts), (self.images, self.heldout_images))
        )


def num_rows(sample: UniformSample) -> int:
    return sum(sample.rows.values())


def hold_out(texts: Store, images: Store, most: int, seed: int) -> StudyStores:
    """A uniform sample of each side, `most` rows and at most a quarter, is set apart.

    Raises:
        DataError: the texts are aligned already, or there are too few rows to hold any out.
    """
    if texts.alignment:
        raise DataError(f"{texts.uris[0]}: is aligned already; study the store that it was made from")
    samples = []
    for place, store in enumerate((texts, images)):
        size = min(most, store.num_rows // 4)
        if size < _FEWEST_HELD_OUT:
            raise DataError(
                f"{', '.join(store.uris)}: has {store.num_rows} rows and {size} would be held out (at most a "
                f"quarter); the studies need {4 * _FEWEST_HELD_OUT} rows a side and heldout_rows of "
                f"{_FEWEST_HELD_OUT} or more"
            )
        samples.append(draw_sample(store, size, derived_seed(seed, place)))
    return StudyStores(texts=texts, images=images, heldout_texts=samples[0], heldout_images=samples[1])


def derived_seed(seed: int, *place: int) -> int:
    """A seed of its own for every `place` of a study."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class FittedMap:
    """A map and the statistics that it came from."""

    affine: Affine
    text: Moments
    image: Moments


def fit_rest(stores: StudyStores, config: StrategyConfig) -> FittedMap:
    """The strategy fitted to every row that is not held out, by map-reduce."""
    text_sample = draw_sample(stores.texts, stores.texts.num_rows, config.seed, stores.heldout_texts)
    image_sample = draw_sample(stores.images, stores.images.num_rows, config.seed, stores.heldout_images)
    return _fitted(stores, config, text_sample, image_sample, checked_moments)


def fit_here(stores: StudyStores, config: StrategyConfig, size: int, seed: int) -> FittedMap:
    """The strategy fitted in this process to `size` rows a side that are not held out."""
    text_sample = draw_sample(stores.texts, size, derived_seed(seed, 0), stores.heldout_texts)
    image_sample = draw_sample(stores.images, size, derived_seed(seed, 1), stores.heldout_images)
    return _fitted(stores, config, text_sample, image_sample, lambda s, _, **how: moments_here(s, **how)[0])


def _fitted(
    stores: StudyStores,
    config: StrategyConfig,
    texts: UniformSample | None,
    images: UniformSample | None,
    moments: Callable[..., Moments],
) -> FittedMap:
    second = STRATEGIES[config.strategy].second
    text = moments(stores.texts, "texts", second=second, sample=texts)
    image = moments(stores.images, "images", second=second, sample=images)
    with one_thread():
        affine = fit_map(text, image, config)
    affine, _ = centroid_steps(affine, image, config, partial(moments, stores.texts, sample=texts))
    return FittedMap(affine=affine, text=text, image=image)


def spectrum(moments: Moments) -> np.ndarray:
    """Eigenvalues (D,) of the covariance, descending; those that the sums of unit rows do not resolve are 0.

    E[ee'] has entries of up to 1, so its difference from mu mu' is known to D times the resolution of 1,
    however little the rows vary.
    """
    values_D = np.linalg.eigvalsh(moments.covariance)[::-1]
    return np.where(values_D > len(values_D) * np.finfo(np.float64).eps, values_D, 0.0)


def sizes_for(asked: Sequence[int], available: int, what: str) -> list[int]:
    """The sizes of the list that `available` rows allow, and `available` itself in place of larger ones.

    Raises:
        DataError: not even the smallest is there.
    """
    sizes = sorted(size for size in set(asked) if size <= available)
    if not sizes:
        raise DataError(
            f"{what}: {available} rows can be used and the smallest size asked for is {min(asked)}; embed "
            "more rows, or ask for smaller sizes"
        )
    return sizes if len(sizes) == len(set(asked)) or sizes[-1] == available else [*sizes, available]


def gathered(references: Sequence[Any]) -> list[Any]:
    """What Ray tasks returned, in order; an error of ours from one is raised as itself."""
    with user_errors():
        return ray.get(list(references))


def remote(function: Any) -> Any:
    """`function` as Ray tasks of one CPU, with BLAS on one thread, so that the bits are the same anywhere."""
    connect()

    def work(*arguments: Any) -> Any:
        with one_thread():
            return function(*arguments)

    return ray.remote(work).remote


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Unit rows with their ids and labels."""

    ids: list[str]
    rows_ND: np.ndarray  # float32
    codes_NA: np.ndarray  # int16
    order_N: np.ndarray  # uint64: hash of id and seed

    def __len__(self) -> int:
        return len(self.ids)

    def taken(self, positions_N: np.ndarray) -> "LabelledRows":
        return LabelledRows(
            ids=[self.ids[at] for at in positions_N.tolist()],
            rows_ND=self.rows_ND[positions_N],
            codes_NA=self.codes_NA[positions_N],
            order_N=self.order_N[positions_N],
        )

    def lowest(self, most: int) -> "LabelledRows":
        """The `most` rows of lowest hash, in its order."""
        return self.taken(np.argsort(self.order_N, kind="stable")[:most])

    def without(self, ids: Sequence[str]) -> "LabelledRows":
        gone = set(ids)
        return self.taken(np.flatnonzero([row_id not in gone for row_id in self.ids]))


def labelled_rows(store: Store, labels: RowLabels, most: int, seed: int) -> LabelledRows:
    """At most `most` of the store's rows that have a label, uniformly drawn, as unit rows.

    Rows without a direction are left out. The driver holds twice as many rows at most.
    """
    connect()
    shared = ray.put(labels)
    read = ray.remote(_read)
    running = [
        read.remote(share, store.embedding_dim, shared, most, seed)
        for share in shares(store.row_groups, GROUPS_PER_TASK)
    ]
    kept = _none(store.embedding_dim, len(labels.attributes))
    with user_errors():
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            kept = _joined([kept, ray.get(done)]).lowest(most)
    return kept


def _read(groups: Sequence[RowGroup], dim: int, labels: RowLabels, most: int, seed: int) -> LabelledRows:
    kept = _none(dim, len(labels.attributes))
    for group in groups:
        ids = read_group_ids(group)
        keys_N = id_keys(ids)
        known_N, codes_NA = labels.of(keys_N)
        unit_ND, valid_N = unit_rows(read_group(group, dim)[known_N])
        found = LabelledRows(
            ids=[ids[known_N[at]] for at in valid_N.tolist()],
            rows_ND=unit_ND,
            codes_NA=codes_NA[valid_N],
            order_N=_mixed(keys_N[known_N[valid_N]], seed),
        )
        kept = _joined([kept, found]).lowest(most)
    return kept


def sample_rows(store: Store, sample: UniformSample | None) -> tuple[list[str], np.ndarray]:
    """(ids, float32 unit rows (N, D)) of a sample, read in this process."""
    ids: list[str] = []
    found = [np.empty((0, store.embedding_dim), np.float32)]
    for group in store.row_groups:
        if sample is not None and not sample.size(group):
            continue
        block_ND, positions_N = read_sampled(group, sample, store.embedding_dim)
        unit_ND, valid_N = unit_rows(block_ND)
        ids += read_group_ids(group, positions_N[valid_N])
        found.append(unit_ND)
    return ids, np.concatenate(found)


def unit_rows(block_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 unit rows of those that have a direction, their positions in the block)."""
    parts = [(chunk.unit_rows().astype(np.float32), chunk.positions_C) for chunk in chunks(block_ND, [])]
    if not parts:
        return np.empty((0, block_ND.shape[1]), np.float32), np.empty(0, np.int64)
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([at for _, at in parts])


def _none(dim: int, num_attributes: int) -> LabelledRows:
    return LabelledRows(
        ids=[],
        rows_ND=np.empty((0, dim), np.float32),
        codes_NA=np.empty((0, num_attributes), np.int16),
        order_N=np.empty(0, np.uint64),
    )


def _joined(parts: Sequence[LabelledRows]) -> LabelledRows:
    return LabelledRows(
        ids=[row_id for part in parts for row_id in part.ids],
        rows_ND=np.concatenate([part.rows_ND for part in parts]),
        codes_NA=np.concatenate([part.codes_NA for part in parts]),
        order_N=np.concatenate([part.order_N for part in parts]),
    )


def _mixed(keys_N: np.ndarray, seed: int) -> np.ndarray:
    """Every key scrambled under `seed` (the finaliser of splitmix64), so that other seeds draw other rows."""
    mixed_N = keys_N + np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))
