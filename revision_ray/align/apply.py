"""Align embeddings in Ray Data pipelines; the align job, which writes an aligned copy of a text store."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from revision_ray.align.alignment import Alignment, load_alignment
from revision_ray.align.map_reduce import reasons
from revision_ray.align.maps import Affine
from revision_ray.core import config, storage
from revision_ray.core.cluster import connect, data_context, one_thread, user_errors
from revision_ray.core.config import MISSING
from revision_ray.core.errors import AlignmentError, DataError
from revision_ray.core.observe import progress
from revision_ray.core.stage import StageKind, StageWork, reads_keys, store_rows_done
from revision_ray.data import shards
from revision_ray.data.finish import FinishSettings, claim, finish_store
from revision_ray.data.shards import EmbeddingTable, Layout, ShardFooter
from revision_ray.data.store import RowGroup, Store, count_rows, open_stores, read_group

log = logging.getLogger(__name__)


class AlignRows:
    """A `map_batches` function for NumPy batches that aligns column `embedding` and keeps all others.

    Aligned embeddings are float32 (N, D), computed in float64. A row without a direction (NaN, infinite or
    zero) becomes NaN. Column `id` is needed where the map adds noise.
    """

    def __init__(self, affine: Affine) -> None:
        self.affine = affine

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        ids = [str(row_id) for row_id in batch["id"]] if self.affine.needs_ids else None
        with one_thread():
            aligned_ND, _ = self.affine.apply(batch["embedding"], ids)
        return {**batch, "embedding": aligned_ND}


def read_rows(store: Store, columns: Sequence[str] = ("id",)) -> ray.data.Dataset:
    """Return the store's rows as a Ray Data dataset: `columns`, and `embedding` (D,) in the store's dtype.

    A block holds at most one row group, which is read in the Ray task that makes the block.
    """
    connect()

    def read(batch: Any) -> Any:
        group = RowGroup(**json.loads(batch["row_group"][0]))
        table = shards.read_columns(group.uri, columns, group.index)
        named = {name: table.column(name).to_numpy() for name in columns}
        return {**named, "embedding": read_group(group, store.embedding_dim)}

    items = [{"row_group": json.dumps(asdict(group))} for group in store.row_groups]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read, batch_size=1, batch_format="numpy"
    )


def aligned_rows(
    store: Store, alignment: Alignment, columns: Sequence[str] = ("id",), *, allow_other_encoder: bool = False
) -> ray.data.Dataset:
    """Return the store's rows as a Ray Data dataset with aligned float32 embeddings; nothing is written.

    Raises:
        AlignmentError: the store has another encoder or dimension than the fit, or is aligned already.
    """
    check_store(store, alignment, allow_other_encoder)
    wanted = tuple(dict.fromkeys(["id", *columns]))
    return read_rows(store, wanted).map_batches(
        AlignRows(alignment.affine), batch_size=None, batch_format="numpy", zero_copy_batch=True
    )


def check_store(store: Store, alignment: Alignment, allow_other_encoder: bool) -> None:
    """Check that this fit may align the store's texts.

    Raises:
        AlignmentError: the store has another encoder or dimension than the fit, or is aligned already.
    """
    if store.alignment:
        raise AlignmentError(
            f"{store.uris[0]}: these rows are aligned already; use the store they were made from"
        )
    where = ", ".join(store.uris)
    alignment.check_encoder(store.encoder, store.embedding_dim, where, allow_other_encoder)


def open_pair(texts: str | Sequence[str], images: str | Sequence[str]) -> tuple[Store, Store]:
    """Open a text and an image store, and check that one dual encoder made both.

    Raises:
        DataError: a store is missing, damaged or of the other modality.
        AlignmentError: the dimensions or encoders differ.
    """
    text = open_stores([texts] if isinstance(texts, str) else texts, "text")
    image = open_stores([images] if isinstance(images, str) else images, "image")
    check_pair(text, image)
    return text, image


def check_pair(texts: Store, images: Store, allow_other_encoder: bool | None = None) -> None:
    """Check that one dual encoder made both stores.

    `allow_other_encoder` is the job's setting, None for a job that has none. True accepts different encoders.

    Raises:
        AlignmentError: the dimensions differ, or the encoders differ and that is not allowed.
    """
    where = f"{', '.join(texts.uris)} and {', '.join(images.uris)}"
    if texts.embedding_dim != images.embedding_dim:
        raise AlignmentError(
            f"{where}: texts have dimension {texts.embedding_dim}, images {images.embedding_dim}; both sides "
            "must come from the same dual encoder"
        )
    if texts.encoder.fingerprint != images.encoder.fingerprint and not allow_other_encoder:
        allow = ", or set allow_other_encoder=true if you know that they share a space"
        raise AlignmentError(
            f"{where}: texts were made by {texts.encoder}, images by {images.encoder}; embed both with one "
            f"encoder{'' if allow_other_encoder is None else allow}"
        )


@dataclass(frozen=True, kw_only=True)
class AlignJob:
    """Write an aligned copy of a text store. Training does not need it: it aligns rows as it reads them."""

    texts: str = MISSING
    """Text store to align."""
    alignment: str = MISSING
    """Directory of the fit to align with."""
    output: str = MISSING
    """Directory to write the aligned store to."""
    layout: Layout = "binary"
    """Column type of the embeddings. binary: for the jobs of this project. list: a float32 list column for
    pandas, datasets and vector stores."""
    dtype: Literal["float16", "float32"] = "float32"
    """Data type of the stored embeddings."""
    max_rejected_fraction: float = 0.001
    """Fail when a larger share of rows is NaN, infinite, zero, or of another dimension."""
    allow_other_encoder: bool = False
    """Align even if the texts were embedded with another encoder than the fit."""


def run_align(job: AlignJob) -> str:
    """Align every text of the store and write the output shard by shard; shards already written are kept.

    Raises:
        AlignmentError: the store has another encoder or dimension than the fit, or is aligned already.
        DataError: a source shard is gone, or too many rows were rejected.
        OutputError: the output holds something else.
    """
    output = storage.absolute(job.output)
    alignment = load_alignment(job.alignment)
    store = open_stores([job.texts], "text")
    check_store(store, alignment, job.allow_other_encoder)
    footer = ShardFooter(
        modality="text",
        embedding_dim=store.embedding_dim,
        dtype=job.dtype,
        encoder=store.encoder,
        identity=alignment.content_hash,
    )
    claim(
        output,
        {
            "alignment": alignment.content_hash,
            "texts": list(store.uris),
            "dtype": job.dtype,
            "layout": job.layout,
        },
    )
    by_shard: dict[str, list[RowGroup]] = {}
    for group in store.row_groups:
        by_shard.setdefault(group.uri, []).append(group)
    _check_shards(list(by_shard.values()), output)
    _write_all(list(by_shard.values()), footer, alignment.affine, output, job.layout)
    config.save_resolved(job, storage.join(output, "config.yaml"))
    finish = FinishSettings(
        domain=store.domain,
        layout=job.layout,
        max_rejected_fraction=job.max_rejected_fraction,
        duplicate_ids="number",
        alignment=alignment.content_hash,
    )
    manifest = finish_store(output, finish)
    return f"{manifest.num_rows:,} texts aligned by {alignment.strategy.strategy}\nstore: {output}"


def _check_shards(work: list[list[RowGroup]], output: str) -> None:
    expected = {_name(groups) for groups in work}
    for uri, _ in storage.list_files(output, "part-*.parquet"):
        if storage.name_of(uri) not in expected:
            raise DataError(
                f"{uri}: was made from a shard that the text store no longer holds; name another output"
            )


def _name(groups: list[RowGroup]) -> str:
    """Return a file name derived from the shard's content, so that shards of several stores never collide."""
    return f"part-{groups[0].shard_hash[:16]}.parquet"


