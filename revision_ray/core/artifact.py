"""Decide whether an output directory is this job's: unused, finished, resumable, or written by another job.

Each job writes the settings and inputs that decide its result (its identity) into one JSON document of the
output. `claim` writes that document first, for jobs that resume; `finished` reads the one that a job wrote
last. Both raise OutputError where the directory belongs to something else. `writing` keeps a second job out.

How `writing` works: each writer puts a small file of its own, a claim, into OUTPUT/.tmp-fence/, then lists
that folder. It has the output if no other claim is alive there. Of two writers at the same time at least one
lists after both have written, so they never both go on. A holder rewrites its claim every few seconds. A
claim is dead when it is much older than one written now, by the clock of the storage, or when its process has
ended, which only a process on the same machine can tell. The storage only has to list what was written
before, as local disks, S3 and GCS do. S3's conditional writes would be simpler, but pyarrow does not send an
If-None-Match header (it ignores that metadata key), and local disks would still need this.
"""

import json
import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.fs as pafs

from revision_ray.core import storage
from revision_ray.core.errors import DataError, OutputError, RevisionError, quote

log = logging.getLogger(__name__)

FOLDER = storage.TEMPORARY + "fence"
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_LIVE = 60.0  # several missed beats: storage may refuse writes for a while
_TRIES = 60  # more than it takes to see a beat, or to see that none comes


