"""A pipeline skips what has not changed, goes on after a kill, runs again exactly what depends on a change,
and reckons what a run would cost. The runner's laws on toy stages; the whole way on real ones, slow."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from toy_chain import PIECES, TOY, ToyJob, diamond, go, made, results, stage

from revision_ray.core import config, storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.core.stage import DataCost, Estimates, Stage, StageKind, StageWork, Throughput
from revision_ray.pipeline import plan
from revision_ray.pipeline.chain import StageChoice, chosen, makers
from revision_ray.pipeline.job import KINDS
from revision_ray.pipeline.ledger import Contents, StageRecord, listed, open_ledger
from revision_ray.pipeline.plan import cost_of, gpu_hours
from revision_ray.pipeline.run import run_chain
from revision_ray.train.work import counted_parameters, seen_samples

TESTS = Path(__file__).parent
ALL = [
    f"{name} {number}" for name in ("source", "left", "right", "alone", "both") for number in range(PIECES)
]


def pieces(*names: str) -> list[str]:
    return [line for line in ALL if line.split()[0] in names]


# --- skipping ---------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_says_so_in_a_line_a_stage(tmp_path, caplog):
    go(tmp_path, diamond(tmp_path))
    assert made(tmp_path) == ALL
    caplog.clear()
    with caplog.at_level(logging.INFO):
        go(tmp_path, diamond(tmp_path))
    assert made(tmp_path) == ALL
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in lines] == [
        f"stage {name} (toy)" for name in ("source", "left", "right", "alone", "both")
    ]
    assert all("skipped, unchanged since 20" in line for line in lines)


def test_the_ledger_says_what_was_done(tmp_path):
    go(tmp_path, diamond(tmp_path))
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    both = ledger["stages"]["both"]
    assert both["state"] == "finished"
    assert both["message"] == "both is done"
    assert both["settings"]["word"] == "<both>"
    left, right = both["inputs"]["reads"]
    assert left == ledger["stages"]["left"]["outputs"][0]
    assert right == ledger["stages"]["right"]["outputs"][0]
    assert both["outputs"][0][0] == str(tmp_path / "both")
    assert both["seconds"] >= 0
    assert both["begun"] <= both["ended"]
    assert both["versions"]["numpy"] == np.__version__
    # Word for word what its name says it is: the hash of the file that the stage's result is.
    digest = Contents().of(str(tmp_path / "both"))
    assert both["outputs"][0][1] == digest


def test_a_changed_setting_runs_again_exactly_what_depends_on_it(tmp_path):
    """The job of this one takes the new setting; those behind it see other content, those beside do not."""
    go(tmp_path, diamond(tmp_path))
    stages = diamond(tmp_path)
    stages[1] = replace(stages[1], job=replace(stages[1].job, word="<LEFT>"))
    shutil.rmtree(tmp_path / "left")
    (tmp_path / "made.txt").unlink()
    go(tmp_path, stages)
    assert made(tmp_path) == pieces("left", "both")
    assert "<LEFT>" in results(tmp_path)["both"]


def test_a_stage_that_makes_the_same_again_lets_later_ones_be(tmp_path):
    go(tmp_path, diamond(tmp_path))
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "made.txt").unlink()
    go(tmp_path, diamond(tmp_path))
    assert made(tmp_path) == pieces("source")


def test_an_output_that_is_gone_or_is_another_is_made_again(tmp_path):
    go(tmp_path, diamond(tmp_path))
    (tmp_path / "made.txt").unlink()
    (tmp_path / "left" / "piece-1").unlink()
    (tmp_path / "left" / "results.json").unlink()
    (tmp_path / "alone" / "results.json").write_text("[]")
    go(tmp_path, diamond(tmp_path))
    assert made(tmp_path) == ["left 1"], "the job keeps what it had"
    assert results(tmp_path)["alone"] != "[]"


def test_a_changed_source_runs_what_reads_it(tmp_path):
    """Sources are known by size and time, wherever they lie; the content of a stage's output is not."""
    source = tmp_path / "data"
    source.mkdir()
    (source / "results.json").write_text("1")
    kind = replace(TOY, sources=("reads",))
    stages = [
        Stage("reader", kind, ToyJob(reads=[str(source)], output=str(tmp_path / "reader"), word="w")),
        stage("other", tmp_path),
        stage("behind", tmp_path, "reader"),
    ]
    go(tmp_path, stages)
    (tmp_path / "made.txt").unlink()
    (source / "more.txt").write_text("not read by the job, yet part of its source")
    go(tmp_path, stages)
    assert made(tmp_path) == [], "it ran, and found all its pieces as they should be"
    begun = open_ledger(str(tmp_path / "run")).records["reader"].inputs
    assert begun == {"reads": [[str(source), listed(str(source))]], "model": []}
    (source / "results.json").write_text("22")
    go(tmp_path, stages)
    assert {line.split()[0] for line in made(tmp_path)} == {"reader", "behind"}


