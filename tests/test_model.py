"""The model against its language model alone, its image tower against the encoder, and the saved folder."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tiny_encoder import write_encoder
from tiny_language_model import TEMPLATES, tiny_config, tiny_tokenizer, write_language_model
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    pipeline,
)

from revision_ray.core.errors import AlignmentError, ConfigError, DataError
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.model import (
    OpenClipImageProcessor,
    ReVisionConfig,
    ReVisionForConditionalGeneration,
    ReVisionProcessor,
    add_image_token,
    build_model,
    check_encoder,
    target_positions,
)
from revision_ray.model.attach import attach_image_tower

DIM, VISUAL, IMAGE_ID, VOCAB = 16, 3, 90, 80  # the placeholder lies above the vocabulary
# Two layers in float32, sums in another order: a few roundings of 6e-8 on logits of about 1 to 10.
ROUNDING = 2e-5
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "phi", "phi3", "gemma", "gemma2", "gpt2", "opt",
            "bloom"]  # fmt: skip
TIED = {"qwen2", "gemma", "gemma2", "gpt2", "opt", "bloom"}


def model_of(family: str = "llama", **settings: Any) -> ReVisionForConditionalGeneration:
    torch.manual_seed(0)
    defaults = {"num_visual_tokens": VISUAL, "projector_hidden_size": 24, "embedding_scale": DIM**0.5}
    model = build_model(tiny_config(family, VOCAB), DIM, IMAGE_ID, **{**defaults, **settings})
    # Biases start at zero in most families: nothing would show if one were lost.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def unit(num: int, seed: int = 1) -> torch.Tensor:
    rows = torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


SLOT = [IMAGE_ID] * VISUAL


def batch_of(rows: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    """Padded with 0 and masked."""
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    real = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, pads, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


# ------------------------------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_language_model_fed_by_hand(family):
    """Two images in one sample, one in another, none in the third."""
    model, images_ID = model_of(family), unit(3)
    rows = [[2, *SLOT, 10, 11, *SLOT, 12], [2, 9, *SLOT, 20], [2, 30, 31, 32]]
    batch = batch_of(rows)
    embed = model.language_model.get_input_embeddings()
    by_hand, image = [], iter(images_ID)
    for row in batch["input_ids"].tolist():
        vectors, position = [], 0
        while position < len(row):
            if row[position] == IMAGE_ID:
                visual_H = model.projector(next(image) * DIM**0.5)
                vectors += [visual_H] * VISUAL
                position += VISUAL
            else:
                vectors.append(embed(torch.tensor(row[position])))
                position += 1
        by_hand.append(torch.stack(vectors))
    mask = batch["attention_mask"]
    expected = model.language_model(inputs_embeds=torch.stack(by_hand), attention_mask=mask).logits
    got = model(**batch, image_embeds=images_ID).logits
    real = mask.bool()
    # The projector ran on one row by hand and on three here.
    torch.testing.assert_close(got[real], expected[real], atol=ROUNDING, rtol=ROUNDING)
    other = model(**batch, image_embeds=images_ID.flip(0)).logits
    assert (other - got)[0].abs().max() > 1e-2, "the image does not reach the answer"
    # Exactly the same but in mixtures of experts, which sum over all tokens of one expert at once.
    torch.testing.assert_close(other[2], got[2], atol=ROUNDING, rtol=ROUNDING)


@torch.no_grad()
def test_expanding_after_projection_equals_expanding_before():
    model, images_ID = model_of(visual_scale=0.3), unit(4)
    after_IVH = model.get_image_features(image_embeds=images_ID).pooler_output
    before_IVH = model.projector(images_ID[:, None].expand(-1, VISUAL, -1) * DIM**0.5) * 0.3
    torch.testing.assert_close(after_IVH, before_IVH, atol=1e-6, rtol=1e-6)
    assert after_IVH.shape == (4, VISUAL, 32)


def test_loss_is_the_sum_over_valid_targets_divided_by_what_the_caller_counts():
    model, images_ID = model_of(), unit(2)
    batch = batch_of([[2, *SLOT, 10, 11, 3], [*SLOT, 12, 3]])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 4:7] = batch["input_ids"][0, 4:7]
    labels[1, 3:5] = batch["input_ids"][1, 3:5]
    output = model(**batch, image_embeds=images_ID, labels=labels)
    log_probability = output.logits.log_softmax(-1)
    pairs = [(0, 4), (0, 5), (0, 6), (1, 3), (1, 4)]
    expected = -sum(log_probability[b, t - 1, labels[b, t]] for b, t in pairs)
    torch.testing.assert_close(output.loss, expected / 5)
    for count in (40, torch.tensor(40)):
        summed = model(**batch, image_embeds=images_ID, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(summed, expected / 40)
    few = model(**batch, image_embeds=images_ID, labels=labels, logits_to_keep=target_positions(labels))
    assert few.logits.shape == (5, VOCAB)
    torch.testing.assert_close(few.loss, output.loss)


def test_gradients_reach_projector_and_language_model_alone_or_together():
    model = model_of()
    batch = {**batch_of([[*SLOT, 10, 11, 3]]), "image_embeds": unit(1)}
    model.language_model.requires_grad_(False)
    model(
        **batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    ).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.projector.parameters())
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


@pytest.mark.parametrize("no_images", [{}, {"image_embeds": torch.zeros(0, DIM)}])
def test_a_batch_of_text_alone_runs_the_projector_with_gradient_zero(no_images):
    """Else ranks with and without images would run different modules in one step."""
    model = model_of()
    batch = batch_of([[2, 10, 11, 3]])
    output = model(**batch, labels=batch["input_ids"], **no_images)
    plain = model.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(output.logits, plain.logits)
    output.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in
               model.projector.parameters())  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = {**batch_of([[*SLOT, 10, 11, 3]]), "image_embeds": unit(1)}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**batch, labels=labels, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp4x_gelu", 4)])
def test_projector_depth_and_width(kind, depth):
    layers = [
        layer for layer in model_of(projector_type=kind).projector if isinstance(layer, torch.nn.Linear)
    ]
    widths = [DIM, *[24] * (depth - 1), 32]
    assert [(layer.in_features, layer.out_features) for layer in layers] == list(itertools.pairwise(widths))


# ------------------------------------------------------------------------------------------------- generation

PROMPTS = [[2, *SLOT, 10], [2, 9, 14, *SLOT, 20, *SLOT, 22, 23], [2, 30, 31]]


def greedy_without_cache(model: Any, prompt: list[int], images_ID: torch.Tensor, steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), image_embeds=images_ID, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_left_padded_batch_equals_single_uncached_samples(family):
    """Greedy answers of random weights: logits differ by far more than rounding."""
    model, images_ID = model_of(family), unit(3)
    model.generation_config.eos_token_id = None
    batch = batch_of(PROMPTS, left=True)
    for use_cache in (True, False):
        together = model.generate(
            **batch, image_embeds=images_ID, max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        answers = together[:, batch["input_ids"].shape[1] :].tolist()
        parts = images_ID[:1], images_ID[1:], images_ID[:0]
        for prompt, part, answer in zip(PROMPTS, parts, answers, strict=True):
            assert answer == greedy_without_cache(model, prompt, part, 6)


@torch.no_grad()
def test_beams_are_those_of_single_samples():
    """Several images in one sample and none in another: each beam keeps its own sample's images."""
    model, images_ID = model_of(), unit(3)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    batch = batch_of(PROMPTS, left=True)
    together = model.generate(**batch, image_embeds=images_ID, **options)[:, batch["input_ids"].shape[1] :]
    parts = images_ID[:1], images_ID[1:], None
    for number, (prompt, part) in enumerate(zip(PROMPTS, parts, strict=True)):
        given = {} if part is None else {"image_embeds": part}
        alone = model.generate(**batch_of([prompt]), **given, **options)[:, len(prompt) :]
        assert torch.equal(alone, together[2 * number : 2 * number + 2])


