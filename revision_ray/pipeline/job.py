"""Run a chain of jobs from one YAML and report on it; list the jobs that can be stages."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

import ray

from revision_ray.align import apply, fit
from revision_ray.core import config, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError
from revision_ray.core.stage import Estimates, Stage
from revision_ray.data import imports
from revision_ray.encode import embed
from revision_ray.evaluate import evaluation
from revision_ray.miniature import dataset, language_model, render
from revision_ray.pipeline import plan
from revision_ray.pipeline.chain import StageChoice, chosen
from revision_ray.pipeline.ledger import open_ledger
from revision_ray.pipeline.run import run_chain
from revision_ray.train import export_job, from_scratch, stages

# Every job that can be a stage. A new one is declared at the end of its module and added here; its key in the
# configuration, its estimate and its part of the report follow from it. The report keeps this order.
KINDS = {
    kind.name: kind
    for kind in (
        render.STAGE,
        from_scratch.ENCODER_STAGE,
        language_model.LANGUAGE_MODEL_STAGE,
        imports.STAGE,
        embed.STAGE,
        fit.STAGE,
        apply.STAGE,
        dataset.STAGE,
        stages.PRETRAIN_STAGE,
        stages.FINETUNE_STAGE,
        evaluation.STAGE,
        export_job.STAGE,
    )
}


def _first_sentence(job: type) -> str:
    about = " ".join(inspect.cleandoc(job.__doc__ or "").split())
    return about.partition(". ")[0].removesuffix(".") + "."


_OneJob = make_dataclass(
    "_OneJob",
    [
        (kind.name, kind.job | None, field(default=None, metadata={"explanation": _first_sentence(kind.job)}))
        for kind in KINDS.values()
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class StageConfig(_OneJob):
    """One stage of a chain: exactly one job, with the same keys as when it runs alone."""

    title: str = ""
    """Title of the stage in the report; by default its name."""


@dataclass(frozen=True, kw_only=True)
class PipelineJob:
    """Run a chain of jobs, each on what earlier ones made. Run again, it skips what has not changed and goes
    on where it was. --dry-run prints what would run and what it would cost, --from STAGE begins there, --only
    STAGE,STAGE runs those alone."""

    output: str = MISSING
    """Run directory for the ledger of finished work and the resolved configuration. Each stage has its own
    output, usually below it."""
    given: dict[str, Any] = field(default_factory=dict)
    """Values that several stages share; refer to one as ${given.NAME}."""
    stages: dict[str, StageConfig] = MISSING
    """Stages in the order in which they run. A stage refers to the output of an earlier one as
    ${stages.NAME.JOB.output}."""
    estimates: Estimates = field(default_factory=Estimates)
    """Assumptions that --dry-run uses to estimate rows, tokens, GPU hours and dollars."""
    from_stage: str | None = None
    """--from: begin with this stage; its inputs must exist."""
    only: list[str] = field(default_factory=list)
    """--only: run only these stages; their inputs must exist."""
    dry_run: bool = False
    """--dry-run: print what would run, with rows, tokens, GPU hours and dollars, and do nothing."""


def run_pipeline(job: PipelineJob) -> str:
    """Run the chain and return its report; for a dry run, return the table of what would run.

    Raises:
        ConfigError: the chain is invalid, or no stage has a name given to --from or --only.
        DataError, AlignmentError, CheckpointError: a stage failed on its data, or another job writes to its
            output.
    """
    chain = stages_of(job)
    ledger = open_ledger(job.output)
    choice = StageChoice(first=job.from_stage, only=tuple(job.only))
    if job.dry_run:
        return plan.table(plan.plan(chain, ledger, choice, job.estimates), job.estimates)
    chosen(chain, choice)  # before anything is written
    whole = replace(job, from_stage=None, only=[])
    config.save_resolved(whole, storage.join(storage.absolute(job.output), "pipeline.yaml"))
    run_chain(chain, ledger, choice, measure)
    return report(chain, storage.absolute(job.output))


def stages_of(job: PipelineJob) -> list[Stage]:
    """Return the chain that the configuration describes.

    Raises:
        ConfigError: no stages, a name that no command line can hold, or a stage with no job or several jobs.
    """
    if not job.stages:
        raise ConfigError(
            "stages: name at least one, as stages.NAME.JOB.KEY=VALUE; see configs/pipeline.yaml"
        )
    chain = []
    for name, entry in job.stages.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"stages.{name}: a stage's name is made of letters, digits, _ and -")
        jobs = [kind for kind in KINDS if getattr(entry, kind) is not None]
        if len(jobs) != 1:
            named = " and ".join(jobs) or "no job"
            raise ConfigError(f"stages.{name}: names {named}; a stage is one of {', '.join(KINDS)}")
        stage = Stage(name, KINDS[jobs[0]], getattr(entry, jobs[0]), entry.title)
        if stage.output == storage.absolute(job.output):
            raise ConfigError(
                f"{stage.key_of('output')}={stage.output}: is the pipeline's own directory; give the stage "
                "one below it"
            )
        chain.append(stage)
    return chain


def measure(stage: Stage) -> dict[str, Any]:
    """Return rows, tokens and gpus of a stage that has just finished; None or 0 where unknown."""
    total = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    return {**stage.kind.done(stage), "gpus": stage.kind.gpus(stage.job, total)}


def report(chain: Sequence[Stage], run: str) -> str:
    """Return the report: one part for each kind of finished stage, and the location of the outputs."""
    parts = []
    for kind in KINDS.values():
        finished = [stage for stage in chain if stage.kind is kind and stage.finished]
        if kind.summary and finished:
            parts.append(kind.summary(finished))
    models = [(stage, stage.kind.model) for stage in chain if stage.kind.model is not None]
    last, folder = models[-1] if models else (None, "")
    model = f", the model in {storage.join(last.output, folder)}" if last and last.finished else ""
    left = [stage.name for stage in chain if not stage.finished]
    missing = f" Not there yet: {', '.join(left)}." if left else ""
    return "\n\n".join([*parts, f"Everything is in {run}{model}{'.' if left else ''}{missing}"])
