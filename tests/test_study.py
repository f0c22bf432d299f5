"""The study job: each study against laws and plain NumPy, resumption, determinism, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_stores import cloud, unit, write_store

from revision_ray.align import moments
from revision_ray.align.apply import open_pair
from revision_ray.align.map_reduce import (
    UniformSample,
    draw_sample,
    moments_here,
    read_sampled,
    store_moments,
)
from revision_ray.align.maps import Affine
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core import config
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, OutputError
from revision_ray.data.store import Store, open_stores
from revision_ray.studies import caption_length, domain_transfer, inputs, sample_efficiency, study
from revision_ray.studies.c3_sigma import C3Sigma
from revision_ray.studies.caption_length import CaptionLength
from revision_ray.studies.cross_modal_probe import CrossModalProbe
from revision_ray.studies.inputs import labelled_rows
from revision_ray.studies.precision import Precision, mean_errors
from revision_ray.studies.sample_efficiency import SampleEfficiency
from revision_ray.studies.study import StudyJob

DIM = 12


def rows_of(store: Store, sample: UniformSample | None) -> np.ndarray:
    """float64 unit rows of a sample, by another way than the moments take."""
    read = [
        read_sampled(g, sample, store.embedding_dim) for g in store.row_groups if not sample or sample.size(g)
    ]
    return unit(np.concatenate([block_ND for block_ND, _ in read]))


def mapped(affine: Affine, rows_ND: np.ndarray) -> np.ndarray:
    return affine.apply(rows_ND)[0].astype(np.float64)


# --- rows that no fit sees --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Store, Store]:
    """900 texts and 700 images, in several shards."""
    folder = tmp_path_factory.mktemp("pair")
    return (
        open_stores([write_store(folder / "texts", cloud(900, DIM, "text"), rows_per_shard=200)], "text"),
        open_stores(
            [write_store(folder / "images", cloud(700, DIM, "image"), "image", rows_per_shard=150)], "image"
        ),
    )


def taken(store: Store, sample: UniformSample) -> set[tuple[str, int]]:
    return {(g.shard_hash, int(at)) for g in store.row_groups if sample.size(g) for at in sample.positions(g)}


def test_a_sample_without_another_shares_no_row_with_it_and_can_take_all_others(pair):
    store = pair[0]
    held = draw_sample(store, 200, 1)
    few = draw_sample(store, 300, 2, held)
    rest = draw_sample(store, store.num_rows, 2, held)
    assert held and few and rest  # noqa: PT018
    assert (len(taken(store, held)), len(taken(store, few)), len(taken(store, rest))) == (200, 300, 700)
    assert not taken(store, held) & taken(store, few)
    assert taken(store, held) | taken(store, rest) == {
        (g.shard_hash, at) for g in store.row_groups for at in range(g.num_rows)
    }


def test_a_sample_without_another_is_uniform_over_the_rest(pair):
    store = pair[0]
    drawn: dict[tuple[str, int], int] = {}
    for seed in range(400):
        held = draw_sample(store, 225, seed)
        sample = draw_sample(store, 225, seed + 1000, held)
        assert sample
        for row in taken(store, sample):
            drawn[row] = drawn.get(row, 0) + 1
    shares = np.array(list(drawn.values())) / 400
    assert len(drawn) == store.num_rows
    # A quarter, to sqrt(0.25 * 0.75 / 400) = 0.022 each; the extremes of 900 lie within five of those.
    assert np.abs(shares - 0.25).max() < 0.11
    assert shares.std() == pytest.approx(0.0217, rel=0.15)


def test_moments_in_one_process_are_those_of_the_map_reduce(cluster, pair):
    sample = draw_sample(pair[0], 400, 3, draw_sample(pair[0], 100, 4))
    affine = Affine(offset=np.full(DIM, 0.1), scale=0.5, noise=0.2, seed=1)
    for keywords in ({}, {"sample": sample, "affine": affine, "second": True}):
        one, _ = moments_here(pair[0], **keywords)
        other, _ = store_moments(pair[0], "test", **keywords)
        assert one.to_bytes() == other.to_bytes()


def test_the_held_out_rows_are_a_quarter_at_most(pair):
    stores = inputs.hold_out(*pair, 200, seed=0)
    assert (inputs.num_rows(stores.heldout_texts), inputs.num_rows(stores.heldout_images)) == (200, 175)
    assert stores.num_rest == 525


def test_rows_that_hardly_vary_have_a_spectrum_without_rounding():
    """Rows that differ in one direction by 1e-5: the other eigenvalues are exactly zero, not -1e-16."""
    rows_ND = np.zeros((200, DIM))
    rows_ND[:, 0], rows_ND[:, 1] = 1.0, 1e-5 * (np.arange(200) % 2)
    rows_ND = rows_ND @ np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0]
    values = inputs.spectrum(moments.of_block(rows_ND, second=True)[0])
    assert values[0] == pytest.approx(0.25e-10, rel=1e-3)
    assert (values[1:] == 0).all()


# --- precision --------------------------------------------------------------------------------------------


def test_float32_sums_lose_what_float64_sums_keep():
    """Equal rows of entries that no binary number holds: every addition rounds, mostly the same way."""
    row_D = unit(np.array([[0.1, 0.3, -0.7, 0.6]]))
    errors = mean_errors([np.repeat(row_D, 5000, axis=0)] * 4, [100, 20_000])
    assert errors["float32"][1] > 10 * errors["float32"][0] > 0
    # Each of N additions rounds a sum below N by half of 2^-52 N at most, which N divides.
    assert max(errors["float64"]) < 20_000 * 2**-53
    assert max(errors["moments"]) < 1e-15
    assert errors["float32"][1] > 1e6 * errors["float64"][1]
    np.testing.assert_allclose(errors["float32_minus_float64"], errors["float32"], rtol=1e-3)


def test_errors_are_measured_against_the_exact_sum():
    rows_ND = unit(np.random.default_rng(0).standard_normal((3000, 5)))
    errors = mean_errors([rows_ND[:700], rows_ND[700:]], [1, 1000, 3000])
    for place, size in enumerate((1, 1000, 3000)):
        single_D, double_D = np.zeros(5, np.float32), np.zeros(5)
        for row_D in rows_ND[:size]:
            single_D, double_D = single_D + row_D.astype(np.float32), double_D + row_D
        exact_D = np.array([math.fsum(column) / size for column in rows_ND[:size].T])
        assert errors["float32"][place] == pytest.approx(
            np.linalg.norm(single_D.astype(float) / size - exact_D), rel=1e-6
        )
        # The true difference is itself of the size of rounding: 1e-17 of a mean near 0.03.
        assert errors["float64"][place] == pytest.approx(np.linalg.norm(double_D / size - exact_D), abs=3e-17)


def test_pieces_of_the_rows_do_not_matter_and_invalid_rows_do_not_count():
    rows_ND = np.random.default_rng(1).standard_normal((500, 6)).astype(np.float16)
    with_gaps_ND = np.insert(rows_ND, [3, 100], np.nan, axis=0)
    one = mean_errors([rows_ND], [50, 500])
    other = mean_errors([with_gaps_ND[:33], with_gaps_ND[33:90], with_gaps_ND[90:]], [50, 500])
    assert one["float32"] == other["float32"]
    assert one["float64"] == other["float64"]


# --- sample efficiency ------------------------------------------------------------------------------------


def isotropic(num_rows: int, centre: int, seed: int, dim: int = 32) -> np.ndarray:
    """Unit rows of a Gaussian cap of r.m.s. width 0.3 around one axis: the trace is about 0.08."""
    rows_ND = np.random.default_rng(seed).standard_normal((num_rows, dim)) * 0.3 / math.sqrt(dim)
    rows_ND[:, centre] += 1
    return unit(rows_ND)


def test_the_held_out_gap_falls_as_the_square_root_of_the_rows(cluster, tmp_path):
    """Of isotropic Gaussians it is sqrt((T_x + T_y)(1/N + 1/M)): N rows of the fit, M held out, a side."""
    texts = write_store(tmp_path / "texts", isotropic(8000, 0, 1).astype(np.float32), rows_per_shard=2000)
    images = write_store(
        tmp_path / "images", isotropic(8000, 1, 2).astype(np.float32), "image", rows_per_shard=2000
    )
    stores = inputs.hold_out(*open_pair(texts, images), 2000, seed=0)
    settings = SampleEfficiency(sizes=[30, 300, 3000], trials=8)
    found = sample_efficiency.run(stores, StrategyConfig(), settings, seed=0)
    trace = 1 - np.sum(isotropic(8000, 1, 2).mean(0) ** 2)
    law = [math.sqrt(2 * trace * (1 / size + 1 / 2000)) for size in (30, 300, 3000)]
    # ReAlign gives the texts the images' trace, from N rows: 1 / sqrt(30 * 32 / 2) = 0.05 of it at N = 30.
    np.testing.assert_allclose(found["expected"], law, rtol=0.03)
    # A norm in 32 dimensions varies by 1 / sqrt(64) = 0.125 from trial to trial, 0.044 in a mean of eight.
    # Held-out rows are the same in all trials; at N = 3000 half of the gap is theirs, and no mean helps.
    np.testing.assert_allclose(found["mean"][:2], law[:2], rtol=0.15)
    assert found["mean"][2] == pytest.approx(law[2], rel=0.3)
    assert found["floor"] == pytest.approx(math.sqrt(2 * trace / 2000), rel=0.03)
    gaps = np.array(found["gaps"])
    np.testing.assert_allclose(found["sd"], [np.std(row, ddof=1) for row in gaps], rtol=1e-12)


def test_sizes_are_cut_to_what_the_store_has():
    assert inputs.sizes_for([100, 500], 10_000, "x") == [100, 500]
    assert inputs.sizes_for([500, 100, 10_000], 700, "x") == [100, 500, 700]
    assert inputs.sizes_for([100, 500, 1000], 500, "x") == [100, 500]
    with pytest.raises(DataError, match=r"x: 50 rows.* 100"):
        inputs.sizes_for([100, 500], 50, "x")


# --- domains ----------------------------------------------------------------------------------------------


def test_every_cell_of_the_domain_matrix_is_that_domains_gap_under_those_statistics(cluster, tmp_path):
    domains = {}
    for place, name in enumerate(("day", "night")):
        turn = np.roll(np.eye(DIM), 3 * place, axis=0)  # the second domain lies elsewhere
        texts, images = (
            write_store(
                tmp_path / name / side, (cloud(600, DIM, side, seed=place) @ turn).astype(np.float32), side
            )
            for side in ("text", "image")
        )
        domains[name] = inputs.hold_out(*open_pair(texts, images), 100, seed=0)
    found = domain_transfer.run(domains, StrategyConfig(strategy="anchor"))
    assert found["domains"] == ["day", "night"]
    for s, statistics in enumerate(domains.values()):
        rest = [
            rows_of(store, draw_sample(store, 600, 0, held)).mean(0)
            for store, held in (
                (statistics.texts, statistics.heldout_texts),
                (statistics.images, statistics.heldout_images),
            )
        ]
        for e, at in enumerate(domains.values()):
            text_ND, image_ND = rows_of(at.texts, at.heldout_texts), rows_of(at.images, at.heldout_images)
            gap = np.linalg.norm(unit(text_ND - rest[0] + rest[1]).mean(0) - image_ND.mean(0))
            assert found["gap"][s][e] == pytest.approx(gap, rel=1e-9)
            if s == e:
                raw = np.linalg.norm(text_ND.mean(0) - image_ND.mean(0))
                assert found["raw"][e] == pytest.approx(raw, rel=1e-9)


# --- caption length ---------------------------------------------------------------------------------------


def test_length_bins_hold_the_texts_of_that_length(cluster, tmp_path):
    rows_ND = cloud(800, DIM, "text")
    words_N = np.random.default_rng(0).integers(3, 40, 800)
    texts = ["word " * number for number in words_N]
    text = open_stores([write_store(tmp_path / "texts", rows_ND, texts=texts, rows_per_shard=300)], "text")
    image = open_stores([write_store(tmp_path / "images", cloud(300, DIM, "image"), "image")], "image")
    found = caption_length.run(text, image, {}, CaptionLength(edges=[10, 30]), None, seed=0)
    centre_D = unit(cloud(300, DIM, "image")).mean(0)
    for row, (low, high) in zip(found["bins"], ((3, 10), (10, 30), (30, 40)), strict=True):
        chosen = (words_N >= low) & (words_N < high)
        inside_ND = unit(rows_ND[chosen])
        values = np.linalg.eigvalsh(np.cov(inside_ND.T, bias=True))
        share = values / values.sum()
        assert row["name"] == f"{words_N[chosen].min()} to {words_N[chosen].max()} words"
        assert row["num_texts"] == chosen.sum()
        assert row["mean_words"] == pytest.approx(words_N[chosen].mean())
        assert row["effective_rank"] == pytest.approx(math.exp(-np.sum(share * np.log(share))), rel=1e-9)
        assert row["trace"] == pytest.approx(values.sum(), rel=1e-9)
        assert row["raw_gap"] == pytest.approx(np.linalg.norm(inside_ND.mean(0) - centre_D), rel=1e-9)
        assert row["truncated"] == 0.0


def test_texts_that_the_encoder_does_not_tell_apart_are_named(cluster, tmp_path):
    rows_ND = np.repeat(cloud(1, DIM, "text"), 60, axis=0)
    texts = ["word " * (3 + row % 2) for row in range(60)]
    text = open_stores([write_store(tmp_path / "texts", rows_ND, texts=texts)], "text")
    image = open_stores([write_store(tmp_path / "images", cloud(60, DIM, "image"), "image")], "image")
    with pytest.raises(DataError, match="all 30 texts of 3 words have one and the same embedding"):
        caption_length.run(text, image, {}, CaptionLength(), None, seed=0)


def test_bins_by_quantiles_are_about_equally_full_and_never_empty():
    counts = dict.fromkeys(range(1, 101), 10)
    assert caption_length._quantile_edges(counts, 4) == [26, 51, 76]
    assert caption_length._quantile_edges({5: 1000, 6: 1, 7: 1}, 4) == [6]
    with pytest.raises(DataError, match="every text has 5 words"):
        caption_length._quantile_edges({5: 1000}, 4)


# --- labels -----------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LABELS = [
    {"id": "text1", "count": 2, "colour": "red"},
    {"id": "text2", "count": 10},
    {"id": "x", "colour": "blue"},
]


def test_labels_are_the_same_from_json_lines_and_parquet(tmp_path):
    one = inputs.read_labels([jsonl(tmp_path / "a.jsonl", LABELS)])
    pq.write_table(pa.Table.from_pylist([{"colour": None, **row} for row in LABELS]), tmp_path / "a.parquet")
    other = inputs.read_labels([str(tmp_path / "a.parquet")])
    assert one.classes == other.classes == {"colour": ["blue", "red"], "count": ["10", "2"]}
    known_N, codes_NA = one.of(inputs.id_keys(["text2", "nobody", "text1"]))
    assert known_N.tolist() == [0, 2]
    assert codes_NA.tolist() == [[-1, 0], [1, 1]]
    np.testing.assert_array_equal(one.codes_NA, other.codes_NA)
    np.testing.assert_array_equal(one.keys_N, other.keys_N)
    assert inputs.read_labels([str(tmp_path / "a.parquet")], ["count"]).attributes == ["count"]


@pytest.mark.parametrize(
    ("rows", "attributes", "message"),
    [
        ([{"count": 1}], [], "line 1: expected a row with an id"),
        ([["text1", 1]], [], "line 1: expected a row with an id"),
        ([{"id": "a"}], [], "no labels"),
        ([{"id": "a", "labels": {"count": 1}}], [], "line 1: labels is"),
        ([{"id": "a", "count": 1}, {"id": "a", "count": 2}], [], "line 2: id a has labels"),
        ([{"id": "a", "count": 1}], ["shape"], "no row has a label of shape; .* count"),
        ([{"id": str(i), "name": str(i)} for i in range(1001)], [], "name has 1001 classes"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, rows, attributes, message):
    with pytest.raises(DataError, match=message):
        inputs.read_labels([jsonl(tmp_path / "labels.jsonl", rows)], attributes)


def test_labelled_rows_do_not_depend_on_the_shards(cluster, tmp_path):
    rows_ND = cloud(500, DIM, "text")
    rows_ND[7] = 0  # has no direction
    labelled = [{"id": f"text{row}", "even": row % 2} for row in range(0, 500, 3)] + [
        {"id": "text7", "even": 1}
    ]
    known = inputs.read_labels([jsonl(tmp_path / "labels.jsonl", labelled)])
    stores = [
        open_stores([write_store(tmp_path / str(size), rows_ND, rows_per_shard=size)], "text")
        for size in (37, 500)
    ]
    one, other = (labelled_rows(store, known, 60, seed=1) for store in stores)
    assert one.ids == other.ids
    np.testing.assert_array_equal(one.rows_ND, other.rows_ND)
    assert len(set(one.ids)) == 60
    assert all(int(row_id[4:]) % 3 == 0 for row_id in one.ids)
    positions = [int(row_id[4:]) for row_id in one.ids]
    np.testing.assert_allclose(one.rows_ND, unit(rows_ND[positions]), atol=1e-6)
    assert one.codes_NA[:, 0].tolist() == [position % 2 for position in positions]
    assert labelled_rows(stores[0], known, 60, seed=2).ids != one.ids
    assert len(labelled_rows(stores[0], known, 1000, seed=1)) == 167
    assert one.without(one.ids[:10]).ids == one.ids[10:]


# --- the job ----------------------------------------------------------------------------------------------

COUNT = 400


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> StudyJob:
    """Every study on small stores: two domains, two lengths, labels that the rows' first entry decides."""
    folder = tmp_path_factory.mktemp("study")
    written = {}
    for place, name in enumerate(("texts", "images", "heldout", "night_texts", "night_images", "long")):
        side = "text" if name in ("texts", "night_texts", "long") else "image"
        rows_ND = cloud(COUNT, DIM, side, seed=place)
        said = [f"{'word ' * (3 + row % 9 + 20 * (name == 'long'))}" for row in range(COUNT)]
        ids = [f"{name}{row}" for row in range(COUNT)]
        texts = said if side == "text" else None
        written[name] = write_store(folder / name, rows_ND, side, ids=ids, texts=texts, rows_per_shard=150)
        middle = np.median(rows_ND[:, 0])
        with (folder / "labels.jsonl").open("a") as file:
            for row_id, row_D in zip(ids, rows_ND, strict=True):
                file.write(json.dumps({"id": row_id, "first": "high" if row_D[0] > middle else "low"}) + "\n")
    return StudyJob(
        texts=written["texts"],
        images=written["images"],
        heldout_images=written["heldout"],
        output=str(folder / "out"),
        domains={
            "day": {"texts": written["texts"], "images": written["images"]},
            "night": {"texts": written["night_texts"], "images": written["night_images"]},
        },
        lengths={"short": written["texts"], "long": written["long"]},
        labels=[str(folder / "labels.jsonl")],
        sample_efficiency=SampleEfficiency(sizes=[20, 100], trials=2),
        c3_sigma=C3Sigma(lengths=[0.0, 0.5], neighbour_rows=60, num_seeds=2),
        probe=CrossModalProbe(num_train=200, num_seeds=2),
    )


