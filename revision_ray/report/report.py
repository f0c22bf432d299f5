"""The report job: measure the modality gap of an encoder, and write a page, JSON and pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import revision_ray
from revision_ray.core import artifact, config, storage
from revision_ray.core.cluster import connect
from revision_ray.core.config import MISSING
from revision_ray.core.errors import DataError, quote
from revision_ray.data.store import REJECTED
from revision_ray.report import claims, figures, page, plots
from revision_ray.report.measure import MeasureSettings, measure
from revision_ray.report.metrics import shown, value_of
from revision_ray.report.sample import ReportInputs, ReportSources, open_inputs
from revision_ray.report.verdict import GapVerdict, verdict

FORMAT_VERSION = 1
DOCUMENT, PAGE, CONFIG, FIGURES = "report.json", "report.html", "config.yaml", "figures"
_PACKAGES = ("numpy", "scipy", "pyarrow", "ray", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class ReportJob(ReportSources, MeasureSettings):
    """Report on an encoder's modality gap, whether fits close it, and which strategy to trust.

    Writes a page that works offline, all numbers as JSON and all figures as PNG.
    """

    output: str = MISSING
    """Directory of the report."""
    title: str = ""
    """Title of the page; by default the encoder's name."""
    replicates: list[ReportSources] = field(default_factory=list)
    """The same recipe under other seeds: {texts, images, alignments, ...} each. The paper's claims are judged
    on all of them."""

    def __post_init__(self) -> None:
        ReportSources.__post_init__(self)
        MeasureSettings.__post_init__(self)

    def settings(self) -> MeasureSettings:
        return MeasureSettings(**{name: getattr(self, name) for name in MeasureSettings.__dataclass_fields__})

    def sources(self) -> list[ReportSources]:
        """Return the sources of this encoder, then those of each replicate."""
        first = ReportSources(**{name: getattr(self, name) for name in ReportSources.__dataclass_fields__})
        return [first, *self.replicates]


def run_report(job: ReportJob) -> str:
    """Write the report and return its summary; a report of the same inputs at the output is kept.

    Raises:
        AlignmentError: fits and stores do not belong together, or a side does not vary.
        DataError: a store cannot be used, or the output has another report or other files.
    """
    output = storage.absolute(job.output)
    settings = job.settings()
    opened = [open_inputs(sources, output, settings.max_rejected_fraction) for sources in job.sources()]
    probes = [
        _read_probe(sources.probe, inputs) for sources, inputs in zip(job.sources(), opened, strict=True)
    ]
    identity = _identity(job, settings, opened, probes)
    finished = _read_finished(output, identity)
    if finished is not None:
        return _summary(finished, output)
    connect()
    config.save_resolved(job, storage.join(output, CONFIG))
    runs = [measure(inputs, settings) for inputs in opened]
    document = _document(job, settings, identity, runs, probes)
    drawn = figures.every_figure(document)
    for figure in drawn:
        storage.write_bytes(storage.join(output, FIGURES, f"{figure.name}.png"), plots.png(figure))
    storage.write_bytes(
        storage.join(output, PAGE), page.render(document, drawn, figures.before_and_after(document)).encode()
    )
    storage.write_json(storage.join(output, DOCUMENT), document)
    return _summary(document, output)


def _document(
    job: ReportJob,
    settings: MeasureSettings,
    identity: Mapping[str, Any],
    runs: Sequence[dict[str, Any]],
    probes: Sequence[dict[str, Any] | None],
) -> dict[str, Any]:
    """Return everything that the page shows; nothing in it depends on when or where it is made."""
    first, probe = runs[0], probes[0]
    judged: GapVerdict = verdict(first, probe["rows"] if probe else None)
    encoder = first["inputs"]["texts"]["encoder"]["name"]
    return _finite(
        {
            "format_version": FORMAT_VERSION,
            "asked": identity,
            "title": job.title or encoder or "an unknown encoder",
            "settings": asdict(settings),
            "versions": {
                "revision_ray": revision_ray.__version__,
                **{name: version(name) for name in _PACKAGES},
            },
            **first,
            "verdict": judged.document(),
            "limitations": _limitations(first, probe),
            "probe": probe,
            "claims": claims.judge(runs, [each["rows"] if each else None for each in probes]),
            "replicates": [{k: v for k, v in run.items() if k != "curves"} for run in runs[1:]],
        }
    )


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _limitations(run: Mapping[str, Any], probe: Mapping[str, Any] | None) -> list[str]:
    """List what a reader must know before quoting a number."""
    on, dim = run["measured_on"], run["embedding_dim"]
    limits = []
    for side in ("texts", "images"):
        if on[f"num_{side}"] <= dim:
            limits.append(
                f"Only {on[f'num_{side}']:,} {side} in {dim} dimensions: their covariance cannot have full "
                "rank, so condition number, spectral correlation and covariance gap say more of the sample "
                f"than of the encoder. Measure on several times {dim} rows."
            )
        if share := on["share_off_unit"]["text" if side == "texts" else "image"]:
            limits.append(
                f"{shown(share, True)} of the {side} were not of length one; all rows are scaled to it."
            )
    if dim < min(on["num_texts"], on["num_images"]) < 10_000:
        limits.append(
            f"{on['num_texts']:,} texts and {on['num_images']:,} images were measured; statistics settle "
            "at about 10,000."
        )
    if on["pairs"] is None:
        limits.append(
            "No text and image share an id, so there are no pairs: what needs them is marked. Embed the "
            "same image-caption pairs (WebDataset tars, or Parquet, with one id) once as images and once "
            "as texts with jobs/embed.py, and give both stores as heldout_images and heldout_texts."
        )
    seen = [entry["label"] for entry in run["strategies"] if not entry["held_out"]]
    if seen:
        limits.append(
            f"Rows measured here took part in the fit of {', '.join(seen)}: centroid gaps come out too "
            "small. Give heldout_texts and heldout_images for an honest figure."
        )
    if on["num_dropped"]:
        limits.append(
            f"{on['num_dropped']:,} sampled rows without a direction (NaN, infinite, zero) are left out."
        )
    if probe and not probe["same_texts"]:
        limits.append("The probe was made with other texts than those of this report.")
    return limits


