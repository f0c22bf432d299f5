"""Gap dynamics: a frame that freezes, its record and figure, a monitor that training does not notice."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import MONITOR, lines, write_world
from tensorboardX.proto.event_pb2 import Event

from revision_ray.core import config
from revision_ray.core.errors import ConfigError, DataError, OutputError
from revision_ray.geometry.dynamics import GapDynamics, Gradients, Residuals, averaged
from revision_ray.geometry.fixed_frame import leak_ref, reference_frame
from revision_ray.report import dynamics_figure
from revision_ray.train import dual_encoder
from revision_ray.train.contrastive import EncoderTraining, learning_rate, train_encoder
from revision_ray.train.monitor import MonitorConfig

N, D, RANK = 400, 12, 4
SCALES = np.array([0.3] * RANK + [0.03] * (D - RANK))  # U is where this is large


def unit(rows_ND):
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def rotation(seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def pairs(seed, offset_D, turn_DD=None):
    """Unit rows: shared content, noise of their own, images `offset_D` away; `turn_DD` turns it all."""
    rng = np.random.default_rng(seed)
    base_D = np.zeros(D)
    base_D[-1] = 1.0
    content_ND = rng.normal(size=(N, D)) * SCALES
    sides = [content_ND + rng.normal(size=(N, D)) * SCALES / 3 + base_D + side * offset_D for side in (1, 0)]
    return [unit(side if turn_DD is None else side @ turn_DD.T) for side in sides]


def offset(in_u, in_v):
    """A mean gap with these parts along one direction of U and one of V, about: rows go to the sphere."""
    offset_D = np.zeros(D)
    offset_D[0], offset_D[RANK] = in_u, in_v
    return offset_D


def gradients_of(rows_ND, num_batches=4):
    batches = rows_ND.reshape(num_batches, -1, rows_ND.shape[1])
    second = np.mean([batch.T @ batch / len(batch) for batch in batches], axis=0)
    centred = np.mean([np.cov(batch.T, bias=True) for batch in batches], axis=0)
    return Gradients(image_DD=second, text_DD=second, covariance_DD=2 * centred, num_batches=num_batches)


def dynamics_of(**settings) -> GapDynamics:
    defaults = {"freeze_step": 20, "energy": 0.9, "kappa_energy": 0.99, "top_components": 8, "late_window": 3}
    return GapDynamics(**{**defaults, **settings})


def watched(dynamics, steps=range(0, 60, 10)):
    """Records of a drift in V only; gradients within U and V alike."""
    rng = np.random.default_rng(9)
    records = []
    for step in steps:
        gradients = gradients_of(rng.normal(size=(N, D)) * SCALES) if step else None
        records.append(dynamics.observe(step, *pairs(step, offset(0.2, 0.3 + step / 200)), gradients))
    return records


# --- records ----------------------------------------------------------------------------------------------


def test_the_identities_hold_on_every_record():
    """Sums of a few hundred terms near one in float64; the parts add up to the whole in each record."""
    for record in watched(dynamics_of()):
        assert record["identity_error"] <= 1e-10
        parts = record["gap_norm"] ** 2 + record["trace_delta"] + record["trace_zeta"]
        assert record["mean_squared_gap"] == pytest.approx(parts, abs=1e-10)
        biases = record["beta_norm"] ** 2 + record["gamma_norm"] ** 2
        assert record["gap_norm"] ** 2 == pytest.approx(biases, abs=1e-10)


def test_a_record_is_json_and_says_what_it_cannot_know():
    first, *_, last = watched(dynamics_of())
    for record in (first, last):
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(first) == set(last)
    unknown = {name for name, value in first.items() if value is None}
    assert unknown == {
        "frozen_at", "pob_drift", "pmb_drift", "pob_stability", "leak_ref", "leak_ref_image", "leak_ref_text",
        "rho_eig", "gradient_eigenvalues", "late",
    }  # fmt: skip
    assert {name for name, value in last.items() if value is None} == set()
    assert len(last["delta_eigenvalues"]) == last["rank"]
    assert len(last["zeta_eigenvalues"]) == min(8, D - last["rank"])


def test_the_basis_follows_until_the_freeze_and_then_stays():
    """Every probe lies in another orientation; an unfrozen frame turns with it."""
    dynamics = dynamics_of(freeze_step=15)
    frames, records = [], []
    for step in (0, 10, 20, 30, 40):  # 20 is the first probe at or behind 15
        records.append(dynamics.observe(step, *pairs(1, offset(0.2, 0.3), rotation(step)), None))
        frames.append((dynamics.frame.u_DR.copy(), dynamics.frame.v_DS.copy()))
    assert [record["frozen"] for record in records] == [False, False, True, True, True]
    assert {record["frozen_at"] for record in records[2:]} == {20}
    for former, later in ((0, 1), (1, 2)):
        assert np.abs(frames[former][0] - frames[later][0]).max() > 0.1
    for later in (3, 4):
        np.testing.assert_array_equal(frames[2][0], frames[later][0])
        np.testing.assert_array_equal(frames[2][1], frames[later][1])
    # An angle is known to about sqrt(eps) where it is zero.
    assert [record["sin_theta"] < 1e-7 for record in records] == [True, True, True, False, False]


def test_the_drift_of_gamma_is_the_one_that_was_put_in():
    """All rows turn within V: gamma turns with them, and U sees nothing of it."""
    dynamics = dynamics_of(freeze_step=0)
    image_ND, text_ND = pairs(3, offset(0.2, 0.3))
    dynamics.observe(0, image_ND, text_ND, None)
    v_DS = dynamics.frame.v_DS
    gamma_D = v_DS @ (v_DS.T @ (image_ND.mean(0) - text_ND.mean(0)))
    turn_DD = turned_in_v(v_DS, 0.4)
    record = dynamics.observe(10, image_ND @ turn_DD.T, text_ND @ turn_DD.T, None)
    turned_D = turn_DD @ gamma_D
    drift = np.linalg.norm(turned_D - gamma_D) / np.linalg.norm(gamma_D)
    cosine = turned_D @ gamma_D / (gamma_D @ gamma_D)
    assert drift > 0.01
    assert record["pob_drift"] == pytest.approx(drift, abs=1e-10)
    assert record["pob_stability"] == pytest.approx(cosine, abs=1e-10)
    assert record["pmb_drift"] == pytest.approx(0, abs=1e-10)
    assert record["sin_theta"] < 1e-7


def turned_in_v(v_DS, angle):
    """The rotation by `angle` in the plane of the first and last basis vector of V."""
    first_D, second_D = v_DS[:, 0], v_DS[:, -1]
    plane = np.outer(second_D, first_D) - np.outer(first_D, second_D)
    projector = np.outer(first_D, first_D) + np.outer(second_D, second_D)
    return np.eye(D) + np.sin(angle) * plane + (np.cos(angle) - 1) * projector


def test_moments_of_gradients_leak_as_the_gradients_do():
    image_ND, text_ND = pairs(0, offset(0.2, 0.3))
    frame = reference_frame(image_ND, text_ND, 0.9)
    gradient_ND = np.random.default_rng(1).normal(size=(N, D)) * SCALES
    shares = np.linalg.norm(gradient_ND @ frame.v_DS) / np.linalg.norm(gradient_ND)
    # Squares of sums in another order, then a root.
    assert leak_ref(gradient_ND.T @ gradient_ND / N, frame) == pytest.approx(shares, rel=1e-12)
    inside_ND = gradient_ND @ frame.u_DR @ frame.u_DR.T
    assert leak_ref(inside_ND.T @ inside_ND, frame) < 1e-7
    assert leak_ref(np.eye(D), frame) == pytest.approx(np.sqrt((D - frame.rank) / D))


def test_gradients_with_the_residuals_spectrum_correlate_fully():
    dynamics = dynamics_of(freeze_step=0)
    image_ND, text_ND = pairs(0, offset(0.2, 0.3))
    gap_ND = image_ND - text_ND
    record = dynamics.observe(0, image_ND, text_ND, gradients_of(7.0 * gap_ND, num_batches=1))
    assert record["rho_eig"] == pytest.approx(1, abs=1e-12)
    ratio = np.array(record["gradient_eigenvalues"]) / record["delta_eigenvalues"]
    np.testing.assert_allclose(ratio, 2 * 49.0, rtol=1e-10)


def test_late_covariances_are_averaged_and_never_pooled():
    """A mean that moves between probes adds nothing to the average; pooled rows would gain its variance."""
    dynamics = dynamics_of(late_window=3)
    records = watched(dynamics, range(0, 80, 10))
    late = records[-1]["late"]
    assert late["num_probes"] == 3
    assert late["trace_zeta"] == pytest.approx(np.mean([r["trace_zeta"] for r in records[-3:]]), rel=1e-12)
    pooled = np.concatenate(
        [np.subtract(*pairs(step, offset(0.2, 0.3 + step / 200))) for step in (50, 60, 70)]
    )
    frame = dynamics.frame
    assert np.trace(np.cov((pooled @ frame.v_DS).T, bias=True)) > 1.05 * late["trace_zeta"]
    assert records[1]["late"] is None
    assert records[2]["late"]["num_probes"] == 1  # the freeze itself, step 20


def test_an_average_takes_gradients_from_the_probes_that_have_them():
    def residuals(gradient_RR):
        return Residuals(gamma_S=np.ones(2), delta_RR=np.eye(3), zeta_SS=np.eye(2), gradient_RR=gradient_RR)

    found = averaged([residuals(None), residuals(np.eye(3)), residuals(3 * np.eye(3))])
    np.testing.assert_array_equal(found.gradient_RR, 2 * np.eye(3))
    assert averaged([residuals(None)]).gradient_RR is None


def test_embeddings_of_a_training_that_diverged_are_refused():
    image_ND, text_ND = pairs(0, offset(0.2, 0.3))
    image_ND[3, 2] = np.nan
    with pytest.raises(DataError, match=r"step 30: .*diverged"):
        dynamics_of().observe(30, image_ND, text_ND, None)


# --- figure -----------------------------------------------------------------------------------------------


def test_the_figure_is_drawn_from_the_file_alone_and_marks_the_freeze(tmp_path):
    records = [{**record, "train_loss": 1.0} for record in watched(dynamics_of())]
    uri = tmp_path / "dynamics.jsonl"
    uri.write_text("".join(json.dumps(record) + "\n" for record in records))
    png, _ = dynamics_figure.draw_file(str(uri), str(tmp_path / "figure"))
    assert Image.open(png).size[0] > 1000
    drawn = (tmp_path / "figure.svg").read_text()
    for words in ("frozen at step 20", "step of the optimizer", "leak_ref", "Euclidean norm", "degrees"):
        assert words in drawn, words
    corner = Image.open(png).convert("RGB").getpixel((1, 1))
    assert corner == (255, 255, 255)
    again = dynamics_figure.draw(dynamics_figure.read_records(str(uri)))
    assert again["svg"] == (tmp_path / "figure.svg").read_bytes()
    assert again["png"] == (tmp_path / "figure.png").read_bytes()


def test_a_run_that_was_cut_off_at_once_has_a_figure_too(tmp_path):
    [record] = watched(dynamics_of(), [0])
    assert dynamics_figure.draw([record])["png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", '{"step": 1}\n', "not json\n"])
def test_a_file_without_records_is_refused(tmp_path, content):
    (tmp_path / "dynamics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"dynamics\.jsonl"):
        dynamics_figure.read_records(str(tmp_path / "dynamics.jsonl"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directories of 64 pairs and of 60 held-out pairs of the miniature world."""
    return write_world(tmp_path_factory.mktemp("world"), 64, 60)


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": -1}, "expected 0"),
        ({"every_steps": 4, "gradient_batches": 5}, "only monitor.every_steps=4 batches"),
        ({"energy": 1.0}, "less than 1"),
        ({"late_window": 0}, "expected 1 or more"),
    ],
)
def test_a_monitor_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MonitorConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probe": 61}, "holds only 60 pairs"),
        ({"num_probe": 32}, "no full covariance in 32"),
        ({"freeze_step": 12}, "would never be frozen"),
    ],
)
def test_a_run_that_cannot_be_measured_so_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MONITOR, **settings).check(num_steps=12, num_heldout=60, embedding_dim=32)
    dataclasses.replace(MonitorConfig(), **settings).check(num_steps=12, num_heldout=60, embedding_dim=32)


