"""The embed job: sources to an embedding store, resumed where it was left, extended where sources are new."""

import logging
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Literal

from revision_ray.core import config, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.core.stage import (
    Forecast,
    Stage,
    StageKind,
    StageWork,
    actor_gpus,
    as_uris,
    store_rows_done,
    whole_sum,
)
from revision_ray.data import records, sources
from revision_ray.data.finish import DuplicateIds, FinishSettings, claim, describe, finish_store, read_footers
from revision_ray.data.shards import EncoderIdentity, Layout, Modality, ShardFooter, SourceSplit
from revision_ray.data.store import count_rows
from revision_ray.encode.encoder import EncoderConfig, backend, located
from revision_ray.encode.pipeline import Resources, ShardPlan, encode_splits

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """Embed images or texts with one tower of a dual encoder into an embedding store."""

    images: str | list[str] | None = None
    """Image sources: folders, WebDataset tars, Parquet, CSV, TSV, dataset.json; URIs and wildcards."""
    texts: str | list[str] | None = None
    """Text sources: JSONL, lines, Parquet, CSV, TSV, LLaVA-style JSON, dataset.json, COCO captions, tars;
    compressed too (.gz, .bz2, .zst)."""
    output: str = MISSING
    """Directory of the store. One that exists is resumed, and extended by sources that it does not hold."""
    domain: str = ""
    """What the data are about (statistics of one domain do not serve another)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored embeddings."""
    layout: Layout = "binary"
    """binary is fast; list is a float32 list column for pandas, datasets and vector stores."""
    batch_size: int = 256
    """Rows that the tower takes at once."""
    rows_per_shard: int | None = None
    """Source rows to a shard, the unit that is resumed; by default 8192 texts or 1024 images (whose pixels
    wait in memory together)."""
    max_image_pixels: int = 178_956_970
    """Larger images are rejected before they are decoded (decompression bombs)."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of the rows is unreadable, empty or duplicate; what was encoded is kept."""
    duplicate_ids: DuplicateIds = "reject"
    """Rows of other content under an id that exists: reject them, or keep them, numbered."""
    resources: Resources = field(default_factory=Resources)

    @property
    def modality(self) -> Modality:
        return "image" if self.images is not None else "text"

    def __post_init__(self) -> None:
        if (self.images is None) == (self.texts is None):
            raise ConfigError(
                "name either images or texts, not both and not neither; each is a store of its own"
            )
        for name in ("batch_size", "rows_per_shard", "max_image_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")


def run_embed(job: EmbedJob) -> str:
    """Embed as `job` says and describe the store.

    Raises:
        DataError: a source is missing, damaged or changed since it was embedded; the output is another store;
            or too many rows were rejected.
    """
    output = storage.absolute(job.output)
    encoder = located(job.encoder)
    identity = _identity(encoder)
    rows_per_shard = job.rows_per_shard or (1024 if job.modality == "image" else 8192)
    footers = read_footers(output)
    # Before anything is claimed: a source that is missing must leave no trace.
    splits = _splits(job, rows_per_shard, list(footers.values()))
    claim(
        output,
        {
            "modality": job.modality,
            "encoder": asdict(identity),
            "dtype": job.dtype,
            "layout": job.layout,
            "rows_per_shard": rows_per_shard,
            "domain": job.domain,
        },
    )
    done = _done(footers)
    complete = _complete(footers, done)
    left = tuple(split for split in splits if split.key not in complete)
    if len(left) < len(splits):
        log.info("%s: %d of %d splits are embedded already", output, len(splits) - len(left), len(splits))
    plan = ShardPlan(
        modality=job.modality,
        done=done,
        encoder=encoder,
        identity=identity,
        output=output,
        dtype=job.dtype,
        layout=job.layout,
        rows_per_shard=rows_per_shard,
        batch_size=job.batch_size,
        max_image_pixels=job.max_image_pixels,
    )
    encode_splits(left, plan, job.resources)
    config.save_resolved(job, storage.join(output, "config.yaml"))
    finish = FinishSettings(
        domain=job.domain,
        layout=job.layout,
        max_rejected_fraction=job.max_rejected_fraction,
        duplicate_ids=job.duplicate_ids,
    )
    return describe(finish_store(output, finish, changed=bool(left)), output)


