"""Every encoder against its library, on tiny checkpoints that are written here."""

import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from revision_ray.core.errors import ConfigError
from revision_ray.data import sources
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode import transformers as transformers_backend
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.encode.open_clip import ClipTokens, FileTokens, LibraryTokens
from revision_ray.encode.pipeline import Prepare, ShardPlan

# Unit rows in float32 through two or three layers, summed in another order in another batch: a few roundings
# of 6e-8. Without a mask, or with another padding, rows differ by more than 1e-3.
ROUNDING = 3e-6

WORDS = [
    "a",
    "an",
    "the",
    "red",
    "blue",
    "green",
    "small",
    "large",
    "square",
    "circle",
    "left",
    "right",
    "of",
    "on",
    "in",
    "photo",
    "dog",
    "cat",
    "and",
    ".",
]
TEXTS = [
    "",
    "a",
    "A photo of a RED dog.",
    "the small blue circle on the left of a large green square",
    "cat " * 9,
]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = VISION | {"vocab_size": 64, "max_position_embeddings": 16}


def _images() -> list[Image.Image]:
    """Larger and smaller than the encoder's 32 pixels, wide and tall."""
    random = np.random.default_rng(3)
    shapes = [(50, 77), (32, 32), (90, 20), (17, 64), (120, 121)]
    return [Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


IMAGES = _images()


def _word_tokenizer(special: list[str], template: str, lowercase: bool = True) -> Tokenizer:
    """Word-level; `special` take the first ids in their order, but "</s>" the highest."""
    first = [token for token in special if token != "</s>"]
    names = [*first, *WORDS, *(["</s>"] if "</s>" in special else [])]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    used = [(token, tokenizer.token_to_id(token)) for token in special if token in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return tokenizer


def _unit(features: Any) -> np.ndarray:
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).numpy()


def _images_of(config: EncoderConfig, batch: int = 100) -> np.ndarray:
    module = backend(config)
    prepare, tower = module.image_preparer(config), module.image_tower(config)
    pixels = np.stack([prepare(image) for image in IMAGES])
    assert pixels.dtype == np.uint8
    rows = [tower.encode(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
    return np.concatenate(rows)


def _texts_of(config: EncoderConfig, batch: int = 100) -> np.ndarray:
    module = backend(config)
    tokens = [row.ids for row in module.text_preparer(config)(TEXTS)]
    tower = module.text_tower(config)
    return np.concatenate([tower.encode(tokens[at : at + batch]) for at in range(0, len(tokens), batch)])


def _num_parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


# ----------------------------------------------------------------------------------------- checkpoints

OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


def _write_open_clip(folder: Path) -> EncoderConfig:
    torch.manual_seed(0)
    folder.mkdir()
    preprocess = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
    document = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    save_file(open_clip.CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    _word_tokenizer(["<pad>", "<unk>", "<s>", "</s>"], "<s> $A </s>").save(str(folder / "tokenizer.json"))
    return EncoderConfig(kind="open_clip", model=str(folder))


def _open_clip_library(config: EncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{config.model}")
    tokenizer = Tokenizer.from_file(f"{config.model}/tokenizer.json")
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=12, pad_id=0)
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(TEXTS)])
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(image) for image in IMAGES]))
        return _unit(images), _unit(model.encode_text(ids))