def test_the_rate_falls_to_its_minimum_and_warms_up_by_ratio():
    training = EncoderTraining(
        data=["x"], heldout=["x"], output="x",
        num_steps=100, learning_rate=1.0, minimum_learning_rate=0.1, warmup_ratio=0.1,
    )  # fmt: skip
    rates = [learning_rate(training, step) for step in range(101)]
    assert rates[:11] == pytest.approx([*np.arange(1, 11) / 10, 1.0])
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)  # half way down
    with pytest.raises(ConfigError, match="minimum_learning_rate"):
        dataclasses.replace(training, minimum_learning_rate=2.0)
    with pytest.raises(ConfigError, match="warmup_ratio"):
        dataclasses.replace(training, warmup_ratio=1.0)


def test_the_papers_preset_builds_towers_of_its_size():
    """40 M and 19 M parameters, the token embedding apart (arXiv 2602.07026 sec. 3)."""
    training = config.load(
        EncoderTraining, ["configs/train_encoder_tinyclip.yaml", "data=[x]", "heldout=[x]", "output=x"]
    )
    with torch.device("meta"):
        model = dual_encoder.build_model(
            dual_encoder.model_config(training.model, 30000, None), training.temperature
        )
    assert sum(p.numel() for p in model.visual.parameters()) == pytest.approx(40e6, rel=0.02)
    assert sum(p.numel() for p in model.transformer.parameters()) == pytest.approx(19e6, rel=0.02)
    training.monitor.check(training.num_steps, 200_000, 512)
    assert learning_rate(training, training.num_steps) == pytest.approx(1e-4)