@pytest.fixture(scope="module")
def done(cluster, job) -> tuple[Path, str]:
    said = study.run_study(job)
    return Path(job.output), said


def read(output: Path, name: str) -> dict:
    return json.loads((output / f"{name}.json").read_text())


STUDIES = list(study.STUDIES)


def test_every_study_leaves_a_table_a_plot_and_json(done):
    output, said = done
    for name in STUDIES:
        for suffix in ("json", "csv", "txt", "png", "svg"):
            assert (output / f"{name}.{suffix}").stat().st_size > 100, f"{name}.{suffix}"
        assert (output / f"{name}.txt").read_text().strip() in said
        assert read(output, name)["study"] == name
    assert "left out" not in said
    assert config.load(StudyJob, [str(output / "config.yaml")]).heldout_rows == 10_000


def test_the_probe_document_keeps_its_schema(done):
    found = read(done[0], "probe")
    assert found["attributes"] == ["first"]
    assert set(found["strategies"]) == {
        "none", "c3", "anchor", "anchor_trace", "realign", "blockwise", "gaussian_ot", "gaussian_ot_noise"
    }  # fmt: skip
    for summary in [*found["strategies"].values(), found["upper_bound"]]:
        for figures in (summary, summary["per_attribute"]["first"]):
            for figure in ("accuracy", "nll"):
                assert set(figures[figure]) == {"mean", "low", "high"}
                assert figures[figure]["low"] <= figures[figure]["mean"] <= figures[figure]["high"]
        assert len(summary["seeds"]) == 2
        assert summary["accuracy"]["mean"] == pytest.approx(
            np.mean([s["accuracy"] for s in summary["seeds"]])
        )
    assert (found["num_train"], found["num_test"], found["num_seeds"]) == (200, COUNT, 2)
    assert set(found["chance"]) == {"accuracy", "nll"}
    assert found["verdict"]
    # Its label is a threshold on the image's own entry, which a head trained on images finds.
    assert found["upper_bound"]["accuracy"]["mean"] > 0.9


