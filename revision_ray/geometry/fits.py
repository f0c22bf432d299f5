"""The fits job: list, show, nearest, export, import."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from revision_ray import storage
from revision_ray.align.fit import describe
from revision_ray.data.shards import Modality
from revision_ray.errors import ConfigError, DataError
from revision_ray.geometry import fit_file, fit_tables, nearest, registry

FORMAT_VERSION = 1
# The keys that each action needs, in the order in which they may follow it, and those that it reads if given.
VERBS = {"list": (), "show": ("name",), "nearest": (), "export": ("name", "output"), "import": ("file",)}
_OPTIONAL = {
    "list": ("output",),
    "show": ("output",),
    "nearest": ("texts", "images", "output"),
    "export": (),
    "import": ("name",),
}


@dataclass(frozen=True, kw_only=True)
class FitsJob:
    """List the fits of a registry, show one, find those nearest to a sample of embeddings, export, import."""

    action: Literal["list", "show", "nearest", "export", "import"] = "list"
    """What to do; may lead the command line as a word of its own, followed by NAME, OUTPUT or FILE."""
    registry: str = "runs"
    """Directory below which fits lie; a fit's name is its path below it."""
    name: str | None = None
    """show, export: which fit. import: what to call it; the file's name without its ending if not given."""
    texts: str | list[str] | None = None
    """nearest: text store (as embedded, not aligned), or several. This or images, or both."""
    images: str | list[str] | None = None
    """nearest: image store, or several."""
    num_rows: int = 10_000
    """nearest: how many rows of each side to sample uniformly; statistics settle at about 10,000."""
    seed: int = 0
    """nearest: of the sample."""
    max_rejected_fraction: float = 0.001
    """nearest: fail when a larger share of the sample is NaN, infinite, zero, or of another dimension."""
    file: str | None = None
    """import: a file that export wrote."""
    output: str | None = None
    """export: the safetensors file. list, show, nearest: a JSON file to write the result to as well."""
    json: bool = False
    """list, show, nearest: say the result as JSON; --json for short."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"num_rows is {self.num_rows}; expected 1 or more")
        for key in VERBS[self.action]:
            if getattr(self, key) is None:
                raise ConfigError(f"{self.action} needs {key}; give it as {key}=VALUE")
        if self.action == "nearest" and not (self.texts or self.images):
            raise ConfigError("nearest needs a sample: give texts=STORE, images=STORE, or both")
        for key in ("name", "texts", "images", "file", "output"):
            if getattr(self, key) and key not in VERBS[self.action] + _OPTIONAL[self.action]:
                raise ConfigError(f"{key} has no effect on {self.action}; leave it out")


def run(job: FitsJob) -> str:
    """Do what `job` says; the result as text."""
    if job.action == "export":
        assert job.name
        assert job.output
        place = registry.place_of(job.registry, job.name)
        return f"{fit_file.export(place.uri, job.output)}: {storage.absolute(job.output)}"
    if job.action == "import":
        assert job.file
        done, uri, fit = fit_file.import_file(job.file, job.registry, job.name)
        return f"{done}: {describe(fit.alignment, uri)}"
    document = _document(job)
    if job.output:
        _write(job.output, document)
    if job.json:
        return json.dumps(document, indent=2)
    return {"list": fit_tables.listed, "show": fit_tables.shown, "nearest": fit_tables.ranked}[job.action](
        document
    )


def _document(job: FitsJob) -> dict[str, Any]:
    start = {"format_version": FORMAT_VERSION, "settings": asdict(job)}
    if job.action == "list":
        return start | {"fits": [registry.summary(entry) for entry in registry.entries(job.registry)]}
    if job.action == "show":
        assert job.name
        return start | {"fit": registry.details(registry.place_of(job.registry, job.name))}
    entries = registry.entries(job.registry)
    sampled = {}
    sides: list[tuple[Modality, str | list[str] | None]] = [("text", job.texts), ("image", job.images)]
    for modality, stores in sides:
        if stores:
            uris = [stores] if isinstance(stores, str) else stores
            sampled[modality] = nearest.sample_stores(
                uris, modality, job.num_rows, job.seed, job.max_rejected_fraction
            )
    return start | nearest.rank(entries, sampled)


def _write(output: str, document: dict[str, Any]) -> None:
    """A former result of the same action makes room, anything else does not."""
    if storage.exists(output):
        try:
            former = storage.read_json(output)["settings"]["action"]
        except (DataError, KeyError, TypeError):
            former = None
        if former != document["settings"]["action"]:
            raise DataError(
                f"{output}: holds something else already; name another file, or remove it yourself"
            )
    storage.write_json(output, document)
