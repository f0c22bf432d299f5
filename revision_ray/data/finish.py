"""The end of every job that writes a store: repeated ids mended, rejected rows listed, the manifest made."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from revision_ray import storage
from revision_ray.data import shards
from revision_ray.data.duplicates import Repeated, find_repeated, mend_shard, rejected_rows
from revision_ray.data.rejected import REJECTED, check_rejected, write_rejected
from revision_ray.data.schema import Rejected
from revision_ray.data.shards import Footer, Layout, Manifest
from revision_ray.errors import DataError, shorten

log = logging.getLogger(__name__)

DuplicateIds = Literal["reject", "number"]
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What the manifest says beyond the footers, and what is tolerated."""

    domain: str
    layout: Layout
    max_rejected_fraction: float
    duplicate_ids: DuplicateIds
    alignment: str = ""


def read_footers(output: str) -> dict[str, Footer]:
    """Footers of the shards in the store at `output`, by URI."""
    uris = [uri for uri, _ in storage.list_files(output, "part-*.parquet")]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return dict(zip(uris, pool.map(shards.read_footer, uris), strict=True))


def claim(output: str, settings: dict[str, object]) -> None:
    """The store at `output` is of these settings: they decide its content and are written down, or equal.

    Raises:
        DataError: it is a store of other settings, or the directory holds something else.
    """
    uri = storage.join(output, shards.SETTINGS)
    settings = {"format_version": shards.FORMAT_VERSION, **settings}
    if not storage.exists(uri):
        strangers = [name for name, _ in storage.list_files(output)]
        if strangers:
            raise DataError(
                f"{output}: holds files that are no embedding store ({strangers[0]}); name another output"
            )
        storage.write_json(uri, settings)
        return
    found = storage.read_json(uri)
    for key, value in settings.items():
        if found.get(key) != value:
            raise DataError(
                f"{output}: is a store with {key} = {shorten(found.get(key))}, this job says "
                f"{shorten(value)}; "
                "name another output"
            )


def finish_store(output: str, finish: Finish, *, changed: bool = True) -> Manifest:
    """The manifest and the list of rejected rows stand, made from the shards' footers.

    `changed` says whether shards were added, so that ids have to be compared again.

    Raises:
        DataError: no rows, or more rejected rows than `finish` allows; then the manifest is not written.
    """
    manifest_uri = storage.join(output, shards.MANIFEST)
    former = shards.read_manifest(output) if storage.exists(manifest_uri) else None
    footers = read_footers(output)
    if not footers:
        raise DataError(f"{output}: the sources hold no rows")
    dims = {footer.embedding_dim: uri for uri, footer in footers.items()}
    if len(dims) > 1:
        raise DataError(f"{output}: shards of different dimensions: {dims}; name an output for each encoder")
    known = {entry.name for entry in former.shards} if former else set()
    repeated = _repeated(footers, known) if changed or former is None else {}
    rejected = _list_rejected(footers, repeated, finish, storage.join(output, REJECTED))
    # Only now, when the job is sure to succeed: what a shard has lost cannot be had again without encoding.
    number_all = finish.duplicate_ids == "number"
    footers |= {uri: mend_shard(uri, rows, number_all, finish.layout) for uri, rows in repeated.items()}
    entries = [shards.entry_of(storage.name_of(uri), footer) for uri, footer in sorted(footers.items())]
    num_rows = sum(entry.num_rows for entry in entries)
    if not num_rows:
        raise DataError(f"{output}: the sources hold no rows")
    first = next(iter(footers.values()))
    manifest = Manifest(
        modality=first.modality,
        embedding_dim=first.embedding_dim,
        dtype=first.dtype,
        num_rows=num_rows,
        num_rejected=len(rejected),
        num_truncated=sum(entry.num_truncated for entry in entries),
        domain=finish.domain,
        encoder=first.encoder,
        shards=tuple(entries),
        layout=finish.layout,
        alignment=finish.alignment,
    )
    storage.write_json(manifest_uri, asdict(manifest))
    return manifest


def describe(manifest: Manifest, output: str) -> str:
    """What the store holds, for a person."""
    truncated = f", {manifest.num_truncated} truncated" if manifest.modality == "text" else ""
    return (
        f"{manifest.num_rows:,} {manifest.modality} embeddings, d = {manifest.embedding_dim}, in "
        f"{len(manifest.shards)} shards; {manifest.num_rejected} rows rejected{truncated}\nstore: {output}"
    )


def _repeated(footers: dict[str, Footer], known: set[str]) -> dict[str, Repeated]:
    """Rows of repeated ids, by shard URI. Shards that a manifest lists (`known`) come first, so they stay."""
    order = sorted(footers, key=lambda uri: (storage.name_of(uri) not in known, *footers[uri].place))
    return {order[place]: rows for place, rows in find_repeated(order).items()}


def _list_rejected(
    footers: dict[str, Footer], repeated: dict[str, Repeated], finish: Finish, listed: str
) -> list[Rejected]:
    """All rejected rows, those with repeated ids included, written to `listed`; few enough for `finish`."""
    rejected = [row for footer in footers.values() for row in footer.rejected]
    num_rows = len(rejected) + sum(footer.num_rows for footer in footers.values())
    if finish.duplicate_ids == "reject":
        rejected += [row for uri, rows in repeated.items() for row in rejected_rows(uri, rows)]
    if repeated:
        log.warning(
            "%d rows repeat an id: those of equal content get a number, those of other content are %s",
            sum(len(rows) for rows in repeated.values()),
            "rejected" if finish.duplicate_ids == "reject" else "numbered too",
        )
    rejected.sort(key=lambda row: (row.uri, row.id))
    write_rejected(listed, rejected)
    check_rejected(rejected, num_rows, finish.max_rejected_fraction, listed)
    return rejected
