"""The fits job (list, show, nearest, export, import), and its results as text for a terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from revision_ray.align import nearest, registry
from revision_ray.align.fit import describe
from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data.shards import Modality


def listed(document: dict[str, Any]) -> str:
    """A line a fit, then the damaged ones with their reasons."""
    sound = [line for line in document["fits"] if not line["damage"]]
    damaged = [line for line in document["fits"] if line["damage"]]
    head = (
        "name",
        "strategy",
        "domain",
        "encoder",
        "d",
        "texts",
        "images",
        "gap before -> after (s.e.)",
        "hash",
    )
    rows = [
        (
            line["name"],
            line["strategy"],
            line["domain"] or "-",
            _encoders(line["text_encoder"], line["image_encoder"]),
            str(line["embedding_dim"]),
            f"{line['num_texts']:,}",
            f"{line['num_images']:,}",
            _gap(line["modality_gap"], line["modality_gap_standard_error"]),
            line["content_hash"][:12],
        )
        for line in sound
    ]
    text = table(head, rows, right=(4, 5, 6)) if rows else "no sound fit"
    text += "".join(f"\ndamaged: {line['name']}: {line['damage']}" for line in damaged)
    return text


def _encoders(text: dict[str, str], image: dict[str, str]) -> str:
    names = [f"{e['name']} {e['fingerprint'][:8]}" if e["fingerprint"] else "unknown" for e in (text, image)]
    return " | ".join(dict.fromkeys(names))


def _gap(gap: dict[str, float], errors: dict[str, float | None]) -> str:
    before, after = (_error(errors[name]) for name in ("before", "after"))
    return f"{gap['before']:.4f} ({before}) -> {gap['after']:.2e} ({after})"


def _error(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def fit_rows(document: dict[str, Any]) -> str:
    """Every key of the fit, nested ones with dots."""
    return "\n".join(f"{key}: {value}" for key, value in _flat(document["fit"]))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)]


def ranked(document: dict[str, Any]) -> str:
    """The sample, a line a fit, those that cannot be compared, and how to read it."""
    lines = [_sample(modality, sample) for modality, sample in document["sample"].items()]
    sides = list(document["sample"])
    head = ("rank", "name", "strategy", "domain", "distance (s.e.)", "floor", "verdict", "of spread")
    head += ("farther by (s.e.)", *(f"{side} trace - fit's (s.e.)" for side in sides))
    rows = [
        (
            str(fit["rank"]),
            fit["name"],
            fit["strategy"],
            fit["domain"] or "-",
            f"{fit['distance']:.4f} ({_error(fit['standard_error'])})",
            f"{fit['sampling_floor']:.4f}",
            fit["verdict"],
            "-" if fit["share_of_spread"] is None else f"{fit['share_of_spread']:.1%}",
            f"{fit['farther_than_nearest']:.4f} ({_error(fit['farther_standard_error'])})",
            *(
                f"{fit['sides'][side]['trace_difference']:+.4f} "
                f"({_error(fit['sides'][side]['trace_difference_standard_error'])})"
                for side in sides
            ),
        )
        for fit in document["ranked"]
    ]
    lines += ["", table(head, rows, right=(0, 5, 7)), ""]
    lines += [f"not comparable: {line['name']}: {line['reason']}" for line in document["not_comparable"]]
    lines.append(
        "The order is that of the distance between the centroids of sample and fit. Standard errors are the "
        "sample's.\nfloor: the distance that so many rows of the fit's own domain have by chance; beyond "
        "chance: three floors.\nof spread: distance over the root of the fit's trace."
    )
    return "\n".join(lines)


def _sample(modality: str, sample: dict[str, Any]) -> str:
    encoder = sample["encoder"]
    known = f"encoder {encoder['name']} {encoder['fingerprint'][:8]}"
    known = known if encoder["fingerprint"] else "encoder unknown, so not compared"
    return (
        f"{modality} sample: {sample['num_rows']:,} of {sample['num_rows_in_store']:,} rows of "
        f"{', '.join(sample['stores'])}; d = {sample['embedding_dim']}, {known}, "
        f"domain {sample['domain'] or '-'}, trace {sample['trace']:.4f}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces between; those numbered in `right` flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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


def run_fits(job: FitsJob) -> str:
    """Do what `job` says; the result as text."""
    if job.action == "export":
        assert job.name
        assert job.output
        place = registry.place_of(job.registry, job.name)
        return f"{registry.export(place.uri, job.output)}: {storage.absolute(job.output)}"
    if job.action == "import":
        assert job.file
        done, uri, fit = registry.import_file(job.file, job.registry, job.name)
        return f"{done}: {describe(fit.alignment, uri)}"
    document = _document(job)
    if job.output:
        _write(job.output, document)
    if job.json:
        return json.dumps(document, indent=2)
    return {"list": listed, "show": fit_rows, "nearest": ranked}[job.action](document)


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
