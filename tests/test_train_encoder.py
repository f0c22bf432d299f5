"""Training a dual encoder: tokenizer, negatives of all workers, batches, a folder that open_clip loads."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import signal
import tarfile

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from small_world import write_world
from torch.nn.parallel import DistributedDataParallel

from revision_ray.core.errors import ConfigError, DataError, OutputError
from revision_ray.train import dual_encoder
from revision_ray.train.contrastive import EncoderTraining, learning_rate, train_encoder
from revision_ray.train.pairs import batch_rows, drawn_captions, pixels, read_pairs

CAPTIONS = ["a red circle", "A blue square, on grass", "two red stars on sand"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directories of 96 pairs and of 40 held-out pairs of the miniature world."""
    return write_world(tmp_path_factory.mktemp("world"), 96, 40)


def training_of(world, output, **settings) -> EncoderTraining:
    small = {"num_steps": 12, "global_batch_size": 32, "warmup_steps": 4, "cpus_per_worker": 1.0}
    places = {"data": [str(world / "pairs")], "heldout": [str(world / "heldout")], "output": str(output)}
    return EncoderTraining(**{**places, **small, **settings})


# --- tokenizer --------------------------------------------------------------------------------------------


def test_tokens_give_the_words_back_and_the_end_token_is_the_highest():
    tokenizer = dual_encoder.build_tokenizer(CAPTIONS, max_words=100)
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<unk>", "<start>")] == [0, 1, 2]
    assert tokenizer.token_to_id("<end>") == tokenizer.get_vocab_size() - 1
    dual_encoder.set_context(tokenizer, 12)
    tokens_BT = dual_encoder.tokenize(tokenizer, CAPTIONS)
    assert tokens_BT.shape == (3, 12)
    for text, ids in zip(CAPTIONS, tokens_BT.tolist(), strict=True):
        assert tokenizer.decode(ids) == text.lower().replace(",", " ,")
        words = len(text.replace(",", " ,").split())
        assert int(np.argmax(ids)) == words + 1  # behind start token and words: where CLIP pools
        assert set(ids[words + 2 :]) <= {0}


def test_a_text_that_is_cut_keeps_its_end_token():
    tokenizer = dual_encoder.build_tokenizer(CAPTIONS, max_words=100)
    dual_encoder.set_context(tokenizer, 6)
    ids = dual_encoder.tokenize(tokenizer, ["red " * 50])[0].tolist()
    assert ids[0] == tokenizer.token_to_id("<start>")
    assert ids[-1] == tokenizer.token_to_id("<end>")
    assert ids[1:-1] == [tokenizer.token_to_id("red")] * 4


def test_rare_words_are_unknown_and_the_vocabulary_ignores_order():
    tokenizer = dual_encoder.build_tokenizer(CAPTIONS, max_words=3)
    assert tokenizer.get_vocab_size() == 4 + 3
    assert tokenizer.encode("zebra").ids[1] == tokenizer.token_to_id("<unk>")
    assert tokenizer.to_str() == dual_encoder.build_tokenizer(CAPTIONS[::-1], max_words=3).to_str()


# --- negatives of all workers -----------------------------------------------------------------------------


