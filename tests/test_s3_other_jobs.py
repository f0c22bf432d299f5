"""The jobs beside the main way with what they read and write on S3: their files are those of local disks."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from embedding_stores import cloud, write_store

from revision_ray.align import fit, fits
from revision_ray.align.fit import FitJob
from revision_ray.align.fits import FitsJob
from revision_ray.core import storage
from revision_ray.data import imports
from revision_ray.data.imports import ImportJob
from revision_ray.data.shards import Modality, read_columns, read_embeddings
from revision_ray.miniature import render
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.documents import DocumentConfig
from revision_ray.miniature.language_model import LanguageTraining, train_language_model
from revision_ray.report import report
from revision_ray.report.report import ReportJob
from revision_ray.studies import study
from revision_ray.studies.study import Precision, SampleEfficiency, StudyJob
from revision_ray.train.contrastive import EncoderTraining, train_encoder
from revision_ray.train.language_model import ModelSize

pytestmark = pytest.mark.slow

DIM, ROWS = 8, 400


Place = Callable[[str], str]


def on_disk(folder: Path) -> Place:
    return lambda key: str(folder / key)


@pytest.fixture(scope="module")
def stores(cluster, bucket, tmp_path_factory) -> list[Place]:
    """The same stores, pickles and fit on a local disk and on S3."""
    folder = tmp_path_factory.mktemp("stores")
    sides: dict[str, Modality] = {"texts": "text", "images": "image"}
    for name, modality in sides.items():
        write_store(
            folder / name, cloud(ROWS, DIM, modality), modality, ids=[f"r{row}" for row in range(ROWS)]
        )
    records = [{"id": f"p{row}", "embed": embed_D, "caption": "a"} for row, embed_D in enumerate(np.eye(DIM))]
    (folder / "pickles").mkdir()
    (folder / "pickles" / "one.pkl").write_bytes(pickle.dumps(records))
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(bucket(str(path.relative_to(folder))), path.read_bytes())
    places = [on_disk(folder), bucket]
    for place in places:
        fit.run_fit(FitJob(texts=place("texts"), images=place("images"), output=place("fit")))
    return places


def contents(folder: str, pattern: str = "*") -> dict[str, bytes]:
    """File -> its bytes, below `folder`."""
    files = storage.list_files(folder, pattern, recursive=True)
    return {storage.relative_path(uri, folder): storage.read_bytes(uri) for uri, _ in files}


def twice(stores: list[Place], run: Callable[[Place], object], output: str, pattern: str) -> None:
    """What `run` leaves is the same on both, and a second run leaves S3 as it is."""
    for place in stores:
        run(place)
    found = [contents(place(output), pattern) for place in stores]
    assert found[1]
    assert found[0].keys() == found[1].keys()
    assert found[0] == found[1]
    before = {uri: info.mtime_ns for uri, info in storage.list_files(stores[1](output), pattern)}
    run(stores[1])
    assert {uri: info.mtime_ns for uri, info in storage.list_files(stores[1](output), pattern)} == before


def test_a_report(stores):
    """A report from S3 to S3 has the pictures of local disks."""

    def run(place: Place) -> None:
        report.run_report(
            ReportJob(
                texts=place("texts"),
                images=place("images"),
                alignments=[place("fit")],
                output=place("report"),
                title="t",
                num_bootstrap=20,
                num_cosines=5000,
                num_heldout=50,
            )
        )

    twice(stores, run, "report", "*.png")


def test_studies(stores):
    """Studies from S3 to S3 have the tables of local disks."""

    def run(place: Place) -> None:
        study.run_study(
            StudyJob(
                texts=place("texts"),
                images=place("images"),
                output=place("study"),
                sample_efficiency=SampleEfficiency(sizes=[20], trials=2),
                precision=Precision(sizes=[20]),
                studies=["sample_efficiency", "precision"],
            )
        )

    twice(stores, run, "study", "*.txt")


def test_a_fit_travels_as_one_file(stores):
    """A registry of fits on S3 exports, imports and lists as on local disks."""
    said = []
    for place in stores:
        registry, file = place("registry"), place("one.safetensors")
        for path, content in contents(place("fit")).items():
            storage.write_bytes(storage.join(registry, "one", path), content)
        fits.run_fits(FitsJob(action="export", registry=registry, name="one", output=file))
        fits.run_fits(FitsJob(action="import", registry=registry, name="two", file=file))
        listed = json.loads(fits.run_fits(FitsJob(action="list", registry=registry, json=True)))["fits"]
        said.append([(entry["name"], entry["content_hash"]) for entry in listed])
    assert [name for name, _ in said[0]] == ["one", "two"]
    assert said[0] == said[1]


def test_pickles_are_imported(stores):
    """Pickles on S3 are imported as from local disks."""
    imported = []
    for place in stores:
        imports.run_import(ImportJob(input=place("pickles"), output=place("imported"), modality="text"))
        ((part, _),) = storage.list_files(place("imported"), "part-*")
        ids = read_columns(part, ["id"]).column("id").to_pylist()
        imported.append((ids, read_embeddings(part).tolist()))
    assert imported[0] == imported[1]
    assert imported[1] == ([f"p{row}" for row in range(DIM)], np.eye(DIM).tolist())


def test_an_encoder_and_a_language_model_from_scratch(cluster, bucket, tmp_path):
    """Encoder and language model from scratch, from S3 to S3, have the weights of local disks."""
    places = [on_disk(tmp_path), bucket]

    def encoder(place: Place) -> None:
        render.run_render(
            DatasetConfig(
                output=place("world"),
                num_pairs=64,
                num_heldout=20,
                num_images=0,
                num_texts=0,
                cpus_per_task=0.5,
            )
        )
        train_encoder(
            EncoderTraining(
                data=[place("world/pairs")],
                heldout=[place("world/heldout")],
                output=place("encoder"),
                num_steps=4,
                global_batch_size=16,
                warmup_steps=2,
                cpus_per_worker=1.0,
            )
        )

    def language_model(place: Place) -> None:
        train_language_model(
            LanguageTraining(
                output=place("language_model"),
                documents=DocumentConfig(num_documents=100),
                size=ModelSize(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48),
                num_steps=4,
                rows_per_batch=4,
                warmup_steps=2,
                num_heldout=20,
                cpus_per_worker=1.0,
            )
        )

    twice(places, encoder, "encoder", "*.safetensors")
    twice(places, language_model, "language_model", "*.safetensors")
