"""A chain of stages: what each reads and writes, which depend on which, which of them are chosen. No Ray."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError, shorten


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """What a chain knows of a job."""

    name: str
    run: Callable[[Any], str]
    """Does the job, or what is left of it, and says in a line where the result is."""
    reads: Callable[[Any], dict[str, list[str]]]
    """Key -> URIs of everything that decides the output besides the settings; also names on a hub."""
    proof: str
    """The file in the output without which it is unfinished."""
    result: str = ""
    """The folder in the output that later stages read, if they do not read all of it."""
    sources: tuple[str, ...] = ()
    """Keys of what is known by its listing, whatever it looks like: data as users have them."""
    trusts: tuple[str, ...] = ()
    """Keys of what the job reads without comparing it with what made the output that it keeps."""


@dataclass(frozen=True)
class Stage:
    """A job in a chain, under a name of its own."""

    name: str
    kind: StageKind
    job: Any
    title: str = ""

    @cached_property
    def output(self) -> str:
        return storage.absolute(self.job.output)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The job's settings as JSON gives them back."""
        return json.loads(json.dumps(asdict(self.job)))

    @cached_property
    def reads(self) -> dict[str, list[str]]:
        """Key -> absolute URIs; a name on a hub, too, as if it were a path."""
        named = self.kind.reads(self.job)
        return {key: [storage.absolute(uri) for uri in uris if uri] for key, uris in named.items()}

    @property
    def finished(self) -> bool:
        """Whether the output stands, of whatever settings."""
        return storage.exists(storage.join(self.output, self.kind.proof))

    def key_of(self, setting: str) -> str:
        """How a setting of the job is named on the command line."""
        return f"stages.{self.name}.{self.kind.name}.{setting}"


@dataclass(frozen=True, kw_only=True)
class StageChoice:
    """Which stages of a chain a run looks at."""

    first: str | None = None
    """This one and those behind it (--from)."""
    only: tuple[str, ...] = ()
    """These alone (--only)."""


def makers(stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    """Stage -> the earlier stages whose outputs it reads.

    Raises:
        ConfigError: two outputs are one or lie in each other, or a stage reads what it or a later one makes.
    """
    found: dict[str, tuple[str, ...]] = {}
    for place, stage in enumerate(stages):
        for other in stages[:place]:
            if _related(stage.output, other.output):
                raise ConfigError(
                    f"stages {other.name} and {stage.name} write to {other.output} and {stage.output}; give "
                    f"each an output of its own, beside the other: {stage.key_of('output')}=..."
                )
        for other in stages[place:]:
            for key, uris in stage.reads.items():
                if uri := next((uri for uri in uris if _related(uri, other.output)), None):
                    raise ConfigError(
                        f"stage {stage.name} reads {uri} ({stage.key_of(key)}), which "
                        f"{'it' if other is stage else f'the later stage {other.name}'} makes; stages run in "
                        "the order in which they are listed"
                    )
        uris = [uri for uris in stage.reads.values() for uri in uris]
        found[stage.name] = tuple(
            other.name for other in stages[:place] if any(_related(uri, other.output) for uri in uris)
        )
    return found


def inside(uri: str, folder: str) -> bool:
    """Whether `uri` lies in `folder`, or is it; a wildcard path stands for the folder that it is below of."""
    uri, folder = (storage.wildcard_root(each).partition("?")[0].rstrip("/") + "/" for each in (uri, folder))
    return uri.startswith(folder)


def _related(one: str, other: str) -> bool:
    return inside(one, other) or inside(other, one)


def chosen(stages: Sequence[Stage], choice: StageChoice) -> list[Stage]:
    """The stages that `choice` names, in the order of the chain.

    Raises:
        ConfigError: the chain cannot be (see `makers`); a name that no stage has (the nearest one is named);
            or a stage that is not chosen has not made yet what a chosen one reads.
    """
    if choice.first and choice.only:
        raise ConfigError("--from and --only: give one of the two")
    for option, names in (("--from", [choice.first] if choice.first else []), ("--only", choice.only)):
        for name in names:
            _check_name(stages, option, name)
    names = [stage.name for stage in stages]
    if choice.first:
        found = stages[names.index(choice.first) :]
    else:
        found = [stage for stage in stages if not choice.only or stage.name in choice.only]
    _check_makers(stages, found, choice)
    return list(found)


def _check_name(stages: Sequence[Stage], option: str, name: str) -> None:
    names = [stage.name for stage in stages]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f" Did you mean: {near[0]}?" if near else ""
        raise ConfigError(
            f"{option} {shorten(name)}: no stage has this name; there are {', '.join(names)}.{meant}"
        )


def _check_makers(stages: Sequence[Stage], found: Sequence[Stage], choice: StageChoice) -> None:
    by_name = {stage.name: stage for stage in stages}
    running = {stage.name for stage in found}
    made_by = makers(stages)
    for stage in found:
        for name in made_by[stage.name]:
            maker = by_name[name]
            if name not in running and not maker.finished:
                option = f"--from {choice.first}" if choice.first else f"--only {','.join(choice.only)}"
                both = f"--only {','.join((name, *choice.only))}" if choice.only else f"--from {name}"
                raise ConfigError(
                    f"{option}: stage {stage.name} reads {maker.output}, which stage {name} has not finished "
                    f"(no {maker.kind.proof} there); begin with it ({both}), or run the whole chain"
                )
