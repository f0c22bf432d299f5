"""The training loop of one worker: build, resume, step, measure, checkpoint, export.

Both stages use the same loop. Everything that a step needs is a function of (data, seed, step), so a run
that died continues from its last checkpoint with the same results.

Shapes: B samples of a micro batch, T tokens, I images, D embedding dim.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint

from revision_ray.core import observe, storage
from revision_ray.core.errors import DataError
from revision_ray.core.observe import Progress, progress
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.model.ending import until_end
from revision_ray.train import checkpoint, export, ingest, models, worker
from revision_ray.train.checkpoint import RunPosition
from revision_ray.train.ingest import PreparedStep, Source
from revision_ray.train.models import Architecture, Stage
from revision_ray.train.optimizer import learning_rate_factor, set_learning_rate
from revision_ray.train.samples import NO_LABEL, Batch, Formatter
from revision_ray.train.settings import Lora, Training
from revision_ray.train.sources import StepOrder
from revision_ray.train.trackers import MetricsWriter, open_writer
from revision_ray.train.zero import ZeroEngine, build_engine, dtype_of, sharded_loading


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Sums over all workers."""

    loss: float  # mean over the valid target tokens of the global batch
    num_targets: int
    num_tokens: int  # without padding
    num_slots: int  # with padding
    num_samples: int
    gradient_norm: float

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / self.num_slots if self.num_slots else 0.0


def train_step(engine: ZeroEngine, micro_batches: Sequence[Batch]) -> StepResult:
    """The weights have moved once, by the gradient of the mean loss over the global batch's target tokens.

    Not a mean of means: every target token weighs the same, whichever worker and micro batch it is in.
    A batch without any target moves nothing.
    """
    totals = _totals(engine, micro_batches)
    if not totals["targets"]:
        return _result(totals, 0.0, 0.0)
    loss_sum, norm = torch.zeros((), dtype=torch.float64), 0.0
    even = _evened(engine, micro_batches)
    for index, batch in enumerate(even):
        last = index == len(even) - 1
        engine.deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the workers; here they are to be summed.
        loss = _loss(engine, batch, totals["targets"] / _world_size())
        engine.deepspeed.backward(loss, scale_wrt_gas=False)
        norm = engine.step(last)
        loss_sum += loss.detach().double().cpu()
    return _result(totals, _sum(engine, [float(loss_sum) / _world_size()])[0], norm)


@torch.no_grad()
def heldout_loss(engine: ZeroEngine, steps: Sequence[Sequence[Batch]]) -> float:
    """Mean loss over the target tokens of the steps' micro batches, of all workers."""
    sums = [0.0, 0.0]
    for micro_batches in steps:
        totals = _totals(engine, micro_batches)
        sums[1] += totals["targets"]
        sums[0] += sum(float(_loss(engine, batch, 1.0)) for batch in _evened(engine, micro_batches))
    total = _sum(engine, [sums[0]])[0]
    return total / sums[1] if sums[1] else float("nan")


def _evened(engine: ZeroEngine, micro_batches: Sequence[Batch]) -> list[Batch]:
    """As many micro batches as any worker has, empty ones behind: all must go through the model equally
    often, because ZeRO-3 gathers weights from all of them as it goes."""
    rounds = torch.tensor(len(micro_batches), device=engine.device)
    dist.all_reduce(rounds, dist.ReduceOp.MAX)
    nothing = Batch(
        input_ids=torch.zeros((1, 2), dtype=torch.int64),
        attention_mask=torch.ones((1, 2), dtype=torch.int64),
        labels=torch.full((1, 2), NO_LABEL),
        image_embeds=torch.zeros((0, engine.model.config.embedding_dim)),
        num_targets=0,
        num_tokens=0,
    )
    return [*micro_batches, *[nothing] * (int(rounds) - len(micro_batches))]


def _loss(engine: ZeroEngine, batch: Batch, num_items: float) -> torch.Tensor:
    """Sum of the cross entropies of the batch's targets over `num_items`."""
    moved: dict[str, Any] = {
        "input_ids": batch.input_ids.to(engine.device),
        "attention_mask": batch.attention_mask.to(engine.device),
        "labels": batch.labels.to(engine.device),
    }
    if len(batch.image_embeds):
        moved["image_embeds"] = batch.image_embeds.to(engine.device, engine.dtype)
    return engine.deepspeed(**moved, num_items_in_batch=num_items, use_cache=False).loss


