"""The studies on the miniature world: what is prepared for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_encoder

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.encode import embed
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.miniature import dataset, study, world
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.miniature.study import Miniature, MiniatureStudyJob
from revision_ray.miniature.world import DrawnShape, Scene
from revision_ray.studies.cross_modal_probe import CrossModalProbe
from revision_ray.studies.inputs import read_labels

THING = DrawnShape(shape="star", colour="red", size="small", x=20, y=20, radius=9, angle=0)


def test_attributes_are_those_in_which_all_things_agree():
    alone = Scene(background="grass", things=(THING,))
    assert study.attributes(alone) == {
        "background": "grass", "count": "1", "colour": "red", "shape": "star", "size": "small"
    }  # fmt: skip
    pair = replace(alone, things=(THING, replace(THING, colour="blue")))
    assert study.attributes(pair) == {
        "background": "grass", "count": "2", "shape": "star", "size": "small"
    }  # fmt: skip


def small(folder: Path) -> DatasetConfig:
    return DatasetConfig(
        output=str(folder), num_pairs=3, num_heldout=40, num_images=150, num_texts=160, rows_per_file=80
    )


def test_labels_are_those_of_the_scenes_and_leave_the_training_pairs_out(tmp_path):
    here = small(tmp_path / "world")
    uri = study._labelled(here, str(tmp_path / "labels.jsonl"))
    rows = [json.loads(line) for line in Path(uri).read_text().splitlines()]
    assert len(rows) == 40 + 150 + 160
    for row in rows[::50]:
        index = int(row["id"].rsplit("-", 1)[1])
        assert index >= dataset.SCENES_PER_SPLIT
        shown = world.scene(here.world, index)
        assert (row["background"], row["count"]) == (shown.background, str(len(shown.things)))
    assert read_labels([uri]).attributes == ["background", "colour", "count", "shape", "size"]
    before = Path(uri).stat().st_mtime_ns
    study._labelled(here, uri)
    assert Path(uri).stat().st_mtime_ns == before


def job_of(folder: Path, **changes) -> MiniatureStudyJob:
    return MiniatureStudyJob(
        texts=str(folder / "texts"),
        images=str(folder / "images"),
        output=str(folder / "study"),
        miniature=Miniature(
            world=str(folder / "world"), encoder=str(folder / "encoder"), num_images=60, num_texts=120
        ),
        **changes,
    )


def test_a_missing_world_and_inputs_given_twice_are_refused(cluster, tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json.* run `make demo` first"):
        study.run_miniature_study(job_of(tmp_path))
    with pytest.raises(ConfigError, match=r"labels: miniature"):
        study.run_miniature_study(job_of(tmp_path, labels=["x.jsonl"]))


@pytest.mark.slow
def test_the_other_domain_long_captions_and_labels_are_made(cluster, tmp_path, monkeypatch):
    """The miniature's studies make their other domain, long captions and labels.

    The whole way with an untrained encoder of 12 tokens, which cuts long captions off."""
    here = small(tmp_path / "world")
    render(here)
    long = replace(here, caption_length="long")
    captions = " ".join(dataset.captions(long, index, 1)[0] for index in range(99))
    monkeypatch.setattr(tiny_encoder, "WORDS", sorted(set(captions.split())))
    encoder = EncoderConfig(model=tiny_encoder.write_encoder(tmp_path / "encoder"))
    for side in ("texts", "images"):
        source = {side: str(tmp_path / "world" / side)}
        embed.run_embed(
            embed.EmbedJob(**source, output=str(tmp_path / side), encoder=encoder, dtype="float32")
        )
    job = job_of(
        tmp_path,
        studies=["domain_transfer", "caption_length", "probe"],
        probe=CrossModalProbe(num_train=60, num_seeds=2, attributes=["background", "count"]),
    )
    said = study.run_miniature_study(job)
    transfer = json.loads((tmp_path / "study" / "domain_transfer.json").read_text())
    assert transfer["domains"] == ["day", "night"]
    lengths = json.loads((tmp_path / "study" / "caption_length.json").read_text())
    assert [row["name"] for row in lengths["stores"]] == ["short", "long"]
    assert [row["num_texts"] for row in lengths["stores"]] == [120, 120]
    assert lengths["stores"][1]["truncated"] == 1.0
    assert lengths["stores"][1]["probe"] is not None
    probed = json.loads((tmp_path / "study" / "probe.json").read_text())
    assert (probed["num_test"], probed["test_images_held_out"]) == (40, True)
    assert study.run_miniature_study(job) == said
