"""The jobs as stages of a pipeline: configurations, dry runs of them, and the whole way, with kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_encoder import write_encoder
from tiny_language_model import write_language_model

from revision_ray.core import config
from revision_ray.core.errors import ConfigError
from revision_ray.pipeline import plan
from revision_ray.pipeline.chain import StageChoice, makers
from revision_ray.pipeline.job import KINDS, PipelineJob, StageConfig, run_pipeline, stages_of
from revision_ray.pipeline.ledger import open_ledger

ROOT = Path(__file__).parents[1]


# --- configuration ----------------------------------------------------------------------------------------


def demo(output: Path, *overrides: str) -> PipelineJob:
    return config.load(PipelineJob, [str(ROOT / "configs/demo.yaml"), f"output={output}", *overrides])


def test_a_stage_is_named_as_the_job_that_it_is():
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert set(KINDS) - {"conversations"} <= jobs
    assert set(KINDS) | {"title"} == set(StageConfig.__dataclass_fields__)


def test_the_demos_stages_read_what_earlier_ones_make(tmp_path):
    made_by = makers(stages_of(demo(tmp_path)))
    assert made_by["encoder"] == ("world",)
    assert made_by["texts"] == ("world", "encoder")
    assert made_by["fit"] == ("images", "texts")
    assert made_by["pretrain"] == ("encoder", "texts", "fit", "language_model")
    assert made_by["finetune"] == ("images", "questions", "pretrain")
    assert made_by["evaluate"] == ("world", "pretrain", "finetune")
    assert made_by["start"] == ("pretrain",)
    assert made_by["finetune_without"] == ("images", "questions", "start")
    assert made_by["model"] == ("finetune",)


def test_one_changed_output_moves_what_names_it(tmp_path):
    stages = {s.name: s for s in stages_of(demo(tmp_path, "stages.fit.fit.output=elsewhere/fit"))}
    assert stages["pretrain"].job.alignment == "elsewhere/fit"
    assert stages["aligned"].job.alignment == "elsewhere/fit"
    assert stages["fit_none"].job.output == f"{tmp_path}/fits/none"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.model.fit.texts=a", "stages.model.fit.output=b"], "stages.model: names fit and export"),
        (["stages.new.title=x"], "stages.new: names no job; a stage is one of render, "),
        (["stages.model.export.output=${output}"], "is the pipeline's own directory"),
        (["stages.a b.export.run=x", "stages.a b.export.output=y"], "is made of letters, digits"),
        (["stages.fti.fit.drift_rows=5"], r"\(or was stages.fit meant\?\)"),
        (["stages.fit.fit.stratgy=none"], "stages.fit.fit.stratgy: Key 'stratgy' not in 'FitJob'"),
        (["stages.fit.fti.strategy=none"], "stages.fit.fti: Key 'fti' not in 'StageConfig'"),
        (["stages.pretrain.pretrain.optimisation.micro_batch_size=96"], "is no multiple of"),
        (["estimates.utilisation=0"], "estimates.utilisation=0.0; expected more than 0"),
    ],
)
def test_mistakes_in_a_chain_are_named(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        stages_of(demo(tmp_path, *overrides))


def test_a_pipeline_without_stages_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="name at least one"):
        stages_of(PipelineJob(output=str(tmp_path), stages={}))


def test_a_choice_that_cannot_be_leaves_no_trace(tmp_path):
    job = replace(demo(tmp_path / "demo"), from_stage="evaluat")
    with pytest.raises(ConfigError, match=r"--from evaluat: .* Did you mean: evaluate\?"):
        run_pipeline(job)
    with pytest.raises(ConfigError, match=r"reads .*demo/.*, which stage world has not finished"):
        run_pipeline(replace(job, from_stage="evaluate"))
    assert not (tmp_path / "demo").exists()


# --- dry runs ---------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_demo_knows_its_sizes_before_anything_is_there(tmp_path):
    job = demo(tmp_path / "demo", "estimates.tokens_per_text=12", "estimates.parameters.pretrain=6.2e5")
    lines = plan.plan(stages_of(job), open_ledger(job.output), StageChoice(), job.estimates)
    rows = {line.stage.name: line.work.rows for line in lines}
    assert {name: rows[name] for name in ("world", "images", "texts", "fit", "aligned", "questions")} == {
        "world": 16_384 + 2_000 + 10_240 + 40_960,
        "images": 10_240,
        "texts": 40_960,
        "fit": 51_200,
        "aligned": 40_960,
        "questions": 500,
    }
    assert (rows["pretrain"], rows["finetune"], rows["finetune_without"]) == (53_760, 4_000, 4_000)
    tokens = {line.stage.name: line.work.tokens for line in lines}
    assert tokens["pretrain"] == 53_760 * (4 + 12)
    assert tokens["language_model"] == 340 * 32 * 128
    assert tokens["finetune"] is None, "nobody said how long a conversation is"
    assert rows["evaluate"] is None, "questions are counted when they are there"
    text = plan.table(lines, job.estimates)
    assert [line.split()[0] for line in text.splitlines()[1 : 1 + len(lines)]] == list(job.stages)
    assert not (tmp_path / "demo").exists()


def test_the_papers_pipeline_is_reckoned_from_its_configuration(tmp_path):
    """8 B parameters, 576 visual tokens, gradient checkpointing: 6 operations a parameter and token."""
    job = config.load(
        PipelineJob,
        [
            str(ROOT / "configs/pipeline.yaml"),
            f"output={tmp_path}/run",
            f"given.texts={tmp_path}/c.jsonl",
            f"given.images={tmp_path}/images",
            "estimates.rows={embed_texts: 2000000, embed_images: 1000, finetune: 1200000, evaluate: 10000}",
            "estimates.data.tokens_out=150",
            "estimates.tokens_per_conversation=424",
        ],
    )
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    chain = [stage for stage in stages_of(job) if stage.name != "evaluate"]
    lines = {
        line.stage.name: line
        for line in plan.plan(chain, open_ledger(job.output), StageChoice(), job.estimates)
    }
    hours = lines["pretrain"].cost.gpu_hours
    assert hours == pytest.approx(2e6 * 726 * 6 * 8.03e9 / (989e12 * 0.4) / 3600, rel=1e-9)
    hours = lines["finetune"].cost.gpu_hours
    assert hours == pytest.approx(1.2e6 * 1000 * 8 * 8.03e9 / (989e12 * 0.4) / 3600, rel=1e-9)


# --- the whole way ----------------------------------------------------------------------------------------


def chain_yaml(folder: Path) -> Path:
    """A tiny world, both embeddings, fit, stage 1, stage 2, evaluation, export; tiny random models."""
    write_encoder(folder / "encoder")
    write_language_model(folder / "language_model")
    optimisation = (
        "{global_batch_size: 16, micro_batch_size: 16, max_steps: 9, num_epochs: 9, learning_rate: 3.0e-3}"
    )
    encoder = f"{{kind: open_clip, model: {folder}/encoder}}"
    text = f"""
