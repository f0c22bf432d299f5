"""Inputs of the studies: stores, held-out rows, labels by id, and labelled samples. Ray.

Labels are JSONL or Parquet with a column `id` and one column for each attribute. Ids are kept as 64-bit
hashes, so that each label takes the same few bytes; tasks share one copy. Samples take the rows whose hash of
id and seed is lowest, so they do not depend on shards or on the order of tasks.

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
    """Labels by id: for each attribute the index of the class, -1 if the id has no label of it."""

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
        """Return the positions in `keys_N` of ids that have labels, and the codes (.., A) of these."""
        if not len(self.keys_N):
            return np.empty(0, np.int64), self.codes_NA
        at_N = np.minimum(np.searchsorted(self.keys_N, keys_N), len(self.keys_N) - 1)
        known_N = np.flatnonzero(self.keys_N[at_N] == keys_N)
        return known_N, self.codes_NA[at_N[known_N]]


def read_labels(uris: Sequence[str], attributes: Sequence[str] = ()) -> RowLabels:
    """Read the labels of all files, of these attributes (by default all).

    Raises:
        DataError: a file is missing or damaged, a row has no id, an id has two different labels, an attribute
            is unknown or has more than a thousand classes, or nothing is labelled.
    """
    by_id: dict[str, dict[str, str]] = {}
    for uri in uris:
        for where, row in _read_rows(uri):
            row_id, values = _parse_row(where, row)
            former = by_id.setdefault(row_id, values)
            if former != values:
                raise DataError(f"{where}: id {row_id} has labels {values}, and {former} in another row")
    named = sorted({name for values in by_id.values() for name in values})
    where = ", ".join(uris)
    unknown = sorted(set(attributes) - set(named))
    if unknown:
        raise DataError(f"{where}: no row has a label of {', '.join(unknown)}; labels are {', '.join(named)}")
    if not named:
        raise DataError(f"{where}: has no labels; expected rows with an id and one column for each attribute")
    chosen = list(attributes) or named
    classes = {name: sorted({v[name] for v in by_id.values() if name in v}) for name in chosen}
    for name, values in classes.items():
        if len(values) > _MOST_CLASSES:
            raise DataError(
                f"{where}: {name} has {len(values)} classes, at most {_MOST_CLASSES} can be probed; name the "
                "attributes in probe.attributes"
            )
    codes = {name: {value: code for code, value in enumerate(values)} for name, values in classes.items()}
    codes_NA = np.array(
        [[codes[name].get(values.get(name, ""), -1) for name in chosen] for values in by_id.values()],
        np.int16,
    )
    keys_N = id_keys(list(by_id))
    order_N = np.argsort(keys_N)
    return RowLabels(classes=classes, keys_N=keys_N[order_N], codes_NA=codes_NA[order_N])


def _parse_row(where: str, row: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(row, dict) or row.get("id") in (None, ""):
        raise DataError(
            f"{where}: expected a row with an id and one field for each attribute, found {str(row)[:80]}"
        )
    values = {name: value for name, value in row.items() if name != "id" and value is not None}
    nested = [name for name, value in values.items() if isinstance(value, list | dict)]
    if nested:
        raise DataError(
            f"{where}: {nested[0]} is {values[nested[0]]!r:.80}; a label must be a text or a number"
        )
    return str(row["id"]), {name: str(value) for name, value in values.items()}


def _read_rows(uri: str) -> Iterator[tuple[str, Any]]:
    """Read each row of a file, with its place for messages."""
    if storage.name_of(uri).endswith(".parquet"):
        yield from _read_parquet(uri)
        return
    for number, line in enumerate(storage.read_bytes(uri).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{uri}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: is not JSON: {error}; labels are JSONL or .parquet") from error


def _read_parquet(uri: str) -> Iterator[tuple[str, Any]]:
    try:
        with storage.open_input(uri) as file:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{uri}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: cannot be read as Parquet: {error}") from error


_FEWEST_HELD_OUT = 8
# Row groups that one task of a study reads.
GROUPS_PER_TASK = 16


@dataclass(frozen=True, kw_only=True)
class StudyStores:
    """Texts and images of one encoder, and the rows of each that no fit uses."""

    texts: Store
    images: Store
    heldout_texts: UniformSample
    heldout_images: UniformSample

    @property
    def num_rest(self) -> int:
        """Return the number of rows that a fit may use, of the side that has fewer."""
        return min(
            side.num_rows - num_rows(held)
            for side, held in ((self.texts, self.heldout_texts), (self.images, self.heldout_images))
        )


def num_rows(sample: UniformSample) -> int:
    return sum(sample.rows.values())


def hold_out(texts: Store, images: Store, most: int, seed: int) -> StudyStores:
    """Hold out a uniform sample of each side: `most` rows, and at most a quarter.

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
                f"{', '.join(store.uris)}: {size} of its {store.num_rows} rows would be held out (at most a "
                f"quarter); the studies need {4 * _FEWEST_HELD_OUT} rows a side and heldout_rows of "
                f"{_FEWEST_HELD_OUT} or more"
            )
        samples.append(draw_sample(store, size, derived_seed(seed, place)))
    return StudyStores(texts=texts, images=images, heldout_texts=samples[0], heldout_images=samples[1])