def _read_probe(uri: str | None, inputs: ReportInputs) -> dict[str, Any] | None:
    """Read label, loss (negative log-likelihood) and accuracy of each strategy from the probe study's JSON.

    Raises:
        DataError: the file is not a result of that study.
    """
    if uri is None:
        return None
    document = storage.read_json(uri)
    try:
        rows = [
            {
                "label": name.removeprefix("given_"),
                "strategy": name.removeprefix("given_"),
                **{f"loss{end}": scores["nll"][key] for end, key in _ENDS},
                **{f"accuracy{end}": scores["accuracy"][key] for end, key in _ENDS},
            }
            for name, scores in document["strategies"].items()
        ]
        bound = document["upper_bound"]
        texts = storage.sha256(*(h.encode() for h in sorted(inputs.reference_texts.shard_hashes)))
        return {
            "uri": uri,
            "rows": sorted(rows, key=lambda row: row["loss"]),
            "upper_bound": {"loss": bound["nll"]["mean"], "accuracy": bound["accuracy"]["mean"]},
            "reading": document.get("reading", ""),
            "same_texts": document.get("asked", {}).get("texts", texts) == texts,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{uri}: is not a result of the cross-modal probe ({quote(error, 80)} is missing); give the "
            f"probe.json that "
            "jobs/study.py wrote"
        ) from error


_ENDS = (("", "mean"), ("_low", "low"), ("_high", "high"))


def _identity(
    job: ReportJob, settings: MeasureSettings, opened: Sequence[ReportInputs], probes: Sequence[Any]
) -> dict[str, Any]:
    """Return what decides every number of the report, as JSON has it."""
    identity = {
        "title": job.title,
        "settings": asdict(settings),
        "inputs": [
            {
                **{name: store["content_hash"] for name, store in inputs.description().items()},
                "fits": [fit.alignment.content_hash if fit.alignment else "none" for fit in inputs.fits],
                "probe": storage.sha256(json.dumps(probe, sort_keys=True).encode()) if probe else None,
            }
            for inputs, probe in zip(opened, probes, strict=True)
        ],
    }
    return json.loads(json.dumps(identity))


def _read_finished(output: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the finished report at `output`; None if there is none.

    Raises:
        OutputError: the output has another report, or files that are not part of a report.
    """
    document = artifact.finished(
        output, DOCUMENT, identity, "a report", key="asked", format_version=FORMAT_VERSION
    )
    if document is None:
        artifact.check_unused(output, "a report", leftovers=(PAGE, CONFIG, REJECTED))
    return document


def _summary(document: Mapping[str, Any], output: str) -> str:
    """Write the report in a few lines."""
    width = max(len(entry["label"]) for entry in document["strategies"]) + 2
    lines = [document["verdict"]["headline"], "", f"{'strategy':<{width}}{'gap':>12}{'floor':>12}"]
    for entry in document["strategies"]:
        gap, floor = value_of(entry, "modality_gap") or 0.0, value_of(entry, "sampling_floor") or 0.0
        lines.append(f"{entry['label']:<{width}}{gap:>12.5f}{floor:>12.5f}")
    lines += ["", *document["verdict"]["paragraphs"], "", f"report: {storage.join(output, PAGE)}"]
    return "\n".join(lines)
