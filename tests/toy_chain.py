"""A chain of toy jobs for the runner: each writes what it read, a piece at a time, and goes on where it was.

`python toy_chain.py FOLDER SECONDS` runs it as a process of its own, so that it can be killed.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from revision_ray.core import artifact, storage
from revision_ray.core.errors import DataError
from revision_ray.core.stage import Stage, StageKind
from revision_ray.pipeline.chain import StageChoice
from revision_ray.pipeline.ledger import open_ledger
from revision_ray.pipeline.run import run_chain

PIECES = 4


@dataclass(frozen=True, kw_only=True)
class ToyJob:
    """Copies what it reads, once a piece, behind its word."""

    reads: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    output: str = ""
    word: str = ""
    seconds: float = 0.0
    """That each piece takes."""


def run(job: ToyJob) -> str:
    """Pieces that stand are kept if they are of these inputs; every call and every piece is on the list."""
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    content = job.word + "".join(Path(uri, "results.json").read_text() for uri in job.reads)
    settings = output / "settings"
    if settings.exists() and settings.read_text() != job.word:
        raise DataError(f"{output}: is of word {settings.read_text()}, this job says {job.word}")
    settings.write_text(job.word)
    for number in range(PIECES):
        piece = output / f"piece-{number}"
        if not piece.exists() or storage.read_bytes(str(piece)).decode() != content:
            time.sleep(job.seconds)
            with (output.parent / "made.txt").open("a") as made:
                made.write(f"{output.name} {number}\n")
            storage.write_bytes(str(piece), content.encode())
    pieces = [(output / f"piece-{number}").read_text() for number in range(PIECES)]
    storage.write_json(str(output / "results.json"), pieces)
    return f"{output.name} is done"


TOY = StageKind(
    name="toy",
    job=ToyJob,
    run=run,
    reads=lambda job: {"reads": job.reads, "model": job.models},
    proof="results.json",
    trusts=("model",),
)


def stage(name: str, folder: Path, *reads: str, **settings) -> Stage:
    """A toy stage that reads the outputs of these others."""
    job = ToyJob(
        reads=[str(folder / other) for other in reads],
        output=str(folder / name),
        **{"word": f"<{name}>", **settings},
    )
    return Stage(name, TOY, job)


def diamond(folder: Path, **settings) -> list[Stage]:
    """source -> left, right -> both; alone reads nothing."""
    return [
        stage("source", folder, **settings),
        stage("left", folder, "source", **settings),
        stage("right", folder, "source", **settings),
        stage("alone", folder, **settings),
        stage("both", folder, "left", "right", **settings),
    ]


def made(folder: Path) -> list[str]:
    """Every piece that was made, in order, as "stage number"."""
    listed = folder / "made.txt"
    return listed.read_text().splitlines() if listed.exists() else []


def results(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in sorted(folder.glob("*/results.json"))}


def go(folder: Path, stages: list[Stage], **choice) -> None:
    run_chain(stages, open_ledger(str(folder / "run")), StageChoice(**choice))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with artifact.writing(str(place / "run")):
        go(place, diamond(place, seconds=float(sys.argv[2])))
    print("finished")
