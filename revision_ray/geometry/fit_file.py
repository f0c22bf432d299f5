"""A fit with its moments as one safetensors file, and back into a registry, to the bit.

The file's tensors are those of the fit's directory: the alignment's under their own names, the moments' below
`moments.text.` and `moments.image.`. Its metadata have one key, `revision_ray_fit`: a JSON document of
alignment.json, the shard hashes, the fit job's settings where known, and a digest of everything. (One key:
safetensors writes several in no fixed order.) Lists of rejected rows stay behind.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from revision_ray import storage
from revision_ray.align.alignment import (
    CONFIG,
    DOCUMENT,
    TENSORS,
    parse_alignment,
    save_alignment,
)
from revision_ray.align.moments import Moments
from revision_ray.errors import AlignmentError, DataError, quote
from revision_ray.geometry.registry import Fit, check_consistent, read

METADATA_KEY, FORMAT_VERSION = "revision_ray_fit", 1
_SIDES = ("text", "image")
_SEGMENT = re.compile(
    r"(?!\.\.?$)[\w.,+@-]+"
)  # of a name: no path out of the registry, no wildcard, no query


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What such a file holds."""

    fit: Fit
    config: str  # YAML of the fit job; empty where it is not known


def pack(fit: Fit, config: str = "") -> bytes:
    """The file of this fit; equal fits give equal bytes."""
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
    """Over every name, type, shape and value: safetensors itself checks none of the values."""
    parts = [_text(document).encode()]
    for name in sorted(tensors):
        array = tensors[name]
        parts += [json.dumps([name, str(array.dtype), array.shape]).encode(), array.tobytes()]
    return storage.sha256(*parts)


def unpack(content: bytes, where: str) -> Packed:
    """What the file at `where` holds, verified.

    Raises:
        AlignmentError: truncated, damaged, no such file, or of a version that this one does not read.
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
    # The same values may be spelled in several ways; only one is what was written.
    if digest != _digest(tensors, document) or text != _text({**document, "digest": digest}):
        raise AlignmentError(f"{where}: does not match its digest, so it is damaged; export the fit again")
    fit = _fit(tensors, document, where)
    check_consistent(fit, where)
    return Packed(fit=fit, config=document.get("config", ""))


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


def _fit(tensors: dict[str, np.ndarray], document: dict[str, Any], where: str) -> Fit:
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
    return Fit(alignment=parse_alignment(alignment, tensors, where), **sides)


def export(uri: str, output: str) -> str:
    """The fit at directory `uri` stands in the file `output` as well; says what was done.

    Raises:
        AlignmentError: the fit is damaged.
        DataError: `output` holds something else already.
    """
    content = pack(read(uri), _config(uri))
    if not storage.exists(output):
        storage.write_bytes(output, content)
        return "exported"
    if storage.read_bytes(output) != content:
        raise DataError(f"{output}: holds something else already; name another file, or remove it yourself")
    return "already there"


def _config(uri: str) -> str:
    uri = storage.join(uri, CONFIG)
    try:
        return storage.read_bytes(uri).decode() if storage.exists(uri) else ""
    except UnicodeDecodeError as error:
        raise AlignmentError(f"{uri}: is not UTF-8 text ({error}); restore or remove it") from error


def import_file(file: str, registry: str, name: str | None = None) -> tuple[str, str, Fit]:
    """The fit in `file` stands in the registry as `name`, by default the file's without its ending.

    Returns what was done, the fit's URI, and the fit.

    Raises:
        AlignmentError: the file is damaged, or another fit has that name.
        DataError: no file there, a name that is none, or other files in that place.
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
    ours = {TENSORS, CONFIG}  # of an import that was interrupted
    strangers = [found for found, _ in storage.list_files(uri) if storage.name_of(found) not in ours]
    if strangers:
        raise DataError(f"{uri}: holds files that are no fit ({strangers[0]}); choose another name")
    if packed.config:
        storage.write_bytes(storage.join(uri, CONFIG), packed.config.encode())
    save_alignment(packed.fit.alignment, packed.fit.text, packed.fit.image, uri)
    return "imported", uri, packed.fit


def _check_same(uri: str, name: str, packed: Packed) -> None:
    there = read(uri)
    if pack(there) != pack(packed.fit):
        raise AlignmentError(
            f"{uri}: another fit has the name {quote(name, 80)} already "
            f"({there.alignment.strategy.strategy}, content hash {there.alignment.content_hash[:12]}; the "
            f"file's is {packed.fit.alignment.content_hash[:12]}); "
            "choose another name, or remove that fit yourself"
        )
