"""The report job: figures by strategy, the verdict, the claims, as a page, JSON and pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import revision_ray
from revision_ray.core import config, storage
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
    """What an encoder's modality gap looks like, whether fits close it, and which strategy to trust: a page
    that works offline, with all numbers as JSON and all figures as PNG."""

    output: str = MISSING
    """Directory of the report."""
    title: str = ""
    """Of the page; by default the encoder's name."""
    replicates: list[ReportSources] = field(default_factory=list)
    """The same recipe under other seeds: {texts, images, alignments, ...} each. The paper's claims are judged
    on all of them."""

    def __post_init__(self) -> None:
        ReportSources.__post_init__(self)
        MeasureSettings.__post_init__(self)

    def settings(self) -> MeasureSettings:
        return MeasureSettings(**{name: getattr(self, name) for name in MeasureSettings.__dataclass_fields__})

    def sources(self) -> list[ReportSources]:
        """Of this encoder, then of each replicate."""
        first = ReportSources(**{name: getattr(self, name) for name in ReportSources.__dataclass_fields__})
        return [first, *self.replicates]


def run(job: ReportJob) -> str:
    """The report stands at the job's output; what it says, in short. One that stands there already is kept.

    Raises:
        AlignmentError: fits and stores do not belong together, or a side does not vary.
        DataError: stores cannot be used, or the output holds another report.
    """
    output = storage.absolute(job.output)
    settings = job.settings()
    opened = [open_inputs(sources, output, settings.max_rejected_fraction) for sources in job.sources()]
    probes = [
        _read_probe(sources.probe, inputs) for sources, inputs in zip(job.sources(), opened, strict=True)
    ]
    asked = _asked(job, settings, opened, probes)
    standing = _standing(output, asked)
    if standing is not None:
        return _said(standing, output)
    connect()
    config.save_resolved(job, storage.join(output, CONFIG))
    runs = [measure(inputs, settings) for inputs in opened]
    document = _document(job, settings, asked, runs, probes)
    drawn = figures.every_figure(document)
    for figure in drawn:
        storage.write_bytes(storage.join(output, FIGURES, f"{figure.name}.png"), plots.png(figure))
    storage.write_bytes(
        storage.join(output, PAGE), page.render(document, drawn, figures.before_and_after(document)).encode()
    )
    storage.write_json(storage.join(output, DOCUMENT), document)
    return _said(document, output)


def _document(
    job: ReportJob,
    settings: MeasureSettings,
    asked: Mapping[str, Any],
    runs: Sequence[dict[str, Any]],
    probes: Sequence[dict[str, Any] | None],
) -> dict[str, Any]:
    """Everything that the page shows; nothing in it depends on when or where it was made."""
    first, probe = runs[0], probes[0]
    judged: GapVerdict = verdict(first, probe["rows"] if probe else None)
    encoder = first["inputs"]["texts"]["encoder"]["name"]
    return _finite(
        {
            "format_version": FORMAT_VERSION,
            "asked": asked,
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
            "claims": claims.judge(runs, [found["rows"] if found else None for found in probes]),
            "replicates": [{k: v for k, v in run.items() if k != "curves"} for run in runs[1:]],
        }
    )


