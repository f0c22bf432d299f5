"""Samples of a WebDataset shard, read as a stream."""

import posixpath
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from revision_ray import storage
from revision_ray.errors import DataError

_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a sample; `content` is None where it was not asked for or is larger than was allowed."""

    name: str
    extension: str
    size: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Sample:
    key: str
    members: list[Member]


def samples(uri: str, extensions: Collection[str], max_bytes: int) -> Iterator[Sample]:
    """The samples of the tar at `uri`: consecutive members of one key, with contents of `extensions` only.

    The key is the member's path up to the first dot of its base name, the extension what follows, in lower
    case (the WebDataset rule). Members without an extension, hidden ones and those named `__*__` belong to no
    sample. Holds one sample in memory.

    Raises:
        DataError: missing, compressed, damaged or cut off; the message names the last sample that is
            whole. An archive
            without its end mark counts as cut off: how much is missing cannot be known.
    """
    sample: Sample | None = None
    last_key: str | None = None
    with storage.open_input(uri) as file:
        try:
            for name, extension, size, content in _files(file, extensions, max_bytes):
                key = name[: len(name) - len(extension) - 1]
                if sample is not None and sample.key != key:
                    yield sample
                    last_key, sample = sample.key, None
                sample = sample or Sample(key, [])
                sample.members.append(Member(name, extension.lower(), size, content))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{uri}: is no sound tar archive: {error}; the last whole sample is {last_key!r}; "
                "restore the file (compressed archives are not read: decompress them first)"
            ) from error
    if sample is not None:
        yield sample


def _files(
    file: pa.NativeFile, extensions: Collection[str], max_bytes: int
) -> Iterator[tuple[str, str, int, bytes | None]]:
    """(name, extension as spelt, size, content if asked for) of the members that belong to samples."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=_READ_BYTES, tarinfo=_StrictTarInfo) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header seen
            name = _unicode(entry.name).removeprefix("./")
            stem, _, extension = posixpath.basename(name).partition(".")
            reserved = stem.startswith("__") and stem.endswith("__")
            if entry.isfile() and stem and extension and not reserved:
                wanted = extension.lower() in extensions and entry.size <= max_bytes
                yield name, extension, entry.size, _content(archive, entry) if wanted else None
        file.seek(archive.offset)  # type: ignore[attr-defined]
        while rest := file.read(_READ_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("data follows the end mark; was it joined with cat? join with tar -A")


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    reader = archive.extractfile(entry)
    assert reader is not None  # `entry` is a regular file
    content = reader.read()
    if len(content) != entry.size:
        raise tarfile.ReadError(f"{entry.name} has {len(content)} of {entry.size} bytes")
    return content


def _unicode(name: str) -> str:
    """`name` with bytes that are not UTF-8 spelt out, so that it can be an id."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged, or missing where the end mark should be, is an error.

    `tarfile` takes such a header behind the first member for the end of the archive, and the rest would be
    lost.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the end mark
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the file ends without the end mark of an archive") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
