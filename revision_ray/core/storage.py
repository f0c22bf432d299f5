"""Read and write bytes at URIs (local paths, s3://, gs://) atomically, with retries on object stores.

A local file is written under a temporary name, synced and renamed. On an object store one PUT (or a completed
multipart upload) is atomic by itself. A request to an object store that fails for a temporary reason
(overload, restart, no connection) is repeated after a growing wait. A lasting error (no such file, no
permission) is raised at once. pyarrow's S3 retry strategy, which also repeats a read that ends early, does
not replace these retries: `FileSystem.from_uri` takes none, it does not apply to other stores, and it logs
nothing while it waits.
"""

import errno
import fnmatch
import hashlib
import json
import logging
import os
import posixpath
import random
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from revision_ray.core.errors import DataError, quote, shorten

log = logging.getLogger(__name__)

# Between attempts. Each attempt on S3 itself tries for about six seconds: more than a minute in all.
SECONDS_BETWEEN = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# As the clients of S3, GCS and Azure name them in their messages; they set no errno.
_PASSING = re.compile(
    r"HTTP status (408|425|429|500|502|503|504)\b"
    r"|AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|THROTTLING)"
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ServerBusy|InternalError|OperationTimedOut)\b"
)

Found = TypeVar("Found")


def is_passing(error: OSError) -> bool:
    """Return whether `error` is temporary, so that the same request may succeed later."""
    lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    return not lasting and _PASSING.search(str(error)) is not None


def patiently(uri: str, attempt: Callable[[], Found]) -> Found:
    """Return the result of `attempt`; repeat it after `SECONDS_BETWEEN` while its error is temporary."""
    for seconds in SECONDS_BETWEEN:
        try:
            return attempt()
        except OSError as error:
            if not is_passing(error):
                raise
            log.warning("%s: %s; trying again in %.1f s", uri, error, seconds)
        time.sleep(seconds * random.uniform(0.7, 1.3))  # workers that failed together do not return together
    return attempt()


class PatientReads:
    """A file on an object store for `pyarrow.PythonFile` that repeats reads with temporary errors."""

    def __init__(self, uri: str, file: pa.NativeFile) -> None:
        self._uri, self._file = uri, file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()

        def attempt() -> bytes:
            self._file.seek(start)
            return self._file.read(None if size < 0 else size)

        return patiently(self._uri, attempt)


_LONGEST_URI = 4096
_EXPLANATION = 400  # characters of a system's error, which names the path too
TEMPORARY = ".tmp-"  # in the names of files and folders that no listing shows


def absolute(uri: str) -> str:
    """Return a URI with a scheme unchanged, or else the absolute local path; without trailing slash."""
    if not uri:
        raise DataError(
            "an empty path was given; name a file, a directory or a URI such as s3://bucket/prefix"
        )
    if len(uri) > _LONGEST_URI:
        raise DataError(f"a path of {len(uri)} characters was given, {quote(uri, 60)}; no storage has such")
    if uri.startswith("file://"):
        uri = uri[len("file://") :]
    return uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))