# --- training on a cluster --------------------------------------------------------------------------------

PLAIN = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 26, "width": 64, "heads": 2, "layers": 1},
}
"""A residual network: its batch normalisation would show a probe that changes running averages."""


@pytest.mark.slow
def test_training_does_not_notice_the_monitor(cluster, world, tmp_path):
    """Training with a monitor has the bits of training without; its record is whole.

    Losses and weights equal to the bit; the record is whole, replaces an old one, goes to TensorBoard."""
    (tmp_path / "plain.json").write_text(json.dumps(PLAIN))
    training = EncoderTraining(
        data=[str(world / "pairs")], heldout=[str(world / "heldout")], output=str(tmp_path / "without"),
        model=str(tmp_path / "plain.json"), num_steps=7, global_batch_size=32, warmup_steps=2,
        cpus_per_worker=1.0,
    )  # fmt: skip
    watched = dataclasses.replace(training, output=str(tmp_path / "with"), monitor=MONITOR)
    (tmp_path / "with").mkdir()
    (tmp_path / "with/dynamics.jsonl").write_text('{"step": 0, "of": "a run that died"}\n')
    plain, _ = train_encoder(training)
    metrics, trained = train_encoder(watched)
    assert trained
    # Encoders from before these settings are known again.
    assert not {"monitor", "warmup_ratio", "minimum_learning_rate"} & metrics["identity"].keys()
    for name in ("identity", "first_loss", "last_loss", "heldout"):
        assert metrics[name] == plain[name]
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]

    records = lines(tmp_path / "with/dynamics.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4, 6, 7]
    assert [record["gradient_batches"] for record in records] == [0, 2, 2, 2, 1]
    assert [record["frozen"] for record in records] == [False, True, True, True, True]
    assert records[0]["train_loss"] is None
    assert records[1]["train_loss"] > 0
    assert all(record["identity_error"] <= 1e-10 for record in records)
    assert all(0 < record["leak_ref"] < 1 for record in records[1:])
    assert (tmp_path / "with/dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert b"frozen at step 2" in (tmp_path / "with/dynamics.svg").read_bytes()
    assert not (tmp_path / "without/dynamics.jsonl").exists()
    found = events_in(tmp_path / "with/tensorboard")
    assert found["dynamics/leak_ref"] == pytest.approx(
        {record["step"]: record["leak_ref"] for record in records[1:]}
    )
    assert set(found["dynamics/late/kappa_eff_u"]) == {2, 4, 6, 7}

    assert train_encoder(watched) == (metrics, False)
    assert train_encoder(dataclasses.replace(watched, monitor=MonitorConfig())) == (metrics, False)
    with pytest.raises(OutputError, match=r"monitor.*measured"):
        train_encoder(dataclasses.replace(training, monitor=MONITOR))


def events_in(folder) -> dict[str, dict[int, float]]:
    """name -> step -> value of the scalars in TensorBoard's event files."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.*"):
        stream = io.BytesIO(path.read_bytes())
        while header := stream.read(12):
            event = Event.FromString(stream.read(int.from_bytes(header[:8], "little")))
            stream.read(4)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found
