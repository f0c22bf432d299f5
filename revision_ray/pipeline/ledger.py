"""Record what a pipeline has done, and hash what stands at a URI to see whether it changed. No Ray.

RUN/ledger.json holds a record of every stage and is written atomically. Stores, fits and worlds carry their
identity in a small document; weights are hashed, once for each version of a file; sources are identified by
names, sizes and modification times, as in the stores made of them.
"""

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import pyarrow.fs as pafs

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote, shorten

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


FORMAT_VERSION = 1
LEDGER = "ledger.json"
_PACKAGES = (
    "revision_ray",
    "ray",
    "torch",
    "transformers",
    "open_clip_torch",
    "deepspeed",
    "numpy",
    "pyarrow",
)

Identified = list[
    list[str]
]  # [URI, identity] of each thing under one key; identity as `content.Contents` has it


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """Record of the last run of a stage."""

    job: str
    settings: dict[str, Any]
    inputs: dict[str, Identified]
    """As they were when it began: what came later makes it run again."""
    outputs: Identified = field(default_factory=list)
    """As they were when it had finished; empty before."""
    state: Literal["running", "failed", "finished"]
    """running is also what a killed one leaves."""
    message: str = ""
    """What the job said at its end, or its error."""
    refused: str = ""
    """Why the job did not go on from this output when settings or inputs had changed, if they have since."""
    begun: str
    ended: str = ""
    """UTC, ISO 8601."""
    seconds: float = 0.0
    unbroken: bool = True
    """Whether `seconds` are those of the whole stage, and not of what an earlier run had left of it."""
    rows: int | None = None
    tokens: float | None = None
    gpus: float = 0.0
    """How much it did, and on how many GPUs, where that is known: what --dry-run calibrates with."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Ledger:
    """The records of a run directory, and the hashes of large files that its stages read."""

    uri: str
    records: dict[str, StageRecord] = field(default_factory=dict)
    hashes: dict[str, list[Any]] = field(default_factory=dict)

    def begin(self, name: str, record: StageRecord) -> None:
        """Record the stage as running."""
        self.records[name] = record
        self._save()

    def end(self, name: str, state: Literal["failed", "finished"], message: str, **known: Any) -> None:
        """Record the stage as ended, with what is known of it now."""
        self.records[name] = replace(
            self.records[name], state=state, message=message, ended=utc_now(), **known
        )
        self._save()

    def keep(self, name: str, former: StageRecord, refused: str) -> None:
        """The stage is on record as before a run that changed nothing, but said why it would not."""
        self.records[name] = replace(former, refused=refused)
        self._save()

    def _save(self) -> None:
        document = {
            "format_version": FORMAT_VERSION,
            "stages": {name: asdict(record) for name, record in self.records.items()},
            "hashes": self.hashes,
        }
        storage.write_json(self.uri, document)


def open_ledger(run: str) -> Ledger:
    """Read the ledger of the run directory; return an empty one if there is none yet.

    Raises:
        DataError: it is damaged, or of a later version.
    """
    uri = storage.join(storage.absolute(run), LEDGER)
    if not storage.exists(uri):
        return Ledger(uri=uri)
    document = storage.read_json(uri)
    try:
        found = document["format_version"]
        if found != FORMAT_VERSION:
            raise DataError(f"{uri}: format_version is {found}, this version reads {FORMAT_VERSION}")
        records = {name: StageRecord(**record) for name, record in document["stages"].items()}
        return Ledger(uri=uri, records=records, hashes=document["hashes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{uri}: damaged: {quote(error)}; remove it: every stage then looks at its own output again"
        ) from error


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str]:
    """Of Python and of what computes, as installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