def test_noise_of_length_zero_is_anchor(done, job):
    stores = inputs.hold_out(*open_pair(job.texts, job.images), job.heldout_rows, job.seed)
    fitted = inputs.fit_here(stores, StrategyConfig(strategy="anchor"), COUNT, 0)
    aligned_ND = mapped(fitted.affine, rows_of(stores.texts, stores.heldout_texts))
    image_ND = rows_of(stores.images, stores.heldout_images)
    found = read(done[0], "c3_sigma")
    gap = np.linalg.norm(aligned_ND.mean(0) - image_ND.mean(0))
    assert found["gap"][0] == pytest.approx(gap, rel=1e-6)  # `apply` rounds to float32
    values = np.linalg.eigvalsh(np.cov(aligned_ND.T, bias=True))[::-1]
    slope = np.polyfit(np.log(np.arange(10, 12)), np.log(values[9:11]), 1)[0]
    assert found["alpha"][0] == pytest.approx(-slope, rel=1e-3)
    assert found["sigmas"] == [0.0, 0.5 / math.sqrt(DIM)]


def test_centroid_steps_are_those_of_realign(done, job):
    stores = inputs.hold_out(*open_pair(job.texts, job.images), job.heldout_rows, job.seed)
    found = read(done[0], "centroid_steps")
    text_ND = rows_of(stores.texts, draw_sample(stores.texts, COUNT, 0, stores.heldout_texts))
    image_ND = rows_of(stores.images, draw_sample(stores.images, COUNT, 0, stores.heldout_images))
    text_D, image_D = text_ND.mean(0), image_ND.mean(0)
    scale = math.sqrt((1 - image_D @ image_D) / (1 - text_D @ text_D))
    rows_ND = unit(image_D + scale * (text_ND - text_D))
    for step in range(3):
        gap = np.linalg.norm(rows_ND.mean(0) - image_D)
        assert found["gap_on_fit"][step] == pytest.approx(gap, rel=1e-6)  # 1e-10 was added to the trace
        rows_ND = unit(rows_ND - rows_ND.mean(0) + image_D)


