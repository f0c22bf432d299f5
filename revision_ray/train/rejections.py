"""The list of samples that training left out or cut off, with their causes; each worker keeps its own."""

import json

from revision_ray import metrics, storage
from revision_ray.train.ingest import Step


class Rejections:
    """OUTPUT/rejected/rank-*.jsonl: what happened before `first_step` is kept when a run goes on."""

    def __init__(self, output: str, rank: int, first_step: int) -> None:
        self._uri = storage.join(output, "rejected", f"rank-{rank:05d}.jsonl")
        former = storage.read_bytes(self._uri).decode().splitlines() if storage.exists(self._uri) else []
        self._lines = [line for line in former if json.loads(line)["step"] < first_step]
        self._changed = len(self._lines) != len(former)

    def add(self, step: Step) -> int:
        """The step's samples that were left out or cut off are on the list; how many there are."""
        found = [*step.rejected, *step.truncated]
        for row_id, cause, detail in found:
            self._lines.append(
                json.dumps({"step": step.step, "id": row_id, "cause": cause, "detail": detail})
            )
        self._changed = self._changed or bool(found)
        metrics.record(rejected=len(step.rejected), truncated=len(step.truncated))
        return len(found)

    def flush(self) -> None:
        """The list stands in the output."""
        if self._changed:
            storage.write_bytes(self._uri, "".join(line + "\n" for line in self._lines).encode())
            self._changed = False