def _identity(encoder: EncoderConfig) -> EncoderIdentity:
    name = "/".join(storage.name_of(part) for part in (encoder.model, encoder.pretrained or "") if part)
    return EncoderIdentity(name=f"{encoder.kind}:{name}", fingerprint=backend(encoder).fingerprint(encoder))


def _splits(job: EmbedJob, rows_per_shard: int, footers: list[ShardFooter]) -> list[SourceSplit]:
    """What the sources hold, without image and text files that stand in the store already.

    Raises:
        DataError: no rows, or a source has changed since its rows were embedded.
    """
    taken = [
        SourceSplit(
            kind="image_files" if f.modality == "image" else "text_files",
            uri=f.split_uri,
            files=f.split_files,
            identity=f.identity,
        )
        for f in footers
        if f.split_files
    ]
    if job.images is not None:
        uris = [job.images] if isinstance(job.images, str) else job.images
        splits = sources.image_splits(uris, rows_per_split=rows_per_shard, taken=taken)
    else:
        assert job.texts is not None
        uris = [job.texts] if isinstance(job.texts, str) else job.texts
        splits = sources.text_splits(uris, taken=taken)
    former = {footer.split_uri: footer.identity for footer in footers if not footer.split_files}
    for split in splits:
        if not split.files and former.get(split.uri, split.identity) != split.identity:
            raise DataError(
                f"{split.uri}: has changed since it was embedded into {job.output}; restore it, or embed "
                "into a new output (add data as new files, not by changing old ones)"
            )
    return splits


def _done(footers: dict[str, ShardFooter]) -> dict[str, frozenset[int]]:
    """Indices of the shards that stand, by split."""
    found: dict[str, set[int]] = defaultdict(set)
    for footer in footers.values():
        found[footer.split].add(footer.index)
    return {key: frozenset(indices) for key, indices in found.items()}


def _complete(footers: dict[str, ShardFooter], done: dict[str, frozenset[int]]) -> set[str]:
    """Keys of the splits of which every shard stands, up to the last."""
    return {
        footer.split
        for footer in footers.values()
        if footer.last and done[footer.split] == frozenset(range(footer.index + 1))
    }


# --- as a stage of a chain --------------------------------------------------------------------------------


def encoder_reads(key: str, encoder: EncoderConfig | None) -> dict[str, list[str]]:
    """Return the checkpoints that a job reads through the encoder configured under `key`."""
    if encoder is None:
        return {}
    uris_by_key = {
        f"{key}.{name}": as_uris(getattr(encoder, name)) for name in ("model", "pretrained", "text_model")
    }
    return {name: uris for name, uris in uris_by_key.items() if uris}


def listed_rows(uri: str, images: bool) -> int | None:
    """Return the rows of a source as far as its listing tells: of image files and Parquet, else None."""
    splits = sources.image_splits([uri]) if images else sources.text_splits([uri])
    rows_of_splits: list[int | None] = []
    for split in splits:
        if split.files:
            rows_of_splits.append(len(split.files))
        elif split.kind.endswith("_parquet"):
            rows_of_splits.append(sum(records.footer(split.uri).rows[split.start : split.stop]))
        else:
            rows_of_splits.append(None)
    return whole_sum(rows_of_splits)


def _reads(job: EmbedJob) -> dict[str, list[str]]:
    key = "images" if job.texts is None else "texts"
    return {key: as_uris(getattr(job, key)), **encoder_reads("encoder", job.encoder)}


def _work(forecast: Forecast, stage: Stage) -> StageWork:
    job, of_images = stage.job, stage.job.texts is None
    rows = count_rows(stage.output) if stage.name in forecast.standing else None
    if rows is None:
        uris = job.images if of_images else job.texts
        rows = forecast.rows_read(stage, uris, lambda uri: listed_rows(uri, of_images))
    if rows is None:
        rows = forecast.configured_rows(stage)
    if of_images:
        return StageWork(rows=rows, tokens=0, uses_gpu=True)
    each = forecast.tokens_per_text()
    tokens = None if rows is None or each is None else rows * each
    return StageWork(rows=rows, tokens=tokens, uses_gpu=True, texts=rows)


STAGE = StageKind(
    name="embed",
    job=EmbedJob,
    run=run_embed,
    reads=_reads,
    proof="manifest.json",
    sources=("images", "texts"),
    work=_work,
    done=store_rows_done,
    gpus=lambda job, total: actor_gpus(job.resources, total),
)