@lru_cache(maxsize=64)
def _filesystem_of(base: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(base)[0]


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path on it. Options go into the query: `s3://b/x?region=...`.

    Raises:
        DataError: unknown scheme, or the filesystem cannot be reached.
    """
    uri = absolute(uri)
    if "://" not in uri:
        return _LOCAL, uri
    scheme, rest = uri.split("://", 1)
    path, _, query = rest.partition("?")
    bucket = path.split("/", 1)[0]
    try:
        base = f"{scheme}://{bucket}" + (f"?{query}" if query else "")
        return patiently(uri, lambda: _filesystem_of(base)), path.rstrip("/")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            f"{uri}: {shorten(error, _EXPLANATION)}; use a local path, s3://bucket/path or gs://bucket/path"
        ) from error


_LOCAL = pafs.LocalFileSystem()


def _query_apart(uri: str) -> tuple[str, str]:
    """Return `uri` without its query, and the query with its "?". A local path has no query."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return path, mark + query


def join(uri: str, *names: str) -> str:
    """Return `uri` extended by path segments; a query stays at the end."""
    path, query = _query_apart(uri)
    return posixpath.join(path, *names) + query


def name_of(uri: str) -> str:
    """Return the last path segment of `uri`, without its query."""
    return posixpath.basename(_query_apart(uri)[0].rstrip("/"))


def parent_of(uri: str) -> str:
    """Return the directory that holds `uri`, with the same query."""
    path, query = _query_apart(uri)
    return (posixpath.dirname(path.rstrip("/")) or "/") + query


def relative_path(uri: str, root: str) -> str:
    """Return the path of `uri` relative to the directory `root`, without query."""
    path, root = _query_apart(uri)[0], _query_apart(root)[0].rstrip("/") + "/"
    assert path.startswith(root), (uri, root)
    return path[len(root) :]


def info(uri: str) -> pafs.FileInfo:
    """Return type, size and modification time of a file or directory (type NotFound if there is none)."""
    filesystem, path = resolve(uri)
    try:
        return patiently(uri, lambda: filesystem.get_file_info(path))
    except OSError as error:
        raise DataError(f"{uri}: cannot be looked up: {shorten(error, _EXPLANATION)}") from error


def exists(uri: str) -> bool:
    return info(uri).type != pafs.FileType.NotFound


def list_files(uri: str, pattern: str = "*", recursive: bool = False) -> list[tuple[str, pafs.FileInfo]]:
    """Return (URI, info) of the files in directory `uri` whose name matches `pattern`, sorted by URI.

    Subdirectories are searched if `recursive`. A directory that does not exist has no files. Temporary files
    of unfinished writes are left out.
    """
    filesystem, path = resolve(uri)
    return [
        (file_uri, entry)
        for file_uri, entry in _files_below(filesystem, path, uri, recursive)
        if fnmatch.fnmatchcase(posixpath.basename(entry.path), pattern)
    ]


def _files_below(
    filesystem: pafs.FileSystem, path: str, uri: str, recursive: bool
) -> list[tuple[str, pafs.FileInfo]]:
    """Return (URI, info) of the finished files below `path`, sorted; URIs are written like `uri`."""
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    try:
        files = [
            (_uri_like(uri, entry.path), entry)
            for entry in patiently(uri, lambda: filesystem.get_file_info(selector))
            if entry.type == pafs.FileType.File and TEMPORARY not in entry.path[len(path) :]
        ]
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed: {shorten(error, _EXPLANATION)}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{uri}: holds a file whose name is not UTF-8: {quote(error.object)}; rename it"
        ) from error
    return sorted(files, key=lambda pair: pair[0])


def glob_files(uri: str) -> list[tuple[str, pafs.FileInfo]]:
    """Return (URI, info) of the files that match the path `uri` with `*`, `?`, `[...]` or `**`, sorted."""
    filesystem, path = resolve(
        uri
    )  # In an object-store URI "?" starts the query: only * and [] are wildcards.
    segments = path.split("/")
    first = next((i for i, segment in enumerate(segments) if is_wildcard(segment)), len(segments))
    if first == len(segments):
        entry = info(uri)
        return [(absolute(uri), entry)] if entry.type == pafs.FileType.File else []
    root, wanted = "/".join(segments[:first]) or "/", segments[first:]
    deep = len(wanted) > 1 or wanted == ["**"]
    return [
        (file_uri, entry)
        for file_uri, entry in _files_below(filesystem, root, uri, recursive=deep)
        if _match(entry.path[len(root.rstrip("/")) + 1 :].split("/"), wanted)
    ]


def is_wildcard(uri: str) -> bool:
    """Return whether `uri` holds a wildcard character outside its query."""
    return any(character in _query_apart(uri)[0] for character in "*?[")


def wildcard_root(uri: str) -> str:
    """Return the directory above the first wildcard of `uri`; all matches are below it."""
    path, query = _query_apart(absolute(uri))
    while is_wildcard(path):
        path = posixpath.dirname(path)
    return path + query


