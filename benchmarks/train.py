"""Training beside what it could cost at least, and beside the reference's way; checkpoints.

    python -m benchmarks.train [folder=runs/bench] [steps=30] [repeats=3]

A Llama of 7 M parameters (width 256, 6 layers), D = 1280, captions of 5 to 60 words, one worker, one thread,
float32. Every figure of a pair comes from the same run.
"""

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.data import make_store
from revision_ray.align.fit import FitJob
from revision_ray.align.fit import run_fit as fit
from revision_ray.core.cluster import connect
from revision_ray.train import checkpoint, ingest, sources
from revision_ray.train import models as stage_models
from revision_ray.train.checkpoint import RunPosition
from revision_ray.train.loop import train_step
from revision_ray.train.models import Architecture
from revision_ray.train.samples import NO_LABEL, Batch, Formatter
from revision_ray.train.settings import Checkpoints, Logging, Optimisation, Workers, ZeroSettings
from revision_ray.train.sources import StepOrder
from revision_ray.train.stages import PretrainJob, pretrain
from revision_ray.train.zero import build_engine

DIM, ROWS, BATCH = 1280, 8192, 16
WORDS = [f"w{number}" for number in range(2000)]


def write_language_model(folder: Path) -> str:
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<e>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<e>"
    ).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=256, intermediate_size=704, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0,
            eos_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def job_of(folder: Path, output: Path, steps: int, visual_tokens: int) -> PretrainJob:
    return PretrainJob(
        data=[str(folder / "captions")],
        alignment=str(folder / "captions-fit"),
        model=str(folder / "language_model"),
        output=str(output),
        architecture=Architecture(num_visual_tokens=visual_tokens),
        optimisation=Optimisation(
            global_batch_size=BATCH, micro_batch_size=BATCH, max_steps=steps, learning_rate=1e-3
        ),
        zero=ZeroSettings(stage=2),
        workers=Workers(cpus_per_worker=1),
        checkpoints=Checkpoints(every_steps=10**6),
        logging=Logging(every_steps=5, tensorboard=False, sample_steps=[]),
    )


def batches_of(job: PretrainJob, steps: int, group_by_length: bool) -> tuple[Any, list[Batch]]:
    """The model of stage 1, and the first steps' batches."""
    torch.manual_seed(0)
    model, processor = stage_models.new_model(
        job.model, job.architecture, embedding_dim=DIM, alignment={}, image_tower=None,
        dtype=torch.float32, attention=None,
    )  # fmt: skip
    stage_models.freeze(model, "pretrain", None)
    stage_models.set_modes(model, "pretrain", False)
    source = sources.text_source(job.data, job.alignment)
    formatter = Formatter(processor.tokenizer, processor.num_visual_tokens, job.max_length)
    order = StepOrder(global_batch_size=BATCH, batches_per_window=32, group_by_length=group_by_length)
    share = ingest.WorkerShare(micro_batch_size=BATCH)
    stream = ingest.steps(source, formatter, order, share, num_steps=steps)
    return model, [batch for step in stream for batch in step.micro_batches]


def bare(model: Any, batches: list[Batch], by_copies: bool = False) -> tuple[float, float]:
    """(tokens, samples) a second of a plain PyTorch loop; `by_copies` projects every visual token."""
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=1e-3)
    start, tokens, samples = 0.0, 0, 0
    for number, batch in enumerate(batches):
        if number == 3:  # behind the warm-up
            start = time.perf_counter()
        loss = _loss_of_copies(model, batch) if by_copies else model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
            image_embeds=batch.image_embeds, use_cache=False,
        ).loss  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number >= 3:
            tokens, samples = tokens + batch.num_tokens, samples + len(batch.ids)
    seconds = time.perf_counter() - start
    return tokens / seconds, samples / seconds


