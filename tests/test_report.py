"""The report: its figures against arithmetic, its page, its bits, and what it says of inputs at fault."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from embedding_stores import cloud, unit, write_store

from revision_ray.align import fit
from revision_ray.align.alignment import load_alignment
from revision_ray.align.fit import FitJob
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, OutputError
from revision_ray.data.shards import EncoderIdentity
from revision_ray.data.store import open_stores
from revision_ray.report import claims, figures, plots, report
from revision_ray.report.measure import PAIRED
from revision_ray.report.metrics import METRICS, quoted, shown
from revision_ray.report.report import ReportJob
from revision_ray.report.sample import ReportSources, draw_pairs, draw_rows
from revision_ray.report.verdict import verdict

DIM = 16
# Small but complete: neighbours, intervals and spectra of a few hundred rows.
QUICK = {"num_bootstrap": 20, "num_cosines": 5000, "num_heldout": 400}


def pair_clouds(num_rows: int, dim: int = DIM, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """float32 (N, D) twice: row i of both is of one scene, seen from two sides of a gap."""
    generator = np.random.default_rng(seed)
    spread_D = np.arange(1, dim + 1) ** -0.6
    scene_ND = generator.standard_normal((num_rows, dim)) * spread_D
    sides = []
    for at in (0, 1):
        offset_D = np.zeros(dim)
        offset_D[at] = 1.5
        sides.append(unit(scene_ND + 0.3 * generator.standard_normal((num_rows, dim)) * spread_D + offset_D))
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


@pytest.fixture(scope="module")
def stores(cluster, tmp_path_factory) -> dict[str, str]:
    """Unpaired texts and images, held-out pairs, and fits of the unpaired ones."""
    folder = tmp_path_factory.mktemp("stores")
    texts_ND, images_ND = pair_clouds(1500, seed=1)[0], pair_clouds(1200, seed=2)[1]
    held_texts_ND, held_images_ND = pair_clouds(300, seed=3)
    ids = [f"pair{row}" for row in range(300)]
    found = {
        "texts": write_store(folder / "texts", texts_ND),
        "images": write_store(folder / "images", images_ND, "image"),
        "heldout_texts": write_store(folder / "held_texts", held_texts_ND, ids=ids),
        "heldout_images": write_store(folder / "held_images", held_images_ND[::-1], "image", ids=ids[::-1]),
    }
    for name in ("anchor", "realign"):
        uri = str(folder / "fits" / name)
        fit.run_fit(FitJob(texts=found["texts"], images=found["images"], strategy=name, output=uri))
        found[name] = uri
    return found


def job_of(stores: dict[str, str], output, **settings) -> ReportJob:
    keys = ("texts", "images", "heldout_texts", "heldout_images")
    given = {"alignments": [stores["anchor"], stores["realign"]], **{key: stores[key] for key in keys}}
    return ReportJob(**{**given, **QUICK, **settings, "output": str(output)})


def unpaired(stores: dict[str, str], output, **settings) -> ReportJob:
    return job_of(stores, output, **{"heldout_texts": None, "heldout_images": None, **settings})


def read(output) -> dict:
    return storage.read_json(str(Path(output) / report.DOCUMENT))


def column(document: dict, label: str) -> dict:
    return next(entry["figures"] for entry in document["strategies"] if entry["label"] == label)


@pytest.fixture(scope="module")
def paired_report(stores, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "paired"
    report.run_report(job_of(stores, output))
    return output


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """For tests that look at numbers and words alone: drawing takes most of the time."""
    patch.setattr(report.figures, "every_figure", lambda document: [])
    patch.setattr(report.figures, "before_and_after", lambda document: None)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def unpaired_report(stores, tmp_path_factory) -> Path:
    """Without figures."""
    output = tmp_path_factory.mktemp("report") / "unpaired"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        report.run_report(unpaired(stores, output))
    return output


# --- figures ----------------------------------------------------------------------------------------------


def test_the_gap_is_that_of_the_fits_arithmetic(stores, unpaired_report):
    """On the rows of the fit: same rows, same map, same sums."""
    document = read(unpaired_report)
    for label in ("anchor", "realign"):
        expected = load_alignment(stores[label]).modality_gap.after
        assert column(document, label)["modality_gap"]["value"] == pytest.approx(expected, abs=1e-12)
        assert column(document, label)["fit_gap"]["value"] == expected
    before = load_alignment(stores["realign"]).modality_gap.before
    assert column(document, "none")["modality_gap"]["value"] == pytest.approx(before, abs=1e-12)


def test_the_gap_of_held_out_rows_is_that_of_numpy(stores, paired_report):
    document = read(paired_report)
    held = [open_stores([stores[f"heldout_{side}s"]], side) for side in ("text", "image")]
    text, image = (draw_rows(store, 10_000, 0) for store in held)
    affine = load_alignment(stores["realign"]).affine
    aligned_ND = affine.apply(text.stored_ND)[0].astype(np.float64)
    expected = np.linalg.norm(image.unit_ND.mean(axis=0) - aligned_ND.mean(axis=0))
    found = column(document, "realign")["modality_gap"]
    # `apply` rounds to float32, the moments do not.
    assert found["value"] == pytest.approx(expected, abs=1e-7)
    assert found["n"] == 300
    assert found["value"] < column(document, "none")["modality_gap"]["value"] / 5


def test_every_figure_is_there_for_every_strategy(paired_report):
    document = read(paired_report)
    assert [entry["label"] for entry in document["strategies"]] == ["none", "anchor", "realign"]
    for entry in document["strategies"]:
        missing = set(METRICS) - set(entry["figures"])
        assert missing == (set() if entry["strategy"] != "none" else {"fit_gap"})
        absent = {key for key, cell in entry["figures"].items() if cell["value"] is None}
        drift = {key for key in METRICS if key.startswith("drift")}
        assert absent == (drift if entry["strategy"] == "none" else set())


def test_the_parts_of_the_gap_add_up(paired_report):
    for entry in read(paired_report)["strategies"]:
        value = {key: cell["value"] for key, cell in entry["figures"].items()}
        parts = value["beta"] ** 2 + value["gamma"] ** 2 + value["delta_trace"] + value["zeta_trace"]
        # All 300 pairs are all rows; the moments are of float64 rows, the pairs of float32 ones.
        assert value["squared_distance"] == pytest.approx(parts, rel=1e-5)
        assert value["identity_error"] <= 1e-10
        assert value["beta"] ** 2 + value["gamma"] ** 2 == pytest.approx(value["modality_gap"] ** 2, rel=1e-9)


def test_intervals_hold_the_means_they_are_of(paired_report):
    for entry in read(paired_report)["strategies"]:
        for key in ("mixing_rate", "neighbourhood_overlap", "pair_cosine", "residual_ratio", "delta_trace"):
            cell = entry["figures"][key]
            assert cell["low"] <= cell["value"] <= cell["high"], (entry["label"], key)
    raw = column(read(paired_report), "none")["modality_gap"]
    assert raw["low"] < raw["value"] < raw["high"]


def test_texts_as_they_are_keep_all_their_neighbours(paired_report):
    raw = column(read(paired_report), "none")
    assert raw["neighbourhood_overlap"]["value"] == raw["displacement_cosine"]["value"] == 1
    assert raw["cosine_correlation"]["value"] == pytest.approx(1)


def test_more_rows_narrow_the_interval_of_a_gap():
    from revision_ray.report.cells import gap_bounds

    rows_ND = unit(cloud(400, 6, "text"))
    gap_D = np.full(6, 0.3)
    wide, narrow = (
        gap_bounds(rows_ND, rows_ND[::-1], gap_D, (share, share), 200, 0) for share in (1.0, 0.01)
    )
    assert wide
    assert narrow
    # A hundred times the rows: a tenth of the width, but for the resamples' own error.
    assert (narrow[1] - narrow[0]) / (wide[1] - wide[0]) == pytest.approx(0.1, rel=0.05)


# --- samples and pairs ------------------------------------------------------------------------------------


def test_pairs_are_rows_of_the_same_id(stores):
    texts = open_stores([stores["heldout_texts"]], "text")
    images = open_stores([stores["heldout_images"]], "image")
    pairs = draw_pairs(texts, images, 100, 0)
    assert pairs
    assert pairs.text.ids == pairs.image.ids
    assert (len(set(pairs.text.ids)), pairs.num_matched) == (100, 300)
    rows = [int(name.removeprefix("pair")) for name in pairs.text.ids]
    texts_ND, images_ND = pair_clouds(300, seed=3)
    assert np.array_equal(pairs.text.stored_ND, texts_ND[rows])
    assert np.array_equal(pairs.image.stored_ND, images_ND[rows])


def test_pairs_do_not_depend_on_shards(stores, tmp_path):
    rows_ND = pair_clouds(300, seed=3)[0]
    ids = [f"pair{row}" for row in range(300)]
    other = write_store(tmp_path / "other", rows_ND, ids=ids, rows_per_shard=37)
    images = open_stores([stores["heldout_images"]], "image")
    drawn = [
        draw_pairs(open_stores([uri], "text"), images, 50, 3) for uri in (stores["heldout_texts"], other)
    ]
    assert drawn[0]
    assert drawn[1]
    assert drawn[0].text.ids == drawn[1].text.ids
    assert np.array_equal(drawn[0].text.stored_ND, drawn[1].text.stored_ND)


def test_a_sample_is_of_distinct_rows_of_the_store(stores):
    store = open_stores([stores["texts"]], "text")
    rows = draw_rows(store, 200, 1)
    assert len(set(rows.ids)) == 200
    texts_ND = pair_clouds(1500, seed=1)[0]
    assert np.array_equal(rows.stored_ND, texts_ND[[int(row_id.removeprefix("text")) for row_id in rows.ids]])


# --- the same inputs, the same report ---------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bits(stores, paired_report, tmp_path):
    report.run_report(job_of(stores, tmp_path / "again"))
    for name in (report.DOCUMENT, report.PAGE):
        assert (tmp_path / "again" / name).read_bytes() == (paired_report / name).read_bytes(), name


def test_a_finished_report_is_kept(stores, paired_report):
    place = paired_report / report.DOCUMENT
    before = place.stat().st_mtime_ns
    said = report.run_report(job_of(stores, paired_report))
    assert place.stat().st_mtime_ns == before
    assert str(paired_report / report.PAGE) in said


def test_an_output_of_another_report_is_refused(stores, paired_report):
    with pytest.raises(OutputError, match=r"seed was 0, is now 1"):
        report.run_report(job_of(stores, paired_report, seed=1))


def test_an_output_with_other_files_is_refused(stores, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        report.run_report(job_of(stores, tmp_path))


# --- what it says -----------------------------------------------------------------------------------------


def test_it_says_whether_rows_took_part_in_the_fit(paired_report, unpaired_report):
    held, seen = (read(output)["strategies"][-1]["held_out"] for output in (paired_report, unpaired_report))
    assert (held, seen) == (True, False)
    assert not any("took part" in text for text in read(paired_report)["limitations"])
    assert any("took part" in text for text in read(unpaired_report)["limitations"])


def test_unpaired_stores_say_what_pairs_would_show(unpaired_report):
    document = read(unpaired_report)
    for entry in document["strategies"]:
        assert {entry["figures"][key]["note"] for key in PAIRED} == {"needs paired rows"}
        assert all(entry["figures"][key]["value"] is None for key in PAIRED)
    assert any("no pairs" in text for text in document["limitations"])
    assert "needs pairs" in (unpaired_report / report.PAGE).read_text()
    drawn = {figure.name for figure in figures.every_figure(document)}
    assert drawn == {"strategies", "scatter", "cosines", "spectra", "drift"}


def probe_row(label: str, loss: float, half: float = 0.01) -> dict:
    ends = {"loss_low": loss - half, "loss_high": loss + half}
    return {"label": label, "strategy": label, "loss": loss, "accuracy": 0.8, **ends}


def test_the_verdict_rests_on_the_probe_where_there_is_one(paired_report):
    document = read(paired_report)
    alone = verdict(document, None)
    assert alone.rests_on == "geometry"
    rows = [probe_row("none", 1.4), probe_row("anchor", 0.9), probe_row("realign", 1.1)]
    told = verdict(document, rows)
    assert (told.trusted, told.rests_on) == ("anchor", "probe")
    close = verdict(document, [*rows[:2], probe_row("realign", 0.905)])
    assert "realign cannot be told from it" in close.paragraphs[-1]


def test_a_probe_is_read_as_the_study_writes_it(stores, tmp_path, undrawn):
    def scores(at: float) -> dict:
        return {"mean": at, "low": at - 0.1, "high": at + 0.1}

    found = {"nll": scores(1.0), "accuracy": scores(0.5)}
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"strategies": {"none": found, "given_mine": found}, "upper_bound": found}))
    report.run_report(job_of(stores, tmp_path / "report", probe=str(path)))
    document = read(tmp_path / "report")
    assert {row["label"] for row in document["probe"]["rows"]} == {"none", "mine"}
    assert document["verdict"]["rests_on"] == "probe"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"probe\.json"):
        report.run_report(job_of(stores, tmp_path / "other", probe=str(path)))


def test_claims_are_judged_over_replicates(stores, tmp_path, undrawn):
    """A second encoder whose texts lie on its images: the gap of one, and not of the other."""
    same_ND, _ = pair_clouds(800, seed=9)
    other = ReportSources(
        texts=write_store(tmp_path / "texts", same_ND[:400]),
        images=write_store(tmp_path / "images", same_ND[400:], "image"),
        alignments=[],
    )
    report.run_report(unpaired(stores, tmp_path / "report", replicates=[other]))
    claim = read(tmp_path / "report")["claims"][0]
    assert claim["supported"] == "partly"
    assert (claim["num_supporting"], claim["num_runs"]) == (1, 2)
    assert claim["reason"]
    gap = claim["figures"][0]
    assert gap["low"] < gap["mean"] < gap["high"]
    assert gap["mean"] == pytest.approx(sum(gap["values"]) / 2)


def test_a_claim_without_its_figures_is_not_judged(paired_report):
    rows = {row["claim"]: row for row in read(paired_report)["claims"]}
    row = rows["C3's isotropic noise flattens the spectrum."]
    assert (row["supported"], row["missing"], row["figures"]) == ("cannot be told", "needs a fit of c3", [])


def test_every_claim_names_figures_that_exist():
    for claim in claims.CLAIMS:
        assert {place.split(".")[1] for place in claim.needs.values()} <= {*METRICS, claims.PROBE_LOSS}
        named = {name for condition in claim.holds for name in (condition.figure, condition.other) if name}
        assert named
        assert named <= set(claim.needs)


@pytest.mark.parametrize(
    ("place", "holding", "failing"),
    [(0, {"gap": 0.31, "floor": 0.1}, {"gap": 0.3, "floor": 0.11}),
     (1, {"A_r": 3, "d_eff/d": 0.5}, {"A_r": 9, "d_eff/d": 0.51}),
     (5, {"R²": 0.3, "by chance": 0.21}, {"R²": 0.3, "by chance": 0.19}),
     (12, {"anchor": 3, "anchor_trace": 2, "realign": 1}, {"anchor": 3, "anchor_trace": 1, "realign": 2}),
     (14, {"none": 1.3, "realign": 1.21}, {"none": 1.3, "realign": 1.19}),
     (15, {"none": 1.3, "c3": 1.2}, {"none": 1.3, "c3": 1.3}),
     (19, {"blockwise": 0.4, "realign": 0.8}, {"blockwise": 0.41, "realign": 0.8}),
     (20, {"none": 3, "c3": 2, "realign": 1}, {"none": 1, "c3": 2, "realign": 3})],
)  # fmt: skip
def test_a_claim_holds_where_all_its_conditions_are_met(place, holding, failing):
    claim = claims.CLAIMS[place]
    assert set(holding) == set(failing) == set(claim.needs)
    assert (claims.holds(claim, holding), claims.holds(claim, failing)) == (True, False)


# --- bad input --------------------------------------------------------------------------------------------


def test_fewer_rows_than_dimensions_are_a_stated_limitation(cluster, tmp_path, undrawn):
    texts_ND, images_ND = pair_clouds(30, dim=40)
    ids = [str(row) for row in range(30)]
    job = ReportJob(
        texts=write_store(tmp_path / "texts", texts_ND, ids=ids),
        images=write_store(tmp_path / "images", images_ND, "image", ids=ids),
        alignments=[],
        output=str(tmp_path / "report"),
        **QUICK,
    )
    report.run_report(job)
    document = read(tmp_path / "report")
    assert any("30 texts in 40 dimensions" in text for text in document["limitations"])
    assert "without variance" in column(document, "none")["condition_number"]["note"]
    assert "eigenvalues" in column(document, "none")["spectral_correlation"]["note"]
    assert "No fit was given" in document["verdict"]["paragraphs"][0]


def test_a_side_that_does_not_vary_is_refused(stores, tmp_path):
    constant_ND = np.tile(unit(np.ones((1, DIM))), (50, 1)).astype(np.float32)
    images = write_store(tmp_path / "images", constant_ND, "image")
    with pytest.raises(AlignmentError, match=r"all 50 image embeddings .* are equal"):
        report.run_report(unpaired(stores, tmp_path / "report", images=images, alignments=[]))


def test_rows_off_the_sphere_are_scaled_and_counted(stores, paired_report, tmp_path, caplog, undrawn):
    rows_ND = pair_clouds(300, seed=3)[0]
    long_ND = rows_ND * np.linspace(1, 3, 300, dtype=np.float32)[:, None]
    ids = [f"pair{row}" for row in range(300)]
    long = write_store(tmp_path / "long", long_ND, ids=ids)
    report.run_report(job_of(stores, tmp_path / "report", heldout_texts=long))
    assert "not of length one" in caplog.text
    document = read(tmp_path / "report")
    assert any("not of length one" in text for text in document["limitations"])
    # Their directions are what they were, so is every figure: scaling rounds float32 rows once more.
    for key in ("modality_gap", "effective_rank", "pair_cosine"):
        one, other = (
            column(read(at), "realign")[key]["value"] for at in (tmp_path / "report", paired_report)
        )
        assert one == pytest.approx(other, rel=1e-5)


def test_rows_without_a_direction_fail_the_job_or_are_counted(stores, tmp_path, undrawn):
    rows_ND = pair_clouds(300, seed=3)[0].copy()
    rows_ND[7] = np.nan
    ids = [f"pair{row}" for row in range(300)]
    broken = write_store(tmp_path / "broken", rows_ND, ids=ids)
    with pytest.raises(DataError, match=r"1 of 300 rows were rejected \(1 x NaN\)"):
        report.run_report(job_of(stores, tmp_path / "strict", heldout_texts=broken))
    report.run_report(job_of(stores, tmp_path / "lenient", heldout_texts=broken, max_rejected_fraction=0.1))
    document = read(tmp_path / "lenient")
    assert column(document, "none")["modality_gap"]["n"] == 299
    assert document["measured_on"]["pairs"]["num"] == 299
    assert any("without a direction" in text for text in document["limitations"])


def test_fits_of_another_encoder_or_dimension_are_refused(stores, tmp_path):
    stranger = EncoderIdentity(name="other", fingerprint="0" * 64)
    texts_ND, images_ND = pair_clouds(100)
    others = {
        "texts": write_store(tmp_path / "texts", texts_ND, encoder=stranger),
        "images": write_store(tmp_path / "images", images_ND, "image", encoder=stranger),
    }
    with pytest.raises(AlignmentError, match="was made by encoder other"):
        report.run_report(unpaired(stores, tmp_path / "report", **others))
    with pytest.raises(AlignmentError, match="embed both with one encoder"):
        report.run_report(unpaired(stores, tmp_path / "report", texts=others["texts"]))
    narrow_ND = pair_clouds(100, dim=8)
    narrow = {
        "texts": write_store(tmp_path / "narrow_texts", narrow_ND[0]),
        "images": write_store(tmp_path / "narrow_images", narrow_ND[1], "image"),
    }
    with pytest.raises(AlignmentError, match="embedding_dim is 8, the fit's is 16"):
        report.run_report(unpaired(stores, tmp_path / "report", **narrow))


def test_held_out_stores_come_as_two(stores):
    with pytest.raises(ConfigError, match="both, or neither"):
        job_of(stores, "x", heldout_images=None)


# --- words and colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "percent", "expected"),
    [(0.5543, False, "0.554"), (2.64e-4, False, "2.6×10⁻⁴"), (12345.6, False, "12,346"), (0, False, "0"),
     (0.0435, True, "4.35 %"), (0.993, True, "99.3 %"), (24, False, "24"), (None, False, "–"),
     (3e8, False, "3.0×10⁸"), (float("inf"), False, "∞"), (57.5, False, "57.5")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, percent, expected):
    assert shown(value, percent) == expected


def test_figures_of_the_paper_keep_their_digits():
    assert (quoted(2.64e-4), quoted(0.0132), quoted(0.0435, True)) == ("2.64×10⁻⁴", "0.0132", "4.35 %")


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("style", [s for s in plots.EVERY if s not in (plots.LINE, *plots.PARTS)])
def test_every_curve_can_be_seen_on_light_and_on_dark(style):
    """3:1 is what WCAG 2.2 asks of graphics (1.4.11); grounds are the page's."""
    for colour, ground in ((style.light, "#fbfbf9"), (style.dark, "#11161c")):
        one, other = sorted((luminance(colour), luminance(ground)))
        assert (other + 0.05) / (one + 0.05) >= 3


