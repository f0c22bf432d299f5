"""The pipeline job: one YAML, a chain of the other jobs."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from revision_ray import config, storage
from revision_ray.align.apply import AlignJob
from revision_ray.align.fit import FitJob
from revision_ray.config import MISSING
from revision_ray.data.import_reference import ImportJob
from revision_ray.encode.embed import EmbedJob
from revision_ray.errors import ConfigError
from revision_ray.evaluate.run import EvaluateJob
from revision_ray.miniature.conversations import ConversationsJob
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.pipeline import plan, report
from revision_ray.pipeline.chain import Choice, Stage, chosen
from revision_ray.pipeline.cost import Estimates
from revision_ray.pipeline.kinds import KINDS
from revision_ray.pipeline.ledger import open_ledger
from revision_ray.pipeline.measured import measure
from revision_ray.pipeline.run import run_chain
from revision_ray.train.encoder import EncoderTraining
from revision_ray.train.export_job import ExportJob
from revision_ray.train.language_model import LanguageTraining
from revision_ray.train.run import FinetuneJob, PretrainJob


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: exactly one job, with the keys that it has when it runs alone."""

    title: str = ""
    """What the report calls it; its name if not given."""
    embed: EmbedJob | None = None
    """jobs/embed.py."""
    fit: FitJob | None = None
    """jobs/fit.py."""
    align: AlignJob | None = None
    """jobs/align.py."""
    import_reference: ImportJob | None = None
    """jobs/import_reference.py."""
    pretrain: PretrainJob | None = None
    """jobs/pretrain.py."""
    finetune: FinetuneJob | None = None
    """jobs/finetune.py."""
    evaluate: EvaluateJob | None = None
    """jobs/evaluate.py."""
    export: ExportJob | None = None
    """jobs/export.py."""
    render: DatasetConfig | None = None
    """jobs/render.py."""
    conversations: ConversationsJob | None = None
    """Questions about the miniature world's images, as data of stage 2."""
    train_encoder: EncoderTraining | None = None
    """jobs/train_encoder.py."""
    train_language_model: LanguageTraining | None = None
    """jobs/train_language_model.py."""


@dataclass(frozen=True, kw_only=True)
class PipelineJob:
    """Run a chain of jobs, each on what earlier ones made. Run again, it skips what has not changed and goes
    on where it was. --dry-run prints what would run and what it would cost, --from STAGE begins there, --only
    STAGE,STAGE runs those alone."""

    output: str = MISSING
    """Run directory: the ledger of what was done, and the resolved configuration. Stages have outputs of
    their own, usually below it."""
    given: dict[str, Any] = field(default_factory=dict)
    """Values that several stages name, as ${given.NAME}."""
    stages: dict[str, StageConfig] = MISSING
    """The chain, in the order in which it runs. A stage names what an earlier one makes by
    ${stages.NAME.JOB.output}."""
    estimates: Estimates = field(default_factory=Estimates)
    """What --dry-run reckons with."""
    from_stage: str | None = None
    """--from: begin with this stage; what it reads must be there."""
    only: list[str] = field(default_factory=list)
    """--only: run these stages alone; what they read must be there."""
    dry_run: bool = False
    """--dry-run: print what would run, with rows, tokens, GPU hours and dollars, and do nothing."""


def run(job: PipelineJob) -> str:
    """The chain has run; what came out. Or, of a dry run, the table of what would.

    Raises:
        ConfigError: the chain cannot be, or a stage has no such name.
        DataError, AlignmentError, CheckpointError: a stage's data are at fault, or another job writes there.
    """
    stages = stages_of(job)
    book = open_ledger(job.output)
    choice = Choice(first=job.from_stage, only=tuple(job.only))
    if job.dry_run:
        return plan.table(plan.plan(stages, book, choice, job.estimates), job.estimates)
    chosen(stages, choice)  # before anything is written
    whole = replace(job, from_stage=None, only=[])
    config.save_resolved(whole, storage.join(storage.absolute(job.output), "pipeline.yaml"))
    run_chain(stages, book, choice, measure)
    return report.report(stages, storage.absolute(job.output))


def stages_of(job: PipelineJob) -> list[Stage]:
    """The chain that the configuration describes.

    Raises:
        ConfigError: no stages, a name that no command line can hold, or a stage of no job or of several.
    """
    if not job.stages:
        raise ConfigError(
            "stages: name at least one, as stages.NAME.JOB.KEY=VALUE; see configs/pipeline.yaml"
        )
    found = []
    for name, entry in job.stages.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"stages.{name}: a stage's name is made of letters, digits, _ and -")
        jobs = [kind for kind in KINDS if getattr(entry, kind) is not None]
        if len(jobs) != 1:
            said = " and ".join(jobs) or "no job"
            raise ConfigError(f"stages.{name}: names {said}; a stage is one of {', '.join(KINDS)}")
        stage = Stage(name, KINDS[jobs[0]], getattr(entry, jobs[0]), entry.title)
        if stage.output == storage.absolute(job.output):
            raise ConfigError(
                f"{stage.key_of('output')}={stage.output}: is the pipeline's own directory; give the stage "
                "one below it"
            )
        found.append(stage)
    return found