def _match(segments: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not segments
    if wanted[0] == "**":
        return any(_match(segments[i:], wanted[1:]) for i in range(len(segments) + 1))
    return bool(segments) and fnmatch.fnmatchcase(segments[0], wanted[0]) and _match(segments[1:], wanted[1:])


def _uri_like(uri: str, path: str) -> str:
    if "://" not in uri or uri.startswith("file://"):
        return path
    scheme, rest = uri.split("://", 1)
    query = rest.partition("?")[2]
    return f"{scheme}://{path}" + (f"?{query}" if query else "")


def open_input(uri: str) -> pa.NativeFile:
    """Open a file for reading, seekable: memory-mapped if local, else with reads repeated on failure.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    filesystem, path = resolve(uri)
    try:
        if filesystem is _LOCAL:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return pa.memory_map(path) if status.st_size else pa.BufferReader(b"")
        file = patiently(uri, lambda: filesystem.open_input_file(path))
        return pa.PythonFile(PatientReads(uri, file), mode="r")
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the path
        raise DataError(f"{uri}: cannot be read: {shorten(error, _EXPLANATION)}") from error


def is_absence(error: BaseException | None) -> bool:
    """Return whether an error of opening a file means that no such file exists or can exist."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return True
    nul_inside = type(error) is ValueError
    return nul_inside or isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)


def read_bytes(uri: str) -> bytes:
    """Read the whole file at `uri`.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    with open_input(uri) as file:
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"{uri}: cannot be read: {shorten(error, _EXPLANATION)}") from error


def write_bytes(uri: str, content: bytes | pa.Buffer) -> None:
    """Write `content` to `uri` atomically; parent directories are created.

    Raises:
        DataError: the write failed (disk full, no permission); no partial file is left.
    """
    filesystem, path = resolve(uri)
    try:
        if filesystem is _LOCAL:
            _replace_local(path, content)
        else:
            patiently(uri, lambda: _put(filesystem, path, content))
    except OSError as error:
        room = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "refused"
        raise DataError(
            f"{uri}: writing {len(memoryview(content))} bytes failed ({room}): "
            f"{shorten(error, _EXPLANATION)}; make room or name another "
            "output, then run the same command again: what was finished is kept"
        ) from error


def _put(filesystem: pafs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def _replace_local(path: str, content: bytes | pa.Buffer) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}{uuid.uuid4().hex}-{os.path.basename(path)}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def local_copy(uri: str) -> str:
    """Return a local path of the file or folder at `uri`, for libraries that cannot open URIs.

    A local path, or the name of a model on a hub, is returned unchanged. A file or folder on an object store
    is copied to REVISION_RAY_CACHE (default ~/.cache/revision_ray), and copied again when the size or time of
    a file changes. Subfolders are left out.

    Raises:
        DataError: there is nothing at `uri`, or it cannot be read or copied.
    """
    uri = absolute(uri) if uri.startswith("file://") else uri
    if "://" not in uri:
        return uri
    single = info(uri)
    files = [(uri, single)] if single.type == pafs.FileType.File else list_files(uri)
    if not files:
        raise DataError(f"{uri}: no such file or folder")
    state = [f"{name_of(each)} {entry.size} {entry.mtime_ns}" for each, entry in files]
    cache = os.path.expanduser(os.environ.get("REVISION_RAY_CACHE", "~/.cache/revision_ray"))
    folder = os.path.join(cache, sha256(uri.encode(), *(line.encode() for line in state))[:32])
    try:
        if not os.path.isdir(folder):
            _copy_whole(files, cache, folder)
    except OSError as error:
        raise DataError(
            f"{uri}: cannot be copied to {cache} (REVISION_RAY_CACHE): {shorten(error, _EXPLANATION)}"
        ) from error
    return os.path.join(folder, name_of(uri)) if single.type == pafs.FileType.File else folder


def _copy_whole(files: list[tuple[str, pafs.FileInfo]], cache: str, folder: str) -> None:
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=cache, ignore_cleanup_errors=True) as temporary:
        whole = os.path.join(temporary, "whole")
        os.mkdir(whole)
        for uri, _ in files:
            filesystem, path = resolve(uri)
            pafs.copy_files(path, os.path.join(whole, name_of(uri)), filesystem, _LOCAL)
        try:
            os.rename(whole, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was faster
                raise


def read_json(uri: str) -> Any:
    """Read the JSON document at `uri`.

    Raises:
        DataError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: is not JSON: {shorten(error)}") from error


def write_json(uri: str, document: Any) -> None:
    write_bytes(uri, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def delete_file(uri: str) -> None:
    """Delete the file at `uri`. Use it only for files that this library wrote."""
    filesystem, path = resolve(uri)
    patiently(uri, lambda: filesystem.delete_file(path))


def sha256(*parts: bytes) -> str:
    """Return the hex SHA-256 of `parts`, each prefixed by its length, so that their boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