@torch.no_grad()
def test_sampling_with_penalties_runs_with_a_placeholder_above_the_vocabulary():
    model, images_ID = model_of(), unit(3)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    sampled = model.generate(
        **batch_of(PROMPTS, left=True), image_embeds=images_ID, max_new_tokens=8, do_sample=True, top_p=0.9,
        repetition_penalty=5.0, no_repeat_ngram_size=2, num_return_sequences=2,
    )  # fmt: skip
    new = sampled[:, -8:]
    assert len(new) == 6
    assert (new < VOCAB).all()
    greedy = model.generate(
        **batch_of([PROMPTS[0]]), image_embeds=images_ID[:1], max_new_tokens=8, do_sample=False,
        repetition_penalty=1e6,
    )[0].tolist()  # fmt: skip
    assert len(set(greedy[-8:])) == 8, "the penalty did not reach the scores"


@torch.no_grad()
def test_a_prompt_prefilled_in_chunks_gives_the_same_answer():
    model, images_ID = model_of(), unit(3)
    model.generation_config.eos_token_id = None
    options = {**batch_of([PROMPTS[1]]), "image_embeds": images_ID[1:], "max_new_tokens": 5}
    whole = model.generate(**options, do_sample=False)
    assert torch.equal(model.generate(**options, do_sample=False, prefill_chunk_size=4), whole)


