"""Where the embedding of an image stands, found by URI, by id, by path, or by file name alone. No Ray.

Keys are held as 64-bit hashes beside places: 24 bytes a key, whatever the length of ids. Two of ten million
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
WAYS = ("uri", "id", "path", "file name")
BY_NAME = WAYS.index("file name")
_SAME_ENDINGS = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}
_ANY_ENDING = "\0"


@dataclass(frozen=True)
class _Table:
    """Sorted hashes, the place of the first row of each and of a second one, or MISSING.

    A place is a row group in the upper 32 bits, a row in the lower.
    """

    hashes: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def of(hashes: np.ndarray, places: np.ndarray) -> "_Table":
        order = np.argsort(hashes, kind="stable")
        unique, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
        places = np.append(places[order], MISSING)
        second = np.where(counts > 1, places[np.where(counts > 1, starts + 1, 0)], MISSING)
        return _Table(unique, places[starts], second)

    def find(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The first and second places of `keys`."""
        if not len(self.hashes):
            return np.full(len(keys), MISSING), np.full(len(keys), MISSING)
        hashes = hash_of(keys)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        is_there = self.hashes[at] == hashes
        return np.where(is_there, self.first[at], MISSING), np.where(is_there, self.second[at], MISSING)


@dataclass(frozen=True)
class Matches:
    """Of N images: where each one stands and how it was found.

    `places` are int64, or MISSING or AMBIGUOUS; `ways` index WAYS. `rivals` (N, 2) are the first two rows of
    an ambiguous name, and the first two that have the file name of a missing image, else MISSING.
    """

    places: np.ndarray
    ways: np.ndarray
    rivals: np.ndarray


@dataclass(frozen=True)
class ImageIndex:
    """The rows of an image store by each of the WAYS that a record may name them."""

    tables: tuple[_Table, ...]

    def find(self, images: Sequence[str], folder: str, *, by_name: bool = False) -> Matches:
        """Find the images as records name them; their paths are relative to `folder`.

        Asked are the URI below `folder`, then as it is (several rows of one URI are one image); the id; the
        path that an id with the ending of its file makes, where the store knows the file, else the id as the
        path without the ending; and, only if `by_name`, the file name without folder and ending.
        """
        paths = [normal_path(image) for image in images]
        uris, ids, by_path, names = self.tables
        asked = [
            (0, uris, [_below(folder, path) for path in paths]),
            (0, uris, list(images)),
            (1, ids, list(images)),
            (1, ids, paths),
            (2, by_path, [_path_key(path) for path in paths]),
            (2, by_path, [without_image_ending(path) + _ANY_ENDING for path in paths]),
        ]
        if by_name:
            asked.append((BY_NAME, names, [file_name(path) for path in paths]))
        places = np.full(len(images), MISSING, np.int64)
        ways = np.zeros(len(images), np.int64)
        rivals = np.full((len(images), 2), MISSING, np.int64)
        for way, table, keys in asked:
            open_places = np.flatnonzero(places == MISSING)
            if not len(open_places):
                break
            first, second = table.find([keys[place] for place in open_places.tolist()])
            is_ambiguous = (second != MISSING) & (way != 0)
            places[open_places] = np.where(is_ambiguous, AMBIGUOUS, first)
            rivals[open_places[is_ambiguous]] = np.stack([first, second], axis=1)[is_ambiguous]
            ways[open_places] = way
        missing = np.flatnonzero(places == MISSING)
        if len(missing):
            rivals[missing] = np.stack(names.find([file_name(paths[at]) for at in missing.tolist()]), axis=1)
        return Matches(places, ways, rivals)


def normal_path(path: str) -> str:
    """`path` with slashes, without `./` and the like; a URI as it is."""
    return path if "://" in path else posixpath.normpath(path.replace("\\", "/"))


def _below(folder: str, path: str) -> str:
    """The URI of `path`, which may be one itself, in `folder`."""
    if "://" in path or path.startswith("/") or not folder:
        return path
    while path.startswith("../"):  # An object store would take the dots for a part of the name.
        folder, path = storage.parent_of(folder), path.removeprefix("../")
    return storage.join(folder, path)


def file_name(path: str) -> str:
    """The last segment of `path`, without the ending of an image file."""
    return without_image_ending(posixpath.basename(path))


def hash_of(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,)."""
    # The stubs take its lazy import for an object.
    return pandas.util.hash_array(np.array(keys, dtype=object), categorize=False)  # type: ignore[operator]


def _path_key(path: str) -> str:
    stem, ending = posixpath.splitext(path)
    return stem + _SAME_ENDINGS.get(ending.lower(), ending.lower())


def _path_of(row_id: str, uri: str) -> str:
    """The key of the path of a row: its id with the ending of the file, where that is the file's path."""
    stem, ending = posixpath.splitext(uri.partition("?")[0])
    if ending and (stem == row_id or stem.endswith(f"/{row_id}")):
        return _path_key(row_id + ending)
    return row_id + _ANY_ENDING


def key_hashes(group: RowGroup) -> np.ndarray:
    """uint64 (4, N): the keys of a row group's rows, in the order of WAYS.

    Raises:
        DataError: the shard is missing or damaged.
    """
    has_uri = "uri" in shards.column_names(group.uri)
    table = shards.read_columns(group.uri, ["id", "uri"] if has_uri else ["id"], group.index)
    ids = [str(row_id) for row_id in table["id"].to_pylist()]
    uris = [uri or "" for uri in table["uri"].to_pylist()] if has_uri else [""] * len(ids)
    paths = [_path_of(row_id, uri) for row_id, uri in zip(ids, uris, strict=True)]
    return np.stack([hash_of(keys) for keys in (uris, ids, paths, [file_name(row_id) for row_id in ids])])


def build_index(hashes_of_groups: Sequence[np.ndarray]) -> ImageIndex:
    """The index of row groups whose `key_hashes` these are, in the order of the store."""
    places = [
        (np.int64(number) << 32) + np.arange(hashes.shape[1], dtype=np.int64)
        for number, hashes in enumerate(hashes_of_groups)
    ]
    all_places = np.concatenate([np.empty(0, np.int64), *places])
    return ImageIndex(
        tuple(
            _Table.of(
                np.concatenate([np.empty(0, np.uint64), *(h[way] for h in hashes_of_groups)]), all_places
            )
            for way in range(len(WAYS))
        )
    )