# --- kills and failures -----------------------------------------------------------------------------------


def toy_process(folder: Path) -> subprocess.Popen:
    """The diamond in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(TESTS / "toy_chain.py"), str(folder), "0.05"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_pipeline_goes_on_where_it_was(tmp_path, seed):
    """SIGKILL at random points from a seed, five times, then a run to the end: every piece was made once (or
    twice, where a kill fell between its line on the list and the piece), and the results are those of an
    undisturbed run."""
    generator = random.Random(seed)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    for _ in range(5):
        wanted = len(made(killed)) + generator.randint(1, 4)
        process = toy_process(killed)
        while process.poll() is None and len(made(killed)) < wanted:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.08))
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors
    said, errors = toy_process(killed).communicate(timeout=60)
    assert said == "finished\n", errors
    lines = made(killed)
    assert list(dict.fromkeys(lines)) == ALL
    assert len(lines) <= len(ALL) + 5
    go(whole, diamond(whole))
    assert results(killed) == results(whole)


def test_a_stage_that_failed_is_on_record_and_tried_again(tmp_path):
    stages = diamond(tmp_path)
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "settings").write_text("<other>")
    with pytest.raises(DataError, match=r"^stage right: .*right: is of word <other>, this job says <right>$"):
        go(tmp_path, stages)
    record = open_ledger(str(tmp_path / "run")).records["right"]
    assert record.state == "failed"
    assert "is of word <other>" in record.message
    assert made(tmp_path) == pieces("source", "left")
    (tmp_path / "right" / "settings").unlink()
    go(tmp_path, stages)
    assert made(tmp_path) == ALL


def test_an_error_of_ours_is_on_record_too(tmp_path):
    def broken(_):
        raise ZeroDivisionError("no")

    stages = [Stage("broken", replace(TOY, run=broken), ToyJob(output=str(tmp_path / "broken")))]
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, stages)
    record = open_ledger(str(tmp_path / "run")).records["broken"]
    assert (record.state, record.message) == ("failed", "ZeroDivisionError('no')")


# --- refusals ---------------------------------------------------------------------------------------------


def test_changed_settings_of_an_output_that_stands_are_refused_with_what_changed_and_what_to_do(tmp_path):
    go(tmp_path, diamond(tmp_path))
    stages = diamond(tmp_path)
    stages[1] = replace(stages[1], job=replace(stages[1].job, word="<LEFT>"))
    for _ in range(2):  # the second time it is as useful as the first
        with pytest.raises(DataError) as refused:
            go(tmp_path, stages)
        said = str(refused.value)
        assert "this job says <LEFT>" in said
        assert "stages.left.toy.word was '<left>', is now '<LEFT>'" in said
        assert "stages.left.toy.output=..., which later stages follow" in said
        assert f"or remove {tmp_path / 'left'} yourself" in said
    go(tmp_path, diamond(tmp_path))
    assert made(tmp_path) == ALL, "the change undone, nothing has to run"


def test_data_of_the_last_stage_that_is_not_there_is_said_before_the_first_one_runs(tmp_path):
    stages = diamond(tmp_path)
    given = replace(stages[-1].job, reads=[*stages[-1].job.reads, str(tmp_path / "given")], models=["org/m"])
    stages[-1] = replace(stages[-1], job=given)
    with pytest.raises(DataError, match=r"stages\.both\.toy\.reads.*nothing has run") as error:
        go(tmp_path, stages)
    assert f"{tmp_path}/given (" in str(error.value)
    assert made(tmp_path) == []
    go(tmp_path, stages, only=("source", "left"))
    assert made(tmp_path) == pieces("source", "left")


def test_other_content_of_what_a_job_trusts_is_refused(tmp_path):
    """A job that keeps its output by the path of a model would otherwise pass old results for new."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"w": np.zeros(2)}, model / "model.safetensors")
    stages = [stage("train", tmp_path, models=[str(model)])]
    go(tmp_path, stages)
    save_file({"w": np.ones(2)}, model / "model.safetensors")
    with pytest.raises(
        DataError, match=rf"was made from other content than {model} \(stages.train.toy.model\)"
    ):
        go(tmp_path, stages)
    shutil.rmtree(tmp_path / "train")
    go(tmp_path, stages)
    go(tmp_path, [stage("train", tmp_path, models=[str(model)])])
    assert len(made(tmp_path)) == 2 * PIECES


