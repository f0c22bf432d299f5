"""Fits by name: a registry is any directory below which fits lie, a fit's name its path below that directory.

Nothing is stored beside the fits, so copying, moving or removing one is all that it takes to register it.
"""

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from revision_ray import storage
from revision_ray.align.alignment import (
    DOCUMENT,
    IMAGE_MOMENTS,
    TENSORS,
    TEXT_MOMENTS,
    Alignment,
    load_alignment,
    load_moments,
)
from revision_ray.align.moments import Moments
from revision_ray.errors import AlignmentError, DataError, RevisionError, quote

UNFINISHED = f"unfinished: no {DOCUMENT}; run the job that makes it again"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a fit, or what is left of one, lies in a registry."""

    name: str  # path below the registry; "." for the registry itself
    uri: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A place with its fit, or with what is wrong with that."""

    place: Place
    fit: Alignment | None
    damage: str = ""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A sound fit with the moments that it was made from."""

    alignment: Alignment
    text: Moments
    image: Moments


def places(registry: str) -> list[Place]:
    """Every finished or unfinished fit below `registry`, by name. Lists all files there, reads none.

    Raises:
        DataError: no such directory, or no fit in it.
    """
    root = storage.absolute(registry)
    if storage.info(root).type == pafs.FileType.File:
        raise DataError(f"{root}: is a file; a registry is a directory of fits (import reads a file)")
    finished: dict[str, bool] = {}
    for uri, _ in storage.list_files(root, recursive=True):
        if _ends_with(uri, DOCUMENT):
            finished[storage.parent_of(uri)] = True
        elif _ends_with(uri, TENSORS):
            finished.setdefault(storage.parent_of(uri), False)
        elif _ends_with(uri, TEXT_MOMENTS) or _ends_with(uri, IMAGE_MOMENTS):
            finished.setdefault(storage.parent_of(storage.parent_of(uri)), False)
    if not finished:
        what = "no fit lies below it" if storage.exists(root) else "no such directory"
        raise DataError(f"{root}: {what}; name a directory of fits, or make one with jobs/fit.py")
    found = [
        Place(name="." if uri == root else storage.relative_path(uri, root), uri=uri, finished=done)
        for uri, done in finished.items()
    ]
    return sorted(found, key=lambda place: place.name)


def _ends_with(uri: str, path: str) -> bool:
    pieces = path.split("/")
    for piece in reversed(pieces):
        if storage.name_of(uri) != piece:
            return False
        uri = storage.parent_of(uri)
    return True


def entries(registry: str) -> list[Entry]:
    """Every fit below `registry`, read and verified with its moments, by name; damaged ones with the reason.

    Raises:
        DataError: as `places`.
    """
    found = places(registry)
    with ThreadPoolExecutor(min(8, len(found))) as pool:
        return list(pool.map(_entry, found))


def _entry(place: Place) -> Entry:
    if not place.finished:
        return Entry(place=place, fit=None, damage=UNFINISHED)
    try:
        return Entry(place=place, fit=read(place.uri).alignment)
    except RevisionError as error:
        return Entry(place=place, fit=None, damage=str(error).removeprefix(f"{place.uri}: "))


def read(uri: str) -> Fit:
    """The fit at directory `uri`, its files verified against each other.

    Raises:
        AlignmentError: none there, unfinished, or damaged.
    """
    alignment = load_alignment(uri)
    try:
        text, image = load_moments(uri)
    except DataError as error:
        raise AlignmentError(
            f"{uri}: the fit is damaged ({error}); make it again with jobs/fit.py"
        ) from error
    fit = Fit(alignment=alignment, text=text, image=image)
    check_consistent(fit, uri)
    return fit


def check_consistent(fit: Fit, where: str) -> None:
    """The alignment's arrays have one dimension, and its statistics are those of the moments beside it.

    Raises:
        AlignmentError: they do not.
    """
    alignment, dim = fit.alignment, fit.alignment.embedding_dim
    for name, array in alignment.tensors().items():
        if array.shape not in ((dim,), (len(alignment.drifted_centroids), dim), (dim, dim)):
            raise AlignmentError(f"{where}: {name} has shape {array.shape}, the fit's dimension is {dim}")
    for side, moments, centroid, trace, count in (
        ("text", fit.text, alignment.text_centroid, alignment.text_trace, alignment.num_texts),
        ("image", fit.image, alignment.image_centroid, alignment.image_trace, alignment.num_images),
    ):
        # Centroids take the same steps on every machine; a trace is a sum, whose order is the machine's.
        same = (
            moments.embedding_dim == dim
            and moments.count == count
            and np.array_equal(moments.centroid, centroid)
            and np.isclose(moments.trace, trace, rtol=0, atol=1e-12)
        )
        if not same:
            raise AlignmentError(
                f"{where}: the {side} moments are not those that this fit was made from; make it again with "
                "jobs/fit.py"
            )


def place_of(registry: str, name: str) -> Place:
    """The place of this name.

    Raises:
        DataError: there is none; the nearest spelling is named.
    """
    found = places(registry)
    by_name = {place.name: place for place in found}
    wanted = name.strip("/") or "."
    if wanted in by_name:
        return by_name[wanted]
    raise DataError(
        f"{storage.absolute(registry)}: no fit named {quote(name, 80)}; {_nearest(wanted, list(by_name))}"
    )


def _nearest(wanted: str, names: Sequence[str]) -> str:
    last = {name.rpartition("/")[2]: name for name in reversed(names)}
    near = [last[wanted]] if wanted in last else difflib.get_close_matches(wanted, names, n=1)
    near = near or [last[word] for word in difflib.get_close_matches(wanted, list(last), n=1)]
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"there are {', '.join(names[:5])}{more}"


def summary(entry: Entry) -> dict[str, Any]:
    """A line of the list; `damage` is empty where the fit is sound."""
    line: dict[str, Any] = {"name": entry.place.name, "uri": entry.place.uri, "damage": entry.damage}
    if entry.fit is None:
        return line
    document = entry.fit.document()
    kept = (
        "strategy", "domain", "embedding_dim", "num_texts", "num_images", "text_encoder", "image_encoder",
        "modality_gap", "content_hash",
    )  # fmt: skip
    errors = {name: document["standard_errors"][f"modality_gap_{name}"] for name in ("before", "after")}
    return line | {key: document[key] for key in kept} | {"modality_gap_standard_error": errors}


def details(place: Place) -> dict[str, Any]:
    """Everything that the fit says of itself, and what its moments hold.

    Raises:
        AlignmentError: unfinished or damaged.
    """
    if not place.finished:
        raise AlignmentError(f"{place.uri}: {UNFINISHED}")
    fit = read(place.uri)
    moments = {
        side: {
            "num_rows": found.count,
            "num_shards": len(found.shard_hashes),
            "second_moments": found.second is not None,
        }
        for side, found in (("text", fit.text), ("image", fit.image))
    }
    affine = fit.alignment.affine
    tensors = {name: list(array.shape) for name, array in fit.alignment.tensors().items()}
    return {
        "name": place.name,
        "uri": place.uri,
        **fit.alignment.document(),
        "needs_ids": affine.needs_ids,
        "tensors": tensors,
        "moments": moments,
    }