@torch.no_grad()
def test_the_placeholder_is_never_an_answer_where_the_vocabulary_has_room_for_it():
    torch.manual_seed(0)
    model = build_model(tiny_config(vocab_size=VOCAB), DIM, 70)
    prompt = {"input_ids": torch.tensor([[2, 70, 10]]), "image_embeds": unit(1)}
    last_H = model(**prompt, output_hidden_states=True).hidden_states[-1][0, -1]
    model.language_model.lm_head.weight[70] = 100 * last_H
    assert model(**prompt).logits[0, -1].argmax() == 70
    assert 70 not in model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, 3:].tolist()


# ---------------------------------------------------------------------------------------------- saved folders


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_gives_equal_logits(family, tmp_path):
    model = model_of(family, alignment={"strategy": "realign", "domain": "shapes"})
    assert (model.language_model.get_output_embeddings().weight is
            model.get_input_embeddings().weight) == (family in TIED)  # fmt: skip
    inputs = {**batch_of([[2, *SLOT, 10], [2, 11]]), "image_embeds": unit(1)}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, ReVisionForConditionalGeneration)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.equal(loaded(**inputs).logits, expected)
        assert loaded.config.alignment == {"strategy": "realign", "domain": "shapes"}
    assert (loaded.language_model.get_output_embeddings().weight is
            loaded.get_input_embeddings().weight) == (family in TIED)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_language_model_is_taken_over_bit_by_bit(family, tmp_path):
    folder = write_language_model(tmp_path / "lm", family)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    alone.generation_config.update(do_sample=True, top_k=7)
    alone.generation_config.save_pretrained(folder)
    model = build_model(folder, DIM, IMAGE_ID)
    taken = model.language_model.state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in alone.state_dict().items())
    assert model.generation_config.top_k == 7
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.top_k == 7
    ids = torch.tensor([[2, 10, 11]])
    assert torch.equal(loaded(input_ids=ids).logits, alone(input_ids=ids).logits)


