"""The registry of fits: listed with what is wrong, moved as one file to the bit, ranked by closed forms."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.numpy
from embedding_stores import ENCODER, cloud, unit, write_store

from revision_ray.align import fit as fit_job
from revision_ray.align import fits, registry
from revision_ray.align.alignment import (
    DOCUMENT,
    IMAGE_MOMENTS,
    TENSORS,
    TEXT_MOMENTS,
    Alignment,
    FitInputs,
    ModalityGap,
    load_alignment,
    load_moments,
    save_alignment,
)
from revision_ray.align.fits import FitsJob, run_fits
from revision_ray.align.moments import Moments, gap_standard_error, of_block
from revision_ray.align.nearest import BEYOND, BY_CHANCE, TOO_FEW, SampledMoments, rank
from revision_ray.align.strategies import STRATEGIES, StrategyConfig, centroid_steps, fit_map
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, OutputError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import Store

ROOT = Path(__file__).parents[1]
DIM = 12
OTHER = EncoderIdentity(name="other", fingerprint="0" * 64)


def moments_of(rows_ND: np.ndarray, shard: str, second: bool = True) -> Moments:
    found, invalid = of_block(rows_ND, second=second)
    assert not invalid
    found.shard_hashes = frozenset({shard * 32})
    return found


def make_fit(
    folder: Path, strategy: str = "realign", shift: float = 0.0, seed: int = 0, dim: int = DIM,
    encoder: EncoderIdentity = ENCODER, domain: str = "tests", **settings,
) -> Alignment:  # fmt: skip
    """A fit of 3000 texts and 2000 images around shifted centres, without Ray, at `folder`."""
    second = STRATEGIES[strategy].second
    texts_ND, images_ND = rows("text", 3000, shift, seed, dim), rows("image", 2000, shift, seed, dim)
    text, image = moments_of(texts_ND, "ab", second), moments_of(images_ND, "cd", second)
    config = StrategyConfig(strategy=strategy, **settings)
    affine = fit_map(text, image, config)
    ids = [str(row) for row in range(len(texts_ND))]
    affine, steps = centroid_steps(
        affine, image, config, lambda _, affine: of_block(texts_ND, affine=affine, ids=ids)[0]
    )
    fitted = Alignment(
        strategy=config,
        affine=affine,
        text_centroid=text.centroid,
        image_centroid=image.centroid,
        drifted_centroids=np.array([step.centroid for step in steps]).reshape(-1, dim),
        text_trace=text.trace,
        image_trace=image.trace,
        num_texts=text.count,
        num_images=image.count,
        domain=domain,
        text_encoder=encoder,
        image_encoder=encoder,
        modality_gap=ModalityGap(
            before=float(np.linalg.norm(image.centroid - text.centroid)), after=1e-4,
            before_standard_error=gap_standard_error(text, image), after_standard_error=float("nan"),
        ),
        text_centroid_standard_error=text.centroid_standard_error,
        image_centroid_standard_error=image.centroid_standard_error,
        drifted_centroid_standard_error=0.0,
        inputs=FitInputs(texts=("texts",), images=("images",)),
    )  # fmt: skip
    save_alignment(fitted, text, image, str(folder))
    return fitted


def rows(modality: str, number: int, shift: float = 0.0, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """float32 (N, D): a cloud whose centre is moved by `shift`, always the same way."""
    away_D = np.random.default_rng(5).standard_normal(dim)
    return cloud(number, dim, modality, seed).astype(np.float32) + np.float32(shift) * away_D  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fits_folder(tmp_path_factory) -> Path:
    """Three sound fits of two domains, and four that are not."""
    root = tmp_path_factory.mktemp("registry")
    make_fit(root / "day" / "realign", domain="day")
    make_fit(root / "day" / "gaussian_ot", "gaussian_ot", domain="day")
    make_fit(root / "night", shift=0.3, domain="night")
    for name in ("cut", "no-moments", "flipped", "unfinished"):
        make_fit(root / "bad" / name, seed=3)
    tensors = root / "bad" / "cut" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-9])
    (root / "bad" / "no-moments" / IMAGE_MOMENTS).unlink()
    moments = root / "bad" / "flipped" / TEXT_MOMENTS
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(bytes(content))
    (root / "bad" / "unfinished" / DOCUMENT).unlink()
    (root / "day" / "notes.txt").write_text("not a fit")
    return root


# --- list and show ----------------------------------------------------------------------------------------


def test_every_fit_is_listed_and_damaged_ones_say_why(fits_folder):
    found = {entry.place.name: entry for entry in registry.entries(str(fits_folder))}
    sound = ["day/gaussian_ot", "day/realign", "night"]
    assert list(found) == ["bad/cut", "bad/flipped", "bad/no-moments", "bad/unfinished", *sound]
    assert [name for name, entry in found.items() if not entry.damage] == sound
    for name, reason in (
        ("bad/cut", "the fit is damaged"),
        ("bad/flipped", f"{TEXT_MOMENTS} does not match {DOCUMENT}"),
        ("bad/no-moments", "no such file"),
        ("bad/unfinished", f"unfinished: no {DOCUMENT}"),
    ):
        assert reason in found[name].damage
        assert found[name].fit is None


def test_the_table_and_the_json_say_the_same(fits_folder, tmp_path):
    job = FitsJob(registry=str(fits_folder), output=str(tmp_path / "fits.json"))
    table = run_fits(job).splitlines()
    document = json.loads((tmp_path / "fits.json").read_text())
    assert json.loads(run_fits(replace(job, json=True, output=None)))["fits"] == document["fits"]
    assert [line["name"] for line in document["fits"] if line["damage"]] == [
        line.split(":")[1].strip() for line in table if line.startswith("damaged: ")
    ]
    realign = next(line for line in document["fits"] if line["name"] == "day/realign")
    line = next(line for line in table if line.startswith("day/realign"))
    for value in ("realign", "day", "tiny ffffffff", "12", "3,000", "2,000", realign["content_hash"][:12]):
        assert value in line
    assert f"{realign['modality_gap']['before']:.4f}" in line
    assert realign["modality_gap_standard_error"]["after"] is None  # JSON has no NaN
    assert "(?)" in line
    assert realign["content_hash"] == load_alignment(str(fits_folder / "day" / "realign")).content_hash


def test_a_result_takes_the_place_of_a_former_one_and_of_nothing_else(fits_folder, tmp_path):
    job = FitsJob(registry=str(fits_folder), output=str(tmp_path / "fits.json"))
    assert run_fits(job) == run_fits(job)
    with pytest.raises(DataError, match=r"fits.json: holds something else"):
        run_fits(replace(job, action="show", name="night"))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="holds something else"):
        run_fits(replace(job, output=str(tmp_path / "thesis.tex")))


def test_show_says_everything_that_the_document_does(fits_folder):
    job = FitsJob(registry=str(fits_folder), action="show", name="day/gaussian_ot")
    shown = json.loads(run_fits(replace(job, json=True)))["fit"]
    document = storage.read_json(str(fits_folder / "day" / "gaussian_ot" / DOCUMENT))
    assert {key: shown[key] for key in document if key != "moments"} == {
        key: value for key, value in document.items() if key != "moments"
    }
    assert shown["moments"]["text"] == {"num_rows": 3000, "num_shards": 1, "second_moments": True}
    assert shown["tensors"]["matrix"] == [DIM, DIM]
    assert f"content_hash: {document['content_hash']}" in run_fits(job).splitlines()


def test_a_registry_that_is_a_fit_has_that_one(fits_folder):
    place = registry.place_of(str(fits_folder / "night"), ".")
    assert (place.name, place.uri) == (".", str(fits_folder / "night"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nigth", "did you mean 'night'"),
        ("realign", "did you mean 'day/realign'"),
        ("gausian_ot", "did you mean 'day/gaussian_ot'"),
        ("zzzzzz", r"there are bad/cut, bad/flipped, .* and 2 more"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(fits_folder, name, message):
    with pytest.raises(DataError, match=rf"no fit named '{name}'; {message}"):
        run_fits(FitsJob(registry=str(fits_folder), action="show", name=name))


@pytest.mark.parametrize("name", ["bad/cut", "bad/no-moments", "bad/flipped", "bad/unfinished"])
@pytest.mark.parametrize("action", ["show", "export"])
def test_a_damaged_fit_is_neither_shown_nor_exported(fits_folder, tmp_path, name, action):
    output = str(tmp_path / "x.safetensors") if action == "export" else None
    with pytest.raises(AlignmentError, match=name):
        run_fits(FitsJob(registry=str(fits_folder), action=action, name=name, output=output))
    assert list(tmp_path.iterdir()) == []


def test_a_registry_without_fits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no fit lies below it; .*jobs/fit.py"):
        run_fits(FitsJob(registry=str(tmp_path)))
    with pytest.raises(DataError, match="no such directory"):
        run_fits(FitsJob(registry=str(tmp_path / "nowhere")))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; a registry is a directory"):
        run_fits(FitsJob(registry=str(tmp_path / "file")))


def test_a_document_that_its_moments_do_not_bear_out_is_damaged(tmp_path):
    """alignment.json is not hashed as a whole, but what it says of the rows follows from the moments."""
    make_fit(tmp_path)
    document = storage.read_json(str(tmp_path / DOCUMENT))
    for change in ({"num_texts": 3001}, {"image_trace": document["image_trace"] + 1e-9}):
        storage.write_json(str(tmp_path / DOCUMENT), document | change)
        with pytest.raises(AlignmentError, match="moments are not those that this fit was made from"):
            registry.read(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "show"}, "show needs name"),
        ({"action": "export", "name": "a"}, "export needs output"),
        ({"action": "import"}, "import needs file"),
        ({"action": "nearest"}, "give texts=STORE, images=STORE, or both"),
        ({"action": "list", "texts": "a"}, "texts has no effect on list"),
        ({"action": "nearest", "texts": "a", "num_rows": 0}, "num_rows is 0"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FitsJob(**settings)


# --- export and import ------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "realign"}, {"strategy": "gaussian_ot"}, {"strategy": "c3", "noise": 0.1}],
    ids=lambda settings: settings["strategy"],
)
def test_a_fit_comes_back_from_its_file_to_the_bit(tmp_path, settings):
    before = make_fit(tmp_path / "here" / "fit", **settings)
    (tmp_path / "here" / "fit" / "config.yaml").write_text("output: somewhere\n")
    file = str(tmp_path / "moved.safetensors")
    assert run_fits(FitsJob(registry=str(tmp_path / "here"), action="export", name="fit", output=file)) == (
        f"exported: {file}"
    )
    said = run_fits(FitsJob(registry=str(tmp_path / "there"), action="import", file=file))
    assert said.startswith(f"imported: {settings['strategy']} fitted on 3,000 texts")
    assert files_of(tmp_path / "there" / "moved") == files_of(tmp_path / "here" / "fit")
    after = load_alignment(str(tmp_path / "there" / "moved"))
    assert after.content_hash == before.content_hash
    texts_ND, ids = cloud(300, DIM, "text", seed=8), [f"{row}" for row in range(300)]
    one_ND, other_ND = before.affine.apply(texts_ND, ids)[0], after.affine.apply(texts_ND, ids)[0]
    assert one_ND.tobytes() == other_ND.tobytes()
    moved = load_moments(str(tmp_path / "there" / "moved"))
    for side, other in zip(load_moments(str(tmp_path / "here" / "fit")), moved, strict=True):
        assert side.to_bytes() == other.to_bytes()


def test_the_file_needs_no_code_of_ours(tmp_path):
    fitted = make_fit(tmp_path / "fit")
    content = registry.pack(registry.read(str(tmp_path / "fit")))
    assert content == registry.pack(registry.read(str(tmp_path / "fit")))
    tensors = safetensors.numpy.load(content)
    np.testing.assert_array_equal(tensors["image_centroid"], fitted.image_centroid)
    assert tensors["moments.text.counts"].sum() == 3000


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    """The file of a fit of three dimensions."""
    folder = tmp_path_factory.mktemp("small")
    make_fit(folder, "gaussian_ot", dim=3)
    return registry.pack(registry.read(str(folder)))


def test_any_flipped_byte_is_noticed(small_file):
    """Every one of the header, and every seventh of the values."""
    header = 8 + int.from_bytes(small_file[:8], "little")
    assert len(small_file) > header + 1000
    for position in [*range(header), *range(header, len(small_file), 7)]:
        content = bytearray(small_file)
        content[position] ^= 1
        with pytest.raises(AlignmentError, match="file:"):
            registry.unpack(bytes(content), "file")


def test_any_truncation_is_noticed(small_file, tmp_path):
    for length in range(0, len(small_file), 97):
        with pytest.raises(AlignmentError, match="is truncated or no safetensors file"):
            registry.unpack(small_file[:length], "file")
    (tmp_path / "cut.safetensors").write_bytes(small_file[:-1])
    with pytest.raises(AlignmentError, match=r"cut.safetensors: is truncated"):
        run_fits(FitsJob(registry=str(tmp_path), action="import", file=str(tmp_path / "cut.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def repacked(content: bytes, change) -> bytes:
    """The file with its document or tensors changed and a digest that fits, as another program might."""
    tensors = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    document = json.loads(header["__metadata__"][registry.METADATA_KEY])
    del document["digest"]
    change(document, tensors)
    document["digest"] = registry._digest(tensors, document)
    return safetensors.numpy.save(tensors, {registry.METADATA_KEY: json.dumps(document, sort_keys=True)})


def no_change(document, tensors):
    """Leaves all as it is."""


def next_version(document, tensors):
    document["format_version"] = 2


def other_hash(document, tensors):
    document["alignment"]["content_hash"] = "0" * 64


def wrong_dimension(document, tensors):
    for name in ("counts", "sum_high", "sum_low", "second_high", "second_low"):
        tensors[f"moments.image.{name}"] = np.zeros((16, 4), np.int64)


def no_moments(document, tensors):
    del tensors["moments.text.counts"]


def no_document(document, tensors):
    del document["alignment"]


def foreign_strategy(document, tensors):
    document["alignment"]["settings"]["centroid_steps"] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (next_version, "format_version is 2, this version reads 1"),
        (other_hash, "does not match"),
        (wrong_dimension, "image moments are not those"),
        (no_moments, r"the fit is incomplete .*counts"),
        (no_document, "the fit is incomplete"),
        (foreign_strategy, r"the fit is damaged .*centroid_steps is -1"),
    ],
)
def test_a_file_that_is_whole_but_no_fit_of_ours_is_refused(small_file, change, message):
    assert registry.pack(registry.unpack(repacked(small_file, no_change), "file").fit) == small_file
    with pytest.raises(AlignmentError, match=message):
        registry.unpack(repacked(small_file, change), "file")


def test_another_safetensors_file_is_refused(tmp_path):
    content = safetensors.numpy.save({"weight": np.zeros(3)}, {"format": "pt"})
    with pytest.raises(AlignmentError, match="holds no exported fit"):
        registry.unpack(content, "model.safetensors")
    with pytest.raises(DataError, match="no such file"):
        registry.import_file(str(tmp_path / "none.safetensors"), str(tmp_path))


def test_an_import_meets_what_is_there(tmp_path, small_file):
    make_fit(tmp_path / "taken")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    file = tmp_path / "fit.safetensors"
    file.write_bytes(small_file)
    with pytest.raises(OutputError, match=r"taken: .*content_hash was .*another name than 'taken'"):
        registry.import_file(str(file), str(tmp_path), "taken")
    with pytest.raises(OutputError, match=r"thesis.tex"):
        registry.import_file(str(file), str(tmp_path), "thesis")
    assert registry.import_file(str(file), str(tmp_path))[:2] == ("imported", str(tmp_path / "fit"))
    done = files_of(tmp_path / "fit")
    assert registry.import_file(str(file), str(tmp_path))[0] == "already there"
    (tmp_path / "fit" / DOCUMENT).unlink()  # as an import that was cut off leaves it
    assert registry.import_file(str(file), str(tmp_path))[0] == "imported"
    assert files_of(tmp_path / "fit") == done


def test_an_export_meets_what_is_there(tmp_path):
    make_fit(tmp_path / "a")
    make_fit(tmp_path / "b", seed=1)
    file = str(tmp_path / "fit.safetensors")
    assert registry.export(str(tmp_path / "a"), file) == "exported"
    assert registry.export(str(tmp_path / "a"), file) == "already there"
    with pytest.raises(OutputError, match="does not belong to this fit"):
        registry.export(str(tmp_path / "b"), file)


@pytest.mark.parametrize("name", ["../out", "a/../../b", "/etc/x", "a//b", ".", "", "a b", "x?y=1", "*"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, small_file, name):
    (tmp_path / "fit.safetensors").write_bytes(small_file)
    with pytest.raises(DataError, match="name="):
        registry.import_file(str(tmp_path / "fit.safetensors"), str(tmp_path / "registry"), name)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]


# --- nearest ----------------------------------------------------------------------------------------------


def sampled(
    rows_ND: np.ndarray, modality: str = "image", encoder: EncoderIdentity = ENCODER
) -> SampledMoments:
    store = Store(
        uris=("store",),
        modality=modality,  # type: ignore[arg-type]
        embedding_dim=rows_ND.shape[1],
        encoder=encoder,
        domain="",
        alignment="",
        row_groups=(),
    )
    return SampledMoments(store=store, moments=moments_of(rows_ND, "ee", second=False), num_rejected=0)


def ranked(root: Path, **sides: SampledMoments) -> list[dict]:
    return rank(registry.entries(str(root)), sides)["ranked"]  # type: ignore[arg-type]


def test_the_figures_are_the_closed_forms(fits_folder):
    images_ND, texts_ND = rows("image", 700, seed=9), rows("text", 900, seed=9)
    found = ranked(fits_folder, image=sampled(images_ND), text=sampled(texts_ND, "text"))
    night = next(line for line in found if line["name"] == "night")
    fit = load_alignment(str(fits_folder / "night"))
    total, floors = 0.0, 0.0
    for side, rows_ND, centroid, trace, count in (
        ("image", images_ND, fit.image_centroid, fit.image_trace, 2000),
        ("text", texts_ND, fit.text_centroid, fit.text_trace, 3000),
    ):
        unit_ND = unit(rows_ND)
        mean_D, number = unit_ND.mean(0), len(unit_ND)
        figures = night["sides"][side]
        distance = np.linalg.norm(mean_D - centroid)
        assert figures["centroid_distance"] == pytest.approx(distance, rel=1e-9)
        variance = np.sum((unit_ND - mean_D) ** 2) / (number - 1)
        assert figures["trace_difference"] == pytest.approx(variance - trace * count / (count - 1), rel=1e-7)
        floors += trace * count / (count - 1) * (1 / number + 1 / count)
        assert figures["sampling_floor"] < np.sqrt(floors) * (1 + 1e-9)
        total += distance**2
    assert night["distance"] == pytest.approx(np.sqrt(total), rel=1e-9)
    assert night["sampling_floor"] == pytest.approx(np.sqrt(floors), rel=1e-9)
    assert night["share_of_spread"] == pytest.approx(
        np.sqrt(total / (fit.image_trace + fit.text_trace)), rel=1e-9
    )


def test_the_fits_of_the_sample_s_own_distribution_come_first_and_share_their_rank(fits_folder):
    """The other domain is half a spread away: a hundred floors of this sample."""
    found = ranked(fits_folder, image=sampled(rows("image", 5000, seed=10)))
    assert [(line["rank"], line["name"], line["verdict"]) for line in found] == [
        (1, "day/gaussian_ot", BY_CHANCE),
        (1, "day/realign", BY_CHANCE),
        (3, "night", BEYOND),
    ]
    assert found[0]["farther_than_nearest"] == 0.0
    assert found[0]["farther_standard_error"] == 0.0
    assert found[2]["farther_than_nearest"] > 10 * found[2]["farther_standard_error"] > 0
    back = ranked(fits_folder, image=sampled(rows("image", 5000, shift=0.3, seed=10)))
    assert (back[0]["rank"], back[0]["name"]) == (1, "night")


def test_the_standard_errors_are_the_spread_over_draws(tmp_path):
    make_fit(tmp_path / "a", shift=0.1)
    make_fit(tmp_path / "b", shift=0.2)
    entries = registry.entries(str(tmp_path))
    lines = []
    for seed in range(150):
        sides = {side: sampled(rows(side, 1024, seed=100 + seed), side) for side in ("image", "text")}
        lines.append(next(x for x in rank(entries, sides)["ranked"] if x["name"] == "b"))  # type: ignore[arg-type]
    for value, error in (("distance", "standard_error"), ("farther_than_nearest", "farther_standard_error")):
        values, errors = ([line[key] for line in lines] for key in (value, error))
        # The spread of 150 draws is known to 1/sqrt(300) = 6 %; 24 % is four times that.
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values, ddof=1), rel=0.24)
    sides = [line["sides"]["image"] for line in lines]
    spread = np.std([side["trace_difference"] for side in sides], ddof=1)
    stated = np.sqrt(np.mean([side["trace_difference_standard_error"] ** 2 for side in sides]))
    assert stated == pytest.approx(spread, rel=0.24)


def test_what_cannot_be_compared_is_named_with_the_reason(tmp_path, fits_folder):
    make_fit(tmp_path / "wide", dim=16)
    make_fit(tmp_path / "foreign", encoder=OTHER)
    make_fit(tmp_path / "broken")
    (tmp_path / "broken" / TENSORS).write_bytes(b"")
    sample = sampled(rows("image", 300))
    with pytest.raises(AlignmentError, match=r"none of 3 fits can be compared .*dimension 16") as error:
        rank(registry.entries(str(tmp_path)), {"image": sample})
    assert "image encoder other (000000000000), the sample's is tiny (ffffffffffff)" in str(error.value)
    make_fit(tmp_path / "good")
    result = rank(registry.entries(str(tmp_path)), {"image": sample})
    assert [line["name"] for line in result["ranked"]] == ["good"]
    assert [line["name"] for line in result["not_comparable"]] == ["broken", "foreign", "wide"]
    unknown = sampled(rows("image", 300), encoder=EncoderIdentity())
    names = [line["name"] for line in rank(registry.entries(str(tmp_path)), {"image": unknown})["ranked"]]
    assert sorted(names) == ["foreign", "good"]  # an encoder that nobody knows may be any


def test_a_sample_too_small_to_tell_says_so(fits_folder):
    found = ranked(fits_folder, image=sampled(rows("image", 40)))
    assert {line["verdict"] for line in found} == {TOO_FEW}
    # One chunk of rows fills one bucket, so there is no spread to see; JSON must have null for it.
    assert {line["standard_error"] for line in found} == {None}
    json.dumps(found, allow_nan=False)


def test_nearest_through_the_job(cluster, fits_folder, tmp_path):
    images = write_store(tmp_path / "images", rows("image", 3000, shift=0.3, seed=11), "image")
    texts = write_store(tmp_path / "texts", rows("text", 1000, shift=0.3, seed=11))
    job = FitsJob(
        registry=str(fits_folder), action="nearest", images=images, texts=[texts], num_rows=1500,
        output=str(tmp_path / "nearest.json"),
    )  # fmt: skip
    said = run_fits(job)
    document = json.loads((tmp_path / "nearest.json").read_text())
    assert document["ranked"][0]["name"] == "night"
    assert document["sample"]["image"]["num_rows"] == 1500
    assert document["sample"]["text"]["num_rows"] == document["sample"]["text"]["num_rows_in_store"] == 1000
    nearest_line = next(line for line in said.splitlines() if line[:4].strip().isdigit())
    assert nearest_line.split()[:2] == ["1", "night"]
    assert "not comparable: bad/unfinished: unfinished" in said
    again = json.loads(run_fits(replace(job, json=True, output=None)))
    assert again["ranked"] == document["ranked"]
    other = json.loads(run_fits(replace(job, json=True, output=None, seed=1)))
    assert other["ranked"][0]["distance"] != document["ranked"][0]["distance"]


def test_bad_samples_fail_the_job(cluster, fits_folder, tmp_path):
    rows_ND = rows("image", 400)
    rows_ND[7] = np.nan
    images = write_store(tmp_path / "images", rows_ND, "image")
    job = FitsJob(registry=str(fits_folder), action="nearest", images=images)
    with pytest.raises(
        DataError, match=r"1 of 400 sampled rows have no direction \(1 x NaN; the first is image7"
    ):
        run_fits(job)
    assert "399 of 400 rows" in run_fits(replace(job, max_rejected_fraction=0.01))
    with pytest.raises(DataError, match="are the two swapped"):
        run_fits(replace(job, images=None, texts=images))


# --- the command line -------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "fits.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_command_lists_and_shows(fits_folder):
    done = command("show", "night", f"registry={fits_folder}", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["fit"]["name"] == "night"
    done = command("list", f"registry={fits_folder / 'nowhere'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("DataError: ")
    done = command("--help")
    assert done.stdout.startswith("usage: python ")
    assert "[list | show NAME | nearest | export NAME OUTPUT | import FILE] [CONFIG.yaml]" in done.stdout


def test_a_fit_of_the_fit_job_is_in_the_registry_and_travels(cluster, tmp_path):
    texts = write_store(tmp_path / "texts", cloud(900, DIM, "text"))
    images = write_store(tmp_path / "images", cloud(800, DIM, "image"), "image")
    output = str(tmp_path / "runs" / "fit")
    fit_job.run_fit(fit_job.FitJob(texts=texts, images=images, output=output))
    assert [entry.damage for entry in registry.entries(str(tmp_path / "runs"))] == [""]
    file = str(tmp_path / "fit.safetensors")
    registry.export(output, file)
    _, uri, _ = registry.import_file(file, str(tmp_path / "elsewhere"), "medical/xray")
    before, after = files_of(Path(output)), files_of(Path(uri))
    assert before.keys() - after.keys() == {"rejected.parquet"}
    assert all(before[name] == content for name, content in after.items())


def test_every_action_is_a_verb():
    assert set(fits.VERBS) == set(fits._OPTIONAL) == set(get_args(FitsJob.__annotations__["action"]))
