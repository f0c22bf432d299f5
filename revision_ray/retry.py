"""Object stores falter: a request that failed for a passing reason is made again, with longer waits.

A server that is overloaded, restarts or is not reached will pass. What will be the same the next time (no
such file, no permission, a wrong key) is raised at once.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

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
    """Whether the same request may well succeed a little later."""
    lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    return not lasting and _PASSING.search(str(error)) is not None


def patiently(uri: str, attempt: Callable[[], Found]) -> Found:
    """What `attempt` returns; made again while its error is a passing one, `SECONDS_BETWEEN` apart."""
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
    """A file on an object store for `pyarrow.PythonFile`; a read that fails is made again."""

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
