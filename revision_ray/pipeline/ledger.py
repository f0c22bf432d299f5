"""What a pipeline has done, in RUN/ledger.json: a record of every stage, written atomically as it goes on."""

import platform
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from revision_ray import storage
from revision_ray.errors import DataError, quote

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
class Record:
    """A stage as it ran last."""

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
    records: dict[str, Record] = field(default_factory=dict)
    hashes: dict[str, list[Any]] = field(default_factory=dict)

    def begin(self, name: str, record: Record) -> None:
        """The stage is on record as running."""
        self.records[name] = record
        self._save()

    def end(self, name: str, state: Literal["failed", "finished"], message: str, **known: Any) -> None:
        """The stage is on record as ended, with what is known of it now."""
        self.records[name] = replace(
            self.records[name], state=state, message=message, ended=utc_now(), **known
        )
        self._save()

    def keep(self, name: str, former: Record, refused: str) -> None:
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
    """The ledger of the run directory, empty where there is none yet.

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
        records = {name: Record(**record) for name, record in document["stages"].items()}
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
