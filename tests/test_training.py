"""Training steps under DeepSpeed: a global batch does the same whatever workers, micro batches and ZeRO."""

import sys

import numpy as np
import pytest
import ray.cloudpickle
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from revision_ray.train.settings import Optimisation, Training, Workers, ZeroSettings

# Workers do not have this module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

DIM, VOCABULARY, IMAGE = 16, 40, 39


def settings(num_workers: int, micro_batch_size: int, stage: int, global_batch_size: int = 8) -> Training:
    return Training(
        model="unused",
        output="unused",
        num_workers=num_workers,
        precision="float32",
        optimisation=Optimisation(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=1e-2,
            projector_learning_rate=2e-2,
            weight_decay=0.1,
        ),
        zero=ZeroSettings(stage=stage),  # type: ignore[arg-type]
        workers=Workers(cpus_per_worker=0.5),
    )


STEPS = 4
OVERFIT, OVERFIT_STEPS = "overfit", 60


def samples(step: int, count: int = 8) -> list:
    """Samples of very different numbers of targets; one has no image."""
    from revision_ray.train.samples import NO_LABEL, TrainingSample

    generator = np.random.default_rng(step)
    made = []
    for number in range(count):
        length = 4 + 3 * number
        ids = generator.integers(5, 30, length).astype(np.int32)
        images = np.empty((0, DIM), np.float32)
        if number != 3:
            ids[:2] = IMAGE
            images = generator.standard_normal((1, DIM)).astype(np.float32)
        labels = np.where(ids == IMAGE, NO_LABEL, ids).astype(np.int32)
        labels[: length // 2] = NO_LABEL
        made.append(TrainingSample(id=f"{step}-{number}", input_ids=ids, labels=labels, image_embeds=images))
    return made


def make_model():
    from transformers import LlamaConfig

    from revision_ray.model.build import build_model

    torch.manual_seed(0)
    language_model = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return build_model(
        language_model, embedding_dim=DIM, image_token_id=IMAGE, num_visual_tokens=2, dtype=torch.float32
    )


def run_steps(configs: dict) -> dict:
    """Worker: steps for each named (settings, stage of training); losses and the weights at the end."""
    from revision_ray.train import models
    from revision_ray.train.loop import train_step
    from revision_ray.train.optimizer import learning_rate_factor, set_learning_rate
    from revision_ray.train.samples import collate
    from revision_ray.train.zero import build_engine

    torch.set_num_threads(1)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    results = {}
    for name, (training, stage) in configs.items():
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        models.freeze(model, stage, None)
        engine = build_engine(model, training, torch.device("cpu"))
        losses, norms = [], []
        num_steps = OVERFIT_STEPS if name == OVERFIT else STEPS
        for step in range(num_steps):
            models.set_modes(engine.model, stage, False)
            factor = learning_rate_factor(step, num_steps, training.optimisation)
            set_learning_rate(engine.deepspeed.optimizer, factor)
            mine = (samples(0, 10) if name == OVERFIT else samples(step))[rank::world]
            size = training.optimisation.micro_batch_size
            batches = [collate(mine[start : start + size], 0) for start in range(0, len(mine), size)]
            result = train_step(engine, batches)
            losses.append(result.loss)
            norms.append(result.gradient_norm)
        from revision_ray.train.export import _whole_state

        state = _whole_state(engine, rank)
        if rank == 0:
            assert state is not None
            weights = {key: value.float().numpy().copy() for key, value in state.items()}
            moved = sorted(key for key in weights if not np.array_equal(weights[key], before[key].numpy()))
            results[name] = {"losses": losses, "norms": norms, "weights": weights, "moved": moved}
        engine.deepspeed.destroy()
    return results


def on_workers(num_workers: int, configs: dict, folder) -> dict:
    trainer = TorchTrainer(
        run_steps,
        train_loop_config=configs,
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            storage_path=str(folder), worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}}
        ),
    )
    result = trainer.fit().return_value
    assert result is not None
    return result


def test_checkpointed_layers_run_again_in_the_backward_pass_also_where_they_are_frozen():
    from revision_ray.train import models
    from revision_ray.train.samples import collate

    batch = collate(samples(0), 0)
    gradients, calls = {}, {}
    for checkpointing in (False, True):
        model = make_model()
        models.freeze(model, "pretrain", None)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        models.set_modes(model, "pretrain", checkpointing)
        counted: list[int] = []
        attention = model.language_model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_embeds=batch.image_embeds,
            labels=batch.labels,
        ).loss.backward()
        gradients[checkpointing], calls[checkpointing] = model.projector[0].weight.grad, len(counted)
    assert calls == {False: 1, True: 2}
    torch.testing.assert_close(gradients[True], gradients[False])


@pytest.fixture(scope="module")
def alone(cluster, tmp_path_factory):
    return on_workers(
        1,
        {
            "whole": (settings(1, 8, 0), "finetune"),
            "accumulated": (settings(1, 2, 2), "finetune"),
            "frozen": (settings(1, 4, 2), "pretrain"),
            OVERFIT: (settings(1, 5, 2, global_batch_size=10), "finetune"),
        },
        tmp_path_factory.mktemp("steps"),
    )


@pytest.fixture(scope="module")
def both(cluster, tmp_path_factory):
    return on_workers(
        2,
        {
            "zero 0": (settings(2, 4, 0), "finetune"),
            "zero 1": (settings(2, 2, 1), "finetune"),
            "zero 2": (settings(2, 2, 2), "finetune"),
            "zero 3": (settings(2, 4, 3), "finetune"),
            "zero 3 accumulated": (settings(2, 2, 3), "finetune"),
        },
        tmp_path_factory.mktemp("steps"),
    )


def test_accumulation_changes_nothing_but_rounding(alone):
    check_same_steps(alone["accumulated"], alone["whole"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero 0", "zero 1", "zero 2", "zero 3", "zero 3 accumulated"])
def test_workers_and_zero_change_nothing_but_rounding(alone, both, name):
    """Two workers with ZeRO 0 to 3, accumulated or not, train as one worker does, to rounding."""
    check_same_steps(both[name], alone["whole"])


def check_same_steps(found, expected):
    # float32 sums in another order: 1e-6 a step in the loss; AdamW divides by the root of the squared
    # gradient, which blows rounding of tiny gradients up to a share of the learning rate (1e-2).
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-5)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=2e-4)
    for key, weights in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][key], weights, atol=2e-4, err_msg=key)


def test_the_loss_is_over_tokens_not_a_mean_of_means(alone):
    from revision_ray.train.samples import collate

    model = make_model()
    batch = collate(samples(0), 0)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, image_embeds=batch.image_embeds
    ).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1), ignore_index=-100
    )
    assert alone["whole"]["losses"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_tiny_model_overfits_ten_samples(alone):
    # Of 40 words, guessing costs log(40) = 3.7 a token.
    assert alone[OVERFIT]["losses"][0] > 3
    assert alone[OVERFIT]["losses"][-1] < 0.1


def test_stage_one_moves_the_projector_and_not_a_bit_else(alone):
    moved = alone["frozen"]["moved"]
    assert moved
    assert all(name.startswith("projector") for name in moved)
    assert any("language_model" in name for name in alone["whole"]["moved"])