def changes(
    former: Mapping[str, Any], current: Mapping[str, Any], named: Callable[[str], str] = str
) -> list[str]:
    """Return one line for each setting that differs, with its old and its new value.

    Nested settings are compared key by key and named with dots. A key that is missing equals None. `named`
    turns a key into the name by which the user gives it.
    """
    old, new = (_flat(json.loads(json.dumps(settings))) for settings in (former, current))
    return [
        f"{named(key)} was {quote(old.get(key), 80)}, is now {quote(new.get(key), 80)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        is_table = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
        nested = dict(enumerate(value)) if is_table else value
        flat |= _flat(nested, f"{prefix}{key}.") if isinstance(nested, dict) else {f"{prefix}{key}": value}
    return flat


def refuse(output: str, what: str, differences: Iterable[str], advice: str = "") -> None:
    """Raise OutputError if there are `differences` between the output and what the job makes."""
    lines = "; ".join(differences)
    if lines:
        raise OutputError(
            f"{output}: holds {what} made from other settings or data ({lines}); name another output, "
            f"or undo the change, or remove that one yourself{advice and '; '}{advice}"
        )


def check_same(output: str, what: str, former: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise OutputError if `what` at `output` was made with other settings; the message lists them."""
    refuse(output, what, changes(former, current))


def check_unused(output: str, what: str, leftovers: Collection[str] = ()) -> None:
    """Raise OutputError if `output` holds files other than `leftovers`, those of an interrupted job."""
    uris = [uri for uri, _ in storage.list_files(output)]
    refuse_files(what, (uri for uri in uris if storage.name_of(uri) not in leftovers))


def refuse_files(what: str, uris: Iterable[str]) -> None:
    """Raise OutputError for the first of `uris`: files in the output that are no part of `what`."""
    for uri in uris:
        raise OutputError(
            f"{uri}: does not belong to {what}; name another output, or remove the file yourself"
        )


def claim(output: str, document: str, settings: Mapping[str, Any], what: str) -> None:
    """Write `settings` to OUTPUT/DOCUMENT, or check that an earlier run of the same job has written them.

    Raises:
        OutputError: the earlier run had other settings, or the directory holds other files.
    """
    uri = storage.join(output, document)
    if storage.exists(uri):
        return check_same(output, what, storage.read_json(uri), settings)
    check_unused(output, what)
    storage.write_json(uri, settings)


def finished(
    output: str,
    document: str,
    identity: Mapping[str, Any],
    what: str,
    *,
    key: str = "identity",
    format_version: int | None = None,
) -> dict[str, Any] | None:
    """Return OUTPUT/DOCUMENT if `what` with this identity is finished there; None if there is no document.

    `key` is where the document holds its identity. The format version is checked where one is given.

    Raises:
        OutputError: it has another identity or format version, or it is no such document.
    """
    uri = storage.join(output, document)
    if not storage.exists(uri):
        return None
    found = storage.read_json(uri)
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise OutputError(f"{uri}: is not {what}; name another output, or remove the file yourself")
    if format_version is not None and found.get("format_version") != format_version:
        raise OutputError(
            f"{uri}: format_version is {quote(found.get('format_version'), 80)}, this version of "
            f"revision_ray writes {format_version}; name another output"
        )
    check_same(uri, what, found[key], identity)
    return found


@dataclass(frozen=True, kw_only=True)
class WriterClaim:
    """Who wants to write. Until it is `held` its writer may still withdraw it."""

    id: str
    held: bool
    host: str
    pid: int
    process: str  # tells a process from a later one with the same number; empty where nobody knows
    since: float  # seconds since 1970, by the writer's clock: for people only
    took: tuple[str, ...] = ()  # claims of the dead that it removed: should one of them live, it has lost


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Nobody else writes to the directory `output` while this is open.

    Raises:
        DataError: another job writes there; or the storage does not take a claim; or this process was silent
            for so long that another job took the output over.
    """
    output = storage.absolute(output)
    fresh = not storage.exists(output)
    claim = _acquire(output)
    heart = _Heart(output, claim)
    heart.start()
    try:
        with _interruptible():
            yield
    except KeyboardInterrupt:
        if not heart.lost:
            raise
    finally:
        heart.stop()
        _withdraw(output, claim)
        if fresh:
            _remove_if_empty(output)
    if heart.lost:
        raise DataError(
            f"{output}: this job gave no sign of life for more than {SECONDS_TO_LIVE:.0f} s, and another one "
            "has taken its output over; let that one finish"
        )


# Not SIGINT: jobs that a script starts in the background ignore it.
_LOST = signal.SIGUSR2


@contextmanager
def _interruptible() -> Iterator[None]:
    """_LOST raises KeyboardInterrupt, which ends Ray's waits too. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(_LOST, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(_LOST, former)


def _acquire(output: str) -> WriterClaim:
    """The claim that holds the output now.

    A holder on this machine lives as long as its process. Of one elsewhere the next sign of life is waited
    for: a job that died and was submitted again is not refused because of itself.
    """
    claim = _fresh_claim()
    beats: dict[str, float] = {}
    for _ in range(_TRIES):
        _write(output, claim)
        rivals, dead = _others(output, claim)
        if not rivals:
            return _hold(output, claim, dead)
        _withdraw(output, claim)
        holder, beat = max(rivals, key=lambda rival: rival[0].held)
        if holder.held:
            if holder.host == claim.host or beats.get(holder.id, beat) != beat:
                raise DataError(_refusal(output, holder))
            if holder.id not in beats:
                log.info("%s: %s; waiting for its next sign of life", output, _named(holder))
            beats[holder.id] = beat
            time.sleep(SECONDS_BETWEEN_BEATS / 4)
        else:
            time.sleep(random.uniform(0.1, 1.0))  # all withdraw and ask again, no two at the same moment
    raise DataError(_refusal(output, holder))


def _fresh_claim() -> WriterClaim:
    return WriterClaim(
        id=uuid.uuid4().hex,
        held=False,
        host=_place(),
        pid=os.getpid(),
        process=_process(os.getpid()),
        since=time.time(),
    )


def _hold(output: str, claim: WriterClaim, dead: list[str]) -> WriterClaim:
    held = replace(claim, held=True, took=tuple(dead))
    _write(output, held)
    for each in dead:
        _delete(_uri(output, each))
    return held


def _named(holder: WriterClaim) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.since))
    host = holder.host.split("/")[0]
    return f"another job writes there (process {holder.pid} on {host}, since {since})"


def _refusal(output: str, holder: WriterClaim) -> str:
    remedy = "wait for it, or stop it and run this command again, which goes on where it was"
    return f"{output}: {_named(holder)}; {remedy}"


def _others(output: str, mine: WriterClaim) -> tuple[list[tuple[WriterClaim, float]], list[str]]:
    """The claims of others that are alive, with the times of their last beats, and the ids of the dead."""
    folder = storage.join(output, FOLDER)
    listed = {storage.name_of(uri): (uri, entry) for uri, entry in storage.list_files(folder)}
    if mine.id not in listed:
        raise DataError(f"{output}: the storage does not list what was just written there; run again")
    now = _seconds(listed[mine.id][1])
    alive, dead = [], []
    for name, (uri, entry) in listed.items():
        if name == mine.id or (other := _read(uri)) is None:
            continue
        if now - _seconds(entry) > SECONDS_TO_LIVE or _is_gone(other):
            log.info("%s: process %d, which wrote there, is gone", output, other.pid)
            dead.append(name)
        else:
            alive.append((other, _seconds(entry)))
    return alive, dead


def _is_lost(output: str, mine: WriterClaim) -> bool:
    """Whether another writer has taken this claim for dead."""
    listed = {storage.name_of(uri): uri for uri, _ in storage.list_files(storage.join(output, FOLDER))}
    others = [_read(uri) for name, uri in listed.items() if name != mine.id]
    return mine.id not in listed or any(other is not None and mine.id in other.took for other in others)


def _is_gone(claim: WriterClaim) -> bool:
    """Whether the claim's process has ended, as far as can be told from here."""
    if claim.host != _place():
        return False
    return _process(claim.pid) != claim.process


def _place() -> str:
    """The machine, and in it the container, within which a process number means one process."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}/{space}"


def _process(pid: int) -> str:
    """When process `pid` began, in the system's ticks; empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return "" if os.path.exists("/proc/self/stat") else _process_elsewhere(pid)
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _process_elsewhere(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


class _Heart(threading.Thread):
    """Writes the claim again and again, until it is stopped, or finds that another job has taken it away."""

    def __init__(self, output: str, claim: WriterClaim) -> None:
        super().__init__(name="fence", daemon=True)
        self.lost = False
        self._output, self._claim = output, claim
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_BEATS):
            try:
                if _is_lost(self._output, self._claim):
                    self.lost = True
                    log.error("%s: another job has taken this output over", self._output)
                    self._interrupt()
                    return
                _write(self._output, self._claim)
            except RevisionError as error:
                log.warning("the sign of life could not be written: %s", error)

    def _interrupt(self) -> None:
        main = threading.main_thread().ident
        if main is not None and signal.getsignal(_LOST) is signal.default_int_handler:
            signal.pthread_kill(main, _LOST)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _uri(output: str, claim: str) -> str:
    return storage.join(output, FOLDER, claim)


def _write(output: str, claim: WriterClaim) -> None:
    for left in reversed(range(3)):
        try:
            return storage.write_json(_uri(output, claim.id), asdict(claim))
        except DataError as error:
            # A writer that withdraws removes the empty folder, perhaps between its creation here and its use.
            if not left or not isinstance(error.__cause__, FileNotFoundError):
                raise


def _read(uri: str) -> WriterClaim | None:
    """The claim at `uri`; None where it was withdrawn meanwhile."""
    for left in reversed(range(5)):
        try:
            found = storage.read_json(uri)
            return WriterClaim(**{**found, "took": tuple(found["took"])})
        except DataError:
            # On object stores, its size may be that of the claim that was replaced at this moment.
            if not storage.exists(uri):
                return None
            if not left:
                raise
        time.sleep(0.1)
    return None


def _withdraw(output: str, claim: WriterClaim) -> None:
    _delete(_uri(output, claim.id))
    _remove_if_empty(storage.join(output, FOLDER))


def _delete(uri: str) -> None:
    try:
        storage.delete_file(uri)
    except OSError as error:
        if storage.exists(uri):
            log.warning("%s: cannot be removed: %s", uri, error)


def _remove_if_empty(uri: str) -> None:
    """A local folder that holds nothing is gone; object stores have no folders."""
    if "://" not in uri and os.path.isdir(uri) and not os.listdir(uri):
        try:
            os.rmdir(uri)
        except OSError:
            return  # another job has just put its claim there


def _seconds(entry: pafs.FileInfo) -> float:
    return (entry.mtime_ns or 0) / 1e9