def test_no_two_strategies_look_alike():
    looks = [(style.light, style.marker) for style in plots.OTHERS]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    fits = plots.styles([("a", "realign"), ("b", "realign"), ("c", "none")])
    assert fits["a"].light == fits["b"].light
    assert fits["a"].marker != fits["b"].marker


# --- the page ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page would load, its ids, headings, pictures and the text of its figures' captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.svgs: list[dict] = []
        self.figures = self.captions = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {key: value or "" for key, value in attrs}
        self.loads += [found[key] for key in ("src", "srcset", "data", "poster") if key in found]
        if tag == "link":
            self.loads.append(found["href"])
        if tag in ("a", "use"):
            self.links.append(found.get("href") or found.get("xlink:href", ""))
        self.ids += [found["id"]] if "id" in found else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        self.svgs += [found] if tag == "svg" else []
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"


@pytest.fixture(scope="module")
def page(paired_report) -> tuple[Page, str]:
    text = (paired_report / report.PAGE).read_text()
    return Page(text), text


def test_the_page_loads_nothing(page):
    parsed, text = page
    assert [uri for uri in parsed.loads if not uri.startswith("data:")] == []
    assert re.findall(r"https?://[^\s'\"<)]*|@import|url\((?!#)", text) == []


def test_every_figure_has_a_caption_and_every_picture_words(page):
    parsed, _ = page
    assert parsed.figures == parsed.captions >= 7
    assert len(parsed.svgs) >= 12
    for svg in parsed.svgs:
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20


