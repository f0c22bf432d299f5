"""What stands at a URI, as a hash that changes with it: the identities that artifacts carry already.

Stores, fits and worlds say in a small document what they hold; weights are hashed, once for each version of a
file; sources are known by names, sizes and modification times, as in the stores made of them. No Ray.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from revision_ray import storage
from revision_ray.errors import DataError, shorten

# Of a model's folder, what decides what it says. Figures of its training are no part of the model.
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_NO_MODEL_FILES = ("metrics.json",)
_CONFIGURATIONS = ("config.json", "open_clip_config.json")


@dataclass
class Contents:
    """Identities of what stands at URIs; `known` keeps the hashes of large files by their size and time."""

    known: dict[str, list[Any]] = field(default_factory=dict)
    """URI -> [size, modification time in ns, SHA-256]."""

    def of(self, uri: str) -> str:
        """Hex digits, equal for equal content; none where nothing stands, or what stands is unfinished.

        Raises:
            DataError: a document that should say what stands there is damaged.
        """
        kind = storage.info(uri).type
        if kind == pafs.FileType.File or (kind == pafs.FileType.NotFound and storage.is_wildcard(uri)):
            return listed(uri)
        if kind != pafs.FileType.Directory:
            return ""
        names = {storage.name_of(found) for found, _ in storage.list_files(uri)}
        if "manifest.json" in names:
            return _of_manifest(uri, names)
        if "alignment.json" in names:
            return _of_fit(uri)
        if names & set(_CONFIGURATIONS):
            return self._of_model(uri)
        if "results.json" in names:  # of a training run, whose result is its model, or of an evaluation
            model = storage.join(uri, "model")
            trained = storage.exists(storage.join(model, "config.json"))
            return self._of_model(model) if trained else self._sha256(storage.join(uri, "results.json"))
        if "conversations.jsonl" in names:
            return self._sha256(storage.join(uri, "conversations.jsonl"))
        return listed(uri)

    def _of_model(self, folder: str) -> str:
        files = [
            uri
            for uri, _ in storage.list_files(folder)
            if storage.name_of(uri).endswith(_MODEL_FILES) and storage.name_of(uri) not in _NO_MODEL_FILES
        ]
        parts = [part for uri in files for part in (storage.name_of(uri), self._sha256(uri))]
        return storage.sha256(*(part.encode() for part in parts))

    def _sha256(self, uri: str) -> str:
        entry = storage.info(uri)
        size, time, digest = self.known.get(uri, [None, None, ""])
        if (size, time) != (entry.size, entry.mtime_ns):
            digest = _sha256_of(uri)
            self.known[uri] = [entry.size, entry.mtime_ns, digest]
        return digest


def _sha256_of(uri: str) -> str:
    digest = hashlib.sha256()
    with storage.open_input(uri) as file:
        try:
            while block := file.read_buffer(1 << 24):
                digest.update(block)
        except OSError as error:
            raise DataError(f"{uri}: cannot be read: {shorten(error)}") from error
    return digest.hexdigest()


def _of_manifest(uri: str, names: set[str]) -> str:
    """Of an embedding store, whose shards must be there; of anything else, its manifest as it stands."""
    document = storage.read_json(storage.join(uri, "manifest.json"))
    shards = document.get("shards") if isinstance(document, dict) else None
    if not isinstance(shards, list):
        return storage.sha256(json.dumps(document, sort_keys=True).encode())
    try:
        if any(shard["name"] not in names for shard in shards):
            return ""
        document["shards"] = sorted(shard["content_hash"] for shard in shards)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{uri}/manifest.json: damaged: {shorten(error)}; run the job that made it again"
        ) from error
    return storage.sha256(json.dumps(document, sort_keys=True).encode())


def _of_fit(uri: str) -> str:
    document = storage.read_json(storage.join(uri, "alignment.json"))
    keys = ("content_hash", "strategy", "domain", "text_encoder", "image_encoder")
    try:
        return storage.sha256(json.dumps([document[key] for key in keys], sort_keys=True).encode())
    except (KeyError, TypeError) as error:
        raise DataError(f"{uri}/alignment.json: damaged: {shorten(error)}; fit again") from error


def listed(uri: str) -> str:
    """Identity of sources by name, size and time: of a file, of a folder with everything below it, or of what
    a wildcard path matches; empty where there is none."""
    entry = storage.info(uri)
    if entry.type == pafs.FileType.File:
        files, root = [(uri, entry)], storage.parent_of(uri)
    elif entry.type == pafs.FileType.Directory:
        files, root = storage.list_files(uri, recursive=True), uri
    else:
        files, root = storage.glob_files(uri), storage.wildcard_root(uri)
    if not files:
        return ""
    lines = (
        f"{storage.relative_path(found, root)} {info.size} {info.mtime_ns}".encode() for found, info in files
    )
    return storage.sha256(*lines)