def test_a_second_run_computes_nothing(done, job, monkeypatch):
    output, said = done
    monkeypatch.setattr(study, "_write", lambda *_: pytest.fail("a study was run again"))
    for name in study.STUDIES:
        again = replace(study.STUDIES[name], work=lambda _: pytest.fail("a study was run again"))
        monkeypatch.setitem(study.STUDIES, name, again)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert study.run_study(job) == said
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.json")} == before


def test_what_is_missing_is_made_again_with_the_same_bytes(done, job):
    output, _ = done
    names = ["precision", "centroid_steps", "c3_sigma"]  # the last one with the probe
    before = {path: path.read_bytes() for name in names for path in output.glob(f"{name}.*")}
    for path in before:
        path.unlink()
    study.run_study(job)
    after = {path: path.read_bytes() for path in before}
    assert [path.name for path in before if before[path] != after[path]] == []


def test_a_study_of_other_settings_is_not_overwritten(done, job):
    with pytest.raises(OutputError, match=r"centroid_steps\.json: .*settings\.steps was 6, is now 2"):
        study.run_study(replace(job, centroid_steps=replace(job.centroid_steps, steps=2)))
    with pytest.raises(OutputError, match=r"seed was 0, is now 1"):
        study.run_study(replace(job, seed=1))
    with pytest.raises(OutputError, match=r"images was"):
        study.run_study(replace(job, images=job.domains["night"]["images"], studies=["centroid_steps"]))


