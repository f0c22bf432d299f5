"""Whole runs of both stages on a real cluster: what they write, what a kill costs, what is refused."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from embedding_stores import cloud, write_store
from PIL import Image
from tiny_encoder import write_encoder
from training_data import DIM, write_records, write_training_data
from transformers import AutoTokenizer

from revision_ray.core import config
from revision_ray.core.errors import AlignmentError, CheckpointError, ConfigError, DataError, OutputError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.train import export
from revision_ray.train.export_job import export_checkpoint
from revision_ray.train.models import Architecture, new_model
from revision_ray.train.settings import Checkpoints, Logging, Lora, Optimisation, Workers, ZeroSettings
from revision_ray.train.stages import FinetuneJob, PretrainJob, _dated, describe, finetune, inspect, pretrain

ROWS = 240


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory):
    """A text store with captions, an image store, a fit, a language model, and conversations about images."""
    folder = tmp_path_factory.mktemp("training")
    records = write_training_data(folder, ROWS, 40)
    without_image = [
        {**turn, "value": turn["value"].replace("<image>\n", "")} for turn in records[5]["conversations"]
    ]
    records[5] = {"id": "text-only", "conversations": without_image}
    write_records(folder / "data.jsonl", records)
    return folder


def test_a_run_that_goes_on_another_day_keeps_its_date(tmp_path, monkeypatch):
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 1, 2)

    job = FinetuneJob(data=["x"], model="m", output=str(tmp_path))
    begun = _dated(job)
    assert begun.today == datetime.date.today().isoformat()
    config.save_resolved(begun, str(tmp_path / "config.yaml"))
    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert _dated(job) == begun
    assert _dated(replace(job, output=str(tmp_path / "other"))).today == "2031-01-02"
    assert _dated(replace(job, today="2024-02-29")).today == "2024-02-29"


def stage_one(world: Path, output: str, **changes) -> PretrainJob:
    job = PretrainJob(
        data=[str(world / "texts")],
        heldout=[str(world / "texts")],
        alignment=str(world / "fit"),
        model=str(world / "language_model"),
        output=str(world / output),
        num_workers=2,
        max_length=32,
        batches_per_window=3,
        architecture=Architecture(num_visual_tokens=2, projector_hidden_size=24),
        optimisation=Optimisation(
            global_batch_size=16,
            micro_batch_size=4,
            learning_rate=3e-3,
            num_epochs=0.8,
            warmup_fraction=0.1,
        ),
        workers=Workers(cpus_per_worker=0.5),
        checkpoints=Checkpoints(every_steps=3),
        logging=Logging(every_steps=1, sample_steps=[2], tensorboard=False),
    )
    return replace(job, **changes)


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(world):
    """The output of stage 1, run without interruption."""
    figures = pretrain(stage_one(world, "unbroken"))
    assert figures["num_steps"] == 12
    assert figures["samples"] == 192
    return world / "unbroken"


def test_stage_one_leaves_a_model_metrics_and_its_configuration(world, unbroken):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(unbroken / "model")
    assert ends_of(unbroken / "model") == ["</s>", "<|im_end|>"]  # a caption's, and the chat template's
    start = AutoModelForCausalLM.from_pretrained(world / "language_model").state_dict()
    assert model.config.alignment["strategy"] == "realign"
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, start[name]), name  # frozen: not a bit has moved
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "tokens_per_second", "padding_share", "ingest_share", "gradient_norm"} <= set(lines[0])
    first, last = (np.mean([line["loss"] for line in part]) for part in (lines[:4], lines[-4:]))
    assert last < first
    assert (unbroken / "config.yaml").exists()
    # What trains and its optimizer state, not the language model.
    largest = max(path.stat().st_size for path in (unbroken / "checkpoints").rglob("*.pt"))
    assert largest < 60_000


def test_a_finished_run_trains_nothing_and_refuses_other_settings(world, unbroken):
    before = (unbroken / "model/model.safetensors").stat().st_mtime_ns
    pretrain(stage_one(world, "unbroken"))
    assert (unbroken / "model/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="seed"):
        pretrain(stage_one(world, "unbroken", seed=1))


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_has_the_same_results(world, unbroken):
    """A run killed after its last checkpoint has the results of an unbroken one."""
    again = world / "killed at the end"
    again.mkdir()
    shutil.copytree(unbroken / "checkpoints", again / "checkpoints")
    assert pretrain(stage_one(world, again.name)) == json.loads((unbroken / "results.json").read_text())


def kill_a_worker_at(output: Path, step: int) -> threading.Thread:
    """SIGKILL to one training worker once the run's metrics have reached `step`."""

    def watch() -> None:
        metrics = output / "metrics.jsonl"
        for _ in range(9000):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
                break
            time.sleep(0.1)
        mine = psutil.Process().children(recursive=True)
        workers = [process for process in mine if "RayTrainWorker" in " ".join(process.cmdline())]
        workers[-1].kill()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(world, unbroken):
    """A worker of stage 1 that is killed after a checkpoint changes no bit, doubles and skips no sample."""
    name = "killed-worker"
    thread = kill_a_worker_at(world / name, 7)
    figures = pretrain(stage_one(world, name))
    thread.join()
    assert figures["samples"] == 192  # none twice, none skipped
    assert losses(world / name) == losses(unbroken)  # on CPUs: to the bit
    same = [(world / run / "model/model.safetensors").read_bytes() for run in (name, "unbroken")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(world, unbroken):
    """A killed job of stage 1, run again, has the losses of an unbroken one."""
    output = world / "killed-job"
    job = stage_one(world, "killed-job")
    from revision_ray.core.config import to_yaml

    (world / "job.yaml").write_text(to_yaml(job))
    command = [sys.executable, "jobs/pretrain.py", str(world / "job.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    for _ in range(9000):
        committed = list((output / "checkpoints").glob("checkpoint-*/position.json"))
        if len(committed) >= 2 or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(2)  # Ray Train writes down that the checkpoint is committed
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, check=True, timeout=900, capture_output=True, text=True)
    assert losses(output) == losses(unbroken)
    said = done.stdout + done.stderr
    assert "pretrain: 12 of 12 steps" in said
    for noise in ("State API", "PreemptionWatcher"):
        assert noise not in said


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(world, unbroken, tmp_path):
    """A full disk is said, and with room the run goes on to the losses of an unbroken one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        job = stage_one(world, str(folder / "run"), workers=Workers(cpus_per_worker=0.5, max_failures=0))
        with pytest.raises(
            (CheckpointError, DataError), match=r"(?i)no space left.*run the same command again"
        ):
            pretrain(job)
        subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
        pretrain(job)
        assert losses(folder / "run") == losses(unbroken)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_another_number_of_workers_and_a_damaged_checkpoint_are_refused(world, unbroken):
    from ray.train import Checkpoint

    from revision_ray.train import checkpoint

    found = sorted((unbroken / "checkpoints").glob("checkpoint-*"))[-1]
    identity = json.loads((found / "position.json").read_text())["identity"]
    with pytest.raises(CheckpointError, match="written by 2 workers, this run has 1"):
        checkpoint.read_position(Checkpoint(str(found)), identity, 1)
    with pytest.raises(OutputError, match="seed was 0, is now 3"):
        checkpoint.read_position(Checkpoint(str(found)), {**identity, "seed": 3}, 2)
    shard = next(found.rglob("*optim_states.pt"))
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-100])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.verify(found, str(found))
        shard.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            checkpoint.verify(found, str(found))
    finally:
        shard.write_bytes(content)


def test_a_checkpoint_cannot_run_code(tmp_path):
    import pickle

    from revision_ray.train import zero  # noqa: F401  (switches torch.load to tensors alone)

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"x": Hostile()}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "hacked").exists()


def test_a_checkpoint_has_tied_weights_under_each_name_and_buffers():
    def tied() -> torch.nn.Module:
        model = torch.nn.ModuleDict(
            {"tower": torch.nn.BatchNorm1d(4), "embed": torch.nn.Linear(4, 6, bias=False)}
        )
        model["head"] = torch.nn.Linear(4, 6, bias=False)
        model["head"].weight = model["embed"].weight
        return model

    trained, model = tied(), tied()
    trained["tower"](torch.randn(8, 4))
    export.set_weights(model, trained.state_dict(), "here")
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"here: holds stranger\.weight"):
        export.set_weights(model, {"stranger.weight": torch.ones(1)}, "here")


def test_any_checkpoint_exports(world, unbroken, tmp_path):
    from transformers import AutoModelForImageTextToText

    final = AutoModelForImageTextToText.from_pretrained(unbroken / "model").state_dict()
    (tmp_path / "unfinished").mkdir()  # killed before it had a model
    shutil.copytree(unbroken / "checkpoints", tmp_path / "unfinished/checkpoints")
    shutil.copy(unbroken / "config.yaml", tmp_path / "unfinished")
    for run, checkpoint in (("unfinished", None), (unbroken, "checkpoint-00000012"), (unbroken, None)):
        output = str(tmp_path / f"{Path(run).name}-{checkpoint}")
        exported = AutoModelForImageTextToText.from_pretrained(
            export_checkpoint(str(tmp_path / run), checkpoint, output)
        ).state_dict()
        assert exported.keys() == final.keys()
        for name, value in final.items():
            assert torch.equal(exported[name], value), (run, checkpoint, name)
    with pytest.raises(CheckpointError, match="there are checkpoint-"):
        export_checkpoint(str(unbroken), "checkpoint-99", str(tmp_path / "none"))


def test_a_run_exports_what_it_began_with(world, unbroken, tmp_path):
    """The baseline without stage 1: a projector of the run's seed that nothing has trained."""
    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(
        export_checkpoint(str(unbroken), "start", str(tmp_path / "start"))
    ).state_dict()
    torch.manual_seed(0)
    job = stage_one(world, "unbroken")
    begun, _ = new_model(
        job.model,
        job.architecture,
        embedding_dim=DIM,
        alignment={},
        image_tower=None,
        dtype=torch.float32,
        attention=None,
    )
    final = AutoModelForImageTextToText.from_pretrained(unbroken / "model").state_dict()
    for name, value in begun.state_dict().items():
        assert torch.equal(exported[name], value), name
        assert torch.equal(exported[name], final[name]) == (not name.startswith("projector.")), name


def test_the_best_checkpoint_by_held_out_loss_is_kept_apart(world, unbroken, tmp_path):
    from transformers import AutoModelForImageTextToText

    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
    assert sorted(measured) == [3, 6, 9, 12]  # at every checkpoint
    record = json.loads((unbroken / "best/best.json").read_text())
    best = min(measured, key=measured.__getitem__)
    assert (record["step"], record["heldout_loss"]) == (best, measured[best])
    name = f"checkpoint-{best:08d}"
    # Only empty folders may be left of those that were the best before.
    shards = (unbroken / "best").rglob("*.pt")
    assert {path.relative_to(unbroken / "best").parts[0] for path in shards} == {name}
    exported = export_checkpoint(str(unbroken), "best", str(tmp_path / "best"))
    AutoModelForImageTextToText.from_pretrained(exported)
    shutil.copytree(unbroken / "checkpoints", tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        export_checkpoint(str(tmp_path / "run"), "best", str(tmp_path / "none"))


def stage_two(world: Path, output: str, **changes) -> FinetuneJob:
    job = FinetuneJob(
        data=[str(world / "data.jsonl")],
        images=[str(world / "images")],
        model=str(world / "unbroken/model"),
        output=str(world / output),
        num_workers=2,
        max_length=64,
        optimisation=Optimisation(
            global_batch_size=8,
            micro_batch_size=2,
            learning_rate=3e-3,
            projector_learning_rate=1e-2,
            num_epochs=2,
        ),
        workers=Workers(cpus_per_worker=0.5),
        logging=Logging(every_steps=1, sample_steps=[], tensorboard=True),
    )
    return replace(job, **changes)


def ends_of(folder: Path) -> list[str]:
    """The tokens at which the model in `folder` stops, by name."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_ids_to_tokens(
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    )


def test_stage_two_tunes_projector_and_language_model(world, unbroken):
    from transformers import AutoModelForImageTextToText

    figures = finetune(stage_two(world, "tuned", zero=ZeroSettings(stage=3)))
    assert figures["num_steps"] == 10
    assert figures["samples"] == 80
    assert figures["heldout_loss"] is None
    assert figures["without_end"] == 0
    assert ends_of(world / "tuned/model") == ["</s>", "<|im_end|>"]
    tuned = AutoModelForImageTextToText.from_pretrained(world / "tuned/model").state_dict()
    start = AutoModelForImageTextToText.from_pretrained(unbroken / "model").state_dict()
    assert tuned.keys() == start.keys()
    for part in ("projector", "language_model"):
        assert any(not torch.equal(tuned[name], start[name]) for name in tuned if name.startswith(part)), part
    found = losses(world / "tuned")
    assert np.mean([loss for _, loss in found[-3:]]) < found[0][1]
    assert list((world / "tuned/tensorboard").glob("events*"))


@pytest.mark.slow
def test_lora_trains_adapters_and_exports_a_plain_model(world, unbroken, capfd):
    """LoRA trains adapters only and exports a plain model."""
    from transformers import AutoModelForImageTextToText

    # A template without an end: who speaks next ends a turn, and nothing the last.
    model = world / "endless"
    shutil.copytree(unbroken / "model", model)
    (model / "generation_config.json").unlink()
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    figures = finetune(stage_two(world, "lora", lora=Lora(rank=4), num_workers=1, model=str(model)))
    assert (
        figures["without_end"] == json.loads((world / "lora/results.json").read_text())["without_end"] == 80
    )
    assert "80 without an end token" in describe("finetune", figures, str(world / "lora"))
    heard = capfd.readouterr().err
    assert heard.count("8 of 8 samples have no token") == 1
    assert ends_of(world / "lora/model") == ["</s>", "<|im_start|>"]
    tuned = AutoModelForImageTextToText.from_pretrained(world / "lora/model").state_dict()
    start = AutoModelForImageTextToText.from_pretrained(unbroken / "model").state_dict()
    assert tuned.keys() == start.keys()
    moved = {name for name in tuned if not torch.equal(tuned[name], start[name])}
    assert any("q_proj" in name for name in moved)
    assert not any("embed_tokens" in name or "norm" in name for name in moved)


def test_inspect_shows_the_label_mask(world, unbroken):
    shown = inspect(stage_one(world, "unused", inspect=2))
    assert shown.count("<image>x2[[") == 2
    shown = inspect(stage_two(world, "unused", inspect=3))
    assert "[[" in shown


@pytest.mark.slow
def test_image_files_are_embedded_as_the_first_step_of_stage_two(world, unbroken, tmp_path):
    """Stage 2 embeds image files first, and refuses an encoder that the model does not know."""
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 100, 50)).save(tmp_path / f"pictures/image{number}.png")
    records = (world / "data.jsonl").read_text().splitlines()[:8]
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    encoder = EncoderConfig(model=write_encoder(tmp_path / "encoder"))
    job = stage_two(
        world, str(tmp_path / "run"), data=[str(tmp_path / "data.jsonl")], images=[],
        image_files=[str(tmp_path / "pictures")], encoder=encoder, inspect=8,
    )  # fmt: skip
    assert inspect(job).count("<image>") == 7  # the sixth record has none
    assert (tmp_path / "run/images/manifest.json").exists()
    with pytest.raises(AlignmentError, match="allow_other_encoder"):
        finetune(job)
    with pytest.raises(ConfigError, match=r"encoder\.kind"):
        finetune(replace(job, encoder=None))


def test_what_does_not_fit_is_refused_before_workers_start(world, unbroken, tmp_path):
    stranger = EncoderIdentity(name="other", fingerprint="0" * 64)
    other = write_store(tmp_path / "other", cloud(50, DIM, "text"), encoder=stranger, texts=["a"] * 50)
    with pytest.raises(AlignmentError, match="allow_other_encoder"):
        pretrain(stage_one(world, "bad", data=[other]))
    images = write_store(tmp_path / "images", cloud(ROWS, DIM, "image"), "image", encoder=stranger)
    with pytest.raises(AlignmentError, match="allow_other_encoder"):
        finetune(stage_two(world, "bad", images=[images]))
    with pytest.raises(ConfigError, match="alignment"):
        pretrain(stage_one(world, "bad", alignment=""))
    with pytest.raises(ConfigError, match="multiple"):
        stage_one(world, "bad", num_workers=3)
    few = write_store(tmp_path / "few", cloud(3, DIM, "image"), "image")
    with pytest.raises(DataError, match="missing_embedding"):
        finetune(stage_two(world, "bad", images=[few]))
