"""Where a run's numbers go: metrics.jsonl always, TensorBoard by default, W&B and MLflow where asked for."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revision_ray.core import logs, storage
from revision_ray.train.settings import Logging, optional

METRICS = "metrics.jsonl"


@dataclass
class MetricsWriter:
    """The sinks of one run, held by the first worker."""

    sinks: list[Callable[[int, dict[str, Any]], None]] = field(default_factory=list)
    closers: list[Callable[[], None]] = field(default_factory=list)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`values` are recorded for `step` everywhere."""
        for sink in self.sinks:
            sink(step, values)

    def close(self) -> None:
        for closer in self.closers:
            closer()


def open_writer(output: str, settings: Logging, steps_done: int, resolved: dict[str, Any]) -> MetricsWriter:
    """Sinks that go on behind `steps_done`: what a run that died wrote past it is dropped from metrics.jsonl.

    Raises:
        ConfigError: a package that is switched on is missing.
    """
    writer = MetricsWriter()
    writer.sinks.append(json_lines(storage.join(output, METRICS), steps_done))
    if settings.tensorboard:
        add_tensorboard(writer, output)
    if settings.wandb_project:
        _add_wandb(writer, settings.wandb_project, output, resolved)
    if settings.mlflow_experiment:
        _add_mlflow(writer, settings.mlflow_experiment, output)
    return writer


def json_lines(uri: str, steps_done: int) -> Callable[[int, dict[str, Any]], None]:
    """A sink of one line a step at `uri`, behind the lines of steps up to `steps_done` that stand there."""
    former = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    lines = [line for line in former if json.loads(line)["step"] <= steps_done]
    begun = time.time()

    def write(step: int, values: dict[str, Any]) -> None:
        lines.append(json.dumps({"step": step, "seconds": round(time.time() - begun, 3), **values}))
        # Object stores cannot append; a line every few steps keeps this file small.
        storage.write_bytes(uri, ("\n".join(lines) + "\n").encode())

    return write


def add_tensorboard(writer: MetricsWriter, output: str, purge_step: int | None = None) -> None:
    """Events go to OUTPUT/tensorboard; earlier ones from `purge_step` on are no longer shown."""
    folder = storage.join(output, "tensorboard")
    # Object stores cannot append: events are written here, and what there is by then goes there.
    local = tempfile.mkdtemp() if "://" in folder else folder
    events: Any = optional("tensorboardX", "logging.tensorboard").SummaryWriter(local, purge_step=purge_step)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            events.add_scalar(name, value, step)
        events.flush()
        if local != folder:
            for path in Path(local).iterdir():
                storage.write_bytes(storage.join(folder, path.name), path.read_bytes())

    def close() -> None:
        events.close()
        if local != folder:
            shutil.rmtree(local, ignore_errors=True)

    writer.sinks.append(write)
    writer.closers.append(close)


def _add_wandb(writer: MetricsWriter, project: str, output: str, resolved: dict[str, Any]) -> None:
    wandb: Any = optional("wandb", "logging.wandb_project")
    # One name a run, so that a resumed run goes on in the same plot.
    config = json.loads(logs.without_secrets(json.dumps(resolved)))
    run = wandb.init(project=project, id=storage.sha256(output.encode())[:16], resume="allow", config=config)
    writer.sinks.append(lambda step, values: run.log(values, step=step))
    writer.closers.append(run.finish)


def _add_mlflow(writer: MetricsWriter, experiment: str, output: str) -> None:
    mlflow: Any = optional("mlflow", "logging.mlflow_experiment")
    mlflow.set_experiment(experiment)
    mlflow.start_run(run_name=logs.run_id(output))
    writer.sinks.append(lambda step, values: mlflow.log_metrics(values, step=step))
    writer.closers.append(mlflow.end_run)
