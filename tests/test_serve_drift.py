"""Drift: served images against the fit's, by closed forms, fixed seeds, and the laws of the moments."""

import asyncio
import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from embedding_stores import ENCODER

from revision_ray.align.alignment import (
    MIN_ROWS,
    Alignment,
    FitInputs,
    ModalityGap,
    sampling_floor,
    save_alignment,
)
from revision_ray.align.maps import Affine
from revision_ray.align.moments import NUM_BUCKETS, Moments, of_block
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core.errors import AlignmentError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.serve import drift
from revision_ray.serve.drift import ALIKE, DRIFTED, NO_FIT, TOO_FEW, Drift, DriftMonitor
from revision_ray.serve.metrics import SERVE_PREFIX

DIM = 24


def images(num_rows: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 (N, D): unit rows around a centre, anisotropic; `shift` moves it, always the same way."""
    generator = np.random.default_rng(seed)
    centre, direction = np.random.default_rng(0).standard_normal((2, DIM))
    noise_ND = generator.standard_normal((num_rows, DIM)) * np.arange(1, DIM + 1) ** -0.5 * 3
    rows_ND = centre + shift * direction + noise_ND
    return (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)


def fit_of(moments: Moments, domain: str = "photographs", **changes) -> Alignment:
    """A fit whose images are these; of its texts nothing is asked here."""
    zeros_D = np.zeros(moments.embedding_dim)
    fit = Alignment(
        strategy=StrategyConfig(strategy="none"),
        affine=Affine(offset=zeros_D),
        text_centroid=zeros_D,
        image_centroid=moments.centroid,
        drifted_centroids=np.empty((0, moments.embedding_dim)),
        text_trace=1.0,
        image_trace=moments.trace,
        num_texts=moments.count,
        num_images=moments.count,
        domain=domain,
        text_encoder=ENCODER,
        image_encoder=ENCODER,
        modality_gap=ModalityGap(before=1.0, after=0.0, before_standard_error=0.1, after_standard_error=0.1),
        text_centroid_standard_error=0.0,
        image_centroid_standard_error=moments.centroid_standard_error,
        drifted_centroid_standard_error=0.0,
        inputs=FitInputs(texts=("texts",), images=("images",)),
    )
    return replace(fit, **changes)


@cache
def fit(shift: float = 0.0, domain: str = "photographs") -> Alignment:
    return fit_of(of_block(images(20_000, seed=1, shift=shift))[0], domain)


def served(rows_ND: np.ndarray, batch: int = 20, **settings) -> Drift:
    monitored = Drift(fit(), **settings)
    for start in range(0, len(rows_ND), batch):
        monitored.add(rows_ND[start : start + batch])
    return monitored


# --- the distance and what chance makes of it -------------------------------------------------------------


def test_the_report_is_the_closed_form():
    rows_ND = images(640, seed=2)
    report = served(rows_ND).report()
    exact_ND = rows_ND.astype(np.float64)
    exact_ND /= np.linalg.norm(exact_ND, axis=1, keepdims=True)
    mean_D = exact_ND.mean(0)
    assert report["num_images"] == 640
    assert report["centroid_distance"] == pytest.approx(
        np.linalg.norm(mean_D - fit().image_centroid), rel=1e-9
    )
    assert report["trace"] == pytest.approx(np.mean(np.sum((exact_ND - mean_D) ** 2, axis=1)), rel=1e-9)
    assert report["trace_ratio"] == pytest.approx(report["trace"] / fit().image_trace)
    assert report["fit_trace"] == fit().image_trace
    floor = math.sqrt(fit().image_trace * 20_000 / 19_999 * (1 / 640 + 1 / 20_000))
    assert report["sampling_floor"] == pytest.approx(floor)


def test_the_floor_is_the_root_mean_square_distance():
    """Over 400 draws from a population: within 10 %, where the mean of squares itself varies by about 4 %."""
    population_ND = images(50_000, seed=3).astype(np.float64)
    own = fit_of(of_block(population_ND)[0], num_images=10**9)  # a fit that knows the population
    generator = np.random.default_rng(4)
    draws = generator.integers(len(population_ND), size=(400, 100))
    squares = np.sum((population_ND[draws].mean(1) - own.image_centroid) ** 2, axis=1)
    assert math.sqrt(squares.mean()) == pytest.approx(
        sampling_floor(own.image_trace, own.num_images, 100), rel=0.1
    )


@pytest.mark.parametrize("num_images", [60, 1000, 15_000])
def test_images_like_the_fit_s_are_called_so(num_images):
    report = served(images(num_images, seed=5)).report()
    assert report["verdict"] == ALIKE
    assert report["centroid_distance"] < 2 * report["sampling_floor"]
    assert report["nearest"] is None


@pytest.mark.parametrize("num_images", [60, 1000])
def test_images_from_elsewhere_have_drifted(num_images):
    report = served(images(num_images, seed=6, shift=1.5)).report()
    assert report["verdict"] == DRIFTED
    assert report["centroid_distance"] > 3 * report["sampling_floor"]


def test_few_images_are_not_judged():
    report = served(images(MIN_ROWS - 1, seed=6, shift=5.0)).report()
    assert report["verdict"] == TOO_FEW
    assert report["centroid_distance"] > 0
    assert report["nearest"] is None


def test_what_is_beyond_chance_but_tiny_is_alike():
    """A million images resolve a shift of 0.01: three floors, and far below what matters."""
    near = fit_of(of_block(images(20_000, seed=1))[0], num_images=10**9)
    moved_D = near.image_centroid.copy()
    moved_D[0] += 0.01
    monitored = Drift(replace(near, image_centroid=moved_D), window=10**7)
    for _ in range(50):
        monitored.add(images(20_000, seed=1))
    report = monitored.report()
    assert report["centroid_distance"] > 3 * report["sampling_floor"]
    assert report["verdict"] == ALIKE


def test_the_jackknife_sees_that_neighbours_are_alike():
    """Ten copies of each image tell no more than one: the standard error stays, while the floor, made for
    independent images, falls."""
    rows_ND = images(1600, seed=7, shift=1.5)
    once = served(rows_ND, batch=5).report()
    copies = served(np.repeat(rows_ND, 10, axis=0), batch=50).report()
    assert copies["centroid_distance"] == pytest.approx(once["centroid_distance"], rel=1e-6)
    assert copies["standard_error"] == pytest.approx(once["standard_error"], rel=1e-6)
    assert copies["sampling_floor"] < once["sampling_floor"]
    # 16 groups give a standard error to about 1 / sqrt(2 * 15) = 18 %; twice that.
    spread = np.std(
        [served(images(1600, seed=s, shift=1.5)).report()["centroid_distance"] for s in range(40)]
    )
    assert once["standard_error"] == pytest.approx(spread, rel=0.4)


# --- moments ----------------------------------------------------------------------------------------------


def test_two_monitors_merged_are_one():
    """In either order, to the bit: the moments are exact sums of the blocks'."""
    rows_ND = images(900, seed=8)
    blocks = [(rows_ND[start : start + 30], number) for number, start in enumerate(range(0, 900, 30))]
    parts = [of_block(block, offset=number % NUM_BUCKETS)[0] for block, number in blocks]
    whole, left, right = Drift(fit()), Drift(fit()), Drift(fit())
    for part, (block, _) in zip(parts, blocks, strict=True):
        whole.add(block)
        left.merge(part)
    for part in reversed(parts):
        right.merge(part)
    assert whole.report() == left.report() == right.report()
    one, other = served(rows_ND[:450], batch=30).moments(), served(rows_ND[450:], batch=30).moments()
    assert one
    assert other
    both = Drift(fit())
    both.merge(one)
    both.merge(other)
    for key in ("num_images", "centroid_distance", "trace", "sampling_floor", "verdict"):
        assert both.report()[key] == whole.report()[key]


def test_what_is_merged_stays_as_it_was():
    moments = of_block(images(10, seed=1))[0]
    monitored = Drift(fit())
    monitored.merge(moments)
    monitored.add(images(10, seed=2))
    assert moments.count == 10
    report = monitored.report()
    assert monitored.report() == report, "reporting changes nothing"


def test_only_the_last_images_count():
    monitored = served(images(5000, seed=9, shift=3.0), window=1000)
    assert monitored.report()["verdict"] == DRIFTED
    assert 1000 <= monitored.report()["num_images"] <= 1125 + 20
    for start in range(0, 1200, 20):
        monitored.add(images(1200, seed=10)[start : start + 20])
    assert monitored.report()["verdict"] == ALIKE


def test_rows_without_a_direction_are_counted_apart():
    rows_ND = images(60, seed=11)
    rows_ND[3], rows_ND[4] = np.nan, 0
    report = served(rows_ND).report()
    assert (report["num_images"], report["num_invalid"]) == (58, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_dtype_and_length_of_rows(dtype):
    rows_ND = images(200, seed=12)
    # float16 keeps 11 bits: the mean of 200 rows errs by less than 2^-11.
    plain, scaled = served(rows_ND).report(), served((rows_ND * 3).astype(dtype)).report()
    assert scaled["centroid_distance"] == pytest.approx(plain["centroid_distance"], abs=5e-4)


def test_before_the_first_image_there_is_nothing():
    report = Drift(fit()).report()
    assert (report["verdict"], report["num_images"], report["trace"]) == (TOO_FEW, 0, None)
    empty = Drift(fit())
    empty.add(np.empty((0, DIM), np.float32))
    assert empty.report() == report


def test_without_a_fit_there_is_a_trace_and_no_verdict():
    monitored = Drift(None)
    monitored.add(images(100, seed=1))
    report = monitored.report()
    assert (report["verdict"], report["centroid_distance"]) == (NO_FIT, None)
    assert 0 < report["trace"] < 1


@pytest.mark.parametrize("num_images", [0, 1, 60, 500])
def test_a_report_is_json(num_images):
    json.dumps(served(images(num_images, seed=1), others=[fit(2.0, "x-rays")]).report(), allow_nan=False)


def test_another_dimension_is_refused():
    with pytest.raises(AlignmentError, match="embedding_dim 12, the fit has 24"):
        Drift(fit()).add(np.ones((3, 12), np.float32))


# --- other fits -------------------------------------------------------------------------------------------


def test_a_nearer_fit_is_named():
    monitored = served(
        images(400, seed=13, shift=2.0), others=[fit(-2.0, "paintings"), fit(2.0, "x-rays"), fit(1.0, "maps")]
    )
    report = monitored.report()
    assert report["nearest"]["domain"] == "x-rays"
    assert report["nearest"]["centroid_distance"] < report["centroid_distance"]
    assert "'x-rays'" in report["nearest"]["hint"]


def test_no_hint_where_the_own_fit_is_nearest():
    assert served(images(400, seed=14), others=[fit(2.0, "x-rays")]).report()["nearest"] is None


def test_a_fit_that_is_nearer_by_chance_is_not_named():
    """Two fits of the same distribution: one of them is nearer, by less than the floor."""
    twin = fit_of(of_block(images(20_000, seed=15))[0], "twin")
    assert served(images(400, seed=16), others=[twin]).report()["nearest"] is None


def test_fits_of_another_encoder_are_refused():
    stranger = replace(
        fit(), image_encoder=EncoderIdentity(name="other", fingerprint="0" * 64), domain="maps"
    )
    with pytest.raises(AlignmentError, match=r"'maps'.*image encoder other"):
        Drift(fit(), [stranger])
    with pytest.raises(AlignmentError, match="'maps' has embedding_dim 12"):
        Drift(fit(), [fit_of(of_block(images(100, seed=1)[:, :12])[0], "maps")])
    unknown = replace(fit(2.0), image_encoder=EncoderIdentity())
    assert Drift(fit(), [unknown]).others == [unknown], "an unknown encoder is taken at the user's word"


# --- the deployment's class -------------------------------------------------------------------------------


def test_the_monitor_reads_fits_and_sets_the_gauges(tmp_path, monkeypatch):
    seen, exported = {}, f"ray_{SERVE_PREFIX}"

    def record(self, value, tags=None):
        seen[self.exported.removeprefix(exported)] = value

    monkeypatch.setattr(drift, "_PUBLISH_S", 0.05)
    monkeypatch.setattr("revision_ray.core.observe.Gauge.set", record)
    uris = []
    for name, each in (("own", fit()), ("other", fit(2.0, "x-rays"))):
        uris.append(str(tmp_path / name))
        moments = of_block(images(100, seed=1))[0]
        save_alignment(each, moments, moments, uris[-1])

    async def serve() -> dict:
        monitor = DriftMonitor(uris[0], uris[1:])
        for start in range(0, 400, 8):
            await monitor.add(images(400, seed=13, shift=2.0)[start : start + 8])
        assert seen == {}, "gauges are set at intervals, not with every batch"
        await asyncio.sleep(0.2)
        return await monitor.report()

    report = asyncio.run(serve())
    assert (report["verdict"], report["nearest"]["domain"]) == (DRIFTED, "x-rays")
    assert seen == {
        "drift_images": 400,
        "drift_centroid_distance": report["centroid_distance"],
        "drift_sampling_floor": report["sampling_floor"],
        "drift_trace_ratio": report["trace_ratio"],
    }


def test_the_monitor_of_a_fit_that_is_not_there_says_so(tmp_path):
    with pytest.raises(AlignmentError, match=r"jobs/fit\.py"):
        DriftMonitor(str(tmp_path / "none"))
