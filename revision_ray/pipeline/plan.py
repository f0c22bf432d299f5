"""The plan of --dry-run: what a chain would run, how much work each stage has, and what it costs. No Ray.

Nothing is guessed: a figure that neither the data, the configuration nor a measurement gives is None, and so
is every sum that it is part of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from revision_ray.core.stage import Estimates, Forecast, Stage, StageWork, Throughput
from revision_ray.pipeline.chain import StageChoice, chosen, makers
from revision_ray.pipeline.ledger import Contents, Ledger, open_ledger
from revision_ray.pipeline.run import inputs_of, why

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Of one stage. None stands for unknown."""

    gpu_hours: float | None
    gpu_dollars: float | None
    data_dollars: float | None


def cost_of(work: StageWork, rate: Throughput, estimates: Estimates) -> StageCost:
    """What `work` costs at this rate, or at that which its model's size gives."""
    hours = gpu_hours(work, rate, estimates)
    price = estimates.dollars_per_gpu_hour
    dollars = 0.0 if hours == 0 else None if hours is None or price is None else hours * price
    data = 0.0 if estimates.data is None or work.texts == 0 else estimates.data.dollars(work.texts)
    return StageCost(gpu_hours=hours, gpu_dollars=dollars, data_dollars=data)


def gpu_hours(work: StageWork, rate: Throughput, estimates: Estimates) -> float | None:
    """By tokens where their throughput is known or reckoned, else by rows."""
    if not work.uses_gpu or work.rows == 0:
        return 0.0
    if work.tokens:
        per_second = rate.tokens_per_second
        if per_second is None and work.flops_per_token:
            per_second = estimates.teraflops_per_gpu * 1e12 * estimates.utilisation / work.flops_per_token
        if per_second is not None:
            return work.tokens / per_second / _SECONDS_PER_HOUR
    if work.rows is not None and rate.rows_per_second is not None:
        return work.rows / rate.rows_per_second / _SECONDS_PER_HOUR
    return None


def total(values: list[float | None]) -> float | None:
    """The sum; unknown where a part is."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def measured_rate(book: Ledger | None, stage: Stage) -> Throughput:
    """What one GPU did at this stage, or at another one of the same job, when it ran in one go."""
    records = book.records if book else {}
    same = [records[stage.name]] if stage.name in records else []
    same += [record for name, record in records.items() if name != stage.name]
    for record in same:
        if record.job == stage.kind.name and record.state == "finished" and record.rows and record.unbroken:
            tokens, gpu_seconds = record.tokens, record.seconds * record.gpus
            return Throughput(
                tokens_per_second=tokens / gpu_seconds if tokens and gpu_seconds else None,
                rows_per_second=record.rows / gpu_seconds if gpu_seconds else None,
                tokens_per_row=tokens / record.rows if tokens else None,
            )
    return Throughput()


_HEADS = ("rows", "tokens", "GPU hours", "GPU $", "data $")


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """A stage in the table."""

    stage: Stage
    reason: str
    """Why it runs; empty where it is skipped."""
    work: StageWork
    cost: StageCost


def plan(stages: Sequence[Stage], book: Ledger, choice: StageChoice, estimates: Estimates) -> list[PlanLine]:
    """The chosen stages, whether each would run, and what that would cost as a whole. Nothing is written.

    Raises:
        ConfigError: the chain or the choice cannot be. DataError: a source is missing that no stage makes.
    """
    made_by = makers(stages)
    contents = Contents(dict(book.hashes))
    reasons: dict[str, str] = {}
    for stage in chosen(stages, choice):
        reason = why(stage, book.records.get(stage.name), inputs_of(stage, contents), contents)
        running = [name for name in made_by[stage.name] if reasons.get(name)]
        waits = f"runs if {', '.join(running)} makes something else" if running else ""
        reasons[stage.name] = reason or waits
    earlier_run = open_ledger(estimates.measured) if estimates.measured else None
    forecast = Forecast(
        stages=stages,
        makers=made_by,
        estimates=estimates,
        standing=frozenset(stage.name for stage in stages if not reasons.get(stage.name) and stage.finished),
        measured=lambda stage: measured_rate(earlier_run, stage),
    )
    lines = []
    for stage in stages:
        if stage.name in reasons:
            work = forecast.work(stage)
            cost = cost_of(work, forecast.rate(stage), estimates)
            done = not reasons[stage.name]
            nothing = StageCost(gpu_hours=0.0, gpu_dollars=0.0, data_dollars=0.0)
            lines.append(
                PlanLine(stage=stage, reason=reasons[stage.name], work=work, cost=nothing if done else cost)
            )
    return lines


def table(lines: Sequence[PlanLine], estimates: Estimates) -> str:
    """For a person: a line a stage, the sums, and what the sums leave out."""
    rows: list[tuple[str, ...]] = [("stage", "job", *_HEADS, "")]
    for line in lines:
        done = not line.reason
        rows.append(
            (
                line.stage.name,
                line.stage.kind.name,
                _count(line.work.rows),
                "-" if not line.work.uses_gpu else _count(line.work.tokens),
                *(("-",) * 3 if done else _cells(line.cost)),
                line.reason or "skipped, unchanged",
            )
        )
    rows.append(("total", "", "", "", *_cells(_sums(lines)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = [_line(row, widths) for row in rows]
    return "\n".join([*text, "", *_notes(lines, estimates)])


def _sums(lines: Sequence[PlanLine]) -> StageCost:
    return StageCost(
        gpu_hours=total([line.cost.gpu_hours for line in lines]),
        gpu_dollars=total([line.cost.gpu_dollars for line in lines]),
        data_dollars=total([line.cost.data_dollars for line in lines]),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
    right = "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:-1], widths[2:-1], strict=True))
    return f"{left}{right}  {row[-1]}".rstrip()


def _cells(cost: StageCost) -> tuple[str, str, str]:
    hours = "unknown" if cost.gpu_hours is None else f"{cost.gpu_hours:,.2f}" if cost.gpu_hours else "-"
    return hours, _dollars(cost.gpu_dollars), _dollars(cost.data_dollars)


def _dollars(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f}" if value else "-"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value else "-"


def _notes(lines: Sequence[PlanLine], estimates: Estimates) -> list[str]:
    notes = []
    sums = _sums(lines)
    if sums.gpu_dollars is not None and sums.data_dollars is not None:
        notes.append(f"In all ${sums.gpu_dollars + sums.data_dollars:,.2f}.")
    texts = total([line.work.texts for line in lines if line.reason])
    if estimates.data and texts:
        paired, ours = estimates.data.paired_dollars(texts), estimates.data.dollars(texts)
        if paired and ours is not None:
            notes.append(
                f"The data as {texts:,.0f} image-text pairs: ${paired:,.2f}; texts alone cost "
                f"{ours / paired:.2f} of that (arXiv 2602.07026, app. H.4)."
            )
    notes.append(
        "Whole stages: of one that goes on, less is left. Time of nodes without GPUs is not in the dollars."
    )
    return notes