def _totals(engine: ZeroEngine, micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Counts over all workers."""
    counted = [
        sum(batch.num_targets for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
        sum(batch.input_ids.numel() for batch in micro_batches),
        sum(len(batch.ids) for batch in micro_batches),
    ]
    names = ("targets", "tokens", "slots", "samples")
    return dict(zip(names, map(int, _sum(engine, counted)), strict=True))


def _sum(engine: ZeroEngine, values: Sequence[float]) -> list[float]:
    summed = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(summed)
    return summed.tolist()


def _world_size() -> int:
    return dist.get_world_size()


def _result(totals: dict[str, int], loss: float, gradient_norm: float) -> StepResult:
    return StepResult(
        loss=loss,
        num_targets=totals["targets"],
        num_tokens=totals["tokens"],
        num_slots=totals["slots"],
        num_samples=totals["samples"],
        gradient_norm=gradient_norm,
    )


@dataclass
class MetricsWindow:
    """Sums over the steps since the last line of metrics, of all workers; times of this one."""

    losses: list[float] = field(default_factory=list)
    targets: int = 0
    tokens: int = 0
    slots: int = 0
    samples: int = 0
    ingest_seconds: float = 0.0
    compute_seconds: float = 0.0
    gradient_norm: float = 0.0

    def add(self, result: StepResult, ingest_seconds: float, compute_seconds: float) -> None:
        self.losses.append(result.loss)
        self.targets += result.num_targets
        self.tokens += result.num_tokens
        self.slots += result.num_slots
        self.samples += result.num_samples
        self.ingest_seconds += ingest_seconds
        self.compute_seconds += compute_seconds
        self.gradient_norm = result.gradient_norm

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.slots if self.slots else 0.0

    def figures(self, engine: ZeroEngine) -> dict[str, float]:
        seconds = max(self.ingest_seconds + self.compute_seconds, 1e-9)
        return {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": max(group["lr"] for group in engine.deepspeed.optimizer.param_groups),
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
            "padding_share": self.padding_share,
            "ingest_share": self.ingest_seconds / seconds,
        }

    def note(self, engine: ZeroEngine) -> str:
        figures = self.figures(engine)
        return (
            f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:.0f} tokens/s, "
            f"{figures['samples_per_second']:.1f} samples/s, padding {figures['padding_share']:.0%}, "
            f"ingest {figures['ingest_share']:.0%}, lr {figures['learning_rate']:.1e}, "
            f"|g| {figures['gradient_norm']:.2f}"
        )

    def record(self) -> None:
        """Prometheus has the window's tokens: for one worker to call, since they are sums over all."""
        observe.record(samples=self.samples, tokens=self.tokens, padding_share=self.padding_share)


class Rejections:
    """OUTPUT/rejected/rank-*.jsonl: what happened before `first_step` is kept when a run goes on."""

    def __init__(self, output: str, rank: int, first_step: int) -> None:
        self._uri = storage.join(output, "rejected", f"rank-{rank:05d}.jsonl")
        former = storage.read_bytes(self._uri).decode().splitlines() if storage.exists(self._uri) else []
        self._lines = [line for line in former if json.loads(line)["step"] < first_step]
        self._changed = len(self._lines) != len(former)

    def add(self, step: PreparedStep) -> int:
        """The step's samples that were left out or cut off are on the list; how many there are."""
        found = [*step.rejected, *step.truncated]
        for row_id, cause, detail in found:
            self._lines.append(
                json.dumps({"step": step.step, "id": row_id, "cause": cause, "detail": detail})
            )
        self._changed = self._changed or bool(found)
        observe.record(rejected=len(step.rejected), truncated=len(step.truncated))
        return len(found)

    def flush(self) -> None:
        """The list stands in the output."""
        if self._changed:
            storage.write_bytes(self._uri, "".join(line + "\n" for line in self._lines).encode())
            self._changed = False


log = logging.getLogger(__name__)
_HELDOUT_STEPS = 4  # global batches, kept in memory by each worker
_SAMPLE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A run, as the driver prepared it."""

    stage: Stage
    training: Training
    architecture: Architecture | None  # of a new model; None where it is loaded
    lora: Lora | None
    embedding_dim: int
    alignment: dict[str, Any]
    image_tower: EncoderConfig | None
    source: Source
    heldout: Source | None
    num_steps: int
    output: str
    identity: dict[str, Any]
    resolved: dict[str, Any]
    today: str = ""  # date that a chat template may print


@dataclass
class TrainingState:
    """What changes from step to step."""

    step: int = 0
    counters: dict[str, int] = field(default_factory=lambda: {"samples": 0, "rejected": 0, "without_end": 0})
    last_loss: float | None = None
    heldout_loss: float | None = None
    lowest_loss: float = float("inf")  # held out, of the best checkpoint


def train(task: TrainingTask) -> dict[str, Any]:
    """The trained model stands in OUTPUT/model; returns the run's figures (of the first worker)."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    training = task.training
    worker.set_up(task.stage, task.output, rank, training.workers.cpus_per_worker)
    torch.manual_seed(training.seed)
    device = ray.train.torch.get_device()
    model, processor = _model(task, device)
    models.freeze(model, task.stage, task.lora)
    if training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    engine = build_engine(model, training, device)
    state = _resume(engine, task, num_workers)
    state.lowest_loss = checkpoint.lowest_loss(task.output)
    formatter = Formatter(
        processor.tokenizer,
        processor.num_visual_tokens,
        training.max_length,
        on_too_long=training.on_too_long,
        today=task.today,
    )
    share = ingest.WorkerShare(
        rank=rank, num_workers=num_workers, micro_batch_size=training.optimisation.micro_batch_size
    )
    heldout = _heldout(task, formatter, share)
    writer = (
        open_writer(task.output, training.logging, state.step, task.resolved)
        if rank == 0
        else MetricsWriter()
    )
    rejections = Rejections(task.output, rank, state.step)
    try:
        with progress(
            task.stage, task.num_steps, "steps", counted=rank == 0, already_done=state.step
        ) as shown:
            stream = _stream(task, formatter, share, state.step)
            _run(task, engine, state, stream, heldout, writer, rejections, shown, processor)
    finally:
        writer.close()
    export.export(engine, processor, task.output, rank)
    return {
        "num_steps": state.step,
        "loss": state.last_loss,
        "heldout_loss": state.heldout_loss,
        **state.counters,
    }


def _model(task: TrainingTask, device: torch.device) -> tuple[Any, Any]:
    training = task.training
    with sharded_loading(training):
        if task.architecture is not None:
            return models.new_model(
                training.model,
                task.architecture,
                embedding_dim=task.embedding_dim,
                alignment=task.alignment,
                image_tower=task.image_tower,
                dtype=dtype_of(training),
                attention=training.attention,
            )
        return models.load_model(training.model, dtype=dtype_of(training), attention=training.attention)


def _resume(engine: ZeroEngine, task: TrainingTask, num_workers: int) -> TrainingState:
    former = ray.train.get_checkpoint()
    if former is None:
        return TrainingState()
    position = checkpoint.read_position(former, task.identity, num_workers)
    checkpoint.load(engine, former)
    log.info("resumed at step %d of %d from %s", position.step, task.num_steps, former.path)
    return TrainingState(
        step=position.step,
        counters={**TrainingState().counters, **position.counters},
        last_loss=position.losses.get("last"),
        heldout_loss=position.losses.get("heldout"),
    )


def _stream(
    task: TrainingTask, formatter: Formatter, share: ingest.WorkerShare, start_step: int
) -> Iterator[PreparedStep]:
    return ingest.steps(
        task.source,
        formatter,
        order_of(task.training),
        share,
        start_step=start_step,
        num_steps=task.num_steps,
    )


def order_of(training: Training) -> StepOrder:
    """How the samples follow one another."""
    return StepOrder(
        global_batch_size=training.optimisation.global_batch_size,
        batches_per_window=training.batches_per_window,
        seed=training.seed,
        group_by_length=training.group_by_length,
    )


def _heldout(task: TrainingTask, formatter: Formatter, share: ingest.WorkerShare) -> list[PreparedStep]:
    if task.heldout is None:
        return []
    order = replace(order_of(task.training), batches_per_window=_HELDOUT_STEPS)
    steps = min(_HELDOUT_STEPS, ingest.steps_per_epoch(task.heldout, order))
    return list(ingest.steps(task.heldout, formatter, order, share, start_step=0, num_steps=steps))


def _run(
    task: TrainingTask,
    engine: ZeroEngine,
    state: TrainingState,
    stream: Iterator[PreparedStep],
    heldout: list[PreparedStep],
    writer: MetricsWriter,
    rejections: Rejections,
    shown: Progress,
    processor: Any,
) -> None:
    """Steps until there are none left."""
    training, settings = task.training, task.training.optimisation
    window, saved, warned = MetricsWindow(), state.step, False
    while state.step < task.num_steps:
        begun = time.monotonic()
        step = next(stream)
        received = time.monotonic()
        # Dropout of a step is a function of the step, so a resumed run draws the same.
        torch.manual_seed(hash((training.seed, step.step, dist.get_rank())))
        models.set_modes(engine.model, task.stage, training.gradient_checkpointing)
        set_learning_rate(
            engine.deepspeed.optimizer, learning_rate_factor(step.step, task.num_steps, settings)
        )
        result = train_step(engine, step.micro_batches)
        state.step, state.last_loss = step.step + 1, result.loss
        rejected, without_end = _all_sums([rejections.add(step), step.num_without_end], engine.device)
        state.counters["samples"] += result.num_samples
        state.counters["rejected"] += rejected
        state.counters["without_end"] += without_end
        if without_end and not warned:
            _warn_of_endless(without_end, result.num_samples, state.step, processor.tokenizer)
            warned = True
        window.add(result, received - begun, time.monotonic() - received)
        shown.advance(1, window.note(engine))

        last = state.step == task.num_steps
        due = last or state.step - saved >= training.checkpoints.every_steps
        if state.step % training.logging.every_steps == 0 or last:
            writer.write(state.step, window.figures(engine))
            if dist.get_rank() == 0:
                window.record()
            rejections.flush()
            window = MetricsWindow()
            _check_rejected(state, training, last)
        if heldout and (state.step % training.logging.heldout_every_steps == 0 or due):
            state.heldout_loss = _measure(engine, heldout)
            writer.write(state.step, {"heldout_loss": state.heldout_loss})
        if state.step in training.logging.sample_steps:
            _sample(engine, (heldout or [step])[0], processor, task.output, state.step)
        if due:
            _checkpoint(task, engine, state)
            saved = state.step


def _measure(engine: ZeroEngine, heldout: list[PreparedStep]) -> float:
    engine.model.eval()
    loss = heldout_loss(engine, [step.micro_batches for step in heldout])
    log.info("held-out loss %.4f", loss)
    return loss


def _all_sums(values: Sequence[int], device: torch.device) -> list[int]:
    """Each of the values summed over all workers."""
    totals = torch.tensor(values, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def _warn_of_endless(without_end: int, num_samples: int, step: int, tokenizer: Any) -> None:
    if dist.get_rank() == 0:
        log.warning(
            "step %d: %d of %d samples have no token behind the assistant's last turn that ends it, as the "
            "chat template writes them: the model does not learn there where to stop; write the end token "
            "%s behind the assistant's turns in the template. results.json counts such samples: without_end",
            step, without_end, num_samples, tokenizer.eos_token,
        )  # fmt: skip


def _check_rejected(state: TrainingState, training: Training, last: bool) -> None:
    """Raises DataError where too many samples could not be used; judged on a thousand, or at the end."""
    rejected, seen = state.counters["rejected"], state.counters["samples"] + state.counters["rejected"]
    if (seen >= 1000 or last) and rejected > training.max_rejected_fraction * seen:
        raise DataError(
            f"{rejected} of {seen} samples could not be used, more than max_rejected_fraction="
            f"{training.max_rejected_fraction}; {training.output}/rejected lists them with their causes"
        )


@torch.no_grad()
def _sample(engine: ZeroEngine, step: PreparedStep, processor: Any, output: str, number: int) -> None:
    """What the model says about one sample's image is in the log: something for a person to read."""
    batch = next(iter(step.micro_batches), None)
    if batch is None or (dist.get_rank() != 0 and engine.deepspeed.zero_optimization_stage() < 3):
        return
    engine.model.eval()
    targets = (batch.labels[0] != -100).nonzero()
    start = int(targets[0]) if len(targets) else batch.labels.shape[1]
    prompt = batch.input_ids[:1, :start].to(engine.device)
    slots = int((prompt == engine.model.config.image_token_id).sum())
    num_images = slots // engine.model.config.num_visual_tokens
    said = engine.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        image_embeds=batch.image_embeds[:num_images].to(engine.device, engine.dtype),
        max_new_tokens=_SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    answer = said[0][start:] if said.shape[1] > start else said[0]
    wanted = batch.input_ids[0][batch.labels[0] != -100]
    decode = processor.tokenizer.decode
    log.info(
        "step %d says: %s | expected: %s",
        number,
        decode(until_end(answer.tolist(), engine.model.generation_config), skip_special_tokens=True),
        decode(wanted, skip_special_tokens=True),
    )


def _checkpoint(task: TrainingTask, engine: ZeroEngine, state: TrainingState) -> None:
    rank = dist.get_rank()
    position = RunPosition(
        step=state.step,
        num_workers=dist.get_world_size(),
        identity=task.identity,
        counters=dict(state.counters),
        losses={"last": state.last_loss, "heldout": state.heldout_loss},
    )
    where = f"{task.output}: the checkpoint of step {state.step}"
    with tempfile.TemporaryDirectory() as folder, checkpoint.written(where):
        checkpoint.save(engine, position, Path(folder), rank)
        if state.heldout_loss is not None and state.heldout_loss < state.lowest_loss:
            checkpoint.keep(Path(folder), task.output, state.step, state.heldout_loss)
            state.lowest_loss = state.heldout_loss
        ray.train.report(
            {"step": state.step, "loss": state.last_loss, "heldout_loss": state.heldout_loss},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-{state.step:08d}",
        )
