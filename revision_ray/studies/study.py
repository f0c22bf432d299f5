"""The study job: run every study that the inputs allow; write a table, a plot and JSON of each. Ray."""

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, Literal

from revision_ray.align.alignment import load_alignment
from revision_ray.align.apply import open_pair
from revision_ray.align.strategies import StrategyConfig, StrategyName
from revision_ray.core import artifact, config, storage
from revision_ray.core.cluster import connect
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.data.store import Store, open_stores
from revision_ray.report import plots
from revision_ray.studies import (
    c3_sigma,
    caption_length,
    centroid_steps,
    cross_modal_probe,
    domain_transfer,
    inputs,
    precision,
    sample_efficiency,
)
from revision_ray.studies.c3_sigma import C3Sigma
from revision_ray.studies.caption_length import CaptionLength
from revision_ray.studies.centroid_steps import CentroidSteps
from revision_ray.studies.cross_modal_probe import CrossModalProbe
from revision_ray.studies.inputs import RowLabels, StudyStores, read_labels
from revision_ray.studies.precision import Precision
from revision_ray.studies.sample_efficiency import SampleEfficiency

FORMAT_VERSION = 1


def write(
    output: str, name: str, identity: dict[str, Any], result: dict[str, Any], rows: Sequence[dict[str, Any]],
    reading: str, images: dict[str, bytes],
) -> str:  # fmt: skip
    """Write all files of the study to `output`; return the text of its table."""
    text = f"{name.replace('_', ' ')}\n{reading}\n\n{table(rows)}\n"
    for suffix, content in images.items():
        storage.write_bytes(storage.join(output, f"{name}.{suffix}"), content)
    storage.write_bytes(storage.join(output, f"{name}.csv"), _csv(rows))
    storage.write_bytes(storage.join(output, f"{name}.txt"), text.encode())
    document = {
        "format_version": FORMAT_VERSION,
        "study": name,
        "asked": identity,
        "reading": reading,
        **result,
    }
    storage.write_json(storage.join(output, f"{name}.json"), document)
    return text


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as aligned text: the first column to the left, others to the right, a dash for None."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(line[at]) for line in [heads, *cells]) for at in range(len(heads))]
    lines = []
    for line in [heads, *cells]:
        padded = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("   ".join([line[0].ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = io.StringIO()
    heads = list(dict.fromkeys(head for row in rows for head in row))
    writer = csv.DictWriter(sink, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


log = logging.getLogger(__name__)

StudyName = Literal[
    "sample_efficiency", "precision", "centroid_steps", "domain_transfer", "caption_length", "c3_sigma",
    "probe",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """Study a modality gap and what closes it: sample efficiency, precision, centroid steps, domain transfer,
    caption length, C3's noise, and the cross-modal probe. Each study writes a table, a plot and JSON."""

    texts: str | list[str] = MISSING
    """Text store, or several."""
    images: str | list[str] = MISSING
    """Image store, or several; it need not be paired with the texts."""
    output: str = MISSING
    """Directory of the results. A finished study of the same settings and inputs is kept."""
    studies: list[StudyName] = field(default_factory=list)
    """Studies to run; by default all that the inputs allow (the others are named)."""
    seed: int = 0
    """Seed of every sample."""
    strategy: StrategyName = "realign"
    """Strategy that sample_efficiency, domain_transfer and caption_length fit."""
    heldout_rows: int = 10_000
    """Rows a side that no fit uses, on which gaps are measured; at most a quarter of a store."""
    domains: dict[str, dict[str, str]] = field(default_factory=dict)
    """For domain_transfer, two or more: {NAME: {texts: STORE, images: STORE}}."""
    lengths: dict[str, str] = field(default_factory=dict)
    """For caption_length: text stores to compare, {NAME: STORE}, such as short and long captions. With labels
    of their texts, the probe compares them, too."""
    labels: list[str] = field(default_factory=list)
    """For the probe: JSONL or Parquet files with a column id and one column for each attribute."""
    heldout_images: str | None = None
    """For the probe: store of images that take no part in the statistics. Without it, a part of `images` is
    the test set."""
    alignments: list[str] = field(default_factory=list)
    """Directories of fits that the probe tests beside its own."""
    sample_efficiency: SampleEfficiency = field(default_factory=SampleEfficiency)
    precision: Precision = field(default_factory=Precision)
    centroid_steps: CentroidSteps = field(default_factory=CentroidSteps)
    caption_length: CaptionLength = field(default_factory=CaptionLength)
    c3_sigma: C3Sigma = field(default_factory=C3Sigma)
    probe: CrossModalProbe = field(default_factory=CrossModalProbe)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")
        if self.heldout_rows < 1:
            raise ConfigError(f"heldout_rows is {self.heldout_rows}; expected 1 or more")
        if len(self.domains) == 1:
            raise ConfigError(
                f"domains: only {next(iter(self.domains))} is given; domain transfer compares two or more"
            )
        for name, stores in self.domains.items():
            if set(stores) != {"texts", "images"}:
                raise ConfigError(
                    f"domains.{name}: has {', '.join(sorted(stores)) or 'nothing'}; expected a store for "
                    "texts and one for images"
                )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The opened inputs of a job."""

    job: StudyJob
    stores: StudyStores
    domains: dict[str, StudyStores]
    lengths: dict[str, Store]
    labels: RowLabels | None
    heldout: Store | None

    @property
    def strategy(self) -> StrategyConfig:
        return StrategyConfig(strategy=self.job.strategy, seed=self.job.seed)


def run_study(job: StudyJob) -> str:
    """Run the job's studies and write their files; return the text of their tables.

    Raises:
        ConfigError: the inputs do not allow a study of the job, or the output has a result of other settings.
        DataError: a store or a file of labels cannot be used.
    """
    output = storage.absolute(job.output)
    opened = _open(job)
    lacking = {name: need for name, study in STUDIES.items() if (need := study.lacks(opened))}
    for name in job.studies:
        if name in lacking:
            raise ConfigError(f"study {name} needs {lacking[name]}")
    chosen = [name for name in STUDIES if name in (job.studies or set(STUDIES) - set(lacking))]
    identities = {name: _study_identity(name, opened) for name in chosen}
    finished = {
        name: artifact.finished(
            output,
            f"{name}.json",
            identities[name],
            f"a study {name}",
            key="asked",
            format_version=FORMAT_VERSION,
        )
        for name in chosen
    }
    connect()
    config.save_resolved(job, storage.join(output, "config.yaml"))
    texts = []
    for name in chosen:
        if finished[name] is not None:
            log.info("%s is finished in %s and is not run again", name, output)
            texts.append(storage.read_bytes(storage.join(output, f"{name}.txt")).decode())
            continue
        log.info("study %s", name)
        result = STUDIES[name].work(opened)
        texts.append(_write(output, name, identities[name], result))
    left_out = (
        [] if job.studies else [f"left out: {name}, which needs {need}" for name, need in lacking.items()]
    )
    return "\n\n".join([*(text.rstrip() for text in texts), "\n".join([*left_out, f"studies: {output}"])])


def _open(job: StudyJob) -> _Opened:
    texts, images = open_pair(job.texts, job.images)
    heldout = None
    if job.heldout_images is not None:
        _, heldout = open_pair(job.texts, job.heldout_images)
        shared = heldout.shard_hashes & images.shard_hashes
        if shared:
            raise DataError(
                f"{job.heldout_images}: {len(shared)} of its shards are part of images, too; held-out images "
                "must be other images"
            )
    return _Opened(
        job=job,
        stores=inputs.hold_out(texts, images, job.heldout_rows, job.seed),
        domains={
            name: inputs.hold_out(*open_pair(stores["texts"], stores["images"]), job.heldout_rows, job.seed)
            for name, stores in job.domains.items()
        },
        lengths={name: open_stores([uri], "text") for name, uri in job.lengths.items()},
        labels=read_labels(job.labels, job.probe.attributes) if job.labels else None,
        heldout=heldout,
    )


@dataclass(frozen=True, kw_only=True)
class _Study:
    """A study: its module (table, reading, figure), its work, and what it depends on (`_study_identity`).

    `lacks` returns what the study needs and the inputs lack; empty if nothing is missing.
    """

    module: ModuleType
    work: Callable[[_Opened], dict[str, Any]]
    depends_on: str
    lacks: Callable[[_Opened], str] = lambda opened: ""


def _caption_length(opened: _Opened) -> dict[str, Any]:
    job, stores, probing = opened.job, opened.stores, None
    if opened.labels is not None:
        probing = caption_length.ProbeInputs(
            heldout=opened.heldout, labels=opened.labels, settings=job.probe, strategy=opened.strategy
        )
    return caption_length.run(
        stores.texts, stores.images, opened.lengths, job.caption_length, probing, job.seed
    )


def _c3_sigma(opened: _Opened) -> dict[str, Any]:
    job, stores, rows = opened.job, opened.stores, None
    if opened.labels is not None:
        rows = cross_modal_probe.probe_rows(
            stores.texts, stores.images, opened.heldout, opened.labels, job.probe, job.seed
        )
    return c3_sigma.run(stores, job.c3_sigma, rows, job.probe, job.seed)


def _probe(opened: _Opened) -> dict[str, Any]:
    assert opened.labels is not None
    job, stores = opened.job, opened.stores
    return cross_modal_probe.run(
        stores.texts, stores.images, opened.heldout, job.alignments, opened.labels, job.probe, job.seed
    )


def _lacks_texts(opened: _Opened) -> str:
    for store in (opened.stores.texts, *opened.lengths.values()):
        if not caption_length.has_texts(store):
            uris = ", ".join(store.uris)
            return f"text stores with a column text, which {uris} lacks; embed with jobs/embed.py"
    return ""


def _lacks_domains(opened: _Opened) -> str:
    needed = "domains, two or more: domains={NAME: {texts: STORE, images: STORE}, ...}"
    return "" if opened.domains else needed


def _lacks_labels(opened: _Opened) -> str:
    needed = "labels: JSONL or Parquet files with a column id and one column for each attribute"
    return needed if opened.labels is None else ""


STUDIES: dict[str, _Study] = {
    "sample_efficiency": _Study(
        module=sample_efficiency,
        work=lambda o: sample_efficiency.run(o.stores, o.strategy, o.job.sample_efficiency, o.job.seed),
        depends_on="texts strategy heldout_rows images settings",
    ),
    "precision": _Study(
        module=precision,
        work=lambda o: precision.run(o.stores.texts, o.job.precision),
        depends_on="texts settings",
    ),
    "centroid_steps": _Study(
        module=centroid_steps,
        work=lambda o: centroid_steps.run(o.stores, o.job.centroid_steps, o.job.seed),
        depends_on="texts heldout_rows images settings",
    ),
    "domain_transfer": _Study(
        module=domain_transfer,
        work=lambda o: domain_transfer.run(o.domains, o.strategy),
        depends_on="strategy heldout_rows domains",
        lacks=_lacks_domains,
    ),
    "caption_length": _Study(
        module=caption_length,
        work=_caption_length,
        depends_on="texts strategy images settings lengths labels heldout_images probe",
        lacks=_lacks_texts,
    ),
    "c3_sigma": _Study(
        module=c3_sigma,
        work=_c3_sigma,
        depends_on="texts heldout_rows images settings labels heldout_images probe",
    ),
    "probe": _Study(
        module=cross_modal_probe,
        work=_probe,
        depends_on="texts images settings labels heldout_images alignments",
        lacks=_lacks_labels,
    ),
}


def _write(output: str, name: str, identity: dict[str, Any], result: dict[str, Any]) -> str:
    module = STUDIES[name].module
    images = plots.image_files(lambda: module.figure(result))
    return write(output, name, identity, result, module.table(result), module.reading(result), images)


def _study_identity(name: str, opened: _Opened) -> dict[str, Any]:
    """Return what decides the study's result, as JSON has it: seed, settings, and hashes of inputs."""
    job, stores = opened.job, opened.stores
    parts: dict[str, Callable[[], Any]] = {
        "texts": lambda: _store_identity(stores.texts),
        "strategy": lambda: job.strategy,
        "heldout_rows": lambda: job.heldout_rows,
        "images": lambda: _store_identity(stores.images),
        "domains": lambda: {
            domain: [_store_identity(at.texts), _store_identity(at.images)]
            for domain, at in opened.domains.items()
        },
        "settings": lambda: asdict(getattr(job, name)),
        "lengths": lambda: {length: _store_identity(store) for length, store in opened.lengths.items()},
        "labels": lambda: None if opened.labels is None else _label_identity(opened.labels),
        "heldout_images": lambda: None if opened.heldout is None else _store_identity(opened.heldout),
        "alignments": lambda: [load_alignment(uri).content_hash for uri in job.alignments],
        "probe": lambda: asdict(job.probe),
    }
    identity = {"seed": job.seed, **{part: parts[part]() for part in STUDIES[name].depends_on.split()}}
    return json.loads(json.dumps(identity))


def _store_identity(store: Store) -> str:
    return storage.sha256(*(shard.encode() for shard in sorted(store.shard_hashes)))


def _label_identity(labels: RowLabels) -> str:
    return storage.sha256(
        labels.keys_N.tobytes(), labels.codes_NA.tobytes(), json.dumps(labels.classes).encode()
    )