HOLDER = """
import sys, time
from revision_ray.core import artifact

with artifact.writing(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_stage_whose_output_another_pipeline_writes_is_refused(tmp_path):
    stages = diamond(tmp_path)
    shared = str(tmp_path / "right")
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", HOLDER, shared]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            DataError, match=rf"stage right: {shared}: another job writes there \(process {other.pid}"
        ):
            go(tmp_path, stages)
        assert made(tmp_path) == pieces("source", "left")
    finally:
        other.kill()
        other.wait()
    go(tmp_path, stages)
    assert made(tmp_path) == ALL


def test_outputs_apart_and_inputs_from_before(tmp_path):
    twice = [stage("a", tmp_path), replace(stage("b", tmp_path), job=ToyJob(output=str(tmp_path / "a")))]
    with pytest.raises(ConfigError, match=r"stages a and b write to .*: stages.b.toy.output="):
        makers(twice)
    inside = [
        stage("a", tmp_path),
        replace(stage("b", tmp_path), job=ToyJob(output=str(tmp_path / "a" / "b"))),
    ]
    with pytest.raises(ConfigError, match="stages a and b write to"):
        makers(inside)
    with pytest.raises(ConfigError, match="which the later stage b makes"):
        makers([stage("a", tmp_path, "b"), stage("b", tmp_path)])
    with pytest.raises(ConfigError, match="which it makes"):
        makers([stage("a", tmp_path, "a")])


def test_what_lies_in_an_output_or_matches_files_in_it_depends_on_its_maker(tmp_path):
    stages = [
        stage("a", tmp_path),
        stage("aa", tmp_path),  # begins with the same letters
        stage("below", tmp_path, "a/model"),
        stage("wild", tmp_path, "a/*/part-*"),
    ]
    assert makers(stages) == {"a": (), "aa": (), "below": ("a",), "wild": ("a",)}


# --- choosing ---------------------------------------------------------------------------------------------


def test_from_runs_a_stage_and_those_behind_it(tmp_path):
    go(tmp_path, diamond(tmp_path), only=("source", "left"))
    assert made(tmp_path) == pieces("source", "left")
    go(tmp_path, diamond(tmp_path), first="right")
    assert made(tmp_path) == ALL


def test_from_looks_at_nothing_before_it(tmp_path):
    go(tmp_path, diamond(tmp_path))
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "made.txt").unlink()
    go(tmp_path, diamond(tmp_path), first="both")
    assert made(tmp_path) == []
    assert not (tmp_path / "source").exists()


def test_only_runs_in_the_order_of_the_chain(tmp_path):
    go(tmp_path, diamond(tmp_path), only=("left", "source"))
    assert made(tmp_path) == pieces("source", "left")


@pytest.mark.parametrize(
    ("choice", "option"), [({"first": "riht"}, "--from"), ({"only": ("riht",)}, "--only")]
)
def test_an_unknown_stage_is_refused_and_the_nearest_named(tmp_path, choice, option):
    with pytest.raises(ConfigError, match=rf"{option} riht: no stage has this name; .*Did you mean: right\?"):
        chosen(diamond(tmp_path), StageChoice(**choice))


def test_from_and_only_ask_for_what_earlier_stages_make(tmp_path):
    with pytest.raises(
        ConfigError, match=r"--from both: stage both reads .*left, which stage left has not fin"
    ):
        go(tmp_path, diamond(tmp_path), first="both")
    with pytest.raises(ConfigError, match=r"--only left: .*begin with it \(--only source,left\)"):
        go(tmp_path, diamond(tmp_path), only=("left",))
    with pytest.raises(ConfigError, match="one of the two"):
        go(tmp_path, diamond(tmp_path), first="both", only=("left",))
    assert made(tmp_path) == []


FLAGS = {"--from": "from_stage={}", "--only": "only=[{}]", "--dry-run": "dry_run=true"}


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["a.yaml", "--dry-run", "x=1"], ["a.yaml", "dry_run=true", "x=1"]),
        (["--from", "fit", "a.yaml"], ["from_stage=fit", "a.yaml"]),
        (["--from=fit"], ["from_stage=fit"]),
        (["--only", "fit,embed"], ["only=[fit,embed]"]),
        (["x=--from", "--frm"], ["x=--from", "--frm"]),
    ],
)
def test_flags_stand_for_keys(argv, meant):
    assert config.with_flags(argv, FLAGS) == meant


@pytest.mark.parametrize("argv", [["--from"], ["--only", "--dry-run"]])
def test_a_flag_without_its_value_is_refused(argv):
    with pytest.raises(ConfigError, match="a value is required"):
        config.with_flags(argv, FLAGS)


# --- object storage ---------------------------------------------------------------------------------------


def test_everything_may_lie_on_s3(bucket):
    """Outputs, ledger and fences; a source that changes there is noticed."""
    calls = []

    def copy(job: ToyJob) -> str:
        calls.append(storage.name_of(job.output))
        found = [storage.read_bytes(storage.join(uri, "results.json")).decode() for uri in job.reads]
        storage.write_json(storage.join(job.output, "results.json"), [job.word, *found])
        return "done"

    kind = replace(TOY, run=copy)
    storage.write_json(bucket("data/results.json"), 1)
    first = ToyJob(reads=[bucket("data")], output=bucket("run/first"), word="a")
    second = ToyJob(reads=[bucket("run/first")], output=bucket("run/second"), word="b")
    stages = [Stage("first", kind, first), Stage("second", kind, second)]
    for _ in range(2):
        run_chain(stages, open_ledger(bucket("run")), StageChoice())
    assert calls == ["first", "second"]
    assert makers(stages)["second"] == ("first",)
    storage.write_json(bucket("data/results.json"), 22)
    run_chain(stages, open_ledger(bucket("run")), StageChoice())
    assert calls == ["first", "second", "first", "second"]
    left = {storage.name_of(uri) for uri, _ in storage.list_files(bucket("run"), recursive=True)}
    assert left == {"ledger.json", "results.json"}


# --- content ----------------------------------------------------------------------------------------------


def test_a_store_is_its_shards_wherever_they_lie(tmp_path):
    document = {
        "num_rows": 2,
        "shards": [{"name": "b", "content_hash": "2"}, {"name": "a", "content_hash": "1"}],
    }
    for place, order in (("x", 1), ("y", -1)):
        folder = tmp_path / place
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text("")
        found = {**document, "shards": document["shards"][::order]}
        (folder / "manifest.json").write_text(json.dumps(found))
    one, other = (Contents().of(str(tmp_path / place)) for place in "xy")
    assert one == other != ""
    (tmp_path / "y" / "b").unlink()
    assert Contents().of(str(tmp_path / "y")) == "", "a store without one of its shards does not stand"


def test_a_model_is_its_files_and_not_the_figures_of_its_training(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        save_file({"w": np.zeros(2)}, tmp_path / place / "model.safetensors")
        (tmp_path / place / "metrics.json").write_text(place)
    contents = Contents()
    one = contents.of(str(tmp_path / "x"))
    assert one == contents.of(str(tmp_path / "y"))
    known = dict(contents.known)
    assert Contents(known).of(str(tmp_path / "x")) == one
    save_file({"w": np.ones(2)}, tmp_path / "x" / "model.safetensors")
    assert Contents(known).of(str(tmp_path / "x")) != one, "a hash is kept for one version of a file"


def test_nothing_there_has_no_identity(tmp_path):
    assert Contents().of(str(tmp_path / "none")) == ""
    assert Contents().of("meta-llama/of-the-hub") == ""
    assert listed(str(tmp_path / "*.tar")) == ""


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_damaged_ledger_is_named(tmp_path, content):
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(DataError, match=r"ledger\.json"):
        open_ledger(str(tmp_path))


# --- costs ------------------------------------------------------------------------------------------------

DATA_COST = DataCost(
    dollars_per_million_in=0.5,
    dollars_per_million_out=2.0,
    tokens_in=100,
    tokens_out=50,
    paired_tokens_in=700,
)


def test_data_cost_is_the_papers_formula():
    """P_in T_in + P_out T_out, dollars per million tokens; as a multiple of the paired baseline."""
    # 1 M texts: 100 M tokens at $0.5 and 50 M at $2 a million.
    assert DATA_COST.dollars(1_000_000) == pytest.approx(50 + 100, rel=1e-12)
    assert DATA_COST.paired_dollars(1_000_000) == pytest.approx(350 + 100, rel=1e-12)
    assert DATA_COST.dollars(None) is None
    assert replace(DATA_COST, tokens_out=None).dollars(1) is None


def test_gpu_hours_come_from_tokens_and_the_models_size():
    estimates = Estimates(teraflops_per_gpu=1000, utilisation=0.4, dollars_per_gpu_hour=3.0)
    work = StageWork(rows=10, tokens=3.6e9, uses_gpu=True, flops_per_token=4 * 8e9)
    # 4e14 operations a second / 3.2e10 a token = 12,500 tokens a second; 3.6e9 tokens take 288,000 s = 80 h.
    assert gpu_hours(work, Throughput(), estimates) == pytest.approx(80, rel=1e-12)
    assert cost_of(work, Throughput(), estimates).gpu_dollars == pytest.approx(240, rel=1e-12)
    # What was configured or measured goes before.
    assert gpu_hours(work, Throughput(tokens_per_second=25_000), estimates) == pytest.approx(40, rel=1e-12)


def test_what_is_unknown_stays_unknown():
    priced = Estimates(dollars_per_gpu_hour=3.0)
    assert gpu_hours(StageWork(rows=10, tokens=None, uses_gpu=True), Throughput(), priced) is None
    assert (
        gpu_hours(StageWork(rows=None, tokens=None, uses_gpu=True), Throughput(rows_per_second=5), priced)
        is None
    )
    assert gpu_hours(StageWork(rows=18_000, uses_gpu=True), Throughput(rows_per_second=5), priced) == 1.0
    unpriced = cost_of(StageWork(rows=18_000, uses_gpu=True), Throughput(rows_per_second=5), Estimates())
    assert (unpriced.gpu_hours, unpriced.gpu_dollars) == (1.0, None)
    assert cost_of(StageWork(rows=None), Throughput(), Estimates()).gpu_dollars == 0.0, "no GPU is used"


@pytest.mark.parametrize(
    "wrong",
    [
        {"utilisation": 0.0},
        {"teraflops_per_gpu": 0.0},
        {"rows": {"a": -1}},
        {"tokens_per_gpu_second": {"a": 0.0}},
        {"dollars_per_gpu_hour": -1.0},
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Estimates(**wrong)


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "most", "samples"),
    [
        (40_960, 128, 2, 420, 53_760),  # the demo's stage 1: an epoch, and 100 of 320 steps
        (500, 64, 8, None, 4_000),  # its stage 2: 8 epochs of 7 full batches and one of 52
        (500, 64, 0.5, None, 256),
        (10, 64, 1, None, 10),
    ],
)
def test_samples_seen_are_those_of_the_training_loop(rows, size, epochs, most, samples):
    optimisation = SimpleNamespace(global_batch_size=size, num_epochs=epochs, max_steps=most)
    assert seen_samples(rows, optimisation) == samples


def test_parameters_are_counted_in_the_headers(tmp_path):
    save_file({"language_model.a": np.zeros((3, 5)), "projector.b": np.zeros(7)}, tmp_path / "a.safetensors")
    assert counted_parameters(str(tmp_path)) == 15
    save_file({"model.a": np.zeros((3, 5)), "model.b": np.zeros(7)}, tmp_path / "a.safetensors")
    assert counted_parameters(str(tmp_path)) == 22
    assert counted_parameters("meta-llama/of-the-hub") is None


# Jobs by the names that the forecast knows, with the fields that it looks at and nothing to run.


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    global_batch_size: int = 100
    num_epochs: float = 1.0
    max_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    num_visual_tokens: int = 576


@dataclass(frozen=True, kw_only=True)
class Job:
    output: str
    images: str | list[str] | None = None
    texts: str | list[str] | None = None
    data: list[str] = field(default_factory=list)
    max_rows: int | None = None
    model: str = ""
    max_length: int = 2048
    gradient_checkpointing: bool = False
    lora: None = None
    architecture: Architecture = field(default_factory=Architecture)
    optimisation: Optimisation = field(default_factory=Optimisation)


def kind(name: str, *keys: str) -> StageKind:
    def reads(job: Job) -> dict[str, list[str]]:
        named = {key: getattr(job, key) or [] for key in keys}
        return {key: [uris] if isinstance(uris, str) else uris for key, uris in named.items()}

    return replace(KINDS[name], run=lambda _: "", reads=reads, proof="manifest.json")


def real_chain(folder: Path) -> list[Stage]:
    """embed both, fit, pretrain, finetune, of 1,000 texts in Parquet and 3 image files."""
    (folder / "images").mkdir()
    for number in range(3):
        (folder / "images" / f"{number}.png").write_bytes(b"x")
    pq.write_table(
        pa.table({"id": ["a"] * 1000, "text": ["b"] * 1000}), folder / "texts.parquet", row_group_size=300
    )
    out = {name: str(folder / "out" / name) for name in ("images", "texts", "fit", "pretrain", "finetune")}
    jobs = [
        ("embed_images", kind("embed", "images"), Job(images=str(folder / "images"), output=out["images"])),
        (
            "embed_texts",
            kind("embed", "texts"),
            Job(texts=str(folder / "texts.parquet"), output=out["texts"]),
        ),
        (
            "fit",
            kind("fit", "texts", "images"),
            Job(texts=out["texts"], images=[out["images"]], output=out["fit"]),
        ),
        (
            "pretrain",
            kind("pretrain", "data"),
            Job(data=[out["texts"]], model="hub/8b", output=out["pretrain"]),
        ),
        (
            "finetune",
            kind("finetune", "data", "model"),
            Job(data=["c.json*2"], model=out["pretrain"] + "/model", output=out["finetune"]),
        ),
    ]
    return [Stage(name, of, job) for name, of, job in jobs]


ESTIMATES = Estimates(
    rows={"finetune": 5000},
    tokens_per_conversation=424,
    parameters={"pretrain": 8e9},
    teraflops_per_gpu=1000,
    utilisation=0.4,
    rows_per_gpu_second={"embed": 10},
    dollars_per_gpu_hour=2.0,
    data=DATA_COST,
)


def test_a_dry_run_reckons_as_one_does_by_hand(tmp_path):
    lines = plan.plan(real_chain(tmp_path), open_ledger(str(tmp_path)), StageChoice(), ESTIMATES)
    by_name = {line.stage.name: line for line in lines}
    assert {name: line.work.rows for name, line in by_name.items()} == {
        "embed_images": 3,  # image files of the listing
        "embed_texts": 1000,  # rows in the footer
        "fit": 1003,  # of the stores that are not there yet
        "pretrain": 1000,
        "finetune": 5000,  # as configured: JSON is not counted
    }
    # 576 visual tokens and 50 (T_out) of each text; 576 + 424 of each conversation.
    assert by_name["pretrain"].work.tokens == 1000 * 626
    assert by_name["finetune"].work.tokens == 5000 * 1000
    hours = {name: line.cost.gpu_hours for name, line in by_name.items()}
    assert hours["embed_texts"] == pytest.approx(1000 / 10 / 3600, rel=1e-12)
    assert hours["fit"] == 0
    # Forward and through the frozen model: 4 operations a parameter; where it trains, 6.
    assert hours["pretrain"] == pytest.approx(626_000 * 4 * 8e9 / 4e14 / 3600, rel=1e-12)
    assert hours["finetune"] == pytest.approx(5e6 * 6 * 8e9 / 4e14 / 3600, rel=1e-12)
    assert by_name["embed_texts"].cost.data_dollars == pytest.approx(1000 * (0.5 * 100 + 2 * 50) / 1e6)
    assert [by_name[name].cost.data_dollars for name in ("embed_images", "fit", "pretrain")] == [0, 0, 0]
    total = sum(line.cost.gpu_hours for line in lines)
    said = plan.table(lines, ESTIMATES)
    assert f"In all ${2 * total + 0.15:,.2f}." in said
    assert "texts alone cost 0.33 of that" in said  # 150 / 450


def test_a_dry_run_says_unknown_rather_than_guess(tmp_path):
    lines = plan.plan(real_chain(tmp_path), open_ledger(str(tmp_path)), StageChoice(), Estimates())
    said = plan.table(lines, Estimates())
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    assert rows["finetune"].split()[2:5] == ["unknown", "unknown", "unknown"]
    assert rows["total"].split()[1:3] == ["unknown", "unknown"]
    assert "In all" not in said


def test_a_dry_run_writes_nothing(tmp_path):
    stages = real_chain(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan.plan(stages, open_ledger(str(tmp_path / "run")), StageChoice(), ESTIMATES)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_missing_source_names_it(tmp_path):
    stages = real_chain(tmp_path)
    (tmp_path / "texts.parquet").unlink()
    with pytest.raises(DataError, match=r"texts\.parquet: no such file"):
        plan.plan(stages, open_ledger(str(tmp_path)), StageChoice(), ESTIMATES)


def test_manifests_go_before_listings(tmp_path):
    """A stage that would not run is as large as what it has made."""
    stages = real_chain(tmp_path)
    folder = tmp_path / "out" / "texts"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"num_rows": 990, "shards": []}))
    book = open_ledger(str(tmp_path))
    texts = stages[1]
    inputs = {"texts": [[texts.job.texts, Contents().of(texts.job.texts)]]}
    outputs = [[texts.output, Contents().of(texts.output)]]
    book.records["embed_texts"] = StageRecord(
        job="embed", settings=texts.settings, inputs=inputs, outputs=outputs, state="finished", begun="2026"
    )
    by_name = {line.stage.name: line for line in plan.plan(stages, book, StageChoice(), ESTIMATES)}
    assert by_name["embed_texts"].reason == ""
    assert by_name["embed_texts"].cost.gpu_hours == by_name["embed_texts"].cost.data_dollars == 0
    assert by_name["embed_texts"].work.rows == 990
    assert by_name["pretrain"].work.rows == 990


def test_a_finished_pipeline_calibrates(tmp_path):
    """Throughput and tokens of a row as they were measured, instead of formulas and of what is unknown."""
    former = {
        "job": "pretrain", "settings": {}, "inputs": {}, "outputs": [], "state": "finished", "begun": "2026",
        "seconds": 100.0, "rows": 2000, "tokens": 1_000_000.0, "gpus": 4.0,
    }  # fmt: skip
    embedded = {**former, "job": "embed", "rows": 8000, "tokens": None, "gpus": 2.0}
    document = {"format_version": 1, "hashes": {}, "stages": {"one": former, "two": embedded}}
    (tmp_path / "former").mkdir()
    (tmp_path / "former" / "ledger.json").write_text(json.dumps(document))
    measured = Estimates(measured=str(tmp_path / "former"))
    by_name = {
        line.stage.name: line
        for line in plan.plan(real_chain(tmp_path), open_ledger(str(tmp_path)), StageChoice(), measured)
    }
    # 500 tokens a row; 1e6 tokens in 400 GPU seconds; 8000 rows in 200.
    assert by_name["pretrain"].work.tokens == 1000 * 500
    assert by_name["pretrain"].cost.gpu_hours == pytest.approx(500_000 / 2500 / 3600, rel=1e-12)
    assert by_name["embed_texts"].cost.gpu_hours == pytest.approx(1000 / 40 / 3600, rel=1e-12)
    broken = {**document, "stages": {"one": {**former, "unbroken": False}}}
    (tmp_path / "former" / "ledger.json").write_text(json.dumps(broken))
    lines = plan.plan(real_chain_again(tmp_path), open_ledger(str(tmp_path)), StageChoice(), measured)
    assert next(line for line in lines if line.stage.name == "pretrain").cost.gpu_hours is None


def real_chain_again(folder: Path) -> list[Stage]:
    shutil.rmtree(folder / "images")
    return real_chain(folder)


def test_a_dry_run_says_what_waits_for_what(tmp_path):
    go(tmp_path, diamond(tmp_path))
    shutil.rmtree(tmp_path / "left")
    lines = plan.plan(diamond(tmp_path), open_ledger(str(tmp_path / "run")), StageChoice(), Estimates())
    reasons = {line.stage.name: line.reason for line in lines}
    assert reasons["source"] == reasons["right"] == reasons["alone"] == ""
    assert "its output is gone" in reasons["left"]
    assert reasons["both"] == "runs again: what stages.both.toy.reads reads has changed"
    assert "skipped, unchanged" in plan.table(lines, Estimates())
