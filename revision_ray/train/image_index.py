"""Where the embedding of an image stands, found by id, by URI, or by file name. No Ray.

Keys are held as 64-bit hashes beside places: 16 bytes a key, whatever the length of ids. Two of ten million
different keys share a hash with a probability of 3e-6.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas.util

from revision_ray import storage
from revision_ray.data import shards
from revision_ray.data.image_rows import without_image_ending
from revision_ray.data.store import RowGroup

MISSING, AMBIGUOUS = -1, -2
WAYS = ("id", "uri", "file name")


@dataclass(frozen=True)
class _Table:
    """Sorted hashes and their places: row group in the upper 32 bits, row in the lower; or AMBIGUOUS."""

    hashes: np.ndarray
    places: np.ndarray

    def find(self, keys: Sequence[str]) -> np.ndarray:
        if not len(self.hashes):
            return np.full(len(keys), MISSING, np.int64)
        hashes = hash_of(keys)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.places[at], MISSING)


@dataclass(frozen=True)
class ImageIndex:
    """The rows of an image store by each of the WAYS that a record may name them."""

    tables: tuple[_Table, ...]

    def find(self, images: Sequence[str], root: str) -> tuple[np.ndarray, np.ndarray]:
        """(places, ways): int64 places of the images as records write them, or MISSING or AMBIGUOUS; and
        which of the WAYS found them.

        Asked are the id as it is, then without the ending of an image file; the URI below `root`, then as it
        is; the file name alone.
        """
        by_id, by_uri, by_name = self.tables
        below = [storage.join(root, image) for image in images] if root else list(images)
        asked = [
            (0, by_id, list(images)),
            (0, by_id, [without_image_ending(image) for image in images]),
            (1, by_uri, below),
            (1, by_uri, list(images)),
            (2, by_name, [file_name(image) for image in images]),
        ]
        places = np.full(len(images), MISSING, np.int64)
        ways = np.zeros(len(images), np.int64)
        for way, table, keys in asked:
            open_places = np.flatnonzero(places == MISSING)
            if not len(open_places):
                break
            places[open_places] = table.find([keys[place] for place in open_places.tolist()])
            ways[open_places] = way
        return places, ways


def file_name(path: str) -> str:
    """The last segment of `path`, without the ending of an image file."""
    return without_image_ending(posixpath.basename(path))


def hash_of(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,)."""
    # The stubs take its lazy import for an object.
    return pandas.util.hash_array(np.array(keys, dtype=object), categorize=False)  # type: ignore[operator]


def key_hashes(group: RowGroup) -> np.ndarray:
    """uint64 (3, N): the keys of a row group's rows, in the order of WAYS.

    Raises:
        DataError: the shard is missing or damaged.
    """
    has_uri = "uri" in shards.column_names(group.uri)
    table = shards.read_columns(group.uri, ["id", "uri"] if has_uri else ["id"], group.index)
    ids = [str(row_id) for row_id in table["id"].to_pylist()]
    uris = [uri or "" for uri in table["uri"].to_pylist()] if has_uri else ids
    return np.stack([hash_of(keys) for keys in (ids, uris, [file_name(row_id) for row_id in ids])])


def build_index(hashes_of_groups: Sequence[np.ndarray]) -> ImageIndex:
    """The index of row groups whose `key_hashes` these are, in the order of the store."""
    places = [
        (np.int64(number) << 32) + np.arange(hashes.shape[1], dtype=np.int64)
        for number, hashes in enumerate(hashes_of_groups)
    ]
    all_places = np.concatenate([np.empty(0, np.int64), *places])
    tables = []
    for way in range(len(WAYS)):
        hashes = np.concatenate([np.empty(0, np.uint64), *(rows[way] for rows in hashes_of_groups)])
        unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        tables.append(_Table(unique, np.where(counts > 1, AMBIGUOUS, all_places[first])))
    return ImageIndex(tuple(tables))