def _write_clip(folder: Path) -> EncoderConfig:
    torch.manual_seed(1)
    tokenizer = _word_tokenizer(["<unk>", "<s>", "</s>"], "<s> $A </s>")
    end = tokenizer.token_to_id("</s>")
    text = TEXT | {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": end}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return EncoderConfig(kind="transformers", model=str(folder))


def _write_siglip(folder: Path, pad: str) -> EncoderConfig:
    """SigLIP pads with its end token, SigLIP 2 with <pad> and a tokenizer that knows no upper case."""
    torch.manual_seed(2)
    special = ["<pad>", "<unk>", "</s>"]
    tokenizer = _word_tokenizer(special, "$A </s>", lowercase=False)
    SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2).save_pretrained(folder)
    names = {"eos_token": "</s>", "pad_token": pad, "unk_token": "<unk>", "padding_side": "right"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return EncoderConfig(kind="transformers", model=str(folder))


def _transformers_library(config: EncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    model = AutoModel.from_pretrained(config.model).eval()
    pixels = AutoImageProcessor.from_pretrained(config.model)(images=IMAGES, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    keywords = {"truncation": True, "max_length": 16, "return_tensors": "pt"}
    if isinstance(model, CLIPModel):
        tokens = dict(tokenizer(TEXTS, padding=True, **keywords))
    else:
        lower = [text.lower() for text in TEXTS]
        tokens = {"input_ids": tokenizer(lower, padding="max_length", **keywords)["input_ids"]}
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        return _unit(model.get_image_features(**pixels)), _unit(model.get_text_features(**tokens))


# As the published image checkpoints ship it: the library's vision tower, and an adapter for Llama's states.
LLM2CLIP_CODE = """
import torch
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))
        self.ln = nn.LayerNorm(dim)
    def forward(self, x):
        return x + self.fn(self.ln(x))

class Adapter(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.adaptor = nn.Sequential(Block(dim), Block(dim), nn.LayerNorm(dim), nn.Linear(dim, out))
    def forward(self, x):
        return self.adaptor(nn.functional.normalize(x, dim=-1))

class TinyLLM2CLIP(PreTrainedModel):
    config_class = CLIPConfig
    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        dim = config.projection_dim
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, dim, bias=False)
        self.text_adapter = Adapter(40, dim)
        self.post_init()
    def get_image_features(self, pixel_values):
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)
    def get_text_features(self, vectors):
        return self.text_adapter(vectors)
"""


def _write_llm2clip(folder: Path, foreign: bool = False) -> EncoderConfig:
    """`foreign` names the weights otherwise, so that only the checkpoint's own code knows them."""
    torch.manual_seed(4)
    code = LLM2CLIP_CODE
    if foreign:
        code = code.replace("self.visual_projection", "self.vis_head").replace(
            "self.adaptor", "self.first.layers"
        )
        code = code.replace("super().__init__()\n        self.first", "super().__init__()\n        "
                            "self.first = nn.Module()\n        self.first")  # fmt: skip
    namespace: dict[str, Any] = {"__name__": "tiny_llm2clip"}
    exec(compile(code, "modeling_tiny.py", "exec"), namespace)
    image = folder / "image"
    model = namespace["TinyLLM2CLIP"](CLIPConfig(vision_config=VISION, projection_dim=24))
    model.save_pretrained(image)
    (image / "modeling_tiny.py").write_text(code)
    document = json.loads((image / "config.json").read_text())
    document["auto_map"] = {"AutoModel": "modeling_tiny.TinyLLM2CLIP"}
    (image / "config.json").write_text(json.dumps(document))

    text = folder / "text"
    header = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _word_tokenizer(["<pad>", "<unk>", "<s>", *header, "user"], "<s> $A")
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(text)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaModel(llama).save_pretrained(text)
    return EncoderConfig(kind="llm2clip", model=str(image), text_model=str(text))


def _llm2vec_states(config: EncoderConfig, causal: bool = False) -> torch.Tensor:
    """Pooled states as llm2vec computes them: padded on the left, mask spelled out, mean of the last."""
    tokenizer = AutoTokenizer.from_pretrained(config.text_model)
    model = LlamaModel.from_pretrained(config.text_model, attn_implementation="eager").eval()
    bodies = [text.rstrip() + "<|eot_id|>" for text in TEXTS]
    whole = [f"<|start_header_id|>user<|end_header_id|>\n\n{body}" for body in bodies]
    batch = tokenizer(whole, padding=True, return_tensors="pt")
    real_NT = batch["attention_mask"].bool()
    allowed_NTT = real_NT[:, None, :].expand(-1, real_NT.shape[1], -1)
    if causal:
        allowed_NTT = allowed_NTT & torch.ones(real_NT.shape[1], real_NT.shape[1], dtype=torch.bool).tril()
    mask = torch.where(allowed_NTT, 0.0, torch.finfo(torch.float32).min)[:, None]
    lengths = [len(tokenizer(body, add_special_tokens=False)["input_ids"]) for body in bodies]
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    return torch.stack([row[-length:].mean(0) for row, length in zip(states, lengths, strict=True)])


def _llm2clip_library(config: EncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    model = AutoModel.from_pretrained(config.model, trust_remote_code=True).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    with torch.no_grad():
        pixels = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
        texts = model.get_text_features(_llm2vec_states(config))
        return _unit(model.get_image_features(pixels)), _unit(texts)


@dataclasses.dataclass
class Case:
    config: EncoderConfig
    library: Callable[[EncoderConfig], tuple[np.ndarray, np.ndarray]]
    dim: int
    context: int
    """Words that fit, special tokens aside."""


KINDS = ["open_clip", "clip", "siglip", "siglip2", "llm2clip"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "open_clip": Case(_write_open_clip(folder / "open_clip"), _open_clip_library, 24, 10),
        "clip": Case(_write_clip(folder / "clip"), _transformers_library, 24, 14),
        "siglip": Case(_write_siglip(folder / "siglip", "</s>"), _transformers_library, 32, 15),
        "siglip2": Case(_write_siglip(folder / "siglip2", "<pad>"), _transformers_library, 32, 15),
        "llm2clip": Case(_write_llm2clip(folder / "llm2clip"), _llm2clip_library, 24, 507),
    }


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def copied(case: Case, tmp_path: Path) -> EncoderConfig:
    """A private copy of the checkpoint, to be changed."""
    return _copy(case.config, tmp_path)


def _copy(config: EncoderConfig, target: Path) -> EncoderConfig:
    shutil.copytree(config.model, target / "copy")
    if config.text_model:
        shutil.copytree(config.text_model, target / "copy_text")
    text_model = str(target / "copy_text") if config.text_model else None
    return dataclasses.replace(config, model=str(target / "copy"), text_model=text_model)


# ---------------------------------------------------------------------------------------------- parity


def test_rows_equal_the_librarys_own(case: Case) -> None:
    library_images, library_texts = case.library(case.config)
    images, texts = _images_of(case.config), _texts_of(case.config)
    assert images.dtype == texts.dtype == np.float32
    assert images.shape == (len(IMAGES), case.dim)
    np.testing.assert_allclose(images, library_images, atol=ROUNDING, rtol=0)
    np.testing.assert_allclose(texts, library_texts, atol=ROUNDING, rtol=0)
    # Rows that are all alike would pass: they are not.
    assert np.abs(texts - texts[0])[1:].max(1).min() > 1e-3
    assert np.abs(images - images[0])[1:].max(1).min() > 1e-3


def test_batch_size_and_padding_do_not_change_a_row(case: Case) -> None:
    for encode in (_images_of, _texts_of):
        together = encode(case.config)
        np.testing.assert_allclose(encode(case.config, batch=1), together, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(encode(case.config, batch=2), together, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_bfloat16_rows_are_float32_and_of_unit_length(case: Case) -> None:
    config = dataclasses.replace(case.config, dtype="bfloat16")
    for encode in (_images_of, _texts_of):
        rows, exact = encode(config), encode(case.config)
        assert rows.dtype == np.float32
        # Normalised in float32, not in the 8 bits of bfloat16.
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        assert (rows * exact).sum(1).min() > 0.99


def test_pixels_are_scaled_as_by_the_library(cases: dict[str, Case]) -> None:
    from revision_ray.encode import open_clip as our_open_clip
    from revision_ray.encode import transformers as our_transformers

    cpu = torch.device("cpu")
    config = cases["open_clip"].config
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{config.model}")
    tower = our_open_clip.image_tower(config)
    for image in IMAGES:
        ours = tower._scale(our_open_clip.image_preparer(config)(image)[None], cpu, torch.float32)[0]
        torch.testing.assert_close(ours, preprocess(image), atol=1e-6, rtol=0)
    config = cases["siglip"].config
    processor = AutoImageProcessor.from_pretrained(config.model)
    scale = our_transformers.pixel_scale_of(processor)
    for image in IMAGES:
        ours = scale(our_transformers.image_preparer(config)(image)[None], cpu, torch.float32)
        torch.testing.assert_close(
            ours, processor(images=image, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0
        )


def test_pixels_from_shared_memory_are_taken_without_a_warning(case: Case) -> None:
    module = backend(case.config)
    pixels = module.image_preparer(case.config)(IMAGES[0])[None]
    pixels.flags.writeable = False
    tower = module.image_tower(case.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.encode(pixels)


def test_llama_tokens_see_the_tokens_behind_them(cases: dict[str, Case]) -> None:
    config = cases["llm2clip"].config
    module = backend(config)
    tower: Any = module.text_tower(config)
    tokens = [row.ids for row in module.text_preparer(config)(TEXTS)]
    alone = torch.cat([tower.pooled([ids]) for ids in tokens])  # without padding no mask is passed on
    torch.testing.assert_close(alone, _llm2vec_states(config), atol=1e-5, rtol=1e-5)
    assert (alone - _llm2vec_states(config, causal=True)).abs().max() > 1e-2


# --------------------------------------------------------------------------------------- one side only


def test_each_side_holds_its_own_weights_alone(cases: dict[str, Case]) -> None:
    config = cases["open_clip"].config
    whole = open_clip.create_model_from_pretrained(f"local-dir:{config.model}", return_transform=False)
    text_parts = _num_parameters(whole) - _num_parameters(whole.visual)
    assert _num_parameters(backend(config).image_tower(config).model) == _num_parameters(whole.visual)
    assert _num_parameters(backend(config).text_tower(config).model) == text_parts

    for name in ("clip", "siglip"):
        config = cases[name].config
        images: Any = backend(config).image_tower(config)
        texts: Any = backend(config).text_tower(config)
        whole = AutoModel.from_pretrained(config.model)
        scalars = 1 if name == "clip" else 2  # logit scale and bias belong to neither side
        assert _num_parameters(images.model) + _num_parameters(texts.model) + scalars == _num_parameters(
            whole
        )
        assert not any("text" in key for key in images.model.state_dict())
        assert not any("vis" in key or "patch" in key for key in texts.model.state_dict())

    config = cases["llm2clip"].config
    whole = AutoModel.from_pretrained(config.model, trust_remote_code=True)
    assert _num_parameters(backend(config).image_tower(config).model) == _num_parameters(
        whole.vision_model, whole.visual_projection
    )
    assert _num_parameters(backend(config).text_tower(config).adapter) == _num_parameters(whole.text_adapter)


def test_preparers_need_no_weights(case: Case, copied: EncoderConfig) -> None:
    for path in [*Path(copied.model).parent.rglob("*.safetensors")]:
        path.unlink()
    module = backend(copied)
    assert module.image_preparer(copied)(IMAGES[0]).shape == (3, 32, 32)
    assert len(module.text_preparer(copied)(TEXTS)) == len(TEXTS)
    with pytest.raises(ConfigError, match=r"weights|damaged|checkpoint"):
        module.image_tower(copied)


# ------------------------------------------------------------------------------------------ truncation


def test_a_text_is_marked_when_the_context_cuts_it(case: Case) -> None:
    prepare = backend(case.config).text_preparer(case.config)
    fits, cut, long, short = prepare(
        ["cat " * case.context, "cat " * (case.context + 1), "dog cat " * 5000, "cat"]
    )
    assert fits.num_tokens == fits.limit == cut.limit == long.limit
    assert (cut.num_tokens, long.num_tokens) == (fits.limit + 1, fits.limit - case.context + 10_000)
    assert {fits.num_taken, cut.num_taken, long.num_taken} == {fits.limit}
    assert short.num_tokens == short.num_taken == fits.limit - case.context + 1, "padding is not counted"
    assert (fits.truncated, cut.truncated, long.truncated) == (False, True, True)
    assert len(fits.ids) == len(cut.ids) == len(long.ids)
    # The end token stays last: the row is pooled there, or over it.
    assert fits.ids[-1] == cut.ids[-1] == long.ids[-1] != fits.ids[-2]
    np.testing.assert_array_equal(fits.ids, cut.ids)
    assert prepare([]) == []


def test_a_cut_text_gives_the_row_of_what_was_left(case: Case) -> None:
    module = backend(case.config)
    tokens = module.text_preparer(case.config)(["cat " * case.context, "cat " * (case.context + 9)])
    rows = module.text_tower(case.config).encode([row.ids for row in tokens])
    np.testing.assert_allclose(rows[0], rows[1], atol=ROUNDING)


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "a b " * 25_000, "é\u4e2d" * 30_000], ids=["word", "words", "wide"]
)
def test_100_kilobytes_are_tokenised_quickly(case: Case, text: str) -> None:
    prepare = backend(case.config).text_preparer(case.config)
    start = time.perf_counter()
    (row,) = prepare([text])
    # Milliseconds in practice; a quadratic tokenizer takes minutes.
    assert time.perf_counter() - start < 5
    assert len(row.ids) > 1


# --------------------------------------------------------------------------------- open_clip's ways in


def _write_json_encoder(folder: Path, **text_cfg: Any) -> tuple[str, str]:
    """A configuration JSON and a checkpoint file, for open_clip's own tokenizer."""
    cfg = OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"vocab_size": 49408} | text_cfg}
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(cfg))
    save_file(open_clip.CLIP(**cfg).state_dict(), folder / "weights.safetensors")
    return str(folder / "tiny.json"), str(folder / "weights.safetensors")


HARD_TEXTS = [
    "",
    "A Photo of two DOGS, it's they'll I'd",
    "caf\u00e9 \u4e2d\u6587 \U0001f600\U0001f600 \u0627\u0644\u0639 na\u00efve\ufb01 \u00bd 1234",
    "&amp;lt;b&gt; &#39;x&#39; \u201cquoted\u201d  tabs\t\tand\nlines",
    "supercalifragilisticexpialidocious" * 5,
    "".join(chr(97 + i * i % 26) for i in range(300)),
    "!!!???...---___" * 4,
]


@pytest.mark.parametrize("context", [12, 77, 400])
def test_ids_equal_those_of_open_clips_own_tokenizer(tmp_path: Path, context: int) -> None:
    model, weights = _write_json_encoder(tmp_path / "enc", context_length=context)
    config = EncoderConfig(model=model, pretrained=weights)
    rows = backend(config).text_preparer(config)(HARD_TEXTS)
    tokenizer = SimpleTokenizer(context_length=context)
    for text, row, expected in zip(HARD_TEXTS, rows, tokenizer(HARD_TEXTS).numpy(), strict=True):
        np.testing.assert_array_equal(row.ids, expected[: len(row.ids)], err_msg=text)
        assert not expected[len(row.ids) :].any()
        assert row.truncated == (len(tokenizer.encode(text)) > context - 2)


CONTROL = {
    "json": ["<start_of_text>", "<end_of_text>"],
    "library": ["<s>", "</s>"],
    "file": ["<s>", "</s>"],
    "transformers": ["<s>", "</s>"],
}


@pytest.mark.parametrize("kind", CONTROL)
def test_a_control_tokens_name_in_a_text_is_text(kind: str) -> None:
    """Its embedding would else be read at an end token in the midst of the text."""
    if kind == "json":
        prepare: Any = ClipTokens(SimpleTokenizer(context_length=24), 24)
    else:
        words = _word_tokenizer(["<pad>", "<unk>", "<s>", "</s>"], "<s> $A </s>")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        )
        prepare = {
            "file": lambda: FileTokens(words, 24),
            "transformers": lambda: transformers_backend._TransformersTexts(wrapped, 24, lowercase=False),
            "library": lambda: LibraryTokens(_named(wrapped), 24),
        }[kind]()
    start, end = (prepare(["a dog"])[0].ids[place] for place in (0, -1 if kind != "library" else 3))
    for name in CONTROL[kind]:
        (tokens,) = prepare([f"a {name} dog"])
        ids = tokens.ids.tolist()
        assert (ids.count(start), ids.count(end), ids[0]) == (1, 1, start)
        assert not tokens.truncated
    # Ordinary texts have the tokenizer's own ids, beside one that names a control token too.
    alone, beside = prepare(["a dog"])[0], prepare([f"a {CONTROL[kind][1]}", "a dog"])[1]
    np.testing.assert_array_equal(alone.ids, beside.ids)


def _named(tokenizer: PreTrainedTokenizerFast) -> Any:
    """As open_clip's HFTokenizer, which can only be made from a file."""
    wrapper = object.__new__(HFTokenizer)
    wrapper.tokenizer, wrapper.tokenizer_mode, wrapper.strip_sep_token = tokenizer, "", False
    wrapper.clean_fn, wrapper.context_length = str, 24
    return wrapper


def test_open_clips_own_tokenizer_takes_100_kilobytes_without_a_space() -> None:
    config = EncoderConfig(model="ViT-B-32", pretrained="laion2b_s34b_b79k")  # nothing is downloaded for this
    prepare = backend(config).text_preparer(config)
    letters = "".join(chr(97 + number) for number in np.random.default_rng(0).integers(0, 26, 100_000))
    start = time.perf_counter()
    (row,) = prepare([letters])
    assert time.perf_counter() - start < 5  # 0.2 s; open_clip's own loop takes minutes
    assert (len(row.ids), row.truncated) == (77, True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_file_with_an_architecture_or_a_json(tmp_path: Path, suffix: str) -> None:
    model_json, weights = _write_json_encoder(tmp_path / "enc")
    if suffix == ".pt":
        torch.save({"state_dict": load_file(weights)}, weights := str(tmp_path / "weights.pt"))
    name = f"tiny-{suffix[1:]}"
    shutil.copy(model_json, tmp_path / f"{name}.json")
    open_clip.add_model_config(tmp_path / f"{name}.json")
    by_name, by_json = (EncoderConfig(model=model, pretrained=weights) for model in (name, model_json))
    library, preprocess = open_clip.create_model_from_pretrained(name, pretrained=weights)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        images = _unit(library.eval().encode_image(torch.stack([preprocess(image) for image in IMAGES])))
        texts = _unit(library.encode_text(ids))
    for config in (by_name, by_json):
        np.testing.assert_allclose(_images_of(config), images, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(_texts_of(config), texts, atol=ROUNDING, rtol=0)
    assert backend(by_name).fingerprint(by_name) == backend(by_json).fingerprint(by_json)


def test_a_tokenizer_that_the_configuration_names(tmp_path: Path) -> None:
    """A text tower that pools at the last position reads its padding, and open_clip finds the tokenizer."""
    folder = tmp_path / "named"
    cfg = OPEN_CLIP | {"custom_text": True}
    cfg["text_cfg"] = OPEN_CLIP["text_cfg"] | {
        "hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"clean": "canonicalize"}, "pool_type": "last",
        "no_causal_mask": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    built = {key: value for key, value in cfg.items() if key != "custom_text"}
    save_file(open_clip.CustomTextCLIP(**built).state_dict(), folder / "open_clip_model.safetensors")
    tokenizer = _word_tokenizer(["<unk>", "<pad>", "</s>"], "$A </s>")
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = EncoderConfig(model=str(folder))
    library = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False)
    with torch.no_grad():
        texts = _unit(library.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)))
    np.testing.assert_allclose(_texts_of(config), texts, atol=ROUNDING, rtol=0)
    fits, cut = backend(config).text_preparer(config)(["cat " * 11, "cat " * 12])
    assert (fits.truncated, cut.truncated) == (False, True)
    assert (fits.num_tokens, cut.num_tokens, cut.num_taken) == (12, 13, 12)
    # It pads by itself, and the job's metrics count no padding.
    (tmp_path / "texts.txt").write_text("cat\n" + "cat " * 30 + "\ncat dog\n")
    (split,) = sources.text_splits([str(tmp_path / "texts.txt")])
    plan = ShardPlan(
        modality="text", done={}, encoder=config, identity=EncoderIdentity(name="named", fingerprint="f"),
        output="", dtype="float16", layout="binary", rows_per_shard=8, batch_size=8, max_image_pixels=1,
    )  # fmt: skip
    (unit,) = Prepare(plan)(pa.table({"split": [json.dumps(dataclasses.asdict(split))]}))
    assert unit.column("shape").to_pylist() == [[12, 12, 12]]
    assert unit.column("num_tokens").to_pylist() == [2 + 12 + 3]


# ----------------------------------------------------------------------------------------- remote code


def test_an_unknown_layout_needs_the_checkpoints_code_and_a_yes(tmp_path: Path) -> None:
    config = _write_llm2clip(tmp_path / "foreign", foreign=True)
    module = backend(config)
    for side in (module.image_tower, module.text_tower):
        with pytest.raises(ConfigError, match=r"trust_remote_code=true"):
            side(config)
    trusting = dataclasses.replace(config, trust_remote_code=True)
    images, texts = _llm2clip_library(config)
    np.testing.assert_allclose(_images_of(trusting), images, atol=ROUNDING, rtol=0)
    np.testing.assert_allclose(_texts_of(trusting), texts, atol=ROUNDING, rtol=0)
    image_tower: Any = module.image_tower(trusting)
    assert not any(key.startswith("text") for key in image_tower.model.state_dict())
    text_tower: Any = module.text_tower(trusting)
    assert not any("vis" in key for key in text_tower.adapter.state_dict())


def test_a_known_layout_never_runs_the_checkpoints_code(cases: dict[str, Case], tmp_path: Path) -> None:
    config = _copy(cases["llm2clip"].config, tmp_path)
    (Path(config.model) / "modeling_tiny.py").write_text("raise SystemExit('this code has run')")
    np.testing.assert_array_equal(_images_of(config), _images_of(cases["llm2clip"].config))
    np.testing.assert_array_equal(_texts_of(config), _texts_of(cases["llm2clip"].config))


# ---------------------------------------------------------------------------------------- fingerprints


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _change_a_weight(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[7] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def _change_the_config(folder: Path) -> None:
    (path,) = [*folder.glob("open_clip_config.json"), *folder.glob("config.json")]
    _edit(path, lambda document: document.get("model_cfg", document).update(quick_gelu=True))


def _change_the_tokenizer(folder: Path) -> None:
    vocabulary: Callable[[Any], dict[str, int]] = lambda document: document["model"]["vocab"]  # noqa: E731
    _edit(
        folder / "tokenizer.json",
        lambda document: vocabulary(document).update(zebra=vocabulary(document).pop("dog")),
    )


def _change_the_preprocessing(folder: Path) -> None:
    if (folder / "open_clip_config.json").exists():
        _edit(
            folder / "open_clip_config.json",
            lambda document: document["preprocess_cfg"].update(mean=[0, 0, 0]),
        )
    elif (folder / "preprocessor_config.json").exists():
        _edit(folder / "preprocessor_config.json", lambda document: document.update(image_mean=[0, 0, 0]))
    else:
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0, 0, 0]).save_pretrained(
            folder
        )


CHANGES = [_change_a_weight, _change_the_config, _change_the_tokenizer, _change_the_preprocessing]


def test_fingerprint_ignores_place_dtype_and_device(case: Case, copied: EncoderConfig) -> None:
    fingerprint = backend(case.config).fingerprint(case.config)
    assert len(bytes.fromhex(fingerprint)) == 32
    assert backend(copied).fingerprint(copied) == fingerprint
    other = dataclasses.replace(copied, dtype="bfloat16", device="cpu", trust_remote_code=True)
    assert backend(other).fingerprint(other) == fingerprint


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_what_decides_the_rows(
    case: Case, copied: EncoderConfig, change: Callable[[Path], None]
) -> None:
    before = backend(copied).fingerprint(copied)
    change(Path(copied.text_model or copied.model) if change is _change_the_tokenizer else Path(copied.model))
    assert backend(copied).fingerprint(copied) != before


def test_fingerprint_covers_the_language_model(cases: dict[str, Case], tmp_path: Path) -> None:
    config = _copy(cases["llm2clip"].config, tmp_path)
    before = backend(config).fingerprint(config)
    _change_a_weight(Path(config.text_model or ""))
    assert backend(config).fingerprint(config) != before


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B-23", "pretrained": "openai"}, "no such architecture.*ViT-B-32"),
        ({"model": "ViT-B-32"}, "pretrained: required.*laion2b_s34b_b79k"),
        ({"model": "ViT-B-32", "pretrained": "nothing_like_it"}, "neither a file nor a tag"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "QuickGELU.*ViT-B-32-quickgelu"),
        ({"model": "missing/enc.json"}, "no such file"),
        ({"kind": "transformers", "model": "missing/folder/of/mine"}, "no such folder"),
        ({"kind": "llm2clip", "model": "."}, "text_model: required"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_remedy(settings: dict[str, str], message: str) -> None:
    config = EncoderConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        backend(config).text_tower(config)


@pytest.mark.parametrize("content", [b"", b"\x00" * 400, b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(copied: EncoderConfig, content: bytes) -> None:
    (path,) = Path(copied.model).glob("*.safetensors")
    path.write_bytes(content)
    for side in (backend(copied).image_tower, backend(copied).text_tower):
        with pytest.raises(ConfigError, match=r"cannot be loaded.*again"):
            side(copied)


def test_missing_weights_are_never_replaced_by_random_ones(copied: EncoderConfig) -> None:
    (path,) = Path(copied.model).glob("*.safetensors")
    weights = load_file(path)
    for name in list(weights):
        if "layers.1" in name or "resblocks.1" in name or "adaptor.1" in name:
            del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    for side in (backend(copied).image_tower, backend(copied).text_tower):
        with pytest.raises(ConfigError, match=r"lacks|Missing key|not laid out"):
            side(copied)


def test_weights_of_another_shape_are_refused(copied: EncoderConfig) -> None:
    (path,) = Path(copied.model).glob("*.safetensors")
    weights = {name: tensor[..., :-1].contiguous() if tensor.dim() == 2 else tensor
               for name, tensor in load_file(path).items()}  # fmt: skip
    save_file(weights, path, metadata={"format": "pt"})
    for side in (backend(copied).image_tower, backend(copied).text_tower):
        with pytest.raises(ConfigError, match=r"shape|size mismatch|not laid out"):
            side(copied)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path, cases: dict[str, Case]) -> None:
    model, _ = _write_json_encoder(tmp_path / "enc")
    torch.save({"state_dict": {}, "optimizer": Path("x")}, tmp_path / "weights.pt")
    config = EncoderConfig(model=model, pretrained=str(tmp_path / "weights.pt"))
    with pytest.raises(ConfigError, match="safetensors"):
        backend(config).image_tower(config)


@pytest.mark.parametrize(
    ("model_type", "message"), [("siglip2", "NaFlex.*fixed resolution"), ("bert", "takes")]
)
def test_a_model_of_another_kind_is_refused(
    cases: dict[str, Case], tmp_path: Path, model_type: str, message: str
) -> None:
    config = _copy(cases["siglip"].config, tmp_path)
    _edit(Path(config.model) / "config.json", lambda document: document.update(model_type=model_type))
    for part in ("image_preparer", "text_preparer", "image_tower", "text_tower", "fingerprint"):
        with pytest.raises(ConfigError, match=message):
            getattr(backend(config), part)(config)


def test_a_tokenizer_with_more_tokens_than_the_text_tower_is_refused(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    config = _copy(cases["open_clip"].config, tmp_path)
    _edit(
        Path(config.model) / "open_clip_config.json",
        lambda document: document["model_cfg"]["text_cfg"].update(vocab_size=9),
    )
    with pytest.raises(ConfigError, match="do not belong together"):
        backend(config).text_preparer(config)


def test_clip_vision_defaults_are_not_mixed_with_the_checkpoints(cases: dict[str, Case]) -> None:
    """The joint dimension comes from the checkpoint, not from the library's default of 512."""
    config = cases["clip"].config
    assert CLIPVisionConfig().projection_dim == 512
    assert (
        backend(config).image_tower(config).embedding_dim
        == backend(config).text_tower(config).embedding_dim
        == 24
    )