stages:
  world:
    render: {{output: "${{output}}/world", num_pairs: 4, num_heldout: 6, num_images: 60, num_texts: 300,
              rows_per_file: 40, cpus_per_task: 0.5}}
  images:
    embed: {{images: "${{stages.world.render.output}}/images", output: "${{output}}/images",
             rows_per_shard: 16, encoder: {encoder}}}
  texts:
    embed: {{texts: "${{stages.world.render.output}}/texts", output: "${{output}}/texts", rows_per_shard: 64,
             encoder: {encoder}}}
  fit:
    fit: {{texts: "${{stages.texts.embed.output}}", images: "${{stages.images.embed.output}}",
           output: "${{output}}/fit"}}
  questions:
    conversations: {{world: "${{stages.world.render.output}}", output: "${{output}}/questions",
                     num_samples: 60}}
  pretrain:
    pretrain:
      data: ["${{stages.texts.embed.output}}"]
      alignment: ${{stages.fit.fit.output}}
      model: {folder}/language_model
      image_tower: {encoder}
      output: ${{output}}/pretrain
      max_length: 48
      batches_per_window: 3
      architecture: {{num_visual_tokens: 2, projector_hidden_size: 24}}
      optimisation: {optimisation}
      workers: {{cpus_per_worker: 0.5}}
      checkpoints: {{every_steps: 3}}
      logging: {{every_steps: 1, tensorboard: false}}
  finetune:
    finetune:
      data: ["${{stages.questions.conversations.output}}/conversations.jsonl"]
      images: ["${{stages.images.embed.output}}"]
      model: ${{stages.pretrain.pretrain.output}}/model
      output: ${{output}}/finetune
      max_length: 48
      batches_per_window: 3
      optimisation: {optimisation}
      workers: {{cpus_per_worker: 0.5}}
      checkpoints: {{every_steps: 3}}
      logging: {{every_steps: 1, tensorboard: false}}
  evaluate:
    title: After stage 2
    evaluate:
      model: ${{stages.finetune.finetune.output}}/model
      benchmarks: [miniature]
      data: {{miniature: "${{stages.world.render.output}}"}}
      output: ${{output}}/evaluate
      num_pictures: 2
      max_new_tokens: 4
      cpus_per_actor: 0.5
  start:
    export: {{run: "${{stages.pretrain.pretrain.output}}", checkpoint: start, output: "${{output}}/start"}}
  model:
    export: {{run: "${{stages.finetune.finetune.output}}", output: "${{output}}/model"}}