def _finite(value: Any) -> Any:
    """The same with NaN and infinity as null, which is all that JSON has for them."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _limitations(run: Mapping[str, Any], probe: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before trusting the figures."""
    on, dim = run["measured_on"], run["embedding_dim"]
    found = []
    for side in ("texts", "images"):
        if on[f"num_{side}"] <= dim:
            found.append(
                f"Only {on[f'num_{side}']:,} {side} in {dim} dimensions: their covariance cannot have full "
                "rank, so condition number, spectral correlation and covariance gap say more of the sample "
                f"than of the encoder. Measure on several times {dim} rows."
            )
        if share := on["share_off_unit"]["text" if side == "texts" else "image"]:
            found.append(
                f"{shown(share, True)} of the {side} were not of length one; all rows are scaled to it."
            )
    if dim < min(on["num_texts"], on["num_images"]) < 10_000:
        found.append(
            f"{on['num_texts']:,} texts and {on['num_images']:,} images were measured; statistics settle "
            "at about 10,000."
        )
    if on["pairs"] is None:
        found.append(
            "No text and image share an id, so there are no pairs: what needs them is marked. Embed the "
            "same image-caption pairs (WebDataset tars, or Parquet, with one id) once as images and once "
            "as texts with jobs/embed.py, and give both stores as heldout_images and heldout_texts."
        )
    seen = [entry["label"] for entry in run["strategies"] if not entry["held_out"]]
    if seen:
        found.append(
            f"Rows measured here took part in the fit of {', '.join(seen)}: centroid gaps come out too "
            "small. Give heldout_texts and heldout_images for an honest figure."
        )
    if on["num_dropped"]:
        found.append(
            f"{on['num_dropped']:,} sampled rows without a direction (NaN, infinite, zero) are left out."
        )
    if probe and not probe["same_texts"]:
        found.append("The probe was made with other texts than those of this report.")
    return found


def _read_probe(uri: str | None, inputs: ReportInputs) -> dict[str, Any] | None:
    """Rows of the probe study's JSON: label, loss (negative log-likelihood) and accuracy on real images.

    Raises:
        DataError: it is no result of that study.
    """
    if uri is None:
        return None
    document = storage.read_json(uri)
    try:
        rows = [
            {
                "label": name.removeprefix("given_"),
                "strategy": name.removeprefix("given_"),
                **{f"loss{end}": found["nll"][key] for end, key in _ENDS},
                **{f"accuracy{end}": found["accuracy"][key] for end, key in _ENDS},
            }
            for name, found in document["strategies"].items()
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
            f"{uri}: is no result of a cross-modal probe ({quote(error, 80)} is missing); give the "
            f"probe.json that "
            "jobs/study.py wrote"
        ) from error


_ENDS = (("", "mean"), ("_low", "low"), ("_high", "high"))


def _asked(
    job: ReportJob, settings: MeasureSettings, opened: Sequence[ReportInputs], probes: Sequence[Any]
) -> dict[str, Any]:
    """What decides every number of the report, as JSON has it."""
    found = {
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
    return json.loads(json.dumps(found))


def _standing(output: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report at `output`, where it is this one; None where there is none.

    Raises:
        DataError: another report, or files that are no report.
    """
    place = storage.join(output, DOCUMENT)
    if not storage.exists(place):
        ours = {PAGE, CONFIG, REJECTED}  # what a report that was interrupted leaves
        strangers = [uri for uri, _ in storage.list_files(output) if storage.name_of(uri) not in ours]
        if strangers:
            raise DataError(f"{output}: holds files that are no report ({strangers[0]}); name another output")
        return None
    found = storage.read_json(place)
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{place}: is no report that this version reads; name another output")
    if found.get("asked") != asked:
        different = [key for key in asked if found.get("asked", {}).get(key) != asked[key]]
        raise DataError(
            f"{output}: holds another report (different: {', '.join(different)}); name another output, or "
            "remove that directory yourself"
        )
    return found


def _said(document: Mapping[str, Any], output: str) -> str:
    """The report in a few lines."""
    width = max(len(entry["label"]) for entry in document["strategies"]) + 2
    lines = [document["verdict"]["headline"], "", f"{'strategy':<{width}}{'gap':>12}{'floor':>12}"]
    for entry in document["strategies"]:
        gap, floor = value_of(entry, "modality_gap") or 0.0, value_of(entry, "sampling_floor") or 0.0
        lines.append(f"{entry['label']:<{width}}{gap:>12.5f}{floor:>12.5f}")
    lines += ["", *document["verdict"]["paragraphs"], "", f"report: {storage.join(output, PAGE)}"]
    return "\n".join(lines)
