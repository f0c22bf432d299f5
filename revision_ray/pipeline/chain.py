"""Order a chain of stages: find which stage reads what another makes, and choose which run. No Ray."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from revision_ray.core.errors import ConfigError, shorten
from revision_ray.core.stage import Stage, inside


@dataclass(frozen=True, kw_only=True)
class StageChoice:
    """Choice of the stages of a chain to run; by default all."""

    first: str | None = None
    """Begin with this stage (--from)."""
    only: tuple[str, ...] = ()
    """Run only these stages (--only)."""


def makers(stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    """Return stage -> the earlier stages whose outputs it reads.

    Raises:
        ConfigError: two outputs are equal or nested, or a stage reads its own output or that of a later one.
    """
    made_by: dict[str, tuple[str, ...]] = {}
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
        made_by[stage.name] = tuple(
            other.name for other in stages[:place] if any(_related(uri, other.output) for uri in uris)
        )
    return made_by


def _related(one: str, other: str) -> bool:
    return inside(one, other) or inside(other, one)


def chosen(stages: Sequence[Stage], choice: StageChoice) -> list[Stage]:
    """Return the stages that `choice` names, in the order of the chain.

    Raises:
        ConfigError: the chain is invalid (see `makers`); a name that no stage has (the nearest one is named);
            or a chosen stage reads the output of a stage that is neither chosen nor finished.
    """
    if choice.first and choice.only:
        raise ConfigError("--from and --only: give one of the two")
    for option, names in (("--from", [choice.first] if choice.first else []), ("--only", choice.only)):
        for name in names:
            _check_name(stages, option, name)
    names = [stage.name for stage in stages]
    if choice.first:
        running = stages[names.index(choice.first) :]
    else:
        running = [stage for stage in stages if not choice.only or stage.name in choice.only]
    _check_makers(stages, running, choice)
    return list(running)


def _check_name(stages: Sequence[Stage], option: str, name: str) -> None:
    names = [stage.name for stage in stages]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f" Did you mean: {near[0]}?" if near else ""
        raise ConfigError(
            f"{option} {shorten(name)}: no stage has this name; there are {', '.join(names)}.{meant}"
        )


def _check_makers(stages: Sequence[Stage], chosen_stages: Sequence[Stage], choice: StageChoice) -> None:
    by_name = {stage.name: stage for stage in stages}
    running = {stage.name for stage in chosen_stages}
    made_by = makers(stages)
    for stage in chosen_stages:
        for name in made_by[stage.name]:
            maker = by_name[name]
            if name not in running and not maker.finished:
                option = f"--from {choice.first}" if choice.first else f"--only {','.join(choice.only)}"
                both = f"--only {','.join((name, *choice.only))}" if choice.only else f"--from {name}"
                raise ConfigError(
                    f"{option}: stage {stage.name} reads {maker.output}, which stage {name} has not finished "
                    f"(no {maker.kind.proof} there); begin with it ({both}), or run the whole chain"
                )
