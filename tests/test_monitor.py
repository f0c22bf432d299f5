"""The monitor on one worker and on two: gradients of embeddings, probes that nothing else notices."""

import copy
import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_world import MONITOR, lines, write_world

# Few imports: each worker process that a test starts makes them again.
from revision_ray.train import dual_encoder
from revision_ray.train import monitor as monitoring
from revision_ray.train.monitor import GapMonitor, GradientSums
from revision_ray.train.pairs import read_pairs


def embeddings():
    generator = torch.Generator().manual_seed(2)
    return [F.normalize(torch.randn(16, 6, generator=generator), dim=1) for _ in range(2)]


def gradient_moments(batches):
    """Of two batches of these unit rows under the contrastive loss."""
    sums = GradientSums()
    for image_BD, text_BD in batches:
        rows = [side.clone().requires_grad_() for side in (image_BD, text_BD)]
        sums.watch(*rows)
        dual_encoder.contrastive_loss(*rows, temperature=0.1).backward()
    return dataclasses.asdict(sums.over_workers())


def two_batches(part=slice(None)):
    image_BD, text_BD = embeddings()
    return [(image_BD[part], text_BD[part]), (image_BD.flip(1)[part], text_BD.flip(0)[part])]


def test_gradients_are_those_of_the_loss_per_row_and_covariances_are_per_batch():
    gradients = []
    for image_BD, text_BD in two_batches():
        rows = [side.double().requires_grad_() for side in (image_BD, text_BD)]
        (16 * dual_encoder.contrastive_loss(*rows, temperature=0.1)).backward()
        gradients.append([side.grad.numpy() for side in rows])
    found = gradient_moments(two_batches())
    image_ND = np.concatenate([image for image, _ in gradients])
    np.testing.assert_allclose(found["image_DD"], image_ND.T @ image_ND / 32, rtol=1e-4, atol=1e-5)
    centred = np.mean([sum(np.cov(side.T, bias=True) for side in batch) for batch in gradients], axis=0)
    # float32 gradients near 10 against float64 ones.
    np.testing.assert_allclose(found["covariance_DD"], centred, rtol=1e-4, atol=1e-4)
    assert found["num_batches"] == 2
    assert GradientSums().over_workers() is None


class Towers(torch.nn.Module):
    """Stands in for a dual encoder: batch normalisation and dropout, which a probe must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)
        )
        self.text = torch.nn.EmbeddingBag(200, 6)
        self.text.eval()  # a part that was frozen by hand stays so

    def encode_image(self, image_BCHW, normalize):
        return F.normalize(self.image(image_BCHW), dim=-1)

    def encode_text(self, tokens_BT, normalize):
        return F.normalize(self.text(tokens_BT), dim=-1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory of 60 held-out pairs of the miniature world."""
    return write_world(tmp_path_factory.mktemp("world"), 0, 60)


def monitor_of(world, output, model):
    heldout = read_pairs([str(world / "heldout")])
    tokenizer = dual_encoder.build_tokenizer((text for pair in heldout for text in pair.captions), 100)
    dual_encoder.set_context(tokenizer, 26)
    return GapMonitor(MONITOR, model, tokenizer, heldout, image_size=8, num_steps=3, output=str(output))


def run_probes(monitor, part=slice(None)):
    """Two batches of gradients between the probes at 0, 2 and the last step, 3."""
    for step in range(3):
        monitor.probe(step, losses=[float(index) for index in range(step)])
        image_BD, text_BD = (side[part].clone().requires_grad_() for side in embeddings())
        monitor.watch(step, image_BD, text_BD)
        dual_encoder.contrastive_loss(image_BD, text_BD, temperature=0.1).backward()
    monitor.probe(3, losses=[0.0, 1.0, 2.0])
    monitor.finish()


def probes_of_two(rank, rendezvous, world, output, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = Towers()
    with torch.no_grad():
        model.image[2].running_mean += rank  # as batches of its own would leave it
    run_probes(monitor_of(world, output, model), slice(rank * 8, rank * 8 + 8))
    results.put(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_measure_what_one_measures(world, tmp_path):
    """The monitor of two workers measures what that of one measures.

    51 rows do not divide; batch normalisation differs between the workers until the probe."""
    run_probes(monitor_of(world, tmp_path / "one", Towers()))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    places = (str(tmp_path / "meet"), world, tmp_path / "two", results)
    workers = [context.Process(target=probes_of_two, args=(rank, *places)) for rank in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(results.get(timeout=900) for _ in workers) == [0, 1]
    for worker in workers:
        worker.join(timeout=300)
        assert worker.exitcode == 0
    one, two = (lines(tmp_path / name / "dynamics.jsonl") for name in ("one", "two"))
    assert [record["step"] for record in one] == [record["step"] for record in two] == [0, 2, 3]
    for mine, other in zip(one, two, strict=True):
        assert mine["rank"] == other["rank"]
        for name, value in monitoring.scalars("r", mine).items():
            if "seconds" not in name and "identity" not in name:
                # float32 embeddings and gradients from products of other shapes; ratios of small eigenvalues.
                assert monitoring.scalars("r", other)[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_probe_leaves_modes_buffers_and_random_numbers_alone(world, tmp_path):
    model = Towers()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    monitor = monitor_of(world, tmp_path, model)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    monitor.probe(0, [])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes["text"] is False
    assert modes["image.3"] is True
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
