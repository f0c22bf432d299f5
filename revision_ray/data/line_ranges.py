"""Lines of a byte range, so that many tasks share one large file."""

import io
from collections.abc import Iterator

from revision_ray import storage
from revision_ray.errors import DataError, shorten

MAX_LINE_BYTES = 64 * 2**20
_READ_BYTES = 2**20


def lines(uri: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line without its break) of each line that begins in bytes [start, stop) of `uri`.

    Ranges that touch give every line once: a line belongs to the range where it begins. Lines end with LF or
    CRLF. Of a line longer than MAX_LINE_BYTES that many bytes and one more are given, which tells it apart.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with io.BufferedReader(storage.open_input(uri), _READ_BYTES) as file:  # type: ignore[arg-type]
        offset = start
        try:
            if start:
                # From one byte earlier: a line that begins exactly at `start` then costs one line break only.
                file.seek(start - 1)
                offset += _skip_line(file) - 1
            while offset < stop:
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                length = len(line)
                if length > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    length += _skip_line(file)
                yield offset, line.removesuffix(b"\n").removesuffix(b"\r")
                offset += length
        except OSError as error:
            raise DataError(f"{uri}: cannot be read near byte {offset}: {shorten(error, 400)}") from error


def _skip_line(file: io.BufferedReader) -> int:
    """Bytes up to and including the next line break, which `file` now stands behind."""
    skipped = 0
    while piece := file.readline(_READ_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
