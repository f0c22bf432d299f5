"""Find fits by name below a directory (a registry), and export or import a fit as a single file.

A registry is any directory with fits in it or in its subdirectories. A fit's name is its path relative to
the registry. There is no index file: copy, move or remove a fit's directory to change the registry.

A fit file is one safetensors file with the fit and its moments; importing it restores the same bits. Its
tensors are those of the fit's directory: the alignment's under their own names, those of the moments with
the prefixes `moments.text.` and `moments.image.`. Its metadata have a single key, `revision_ray_fit`, because
safetensors writes several keys in no fixed order. The value is a JSON document of alignment.json, the shard
hashes, the fit job's settings where known, and a digest of everything. Rejected rows are not exported.
"""

import difflib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import safetensors
import safetensors.numpy

from revision_ray.align.alignment import (
    CONFIG,
    DOCUMENT,
    IMAGE_MOMENTS,
    TENSORS,
    TEXT_MOMENTS,
    Alignment,
    load_alignment,
    load_moments,
    parse_alignment,
    save_alignment,
)
from revision_ray.align.moments import Moments
from revision_ray.core import artifact, storage
from revision_ray.core.errors import AlignmentError, DataError, RevisionError, quote

UNFINISHED = f"unfinished: no {DOCUMENT}; run the job that makes it again"


@dataclass(frozen=True, kw_only=True)
class FitPlace:
    """Name and directory of a finished or unfinished fit in a registry."""

    name: str  # path relative to the registry; "." for the registry itself
    uri: str
    finished: bool


@dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """A place in a registry with its fit, or with the reason why the fit cannot be read (`damage`)."""

    place: FitPlace
    fit: Alignment | None
    damage: str = ""


@dataclass(frozen=True, kw_only=True)
class RegisteredFit:
    """A verified fit with the moments that it was made from."""

    alignment: Alignment
    text: Moments
    image: Moments


def places(registry: str) -> list[FitPlace]:
    """Find every finished or unfinished fit below `registry`, sorted by name; files are listed, not read.

    Raises:
        DataError: `registry` is a file, does not exist, or holds no fit.
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
        FitPlace(name="." if uri == root else storage.relative_path(uri, root), uri=uri, finished=done)
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


def entries(registry: str) -> list[RegistryEntry]:
    """Read and verify every fit below `registry`, sorted by name; unreadable ones carry the reason.

    Raises:
        DataError: `registry` is a file, does not exist, or holds no fit.
    """
    found = places(registry)
    with ThreadPoolExecutor(min(8, len(found))) as pool:
        return list(pool.map(_entry, found))


def _entry(place: FitPlace) -> RegistryEntry:
    if not place.finished:
        return RegistryEntry(place=place, fit=None, damage=UNFINISHED)
    try:
        return RegistryEntry(place=place, fit=read(place.uri).alignment)
    except RevisionError as error:
        return RegistryEntry(place=place, fit=None, damage=str(error).removeprefix(f"{place.uri}: "))


def read(uri: str) -> RegisteredFit:
    """Read the fit in directory `uri` with its moments, and check that its files agree.

    Raises:
        AlignmentError: there is none, or it is unfinished or damaged.
    """
    alignment = load_alignment(uri)
    try:
        text, image = load_moments(uri)
    except DataError as error:
        raise AlignmentError(
            f"{uri}: the fit is damaged ({error}); make it again with jobs/fit.py"
        ) from error
    fit = RegisteredFit(alignment=alignment, text=text, image=image)
    check_consistent(fit, uri)
    return fit


def check_consistent(fit: RegisteredFit, where: str) -> None:
    """Check that the fit's arrays have its dimension, and that its statistics follow from its moments.

    Raises:
        AlignmentError: one of them does not; the message names `where`.
    """
    alignment, dim = fit.alignment, fit.alignment.embedding_dim
    for name, array in alignment.tensors().items():
        if array.shape not in ((dim,), (len(alignment.drifted_centroids), dim), (dim, dim)):
            raise AlignmentError(f"{where}: {name} has shape {array.shape}, the fit's dimension is {dim}")
    for side, moments, centroid, trace, count in (
        ("text", fit.text, alignment.text_centroid, alignment.text_trace, alignment.num_texts),
        ("image", fit.image, alignment.image_centroid, alignment.image_trace, alignment.num_images),
    ):
        # Centroids have the same bits on every machine. A trace is a float sum, whose order may differ.
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


def place_of(registry: str, name: str) -> FitPlace:
    """Return the place of the fit called `name`.

    Raises:
        DataError: there is none; the message suggests the most similar name.
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


def summary(entry: RegistryEntry) -> dict[str, Any]:
    """Return the main facts about one fit, for the list of fits; `damage` is empty where it can be read."""
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


