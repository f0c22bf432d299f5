"""What every training worker does: build, resume, step, measure, checkpoint, export.

The loop is the same for both stages. Everything that a step needs is a function of (data, seed, step), so a
run that died goes on from its last checkpoint as if nothing had happened.
"""

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

from revision_ray.encode.encoder import EncoderConfig
from revision_ray.errors import DataError
from revision_ray.model.ending import until_end
from revision_ray.progress import Progress, progress
from revision_ray.train import best, checkpoint, export, ingest, models, worker
from revision_ray.train.checkpoint import Position
from revision_ray.train.ingest import Source, Step
from revision_ray.train.metrics import Writer, open_writer
from revision_ray.train.models import Architecture, Stage
from revision_ray.train.optimizer import learning_rate_factor, set_learning_rate
from revision_ray.train.plan import Order
from revision_ray.train.rejections import Rejections
from revision_ray.train.samples import Formatter
from revision_ray.train.settings import Lora, Training
from revision_ray.train.step import heldout_loss, train_step
from revision_ray.train.window import Window
from revision_ray.train.zero import Engine, build_engine, dtype_of, sharded_loading

log = logging.getLogger(__name__)
_HELDOUT_STEPS = 4  # global batches, kept in memory by each worker
_SAMPLE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Task:
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
class State:
    """What changes from step to step."""

    step: int = 0
    counters: dict[str, int] = field(default_factory=lambda: {"samples": 0, "rejected": 0, "without_end": 0})
    last_loss: float | None = None
    heldout_loss: float | None = None
    lowest_loss: float = float("inf")  # held out, of the best checkpoint


def train(task: Task) -> dict[str, Any]:
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
    state.lowest_loss = best.lowest_loss(task.output)
    formatter = Formatter(
        processor.tokenizer,
        processor.num_visual_tokens,
        training.max_length,
        on_too_long=training.on_too_long,
        today=task.today,
    )
    share = ingest.Share(
        rank=rank, num_workers=num_workers, micro_batch_size=training.optimisation.micro_batch_size
    )
    heldout = _heldout(task, formatter, share)
    writer = open_writer(task.output, training.logging, state.step, task.resolved) if rank == 0 else Writer()
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


def _model(task: Task, device: torch.device) -> tuple[Any, Any]:
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


def _resume(engine: Engine, task: Task, num_workers: int) -> State:
    former = ray.train.get_checkpoint()
    if former is None:
        return State()
    position = checkpoint.read_position(former, task.identity, num_workers)
    checkpoint.load(engine, former)
    log.info("resumed at step %d of %d from %s", position.step, task.num_steps, former.path)
    return State(
        step=position.step,
        counters={**State().counters, **position.counters},
        last_loss=position.losses.get("last"),
        heldout_loss=position.losses.get("heldout"),
    )


def _stream(task: Task, formatter: Formatter, share: ingest.Share, start_step: int) -> Iterator[Step]:
    return ingest.steps(
        task.source,
        formatter,
        order_of(task.training),
        share,
        start_step=start_step,
        num_steps=task.num_steps,
    )


def order_of(training: Training) -> Order:
    """How the samples follow one another."""
    return Order(
        global_batch_size=training.optimisation.global_batch_size,
        batches_per_window=training.batches_per_window,
        seed=training.seed,
        group_by_length=training.group_by_length,
    )


def _heldout(task: Task, formatter: Formatter, share: ingest.Share) -> list[Step]:
    if task.heldout is None:
        return []
    order = replace(order_of(task.training), batches_per_window=_HELDOUT_STEPS)
    steps = min(_HELDOUT_STEPS, ingest.steps_per_epoch(task.heldout, order))
    return list(ingest.steps(task.heldout, formatter, order, share, start_step=0, num_steps=steps))


def _run(
    task: Task,
    engine: Engine,
    state: State,
    stream: Iterator[Step],
    heldout: list[Step],
    writer: Writer,
    rejections: Rejections,
    shown: Progress,
    processor: Any,
) -> None:
    """Steps until there are none left."""
    training, settings = task.training, task.training.optimisation
    window, saved, warned = Window(), state.step, False
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
            window = Window()
            _check_rejected(state, training, last)
        if heldout and (state.step % training.logging.heldout_every_steps == 0 or due):
            state.heldout_loss = _measure(engine, heldout)
            writer.write(state.step, {"heldout_loss": state.heldout_loss})
        if state.step in training.logging.sample_steps:
            _sample(engine, (heldout or [step])[0], processor, task.output, state.step)
        if due:
            _checkpoint(task, engine, state)
            saved = state.step


def _measure(engine: Engine, heldout: list[Step]) -> float:
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


def _check_rejected(state: State, training: Training, last: bool) -> None:
    """Raises DataError where too many samples could not be used; judged on a thousand, or at the end."""
    rejected, seen = state.counters["rejected"], state.counters["samples"] + state.counters["rejected"]
    if (seen >= 1000 or last) and rejected > training.max_rejected_fraction * seen:
        raise DataError(
            f"{rejected} of {seen} samples could not be used, more than max_rejected_fraction="
            f"{training.max_rejected_fraction}; {training.output}/rejected lists them with their causes"
        )


@torch.no_grad()
def _sample(engine: Engine, step: Step, processor: Any, output: str, number: int) -> None:
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


def _checkpoint(task: Task, engine: Engine, state: State) -> None:
    rank = dist.get_rank()
    position = Position(
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
            best.keep(Path(folder), task.output, state.step, state.heldout_loss)
            state.lowest_loss = state.heldout_loss
        ray.train.report(
            {"step": state.step, "loss": state.last_loss, "heldout_loss": state.heldout_loss},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-{state.step:08d}",
        )