@torch.no_grad()
def test_bfloat16_is_near_float32(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = {**batch_of([[2, *SLOT, 10]]), "image_embeds": unit(1)}
    expected, got = model(**inputs).logits, half(**inputs).logits
    assert got.dtype == torch.bfloat16
    # Eight bits of mantissa through two layers: a few percent of the logits' size.
    assert (got - expected).norm() / expected.norm() < 0.05
    built = build_model(tiny_config(), DIM, IMAGE_ID, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_language_model(implementation, tmp_path):
    folder = write_language_model(tmp_path)
    for model in (
        build_model(folder, DIM, IMAGE_ID, attn_implementation=implementation),
        build_model(tiny_config(), DIM, IMAGE_ID, attn_implementation=implementation),
    ):
        assert model.language_model.config._attn_implementation == implementation
        assert model.config._attn_implementation == implementation


# -------------------------------------------------------------------------------------------- the image tower


def pictures() -> list[Image.Image]:
    """Wide, tall, exact, small; margins of every remainder; one with transparency."""
    random = np.random.default_rng(3)
    shapes = [(50, 77), (32, 32), (90, 35), (17, 64), (120, 121), (33, 38), (32, 35), (41, 32)]
    images = [Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    return [*images, Image.fromarray(random.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")]


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = VISION | {"vocab_size": 64, "max_position_embeddings": 16}


def write_clip(folder: Path) -> EncoderConfig:
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=DIM)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return EncoderConfig(kind="transformers", model=str(folder))


def write_siglip(folder: Path) -> EncoderConfig:
    torch.manual_seed(0)
    width = {"hidden_size": DIM, "intermediate_size": 24, "num_attention_heads": 2}
    SiglipModel(SiglipConfig(vision_config=VISION | width, text_config=TEXT | width)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return EncoderConfig(kind="transformers", model=str(folder))


def write_open_clip(folder: Path) -> EncoderConfig:
    return EncoderConfig(kind="open_clip", model=write_encoder(folder))


def write_resnet(folder: Path) -> EncoderConfig:
    """With batch norm, whose running statistics are buffers, and preprocessing of its own."""
    write_encoder(folder)
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"]["vision_cfg"] = {
        "image_size": 32,
        "layers": [1, 1, 1, 1],
        "width": 8,
        "head_width": 32,
    }
    document["preprocess_cfg"] = {
        "mean": [0.3, 0.4, 0.5],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**document["model_cfg"])
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(-0.1, 0.1) if "mean" in name else buffer.uniform_(0.5, 2)
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    return EncoderConfig(kind="open_clip", model=str(folder))


WRITERS = [write_clip, write_siglip, write_open_clip, write_resnet]


def encoded(config: EncoderConfig) -> np.ndarray:
    """Unit rows of the pictures, as the embed job makes them from RGB."""
    module = backend(config)
    prepare, tower = module.image_preparer(config), module.image_tower(config)
    rgb = [Image.alpha_composite(Image.new("RGBA", p.size, "white"), p.convert("RGBA")).convert("RGB")
           for p in pictures()]  # fmt: skip
    return tower.encode(np.stack([prepare(picture) for picture in rgb]))


def saved_folder(
    folder: Path, encoder: EncoderConfig | None, template: str = "qwen", **settings: Any
) -> Path:
    """Language model, tower and processor in one folder."""
    language_model = write_language_model(folder / "lm", "qwen2", template)
    tokenizer = tiny_tokenizer(template)
    image_id = add_image_token(tokenizer)
    torch.manual_seed(0)
    model = build_model(
        language_model, DIM, image_id, num_visual_tokens=VISUAL, embedding_scale=4, **settings
    )
    image_processor = None if encoder is None else attach_image_tower(model, encoder)
    model.save_pretrained(folder / "model")
    processor = ReVisionProcessor(tokenizer, image_processor, num_visual_tokens=VISUAL)
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("write", WRITERS)
def test_the_tower_in_the_checkpoint_gives_the_encoders_rows(write, tmp_path):
    config = write(tmp_path / "encoder")
    folder = saved_folder(tmp_path, config)
    expected_ID = encoded(config)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    pixels = processor(images=pictures(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (len(pictures()), 3, 32, 32)
    rows_ID = model.encode_images(pixels)
    assert rows_ID.dtype == torch.float32
    # The pixels are the same bytes; they are scaled and normalised here in another order of operations.
    np.testing.assert_allclose(rows_ID.numpy(), expected_ID, atol=1e-5)
    assert np.abs(expected_ID[0] - expected_ID[1]).max() > 1e-3  # or any picture would do
    assert model.config.image_tower["fingerprint"] == backend(config).fingerprint(config)
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    np.testing.assert_allclose(half.encode_images(pixels).numpy(), expected_ID, atol=3e-2)  # eight bits


def test_the_tower_is_frozen_and_in_evaluation_mode_always(tmp_path):
    folder = saved_folder(tmp_path, write_resnet(tmp_path / "encoder"))
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    assert model.projector.training
    assert not any(module.training for module in model.image_tower.modules())
    assert not any(parameter.requires_grad for parameter in model.image_tower.parameters())
    before = {name: tensor.clone() for name, tensor in model.image_tower.state_dict().items()}
    ids = torch.tensor([[*[model.config.image_token_id] * VISUAL, 10, 11]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids.clamp(max=50)).loss.backward()
    assert all(parameter.grad is None for parameter in model.image_tower.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.image_tower.state_dict().items())


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_the_image_processor_is_open_clips_transform(resize_mode, interpolation, size, tmp_path):
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
    settings: dict[str, Any] = {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
    transform = image_transform_v2(PreprocessCfg(**settings, mean=mean, std=std), is_train=False)
    OpenClipImageProcessor(**settings, image_mean=list(mean), image_std=list(std)).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    rgb = [picture for picture in pictures() if picture.mode == "RGB"]
    expected = torch.stack([transform(picture) for picture in rgb])
    assert torch.equal(processor(rgb)["pixel_values"], expected)
    assert torch.equal(processor(np.asarray(rgb[0]))["pixel_values"], expected[:1])


# ---------------------------------------------------------------------------------------- pipeline, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    return saved_folder(root, write_open_clip(root / "encoder"))


def test_pipeline_answers_about_a_picture_in_a_chat(folder):
    answer = pipeline("image-text-to-text", model=str(folder), max_new_tokens=6, do_sample=False)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    texts = set()
    for picture in pictures()[:4]:
        content = [
            {"type": "image", "image": picture},
            {"type": "text", "text": "what colour is the square ?"},
        ]
        got = answer(text=[{"role": "user", "content": content}], return_full_text=False)[0]["generated_text"]
        prompt = (
            "<|im_start|>system\nyou are a helpful assistant .<|im_end|>\n<|im_start|>user\n"
            + "<image>\nwhat colour is the square ?<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert got.strip() == processor.decode(ids, skip_special_tokens=True)
        texts.add(got)
        with_string = answer(images=picture, text=prompt, return_full_text=False)[0]["generated_text"]
        assert with_string == got
    assert len(texts) > 1, "the picture does not reach the answer"


def test_pipeline_takes_several_images_and_none(folder):
    answer = pipeline("image-text-to-text", model=str(folder), max_new_tokens=3, do_sample=False)
    first, second = pictures()[:2]
    two = [
        {"type": "image", "image": first},
        {"type": "text", "text": "and"},
        {"type": "image", "image": second},
    ]
    assert answer(text=[{"role": "user", "content": two}])[0]["generated_text"][-1]["role"] == "assistant"
    alone = [{"role": "user", "content": "what is a ring ?"}]
    assert answer(text=alone)[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_content_in_parts_is_rendered_as_its_text(template, tmp_path):
    tokenizer = tiny_tokenizer(template)
    add_image_token(tokenizer)
    processor = ReVisionProcessor(tokenizer, num_visual_tokens=2)
    parts = [{"type": "image"}, {"type": "text", "text": "what colour ?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    text = [{"role": "user", "content": "<image>\nwhat colour ?"}, {"role": "assistant", "content": "red"}]
    rendered = processor.apply_chat_template(chat)
    assert rendered == processor.apply_chat_template(text)
    # As the language model's own template has it, which knows nothing of parts.
    assert rendered == tokenizer.apply_chat_template(text, tokenize=False)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template(chat, add_generation_prompt=False) == rendered
    assert again.chat_template == processor.chat_template, "wrapped twice"
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == rendered


def test_the_processor_expands_and_pads_on_the_left(folder):
    processor = AutoProcessor.from_pretrained(folder)
    assert (processor.image_token, processor.num_visual_tokens) == ("<image>", VISUAL)
    texts = ["<image> a dog", "<image> a <image> cat and a dog"]
    batch = processor(text=texts, image_embeds=np.zeros((3, DIM)), padding=True, return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [VISUAL, 2 * VISUAL]
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].all()
    assert batch["image_embeds"].shape == (3, DIM)
    assert processor.decode(batch["input_ids"], skip_special_tokens=True) == ["a dog", "a cat and a dog"]


def test_a_processor_without_image_processor_is_saved_and_loaded(tmp_path):
    folder = saved_folder(tmp_path, None)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, ReVisionProcessor)
    assert processor.image_processor is None
    assert processor.num_visual_tokens == VISUAL
    ids = processor(text="<image> a dog")["input_ids"][0]
    assert ids.count(processor.image_token_id) == VISUAL
    with pytest.raises(ConfigError, match="no image tower"):
        processor(text="<image> a dog", images=pictures()[0])


# ----------------------------------------------------------------------------------------------------- errors


def test_placeholders_must_fit_the_images():
    model = model_of()
    one = batch_of([[2, *SLOT, 10]])
    with pytest.raises(DataError, match=r"3 image placeholders .* 2 images of 3 .* expected 6"):
        model(**one, image_embeds=unit(2))
    with pytest.raises(DataError, match=r"2 image placeholders .* 1 images"):
        model(**batch_of([[2, *SLOT[1:], 10]]), image_embeds=unit(1))
    with pytest.raises(DataError, match=r"0 image placeholders .* 1 images"):
        model(**batch_of([[2, 10]]), image_embeds=unit(1))
    with pytest.raises(DataError, match=r"3 image placeholders .* 0 images"):
        model(**one)
    with pytest.raises(DataError, match=r"3 image placeholders .* 0 images"):
        model.generate(**one, max_new_tokens=2)
    with pytest.raises(DataError, match="6 placeholders"):
        model.generate(**one, image_embeds=unit(2), max_new_tokens=2)


def test_embeddings_must_have_the_models_dimension():
    model = model_of()
    for wrong in (torch.zeros(1, DIM + 1), torch.zeros(DIM), torch.zeros(1, 1, DIM)):
        with pytest.raises(DataError, match=rf"shape .* expected \(images, {DIM}\)"):
            model(**batch_of([SLOT]), image_embeds=wrong)


def test_images_come_in_one_way():
    model, batch = model_of(), batch_of([[2, *SLOT, 10]])
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(DataError, match="one of the two"):
        model(**batch, image_embeds=unit(1), pixel_values=pixels)
    with pytest.raises(ConfigError, match="no image tower"):
        model(**batch, pixel_values=pixels)
    vectors = torch.zeros(1, 4, 32)
    with pytest.raises(DataError, match="placeholders"):
        model(inputs_embeds=vectors, image_embeds=unit(1))
    with pytest.raises(DataError, match="input_ids or inputs_embeds"):
        model(**batch, inputs_embeds=vectors)
    with pytest.raises(DataError, match="input_ids or inputs_embeds"):
        model(image_embeds=unit(1))


def test_the_processor_counts(folder):
    processor = AutoProcessor.from_pretrained(folder)
    picture = pictures()[0]
    with pytest.raises(DataError, match="2 <image> in 1 texts and 1 images"):
        processor(text="<image> and <image>", images=picture)
    with pytest.raises(DataError, match="0 <image> in 1 texts and 1 images"):
        processor(text="a dog", images=[picture])
    with pytest.raises(DataError, match="one of the two"):
        processor(text="<image>", images=picture, image_embeds=np.zeros((1, DIM)))
    with pytest.raises(DataError, match="neither"):
        processor()
    with pytest.raises(ConfigError, match="add_image_token"):
        ReVisionProcessor(tiny_tokenizer())


def test_another_encoder_is_refused(tmp_path):
    config = ReVisionConfig(alignment={"image_fingerprint": "a" * 64})
    check_encoder(config, "a" * 64)
    check_encoder(ReVisionConfig(), "b" * 64)
    with pytest.raises(AlignmentError, match=r"bbbbbbbbbbbb.* aaaaaaaaaaaa"):
        check_encoder(config, "b" * 64)
    encoder = write_open_clip(tmp_path / "encoder")
    with pytest.raises(AlignmentError, match="aaaaaaaaaaaa"):
        attach_image_tower(model_of(alignment={"image_fingerprint": "a" * 64}), encoder)
    right = backend(encoder).fingerprint(encoder)
    attach_image_tower(model_of(alignment={"image_fingerprint": right}), encoder)
    with pytest.raises(ConfigError, match=f"embedding_dim is {DIM}, the model's is 8"):
        attach_image_tower(build_model(tiny_config(), 8, IMAGE_ID), encoder)


def test_settings_out_of_range(tmp_path):
    for wrong in ("mlp0x_gelu", "mlp2x_relu", "identity"):
        with pytest.raises(ConfigError, match="mlp2x_gelu"):
            model_of(projector_type=wrong)
    with pytest.raises(ConfigError, match="num_visual_tokens=0"):
        model_of(num_visual_tokens=0)
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        build_model(str(tmp_path), DIM, IMAGE_ID)
    config = ReVisionConfig(text_config=tiny_config(), image_tower={"kind": "other", "config": {}})
    with pytest.raises(ConfigError, match="expected kind"):
        ReVisionForConditionalGeneration(config)


# ----------------------------------------------------------------------------------------------- registration

REGISTERED = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
config = AutoConfig.for_model("revision")
assert type(config).__module__ == "revision_ray.model.configuration", type(config)
assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__ == "ReVisionForConditionalGeneration"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        # Nothing is loaded by itself; first others only ask whether transformers is there, as peft does.
        "import revision_ray, sys\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "import importlib.util\nassert importlib.util.find_spec('transformers')\n" + REGISTERED
        + "assert not any(type(finder).__module__ == 'revision_ray' for finder in sys.meta_path)\n",
        "import transformers\nimport revision_ray\n" + REGISTERED,
        # Modules that import transformers, and that our model imports.
        "import revision_ray.data.chat\n" + REGISTERED,
        "import revision_ray.encode.checkpoints\n" + REGISTERED,
        pytest.param("import revision_ray.encode.transformers\n" + REGISTERED, marks=pytest.mark.slow),
        pytest.param("import revision_ray.model.modeling\n" + REGISTERED, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_import_registers_in_either_order_and_loads_nothing_by_itself(program):
    """Importing the package registers its model in transformers, in any order, and loads nothing."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configuration_survives_json(tmp_path):
    config = ReVisionConfig(
        text_config=tiny_config("gpt2"), embedding_dim=7, projector_type="mlp3x_gelu", num_visual_tokens=5,
        image_token_id=99, alignment={"strategy": "gaussian_ot"},
        image_tower={"kind": "open_clip", "config": {"embed_dim": 7}},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = ReVisionConfig.from_pretrained(tmp_path)
    names = [
        field.name
        for field in dataclasses.fields(ReVisionConfig)
        if field.name in ReVisionConfig.__annotations__
    ]
    assert "embedding_dim" in names
    assert all(getattr(again, name) == getattr(config, name) for name in names if name != "text_config")
    assert again.text_config.to_dict() == config.text_config.to_dict()