def test_studies_that_the_inputs_do_not_allow_are_named(cluster, job, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    rows = [{"id": str(row), "embedding": row_D} for row, row_D in enumerate(cloud(80, DIM, "text").tolist())]
    pq.write_table(pa.Table.from_pylist(rows), bare / "rows.parquet")
    plain = StudyJob(
        texts=str(bare),
        images=str(bare),
        output=str(tmp_path / "out"),
        sample_efficiency=SampleEfficiency(sizes=[20], trials=2),
        precision=Precision(sizes=[20]),
    )
    said = study.run_study(plain)
    assert "left out: domain_transfer, which needs domains" in said
    assert "left out: caption_length, which needs text stores with a column text" in said
    assert "left out: probe, which needs labels" in said
    assert not (tmp_path / "out" / "probe.json").exists()
    assert read(tmp_path / "out", "c3_sigma")["probe"] is None
    for name in ("probe", "caption_length", "domain_transfer"):
        with pytest.raises(ConfigError, match=f"study {name} needs"):
            study.run_study(replace(plain, studies=[name]))


def bad(job: StudyJob, **changes) -> StudyJob:
    return replace(job, output=job.output + "_bad", **changes)


def test_inputs_that_cannot_serve_are_refused(cluster, job, tmp_path):
    refused = r"labels .*, probe\.num_train is 5000; label more, or set probe\.num_train=400"
    with pytest.raises(DataError, match=refused):
        study.run_study(bad(job, studies=["probe"], probe=CrossModalProbe(num_train=5000)))
    large = SampleEfficiency(sizes=[1000])
    with pytest.raises(DataError, match=r"300 rows.* 1000"):
        study.run_study(bad(job, studies=["sample_efficiency"], sample_efficiency=large))
    with pytest.raises(DataError, match="shards are part of images"):
        study.run_study(bad(job, heldout_images=job.images))
    with pytest.raises(DataError, match="expected text; are the two swapped"):
        study.run_study(bad(job, texts=job.images))
    few = write_store(tmp_path / "few", cloud(20, DIM, "text"))
    with pytest.raises(DataError, match="5 of its 20 rows"):
        study.run_study(bad(job, texts=few, domains={}, lengths={}))
    other = write_store(tmp_path / "other", cloud(80, DIM + 1, "image"), "image")
    with pytest.raises(AlignmentError, match="texts have dimension 12, images 13"):
        study.run_study(bad(job, images=other))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "precision.json").write_text("{}")
    with pytest.raises(OutputError, match=r"precision\.json: "):
        study.run_study(replace(job, output=str(tmp_path / "strange")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studies=[prob]", "prob"),
        ("domains={day: {texts: a, images: b}}", "only day is given; domain transfer compares two or more"),
        ("domains={day: {texts: a}, night: {texts: a}}", r"domains.day: has texts; expected a store for"),
        ("probe.num_seeds=1", r"probe.num_seeds is 1; expected 2 or more"),
        ("probe.num_trian=1", "num_train"),
        ("sample_efficiency.trials=1", "2 trials or more"),
        ("c3_sigma.lengths=[-1]", "expected numbers of 0 or more"),
        ("caption_length.edges=[5,3]", "expected ascending numbers"),
        ("centroid_steps.steps=0", "steps is 0"),
        ("seed=-1", "seed is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(StudyJob, ["texts=a", "images=b", "output=c", override])
