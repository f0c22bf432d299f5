"""What a run of a chain would do, without doing any of it: the table of --dry-run. No Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from revision_ray.pipeline.chain import Choice, Stage, chosen, makers
from revision_ray.pipeline.content import Contents
from revision_ray.pipeline.cost import Cost, Estimates, Work, cost_of, total
from revision_ray.pipeline.ledger import Ledger, open_ledger
from revision_ray.pipeline.run import inputs_of, why
from revision_ray.pipeline.work import Forecast

_HEADS = ("rows", "tokens", "GPU hours", "GPU $", "data $")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A stage in the table."""

    stage: Stage
    reason: str
    """Why it runs; empty where it is skipped."""
    work: Work
    cost: Cost


def plan(stages: Sequence[Stage], book: Ledger, choice: Choice, estimates: Estimates) -> list[Line]:
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
    forecast = Forecast(
        stages=stages,
        makers=made_by,
        estimates=estimates,
        standing=frozenset(stage.name for stage in stages if not reasons.get(stage.name) and stage.finished),
        measured=open_ledger(estimates.measured) if estimates.measured else None,
    )
    lines = []
    for stage in stages:
        if stage.name in reasons:
            work = forecast.work(stage)
            cost = cost_of(work, forecast.rate(stage), estimates)
            done = not reasons[stage.name]
            nothing = Cost(gpu_hours=0.0, gpu_dollars=0.0, data_dollars=0.0)
            lines.append(
                Line(stage=stage, reason=reasons[stage.name], work=work, cost=nothing if done else cost)
            )
    return lines


def table(lines: Sequence[Line], estimates: Estimates) -> str:
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


def _sums(lines: Sequence[Line]) -> Cost:
    return Cost(
        gpu_hours=total([line.cost.gpu_hours for line in lines]),
        gpu_dollars=total([line.cost.gpu_dollars for line in lines]),
        data_dollars=total([line.cost.data_dollars for line in lines]),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
    right = "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:-1], widths[2:-1], strict=True))
    return f"{left}{right}  {row[-1]}".rstrip()


def _cells(cost: Cost) -> tuple[str, str, str]:
    hours = "unknown" if cost.gpu_hours is None else f"{cost.gpu_hours:,.2f}" if cost.gpu_hours else "-"
    return hours, _dollars(cost.gpu_dollars), _dollars(cost.data_dollars)


def _dollars(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f}" if value else "-"


def _count(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value else "-"


def _notes(lines: Sequence[Line], estimates: Estimates) -> list[str]:
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
