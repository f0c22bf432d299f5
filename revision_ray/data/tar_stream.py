"""Samples of a WebDataset shard, read as a stream."""

import logging
import posixpath
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from revision_ray import storage
from revision_ray.data.images import HEAD_BYTES
from revision_ray.errors import DataError, quote, shorten

_log = logging.getLogger(__name__)

ByContent = Callable[[bytes], bool]
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


def samples(
    uri: str, extensions: Collection[str], max_bytes: int, *, by_content: ByContent | None = None
) -> Iterator[Sample]:
    """The samples of the tar at `uri`: consecutive members of one key, with contents of `extensions` only.

    The key is the member's path up to the first dot of its base name, the extension what follows, in lower
    case (the WebDataset rule). Hidden members and those named `__*__` belong to no sample, nor do those
    without an extension. `by_content` judges by their first HEAD_BYTES which members of other extensions, or
    of none, are wanted too. Holds one sample in memory.

    Raises:
        DataError: missing, compressed, damaged or cut off; the message names the last sample that is
            whole. An archive
            without its end mark counts as cut off: how much is missing cannot be known.
    """
    sample: Sample | None = None
    last_key: str | None = None
    with storage.open_input(uri) as file:
        try:
            for name, extension, size, content in _files(file, uri, extensions, max_bytes, by_content):
                key = name[: len(name) - len(extension) - 1] if extension else name
                if sample is not None and sample.key != key:
                    yield sample
                    last_key, sample = sample.key, None
                sample = sample or Sample(key, [])
                sample.members.append(Member(name, extension.lower(), size, content))
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{uri}: is no sound tar archive: {shorten(error)}; the last whole sample is "
                f"{None if last_key is None else quote(last_key)}; "
                "restore the file (compressed archives are not read: decompress them first)"
            ) from error
    if sample is not None:
        yield sample


def _files(
    file: pa.NativeFile,
    uri: str,
    extensions: Collection[str],
    max_bytes: int,
    by_content: ByContent | None,
) -> Iterator[tuple[str, str, int, bytes | None]]:
    """(name, extension as spelt, size, content if wanted) of the members that belong to samples."""
    num_passed = 0
    with tarfile.open(fileobj=file, mode="r|", bufsize=_READ_BYTES, tarinfo=_StrictTarInfo) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header seen
            name = _unicode(entry.name).removeprefix("./")
            stem, _, extension = posixpath.basename(name).partition(".")
            reserved = stem.startswith("__") and stem.endswith("__")
            if not entry.isfile() or not stem or reserved:
                continue
            by_name = extension.lower() in extensions
            content = None
            if entry.size <= max_bytes and (by_name or by_content is not None):
                content = _content(archive, entry, None if by_name else by_content)
            if extension or content is not None:
                yield name, extension, entry.size, content
            else:
                num_passed += 1
        file.seek(archive.offset)  # type: ignore[attr-defined]
        while rest := file.read(_READ_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("data follows the end mark; was it joined with cat? join with tar -A")
    if num_passed:
        _log.warning("%s: passed over %d members without an extension", uri, num_passed)


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, wanted: ByContent | None) -> bytes | None:
    reader = archive.extractfile(entry)
    assert reader is not None  # `entry` is a regular file
    head = b"" if wanted is None else reader.read(HEAD_BYTES)
    if wanted is not None and not wanted(head):
        return None
    content = head + reader.read() if head else reader.read()
    if len(content) != entry.size:
        raise tarfile.ReadError(f"{shorten(entry.name)} has {len(content)} of {entry.size} bytes")
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