"""
    (folder / "chain.yaml").write_text(text)
    return folder / "chain.yaml"


STAGES = [
    "world",
    "images",
    "texts",
    "fit",
    "questions",
    "pretrain",
    "finetune",
    "evaluate",
    "start",
    "model",
]


def start(chain: Path, output: Path, *argv: str) -> subprocess.Popen:
    """The pipeline as a user starts it, in a session of its own, so that all of it can be killed."""
    command = [sys.executable, str(ROOT / "jobs/pipeline.py"), str(chain), f"output={output}", *argv]
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(chain: Path, output: Path, *argv: str) -> str:
    process = start(chain, output, *argv)
    try:
        said, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def states(output: Path) -> dict[str, str]:
    ledger = output / "ledger.json"
    stages = json.loads(ledger.read_text())["stages"] if ledger.exists() else {}
    return {name: record["state"] for name, record in stages.items()}


def outcomes(output: Path) -> dict[str, str]:
    """What each stage made, as the ledger identifies it."""
    stages = json.loads((output / "ledger.json").read_text())["stages"]
    return {name: record["outputs"][0][1] for name, record in stages.items()}


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, str]:
    """The chain's YAML, the output of an undisturbed run, and what that said."""
    folder = tmp_path_factory.mktemp("pipeline")
    chain = chain_yaml(folder)
    return chain, folder / "whole", finish(chain, folder / "whole")


@pytest.mark.slow
def test_the_whole_way_from_one_yaml(whole):
    """One YAML renders, embeds, fits, trains both stages, evaluates and exports."""
    chain, output, said = whole
    assert states(output) == dict.fromkeys(STAGES, "finished")
    assert "realign " in said
    assert "After stage 2:\naccuracy, %" in said
    assert f"Everything is in {output}, the model in {output}/model" in said
    for model in ("pretrain/model", "finetune/model", "start", "model"):
        assert (output / model / "config.json").exists()
    ledger = json.loads((output / "ledger.json").read_text())["stages"]
    assert ledger["pretrain"]["inputs"]["data"][0] == ledger["texts"]["outputs"][0]
    assert ledger["pretrain"]["rows"] == 9 * 16
    assert ledger["pretrain"]["tokens"] > 9 * 16 * 3
    assert ledger["fit"]["rows"] == 360
    assert ledger["model"]["outputs"][0][1] == ledger["finetune"]["outputs"][0][1], "its last checkpoint"
    assert ledger["start"]["outputs"][0][1] != ledger["pretrain"]["outputs"][0][1]
    resolved = config.load(PipelineJob, [str(output / "pipeline.yaml")])
    assert resolved == config.load(PipelineJob, [str(chain), f"output={output}"])


@pytest.mark.slow
def test_run_again_it_does_nothing(whole):
    """A finished pipeline that is run again skips every stage and prints the same report."""
    chain, output, said = whole
    again = finish(chain, output)
    lines = [line for line in again.splitlines() if "skipped, unchanged since" in line]
    assert [line.split("stage ")[1].split(" ")[0] for line in lines] == STAGES
    report = said[said.index("Fitted on") :]
    assert again.endswith(report)
    assert not [line for line in finish(chain, output, "--dry-run").splitlines() if "runs" in line]


@pytest.mark.slow
def test_changed_settings_of_a_stage_are_refused_with_a_remedy(whole):
    """A finished stage with changed settings is refused with a remedy."""
    chain, output, _ = whole
    process = start(chain, output, "stages.pretrain.pretrain.seed=5")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 2
    (error,) = [line for line in said.splitlines() if line.startswith("OutputError: ")]
    assert "stages.pretrain.pretrain.seed was 0, is now 5" in error
    assert "stages.pretrain.pretrain.output=..." in error
    assert states(output) == dict.fromkeys(STAGES, "finished")


@pytest.mark.slow
def test_killed_at_random_points_it_ends_as_if_it_never_was(whole):
    """A pipeline whose driver and Ray are killed in two of its stages ends with what a calm one makes."""
    chain, undisturbed, _ = whole
    output = chain.parent / "killed"
    generator = random.Random(0)
    for name in (generator.choice(["texts", "fit", "pretrain"]), generator.choice(["finetune", "evaluate"])):
        process = start(chain, output)
        for _ in range(20000):
            if states(output).get(name) in ("running", "finished") or process.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(chain, output)
    assert outcomes(output) == outcomes(undisturbed)
    for stage in ("pretrain", "finetune"):
        assert losses(output / stage) == losses(undisturbed / stage)