class TwoTowers(torch.nn.Module):
    """Towers without batch normalisation, so that a batch in two halves is the same mathematics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(20, 8), torch.nn.Linear(12, 8)

    def forward(self, image_BI, text_BT):
        return F.normalize(self.image(image_BI), dim=-1), F.normalize(self.text(text_BT), dim=-1)


def global_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 20, generator=generator), torch.randn(16, 12, generator=generator)


def half_batch(rank: int) -> list[torch.Tensor]:
    return [rows[rank * 8 : rank * 8 + 8] for rows in global_batch()]


def loss_and_gradients(network, image_BI, text_BT) -> tuple[float, list[np.ndarray]]:
    loss = dual_encoder.contrastive_loss(*network(image_BI, text_BT), temperature=0.05)
    loss.backward()
    return loss.item(), [parameter.grad.numpy() for parameter in network.parameters()]


def one_of_two(rank: int, rendezvous: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    network = DistributedDataParallel(TwoTowers())
    results.put((rank, *loss_and_gradients(network, *half_batch(rank))))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_give_the_loss_and_gradients_of_one(tmp_path):
    """Two workers have the contrastive loss and gradients of one with the whole batch."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    meet = str(tmp_path / "meet")
    workers = [context.Process(target=one_of_two, args=(rank, meet, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: rest for rank, *rest in (results.get(timeout=900) for _ in workers)}
    (loss_0, gradients_0), (loss_1, gradients_1) = found[0], found[1]
    for worker in workers:
        worker.join(timeout=300)
        assert worker.exitcode == 0
    loss, gradients = loss_and_gradients(TwoTowers(), *global_batch())
    # float32 sums of 16 terms in another order: a few units in the last place, 1e-7 of values near 1.
    assert (loss_0 + loss_1) / 2 == pytest.approx(loss, rel=1e-6)
    for whole, half_0, half_1 in zip(gradients, gradients_0, gradients_1, strict=True):
        np.testing.assert_allclose(half_0, whole, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(half_0, half_1)
    alone = np.mean([loss_and_gradients(TwoTowers(), *half_batch(rank))[0] for rank in range(2)])
    assert abs(alone - loss) > 0.1  # without the other half's negatives it is another loss


def test_loss_of_known_rows():
    """Matching rows orthogonal to all others: log(1 + (N - 1) e^(-1/t)); all rows equal: log N."""
    rows = torch.eye(4, dtype=torch.float64)
    expected = np.log1p(3 * np.exp(-1 / 0.5))
    assert dual_encoder.contrastive_loss(rows, rows, 0.5).item() == pytest.approx(expected, rel=1e-12)
    same = rows[:1].expand(4, -1)
    assert dual_encoder.contrastive_loss(same, same, 0.5).item() == pytest.approx(np.log(4), rel=1e-12)


def test_measures_of_known_rows():
    """Two orthogonal centroids of single points: gap sqrt(2), traces 0. Half the rows swapped: R@1 half."""
    image, text = torch.eye(4)[:1].expand(3, -1), torch.eye(4)[1:2].expand(3, -1)
    found = dual_encoder.pair_metrics(image, text)
    assert found["modality_gap"] == pytest.approx(np.sqrt(2))
    assert found["image_trace"] == pytest.approx(0, abs=1e-12)
    rows = torch.eye(4)
    found = dual_encoder.pair_metrics(rows, rows[[0, 1, 3, 2]])
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 0.5
    assert found["text_trace"] == pytest.approx(0.75)


# --- batches ----------------------------------------------------------------------------------------------


def test_every_epoch_takes_every_pair_once():
    rows = np.concatenate([batch_rows(10, step, 4, seed=0) for step in range(10)])
    for epoch in rows.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows.reshape(4, 10)}) == 4
    assert not np.array_equal(
        rows[:10], np.concatenate([batch_rows(10, s, 4, seed=1) for s in range(3)])[:10]
    )


def test_captions_are_drawn_anew(world):
    pairs = read_pairs([str(world / "pairs")])
    first, second = (drawn_captions(pairs, step, seed=0) for step in range(2))
    assert first == drawn_captions(pairs, 0, seed=0)
    assert np.mean([a != b for a, b in zip(first, second, strict=True)]) > 0.5
    assert all(text in pair.captions for text, pair in zip(first, pairs, strict=True))


def shard(path, **members: bytes) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name.replace("_", "."))
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