def _write_all(
    work: list[list[RowGroup]], footer: ShardFooter, affine: Affine, output: str, layout: Layout
) -> None:
    """Align each shard in a Ray task of its own and write it to the output; existing shards are kept."""
    connect()

    def write(item: dict[str, Any]) -> dict[str, Any]:
        groups = work[item["place"]]
        _write_shard(groups, footer, affine, output, layout)
        return {"num_rows": sum(group.num_rows for group in groups)}

    with (
        data_context(),
        user_errors(),
        progress("align", sum(g.num_rows for s in work for g in s), "rows") as shown,
    ):
        items = [{"place": place} for place in range(len(work))]
        for row in ray.data.from_items(items, override_num_blocks=len(items)).map(write).iter_rows():
            shown.advance(row["num_rows"])


def _write_shard(
    groups: list[RowGroup], footer: ShardFooter, affine: Affine, output: str, layout: Layout
) -> None:
    uri = groups[0].uri
    target = storage.join(output, _name(groups))
    if storage.exists(target):
        return
    kept_columns = [c for c in ("text", "truncated") if c in shards.column_names(uri)]
    table = shards.read_columns(uri, ["id", *kept_columns])
    ids = [str(row_id) for row_id in table.column("id").to_pylist()]
    aligned, rejected, start = [], [], 0
    for group in groups:
        block_ND = read_group(group, affine.embedding_dim)
        with one_thread():
            aligned_ND, invalid = affine.apply(block_ND, ids[start : start + len(block_ND)])
        if invalid:
            rejected += reasons(group, np.array(invalid), affine.embedding_dim)
        aligned.append(aligned_ND)
        start += len(block_ND)
    stacked_ND = np.concatenate(aligned)
    keep = np.flatnonzero(~np.isnan(stacked_ND[:, 0]))
    columns = {
        c: pa.array(table.column(c).take(keep).to_pylist(), table.column(c).type) for c in kept_columns
    }
    truncated = columns["truncated"].to_pylist() if "truncated" in columns else []
    footer = replace(footer, split=groups[0].shard_hash, split_uri=uri, num_truncated=sum(truncated),
                     rejected=tuple(rejected))  # fmt: skip
    rows = EmbeddingTable(ids=[ids[row] for row in keep], embedding_ND=stacked_ND[keep], columns=columns)
    shards.write_shard(target, rows, footer, layout)


STAGE = StageKind(
    name="align",
    job=AlignJob,
    run=run_align,
    reads=reads_keys("texts", "alignment"),
    proof="manifest.json",
    work=lambda forecast, stage: StageWork(rows=forecast.rows_read(stage, stage.job.texts, count_rows)),
    done=store_rows_done,
)