def derived_seed(seed: int, *place: int) -> int:
    """Return a seed that differs for every `place` of a study."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class FittedMap:
    """A fitted map and the statistics that it came from."""

    affine: Affine
    text: Moments
    image: Moments


def fit_rest(stores: StudyStores, config: StrategyConfig) -> FittedMap:
    """Fit the strategy to all rows that are not held out, by map-reduce."""
    text_sample = draw_sample(stores.texts, stores.texts.num_rows, config.seed, stores.heldout_texts)
    image_sample = draw_sample(stores.images, stores.images.num_rows, config.seed, stores.heldout_images)
    return _fit(stores, config, text_sample, image_sample, checked_moments)


def fit_here(stores: StudyStores, config: StrategyConfig, size: int, seed: int) -> FittedMap:
    """Fit the strategy to `size` rows a side that are not held out, in this process."""
    text_sample = draw_sample(stores.texts, size, derived_seed(seed, 0), stores.heldout_texts)
    image_sample = draw_sample(stores.images, size, derived_seed(seed, 1), stores.heldout_images)
    return _fit(stores, config, text_sample, image_sample, lambda s, _, **how: moments_here(s, **how)[0])


def _fit(
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
    """Return the eigenvalues (D,) of the covariance, descending; those within rounding are 0.

    E[ee'] has entries of up to 1, so its difference from mu mu' is known to D times the rounding of 1,
    however little the rows vary.
    """
    values_D = np.linalg.eigvalsh(moments.covariance)[::-1]
    return np.where(values_D > len(values_D) * np.finfo(np.float64).eps, values_D, 0.0)


def sizes_for(sizes: Sequence[int], available: int, what: str) -> list[int]:
    """Return the sizes that `available` rows allow, and `available` itself in place of larger ones.

    Raises:
        DataError: there are fewer rows than the smallest size.
    """
    allowed = sorted(size for size in set(sizes) if size <= available)
    if not allowed:
        raise DataError(
            f"{what}: {available} rows can be used, the smallest of sizes is {min(sizes)}; embed more rows "
            "or set smaller sizes"
        )
    return allowed if len(allowed) == len(set(sizes)) or allowed[-1] == available else [*allowed, available]


def gathered(references: Sequence[Any]) -> list[Any]:
    """Return the results of Ray tasks, in order; user errors in a task are raised as themselves."""
    with user_errors():
        return ray.get(list(references))


def remote(function: Any) -> Any:
    """Make Ray tasks of `function`, each with one CPU and one BLAS thread, so that bits never change."""
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
        """Return the `most` rows with the lowest hashes, in that order."""
        return self.taken(np.argsort(self.order_N, kind="stable")[:most])

    def without(self, ids: Sequence[str]) -> "LabelledRows":
        gone = set(ids)
        return self.taken(np.flatnonzero([row_id not in gone for row_id in self.ids]))


def labelled_rows(store: Store, labels: RowLabels, most: int, seed: int) -> LabelledRows:
    """Draw at most `most` of the store's labelled rows uniformly; return them as unit rows.

    Rows without a direction are left out. The driver holds at most twice as many rows.
    """
    connect()
    shared = ray.put(labels)
    read = ray.remote(_read)
    running = [
        read.remote(share, store.embedding_dim, shared, most, seed)
        for share in shares(store.row_groups, GROUPS_PER_TASK)
    ]
    kept = _no_rows(store.embedding_dim, len(labels.attributes))
    with user_errors():
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            kept = _join([kept, ray.get(done)]).lowest(most)
    return kept


def _read(groups: Sequence[RowGroup], dim: int, labels: RowLabels, most: int, seed: int) -> LabelledRows:
    kept = _no_rows(dim, len(labels.attributes))
    for group in groups:
        ids = read_group_ids(group)
        keys_N = id_keys(ids)
        known_N, codes_NA = labels.of(keys_N)
        unit_ND, valid_N = unit_rows(read_group(group, dim)[known_N])
        labelled = LabelledRows(
            ids=[ids[known_N[at]] for at in valid_N.tolist()],
            rows_ND=unit_ND,
            codes_NA=codes_NA[valid_N],
            order_N=_scramble(keys_N[known_N[valid_N]], seed),
        )
        kept = _join([kept, labelled]).lowest(most)
    return kept


def sample_rows(store: Store, sample: UniformSample | None) -> tuple[list[str], np.ndarray]:
    """Read the ids and the float32 unit rows (N, D) of a sample in this process."""
    ids: list[str] = []
    parts = [np.empty((0, store.embedding_dim), np.float32)]
    for group in store.row_groups:
        if sample is not None and not sample.size(group):
            continue
        block_ND, positions_N = read_sampled(group, sample, store.embedding_dim)
        unit_ND, valid_N = unit_rows(block_ND)
        ids += read_group_ids(group, positions_N[valid_N])
        parts.append(unit_ND)
    return ids, np.concatenate(parts)


def unit_rows(block_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that have a direction as float32 unit rows, and their positions in the block."""
    parts = [(chunk.unit_rows().astype(np.float32), chunk.positions_C) for chunk in chunks(block_ND, [])]
    if not parts:
        return np.empty((0, block_ND.shape[1]), np.float32), np.empty(0, np.int64)
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([at for _, at in parts])


def _no_rows(dim: int, num_attributes: int) -> LabelledRows:
    return LabelledRows(
        ids=[],
        rows_ND=np.empty((0, dim), np.float32),
        codes_NA=np.empty((0, num_attributes), np.int16),
        order_N=np.empty(0, np.uint64),
    )


def _join(parts: Sequence[LabelledRows]) -> LabelledRows:
    return LabelledRows(
        ids=[row_id for part in parts for row_id in part.ids],
        rows_ND=np.concatenate([part.rows_ND for part in parts]),
        codes_NA=np.concatenate([part.codes_NA for part in parts]),
        order_N=np.concatenate([part.order_N for part in parts]),
    )


def _scramble(keys_N: np.ndarray, seed: int) -> np.ndarray:
    """Scramble each key by `seed` (the finaliser of splitmix64), so that other seeds draw other rows."""
    mixed_N = keys_N + np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))