def _loss_of_copies(model: Any, batch: Batch) -> torch.Tensor:
    """The reference's way: the embedding is repeated to all visual tokens, and each copy is projected."""
    visual = model.config.num_visual_tokens
    is_image = batch.input_ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(batch.input_ids.masked_fill(is_image, 0))
    copies = batch.image_embeds[:, None].expand(-1, visual, -1)
    projected = model.projector(copies.reshape(-1, copies.shape[-1]))
    embeds = embeds.masked_scatter(is_image[..., None], projected)
    labels = batch.labels.masked_fill(batch.labels == NO_LABEL, -100)
    return model.language_model(
        inputs_embeds=embeds, attention_mask=batch.attention_mask, labels=labels, use_cache=False
    ).loss


def through_the_job(job: PretrainJob) -> tuple[float, float]:
    """(tokens a second, share of the time in the ingest) of stage 1, behind its first ten steps."""
    pretrain(job)
    lines = [json.loads(line) for line in Path(job.output, "metrics.jsonl").read_text().splitlines()]
    later = [line for line in lines if line["step"] > 10]
    return (
        statistics.harmonic_mean([line["tokens_per_second"] for line in later]),
        statistics.mean([line["ingest_share"] for line in later]),
    )


def checkpoints(model: Any, batches: list[Batch], job: PretrainJob, stage: Any) -> dict[str, float]:
    """Size on disk and seconds of saving and of loading, with AdamW's state."""
    stage_models.freeze(model, stage, None)
    engine = build_engine(model, job, torch.device("cpu"))
    stage_models.set_modes(engine.model, stage, False)
    train_step(engine, batches[:1])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        position = RunPosition(step=1, num_workers=1, identity={}, counters={})
        checkpoint.save(engine, position, Path(folder), 0)
        saved = time.perf_counter()
        from ray.train import Checkpoint

        checkpoint.load(engine, Checkpoint.from_directory(folder))
        loaded = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"MB": size / 1e6, "save, seconds": saved - start, "load, seconds": loaded - saved}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(folder: Path, steps: int, repeats: int) -> dict:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    write_language_model(folder / "language_model")
    generator = np.random.default_rng(0)
    captions = [" ".join(generator.choice(WORDS, generator.integers(5, 61))) for _ in range(ROWS)]
    make_store(folder / "captions", "text", ROWS, DIM, texts=captions)
    make_store(folder / "captions-images", "image", ROWS, DIM)
    connect()
    fit(
        FitJob(
            texts=str(folder / "captions"),
            images=str(folder / "captions-images"),
            output=str(folder / "captions-fit"),
        )
    )
    result: dict[str, Any] = {}
    few = job_of(folder, folder / "unused", steps, 1)
    model, batches = batches_of(few, steps, group_by_length=True)
    ratios, shares = [], []
    for repeat in range(repeats):
        alone = bare(model, batches)[0]
        through, share = through_the_job(
            job_of(folder, folder / f"run-{time.time_ns()}-{repeat}", steps + 10, 1)
        )
        ratios.append(through / alone)
        shares.append(share)
    result["tokens a second, job over bare loop"] = spread(ratios)
    result["share of the job's time spent waiting for the ingest"] = spread(shares)
    for visual in (576, 1):
        slow = 6 if visual > 1 else steps
        job = job_of(folder, folder / "unused", slow, visual)
        ours_model, ours = batches_of(job, slow, group_by_length=True)
        _, theirs = batches_of(job, slow, group_by_length=False)
        found = [
            bare(ours_model, ours)[1] / bare(ours_model, theirs, by_copies=True)[1] for _ in range(repeats)
        ]
        result[f"samples a second over the reference's way, {visual} visual tokens"] = spread(found)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo")
    for stage in ("pretrain", "finetune"):
        result[f"checkpoint, {stage}"] = checkpoints(batches_of(few, 4, True)[0], batches, few, stage)
    return result


if __name__ == "__main__":
    options = dict(argument.split("=") for argument in sys.argv[1:])
    print(
        json.dumps(
            main(
                Path(options.get("folder", "runs/bench")).absolute(),
                int(options.get("steps", 30)),
                int(options.get("repeats", 3)),
            ),
            indent=2,
        )
    )