def details(place: FitPlace) -> dict[str, Any]:
    """Return all facts about one fit: alignment.json, the tensors' shapes, and the contents of its moments.

    Raises:
        AlignmentError: the fit is unfinished or damaged.
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


METADATA_KEY, FORMAT_VERSION = "revision_ray_fit", 1
_SIDES = ("text", "image")
_SEGMENT = re.compile(
    r"(?!\.\.?$)[\w.,+@-]+"
)  # one part of a name: no path out of the registry, no wildcard, no query


@dataclass(frozen=True, kw_only=True)
class PackedFit:
    """Content of a fit file."""

    fit: RegisteredFit
    config: str  # settings of the fit job as YAML; empty where unknown


def pack(fit: RegisteredFit, config: str = "") -> bytes:
    """Return the bytes of a fit file; equal fits and configs give equal bytes."""
    tensors = dict(fit.alignment.tensors())
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "alignment": fit.alignment.document(),
        "config": config,
    }
    for side, moments in zip(_SIDES, (fit.text, fit.image), strict=True):
        tensors |= {f"moments.{side}.{name}": array for name, array in moments.tensors().items()}
        document[f"{side}_shards"] = sorted(moments.shard_hashes)
    document["digest"] = _digest(tensors, document)
    return safetensors.numpy.save(tensors, {METADATA_KEY: _text(document)})


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


def _digest(tensors: dict[str, np.ndarray], document: dict[str, Any]) -> str:
    """Hash the document and every tensor's name, type, shape and values; safetensors checks no values."""
    parts = [_text(document).encode()]
    for name in sorted(tensors):
        array = tensors[name]
        parts += [json.dumps([name, str(array.dtype), array.shape]).encode(), array.tobytes()]
    return storage.sha256(*parts)


def unpack(content: bytes, where: str) -> PackedFit:
    """Parse and verify the bytes of a fit file; error messages name it as `where`.

    Raises:
        AlignmentError: it is truncated, damaged, no fit file, or of an unsupported format version.
    """
    try:
        tensors = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise AlignmentError(
            f"{where}: is truncated or no safetensors file ({error}); export the fit again"
        ) from error
    text = header.get("__metadata__", {}).get(METADATA_KEY, "")
    document = _document(text, where)
    digest = document.pop("digest", None)
    # JSON can write the same values in several ways; accept only the bytes that `pack` writes.
    if digest != _digest(tensors, document) or text != _text({**document, "digest": digest}):
        raise AlignmentError(f"{where}: does not match its digest, so it is damaged; export the fit again")
    fit = _fit(tensors, document, where)
    check_consistent(fit, where)
    return PackedFit(fit=fit, config=document.get("config", ""))


def _document(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        version = document.get("format_version")
    except (ValueError, AttributeError) as error:
        raise AlignmentError(
            f"{where}: holds no exported fit; make such a file with jobs/fits.py export"
        ) from error
    if version != FORMAT_VERSION:
        raise AlignmentError(
            f"{where}: format_version is {version}, this version reads {FORMAT_VERSION}; import it with the "
            "version that wrote it, or export it again"
        )
    return document


def _fit(tensors: dict[str, np.ndarray], document: dict[str, Any], where: str) -> RegisteredFit:
    try:
        alignment, sides = document["alignment"], {}
        for side in _SIDES:
            start = f"moments.{side}."
            named = {
                name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)
            }
            sides[side] = Moments.of_tensors(named, document[f"{side}_shards"])
    except (KeyError, TypeError, ValueError) as error:
        raise AlignmentError(
            f"{where}: the fit is incomplete ({quote(error, 80)}); export it again"
        ) from error
    return RegisteredFit(alignment=parse_alignment(alignment, tensors, where), **sides)


def export(uri: str, output: str) -> str:
    """Write the fit in directory `uri` to the file `output`; return "exported" or "already there".

    Raises:
        AlignmentError: the fit is unfinished or damaged.
        OutputError: `output` exists and holds something else.
    """
    content = pack(read(uri), _config(uri))
    if not storage.exists(output):
        storage.write_bytes(output, content)
        return "exported"
    if storage.read_bytes(output) != content:
        artifact.refuse_files("this fit", [output])
    return "already there"


def _config(uri: str) -> str:
    uri = storage.join(uri, CONFIG)
    try:
        return storage.read_bytes(uri).decode() if storage.exists(uri) else ""
    except UnicodeDecodeError as error:
        raise AlignmentError(f"{uri}: is not UTF-8 text ({error}); restore or remove it") from error


def import_file(file: str, registry: str, name: str | None = None) -> tuple[str, str, RegisteredFit]:
    """Write the fit of `file` to the registry as `name`, by default the file's name without its suffix.

    Returns "imported" or "already there", the fit's URI, and the fit.

    Raises:
        AlignmentError: the file, or the fit that has this name already, is damaged.
        DataError: the file is missing, or the name is invalid.
        OutputError: another fit has this name, or its directory holds other files.
    """
    name = storage.name_of(file).rpartition(".")[0] if name is None else name
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise DataError(
            f"name={quote(name, 80)}: expected words of letters, digits and . , + @ - _ with / between them"
        )
    packed = unpack(storage.read_bytes(file), file)
    uri = storage.join(storage.absolute(registry), name)
    if storage.exists(storage.join(uri, DOCUMENT)):
        _check_same(uri, name, packed)
        return "already there", uri, packed.fit
    artifact.check_unused(uri, "a fit", leftovers=(TENSORS, CONFIG))
    if packed.config:
        storage.write_bytes(storage.join(uri, CONFIG), packed.config.encode())
    save_alignment(packed.fit.alignment, packed.fit.text, packed.fit.image, uri)
    return "imported", uri, packed.fit


def _check_same(uri: str, name: str, packed: PackedFit) -> None:
    there = read(uri)
    if pack(there) != pack(packed.fit):
        former, current = (
            {"strategy": fit.alignment.strategy.strategy, "content_hash": fit.alignment.content_hash}
            for fit in (there, packed.fit)
        )
        artifact.refuse(
            uri,
            "a fit",
            artifact.changes(former, current) or ["the moments differ"],
            advice=f"to keep both, give another name than {quote(name, 80)}",
        )
