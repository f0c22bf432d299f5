"""Run a chain: skip unchanged stages, continue interrupted ones, and record every step in the ledger."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from revision_ray.core import artifact, logs, storage
from revision_ray.core.errors import DataError, RevisionError
from revision_ray.core.stage import Stage, inside
from revision_ray.pipeline import ledger
from revision_ray.pipeline.chain import StageChoice, chosen
from revision_ray.pipeline.ledger import Contents, Identified, Ledger, StageRecord

log = logging.getLogger(__name__)

Measured = dict[str, Any]  # rows, tokens, gpus of a finished stage


def run_chain(
    stages: Sequence[Stage],
    book: Ledger,
    choice: StageChoice,
    measure: Callable[[Stage], Measured] | None = None,
) -> None:
    """Run every chosen stage that has changed; `measure` returns the rows, tokens and gpus of a finished one.

    Raises:
        ConfigError: the chain or the choice is invalid.
        DataError: an input that no stage makes is missing; or a stage's output exists but is of other
            settings or inputs; or another job writes to it.
        RevisionError: as the stage's job raises.
    """
    now = chosen(stages, choice)
    _check_given(now, stages)
    for stage in now:
        contents = Contents(book.hashes)
        inputs = inputs_of(stage, contents)
        reason = why(stage, book.records.get(stage.name), inputs, contents)
        place = f"stage {stage.name} ({stage.kind.name})"
        if not reason:
            log.info("%s: skipped, unchanged since %s", place, book.records[stage.name].ended)
            continue
        log.info("%s: %s", place, reason)
        _run_stage(stage, book, inputs, contents, measure)


def _check_given(now: Sequence[Stage], stages: Sequence[Stage]) -> None:
    """Check that every input that no stage makes exists, before the first stage runs."""
    missing = [
        f"{uri} ({stage.key_of(key)})"
        for stage in now
        for key, uris in stage.reads.items()
        if key.rpartition(".")[2] not in stage.kind.hub_names
        for uri in uris
        if not any(inside(uri, other.output) for other in stages) and not _there(uri)
    ]
    if missing:
        raise DataError(
            f"nothing there, and no stage makes it: {', '.join(missing)}; name what is there, or choose the "
            "stages that do without (--only); nothing has run"
        )


def _there(uri: str) -> bool:
    return storage.exists(uri) or (storage.is_wildcard(uri) and bool(storage.glob_files(uri)))


def inputs_of(stage: Stage, contents: Contents) -> dict[str, Identified]:
    """Return the current identity of everything the stage reads, by configuration key."""
    return {
        key: [[uri, ledger.listed(uri) if key in stage.kind.sources else contents.of(uri)] for uri in uris]
        for key, uris in stage.reads.items()
    }


def why(stage: Stage, record: StageRecord | None, inputs: dict[str, Identified], contents: Contents) -> str:
    """Return why a stage has to run; empty if its settings, inputs and output are unchanged."""
    if record is None or record.job != stage.kind.name:
        return "runs for the first time"
    if record.state == "running":
        return f"goes on, was cut off after {record.begun}"
    if record.state == "failed":
        return f"goes on, failed at {record.ended}"
    if changed := changes(record, stage, inputs):
        return f"runs again: {'; '.join(changed)}"
    if not stage.finished or not record.outputs:
        return f"runs again: its output is gone from {stage.output}"
    if record.outputs != outputs_of(stage, contents):
        return f"runs again: its output at {stage.output} is not what it had made"
    return ""


def changes(record: StageRecord, stage: Stage, inputs: dict[str, Identified]) -> list[str]:
    """Return one line for each setting and each input that differs from the stage's last run."""
    lines = artifact.changes(record.settings, stage.settings, stage.key_of)
    return lines + [f"what {stage.key_of(key)} reads has changed" for key in _changed_inputs(record, inputs)]


def _changed_inputs(record: StageRecord, inputs: dict[str, Identified]) -> list[str]:
    """Return the keys whose content differs from the last run, regardless of its location."""
    return [
        key
        for key in sorted(record.inputs.keys() | inputs.keys())
        if _identities(record.inputs.get(key, [])) != _identities(inputs.get(key, []))
    ]


def _identities(found: Identified) -> list[str]:
    return [identity for _, identity in found]


def outputs_of(stage: Stage, contents: Contents) -> Identified:
    return [[stage.output, contents.of(stage.output)]]


def _run_stage(
    stage: Stage,
    book: Ledger,
    inputs: dict[str, Identified],
    contents: Contents,
    measure: Callable[[Stage], Measured] | None,
) -> None:
    former = book.records.get(stage.name)
    changed = changes(former, stage, inputs) if former else []
    if former:
        _refuse_stale(stage, former, inputs)
    with _alone(stage):
        unbroken = not stage.finished and (former is None or former.state == "finished")
        record = StageRecord(
            job=stage.kind.name,
            settings=stage.settings,
            inputs=inputs,
            state="running",
            begun=ledger.utc_now(),
            unbroken=unbroken,
            versions=ledger.versions(),
        )
        book.begin(stage.name, record)
        start = time.monotonic()
        try:
            with logs.working_for(stage.name, stage.output):
                message = stage.kind.run(stage.job)
        except RevisionError as error:
            if former and former.outputs == outputs_of(stage, contents):
                book.keep(stage.name, former, str(error))
            else:
                book.end(stage.name, "failed", str(error), seconds=_since(start))
            raise type(error)(_explained(stage, str(error), changed)) from error
        except BaseException as error:
            book.end(stage.name, "failed", repr(error), seconds=_since(start))
            raise
        known = measure(stage) if measure else {}
        outputs = outputs_of(stage, contents)
        book.end(stage.name, "finished", message, seconds=_since(start), outputs=outputs, **known)
    log.info("stage %s: %s", stage.name, message)


def _since(start: float) -> float:
    return round(time.monotonic() - start, 3)


def _alone(stage: Stage) -> ExitStack:
    """Lock the stage's output for this process until the returned context exits.

    Raises:
        DataError: another process writes to it.
    """
    held = ExitStack()
    try:
        held.enter_context(artifact.writing(stage.output))
    except DataError as error:
        raise DataError(f"stage {stage.name}: {error}") from error
    return held


def _refuse_stale(stage: Stage, former: StageRecord, inputs: dict[str, Identified]) -> None:
    """Check that the existing output was not made from other inputs that the job itself does not check.

    Raises:
        DataError: the output was made from other content than the job would read now.
    """
    if storage.absolute(former.settings["output"]) != stage.output or not storage.exists(stage.output):
        return
    for key in _changed_inputs(former, inputs):
        if key in stage.kind.trusts:
            uris = ", ".join(stage.reads.get(key, [])) or "nothing"
            raise DataError(
                f"stage {stage.name}: {stage.output} was made from other content than {uris} "
                f"({stage.key_of(key)}) has now, and its job would keep it; {_remedy(stage)}"
            )


def _explained(stage: Stage, error: str, changed: list[str]) -> str:
    """Return the job's error message with the changes since the stage ran last."""
    if not changed:
        return f"stage {stage.name}: {error}"
    return f"stage {stage.name}: {error} [since it ran last: {'; '.join(changed)}; {_remedy(stage)}]"


def _remedy(stage: Stage) -> str:
    return (
        f"name another output, {stage.key_of('output')}=..., which later stages follow where they name it by "
        f"${{...}}; or undo the change; or remove {stage.output} yourself"
    )