def test_the_page_is_well_formed(page):
    parsed, _ = page
    assert len(parsed.ids) == len(set(parsed.ids)), "an id occurs twice"
    inner = {link.removeprefix("#") for link in parsed.links if link.startswith("#")}
    assert inner <= set(parsed.ids), "a link within the page leads nowhere"
    assert parsed.headings[0] == 1
    steps = [after - before for before, after in pairwise(parsed.headings)]
    assert max(steps) <= 1, "a level of headings is left out"


def test_colours_of_the_page_are_the_themes(page):
    _, text = page
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert not re.search(r"#[0-9a-f]{6}", "".join(svgs)), "a colour that is not the theme's"
    for style in plots.EVERY:
        assert f"--c-{style.name}: light-dark({style.light}, {style.dark});" in text
    dark = {style.light: style.dark for style in plots.EVERY}
    assert all(dark[style.light] == style.dark for style in plots.EVERY), "one colour, two dark ones"


def test_pictures_stand_beside_the_page(paired_report):
    names = sorted(path.name for path in (paired_report / report.FIGURES).iterdir())
    assert len(names) == 7
    for name in names:
        assert (paired_report / report.FIGURES / name).read_bytes().startswith(b"\x89PNG")
    assert (paired_report / report.CONFIG).exists()


def test_the_page_fits_every_screen_and_complains_of_nothing(paired_report, tmp_path):
    shutil.copy(paired_report / report.PAGE, tmp_path / "report.html")
    browser = Browser(tmp_path)
    try:
        for width, scheme in ((1280, "light"), (390, "dark")):
            browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                        mobile=width < 500)  # fmt: skip
            browser.cdp(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            browser.open((tmp_path / "report.html").as_uri())
            assert browser.run("return document.documentElement.scrollWidth") <= width
            ground = browser.run("return getComputedStyle(document.body).backgroundColor")
            browser.click("#theme")
            assert browser.run("return getComputedStyle(document.body).backgroundColor") != ground
        overlaps = browser.run(_OVERLAPS)
        assert overlaps == []
        assert browser.complaints() == []
    finally:
        browser.close()


# Pairs of texts of one panel whose boxes share more than a corner.
_OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll('figure svg')) {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, p] = boxes[i], [b, q] = boxes[j];
    const w = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const h = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    const where = svg.getAttribute('aria-label').slice(0, 30);
    if (a && b && w > 2 && h > 4) found.push(where + ': ' + a + ' / ' + b);
  }
}
return found;
"""