def test_pairs_of_others_are_read_and_incomplete_ones_refused(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (80, 40), "red").save(png, "PNG")
    [pair] = read_pairs([shard(tmp_path / "a.tar", k_png=png.getvalue(), k_txt=b"red")])
    assert pair.captions == ["red"]
    assert (pixels(pair, 32) == [255, 0, 0]).all()
    assert pixels(pair, 32).shape == (32, 32, 3)
    with pytest.raises(DataError, match=r"b\.tar: sample 'k' has no caption"):
        read_pairs([shard(tmp_path / "b.tar", k_png=png.getvalue())])
    with pytest.raises(DataError, match=r"c\.tar: sample 'k' has no image"):
        read_pairs([shard(tmp_path / "c.tar", k_txt=b"red")])
    with pytest.raises(DataError, match=r"nothing: no such file or directory"):
        read_pairs([str(tmp_path / "nothing")])


# --- settings ---------------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero(world, tmp_path):
    training = training_of(world, tmp_path, num_steps=20, warmup_steps=5, learning_rate=1.0)
    rates = [learning_rate(training, step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[20] == pytest.approx(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 97}, "there are only 96 pairs"),
        ({"num_workers": 3}, "does not divide"),
        ({"temperature": 0.0}, "expected a positive number"),
        ({"model": "ViT-Z-99"}, "no open_clip model configuration"),
        ({"model": "roberta-ViT-B-32"}, "without hf_model_name"),
    ],
)
def test_settings_that_cannot_be_are_refused(world, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_encoder(training_of(world, tmp_path, **settings))


# --- training on a cluster --------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_open_clip_loads_the_folder(cluster, world, tmp_path):
    training = training_of(world, tmp_path / "encoder")
    interrupt = signal.getsignal(signal.SIGINT)
    metrics, trained = train_encoder(training)
    assert trained
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C does what it did before"
    assert metrics["last_loss"] < metrics["first_loss"]
    assert metrics["num_parameters"] == pytest.approx(1.8e6, rel=0.05)

    folder = f"local-dir:{tmp_path / 'encoder'}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    model.eval()
    assert model.logit_scale.exp().item() == pytest.approx(100)
    pairs = read_pairs(training.heldout)
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(io.BytesIO(pair.image))) for pair in pairs])
        image_ND = model.encode_image(images, normalize=True)
        text_ND = model.encode_text(tokenizer([pair.captions[0] for pair in pairs]), normalize=True)
    again = dual_encoder.pair_metrics(image_ND, text_ND)
    # The same weights and pixels through another program: float32 rounding, amplified by normalisation.
    for name in ("modality_gap", "image_trace", "text_trace"):
        assert again[name] == pytest.approx(metrics["heldout"][name], abs=1e-4)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "encoder").glob("*.*")}
    former, trained = train_encoder(training)
    assert (former, trained) == (json.loads((tmp_path / "encoder/metrics.json").read_text()), False)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(OutputError, match="num_steps was 12, is now 13"):
        train_encoder(dataclasses.replace(training, num_steps=13))


@pytest.mark.slow
def test_two_workers_train_the_encoder_that_one_trains_and_a_seed_decides_it(cluster, world, tmp_path):
    """Two workers train the encoder that one trains, to rounding; another seed trains another.

    Towers without batch normalisation, which on CPUs is each worker's own. That a seed gives the same bits
    again is shown where training does not notice its monitor."""
    plain = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 26, "width": 64, "heads": 2, "layers": 1},
    }
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    runs = {"one": {}, "two": {"num_workers": 2, "cpus_per_worker": 0.5}, "seed": {"seed": 1}}
    metrics = {
        name: train_encoder(
            training_of(world, tmp_path / name, model=str(tmp_path / "plain.json"), **settings)
        )[0]
        for name, settings in runs.items()
    }
    # Twelve steps of float32 whose sums have another order; AdamW divides small gradients by their own size.
    assert metrics["two"]["heldout"]["modality_gap"] == pytest.approx(
        metrics["one"]["heldout"]["modality_gap"], abs=1e-3
    )
    assert abs(metrics["seed"]["heldout"]["modality_gap"] - metrics["one"]["heldout"]["modality_gap"]) > 1e-3
