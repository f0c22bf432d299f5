"""Engines: an answer in company equals the one alone and that of `generate`; text, draws, queue, faults."""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language_model import tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from revision_ray.core.errors import ConfigError, DataError
from revision_ray.model import ReVisionProcessor, add_image_token, build_model
from revision_ray.model.modeling import FrozenImageTower
from revision_ray.serve.engine import AnswerPiece, GenerationEngine, Prompt, QueueFull
from revision_ray.serve.replicas import LanguageModel, make_engine
from revision_ray.serve.sampling import (
    LogitAdjustments,
    Sampling,
    SamplingState,
    TextStream,
    TokenNames,
    choose,
)
from revision_ray.serve.settings import EngineConfig

DIM, VISUAL, CONTEXT = 16, 3, 96
TOKENIZER = tiny_tokenizer("qwen")
IMAGE_ID = add_image_token(TOKENIZER)
VOCAB = len(TOKENIZER)
KINDS = ["continuous", "generate"]
# Grouped key/value heads; tied; fused projections and no gate; learnt positions; experts; narrow embeddings.
FAMILIES = ["llama", "qwen2", "phi", "gpt2", "mixtral", "opt"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For models this small a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: str = "llama", end: Sequence[int] = (), **generation: Any) -> Any:
    """A random model that never says <image>, and ends at the tokens `end` alone."""
    torch.manual_seed(0)
    config = tiny_config(family, VOCAB)
    config.max_position_embeddings = CONTEXT
    model = build_model(config, DIM, IMAGE_ID, num_visual_tokens=VISUAL, embedding_scale=DIM**0.5)
    # Biases start at zero, and every answer would soon go in circles.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = list(end) or None
    model.generation_config.update(**generation)
    return model


def images(num: int, seed: int = 0) -> np.ndarray:
    rows_ID = np.random.default_rng(seed).standard_normal((num, DIM)).astype(np.float32)
    return rows_ID / np.linalg.norm(rows_ID, axis=1, keepdims=True)


def prompt_of(seed: int, length: int | None = None, num_images: int | None = None) -> Prompt:
    """Random words, and images between them."""
    random = np.random.default_rng(seed)
    num_images = int(random.integers(0, 3)) if num_images is None else num_images
    ids = [2]
    for _ in range(num_images):
        ids += [IMAGE_ID] * VISUAL + random.integers(4, VOCAB - 10, 2).tolist()
    rest = int(random.integers(1, 12)) if length is None else length - len(ids)
    ids += random.integers(4, VOCAB - 10, rest).tolist()
    return Prompt(input_ids=tuple(ids), image_embeds=images(num_images, seed))


PROMPTS = [prompt_of(seed) for seed in range(9)]


def greedy(max_tokens: int = 16, **others: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0, **others)


@torch.no_grad()
def generated(model: Any, prompt: Prompt, max_tokens: int = 16) -> list[int]:
    inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt.input_ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if len(prompt.image_embeds):
        inputs["image_embeds"] = torch.from_numpy(prompt.image_embeds)
    out_BT = model.generate(
        **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, top_k=None, temperature=None
    )
    return out_BT[0, len(prompt.input_ids) :].tolist()


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@functools.cache
def answers_of(family: str, limits: tuple[int, ...]) -> list[str]:
    """Greedy, of the family's model to as many of PROMPTS, one at a time."""
    model = model_of(family)
    return [text_of(generated(model, *pair)) for pair in zip(PROMPTS, limits, strict=False)]


@contextlib.asynccontextmanager
async def engine_of(
    kind: str = "continuous", model: Any = None, tokenizer: Any = TOKENIZER, **others: Any
) -> AsyncIterator[GenerationEngine]:
    others = {"num_slots": 4, "max_length": CONTEXT, "batch_wait_s": 0.05, "piece_interval_s": 0.0, **others}
    engine = make_engine(model or model_of(), tokenizer, EngineConfig(kind=kind, **others))
    try:
        yield engine
    finally:
        await engine.close()


async def pieces_of(engine: GenerationEngine, prompt: Prompt, sampling: Sampling) -> list[AnswerPiece]:
    return [piece async for piece in engine.stream(prompt, sampling)]


async def answer_of(engine: GenerationEngine, prompt: Prompt, sampling: Sampling) -> str:
    pieces = await pieces_of(engine, prompt, sampling)
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return "".join(piece.text for piece in pieces)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


class Gate:
    """Steps of `model` wait until it is open, and fail while it is broken."""

    def __init__(self, model: Any) -> None:
        self.open, self.broken, self.delay_s = threading.Event(), False, 0.0
        self.steps, self.widths = 0, []
        self.open.set()
        model.language_model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, args: Any, kwargs: Any) -> None:
        time.sleep(self.delay_s)
        assert self.open.wait(20)
        self.steps += 1
        self.widths.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        if self.broken:
            raise RuntimeError("a secret detail")


# ------------------------------------------------------------------------------- alone, in company, generate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_equals_a_full_batch_equals_generate(family, kind):
    """Nine prompts of different lengths with none to two images, over four slots: they come and go."""
    model = model_of(family)
    limits = (16, 3, 9, 12, 1, 16, 5, 16, 7)
    expected = answers_of(family, limits)
    assert len(set(expected)) > 5

    async def run() -> tuple[list[str], list[str]]:
        async with engine_of(kind, model, max_prefill_tokens=40) as engine:
            together = await asyncio.gather(
                *(answer_of(engine, *pair) for pair in zip(PROMPTS, map(greedy, limits), strict=True))
            )
            alone = [await answer_of(engine, PROMPTS[row], greedy(limits[row])) for row in range(3)]
        return together, alone

    together, alone = asyncio.run(run())
    assert together == expected
    assert alone == expected[:3]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_that_join_later_change_nothing(attention):
    """The cache grows meanwhile, from 64 tokens to the context."""
    model = model_of()
    model.set_attn_implementation(attention)
    assert model.language_model.config._attn_implementation == attention
    prompts = [prompt_of(20, 10, 1), prompt_of(21, 50, 2), prompt_of(22, 4, 0), prompt_of(23, 30, 1)]
    expected = [text_of(generated(model, prompt, 40)) for prompt in prompts]

    async def run() -> list[str]:
        async with engine_of(model=model) as engine:
            gate = Gate(model)

            async def later(number: int) -> str:
                await until(lambda: gate.steps >= 5 * number)
                return await answer_of(engine, prompts[number], greedy(40))

            return await asyncio.gather(*map(later, range(len(prompts))))

    assert asyncio.run(run()) == expected


def test_in_bfloat16_it_runs_too():
    async def run() -> list[str]:
        async with engine_of(model=model_of().to(torch.bfloat16)) as engine:
            return await asyncio.gather(*(answer_of(engine, prompt, greedy()) for prompt in PROMPTS))

    assert all(asyncio.run(run()))


@pytest.mark.parametrize("kind", KINDS)
def test_end_tokens_and_generation_settings_are_the_models(kind):
    """One end token or several; tokens never said; a repetition penalty. Drawing defaults are ignored."""
    plain = generated(model_of(), PROMPTS[0])
    for settings_of_model in (
        {"end": [plain[4]]},
        {"end": [plain[5], plain[2]]},
        {"suppress_tokens": [plain[0]]},
        {"repetition_penalty": 1.5},
        {"temperature": 0.1, "top_k": 2, "do_sample": True},
    ):
        model = model_of(**settings_of_model)
        ids = generated(model, PROMPTS[0])
        ended = bool(ids[-1] in settings_of_model.get("end", []))

        async def run(model: Any = model) -> list[AnswerPiece]:
            async with engine_of(kind, model) as engine:
                return await pieces_of(engine, PROMPTS[0], greedy())

        pieces = asyncio.run(run())
        text = "".join(piece.text for piece in pieces)
        assert text == text_of(ids[:-1] if ended else ids), settings_of_model
        assert pieces[-1].finish_reason == ("stop" if ended else "length")
        assert pieces[-1].num_tokens == len(ids) - ended


def test_what_the_slots_cannot_serve_is_refused_with_the_way_out():
    small = EngineConfig(max_length=CONTEXT)
    for family, reason in (("bloom", "position_ids"), ("mistral", "DynamicSlidingWindowLayer")):
        model = model_of(family)
        if family == "mistral":
            model.language_model.config.sliding_window = 32
        with pytest.raises(ConfigError, match=rf"{reason}.*engine.kind=generate"):
            make_engine(model, TOKENIZER, small)
    model = model_of()
    model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"engine\.attention=sdpa"):
        make_engine(model, TOKENIZER, small)


def test_a_model_that_ignores_positions_is_found_out():
    model = model_of()
    forward = model.language_model.model.forward

    def ignoring(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.language_model.model.forward = ignoring
    with pytest.raises(ConfigError, match=r"otherwise than alone.*engine.kind=generate"):
        make_engine(model, TOKENIZER, EngineConfig(max_length=CONTEXT))


def test_a_window_that_is_never_left_and_a_model_without_positions_are_served():
    for kind, family in (("continuous", "mistral"), ("generate", "bloom"), ("generate", "mistral")):
        model = model_of(family)
        expected = answers_of(family, (16,) * 3)

        async def run(kind: str = kind, model: Any = model) -> list[str]:
            async with engine_of(kind, model) as engine:
                return await asyncio.gather(*(answer_of(engine, prompt, greedy()) for prompt in PROMPTS[:3]))

        assert asyncio.run(run()) == expected


# -------------------------------------------------------------------------------------------------- sampling


def drawn(seed: int | None, **others: Any) -> Sampling:
    return Sampling(**{"max_tokens": 12, "temperature": 1.3, "top_p": 0.9, **others}, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_answer_does_not_depend_on_its_company(kind):
    async def run() -> tuple[list[str], list[str]]:
        async with engine_of(kind) as engine:
            alone = [await answer_of(engine, PROMPTS[0], drawn(seed)) for seed in (5, 5, 6)]
            company = [drawn(None), greedy(), drawn(6), drawn(None, top_p=1.0, temperature=0.7)]
            mixed = await asyncio.gather(
                *(answer_of(engine, PROMPTS[row], company[row]) for row in (1, 2)),
                answer_of(engine, PROMPTS[0], drawn(5)),
                *(answer_of(engine, PROMPTS[4], sampling) for sampling in company),
                answer_of(engine, PROMPTS[0], drawn(6)),
            )
        return alone, [mixed[2], mixed[-1]]

    (five, again, six), mixed = asyncio.run(run())
    assert five == again != six
    assert mixed == [five, six]


def test_both_engines_draw_the_same_answer_from_a_seed():
    async def run(kind: str) -> str:
        async with engine_of(kind) as engine:
            return await answer_of(engine, PROMPTS[1], drawn(3))

    assert asyncio.run(run("continuous")) == asyncio.run(run("generate"))


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.0)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, seeded):
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    num = 4000
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p)
    draws = [SamplingState(sampling, torch.device("cpu")) for _ in range(num)]
    if seeded:
        for seed, draw in enumerate(draws):
            draw.generator = torch.Generator().manual_seed(seed)
    tokens_B = choose(logits_V.expand(num, -1).clone(), draws, torch.Generator().manual_seed(0))
    expected_V = (logits_V / temperature).softmax(-1)
    order = expected_V.argsort(descending=True)
    kept = order[: int((expected_V[order].cumsum(-1) < top_p).sum()) + 1]
    expected_V = torch.zeros(5).index_copy(0, kept, expected_V[kept])
    expected_V /= expected_V.sum()
    counted_V = torch.bincount(tokens_B, minlength=5) / num
    # Five standard deviations of a proportion of 4000.
    assert (counted_V - expected_V).abs().max() < 5 * (0.25 / num) ** 0.5
    assert not counted_V[expected_V == 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_models(kind):
    """Before temperature, and with a token that the model may not say."""
    model = model_of(suppress_tokens=[generated(model_of(), PROMPTS[3])[0]])
    sampling = drawn(1, top_logprobs=3, max_tokens=6)

    async def run() -> list[list[AnswerPiece]]:
        async with engine_of(kind, model) as engine:
            each = (sampling, drawn(1, top_logprobs=0, max_tokens=6), drawn(1, max_tokens=6))
            return await asyncio.gather(*(pieces_of(engine, PROMPTS[3], wish) for wish in each))

    pieces, without_top, without = asyncio.run(run())
    ids = list(PROMPTS[3].input_ids)
    for piece in pieces:
        inputs = {"input_ids": torch.tensor([ids]), "image_embeds": torch.from_numpy(PROMPTS[3].image_embeds)}
        with torch.no_grad():
            expected_V = model(**inputs).logits[0, -1].log_softmax(-1)
        assert piece.token is not None
        token = TOKENIZER.convert_tokens_to_ids(piece.token.token)
        # Steps with a cache round otherwise than one pass.
        assert piece.token.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
        values, likeliest = expected_V.topk(3)
        assert [one.logprob for one in piece.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [one.token for one in piece.top] == TOKENIZER.convert_ids_to_tokens(likeliest.tolist())
        assert bytes(piece.token.bytes).decode() == piece.token.token
        ids.append(token)
    assert [piece.token for piece in without_top] == [piece.token for piece in pieces]
    assert not any(piece.top for piece in without_top)
    assert all(piece.token is None for piece in without)


# --------------------------------------------------------------------------------- what a request may ask for

# What a request asks for, and the same for `generate`. Drawn among few tokens: seeds do not matter.
WISHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "less": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "one": ({"top_k": 1, "temperature": 1.5, "seed": 3}, {}),
    "likeliest": ({"min_p": 1.0, "temperature": 1.5, "seed": 3}, {}),
}


@torch.no_grad()
def generated_as(model: Any, prompt: Prompt, max_tokens: int = 16, **settings: Any) -> list[int]:
    """What `generated` gives with settings of `generate`."""
    before = model.generation_config
    model.generation_config = type(before)(**{**before.to_dict(), **settings})
    try:
        return generated(model, prompt, max_tokens)
    finally:
        model.generation_config = before


@pytest.mark.parametrize("kind", KINDS)
def test_requests_with_wishes_of_their_own_in_one_batch_get_what_generate_gives_each(kind):
    model = model_of()
    ends = generated(model, PROMPTS[0])[2:5]
    wishes = {
        **WISHES,
        "minimum": (
            {"min_tokens": 9, "stop_token_ids": tuple(ends)},
            {"min_new_tokens": 9, "eos_token_id": ends},
        ),
        "ends": ({"stop_token_ids": tuple(ends)}, {"eos_token_id": ends}),
        "none": ({}, {}),
    }
    expected = {}
    for name, (_, settings_) in wishes.items():
        ids = generated_as(model, PROMPTS[0], **settings_)
        ended = ids[-1] in settings_.get("eos_token_id", ())
        expected[name] = text_of(ids[:-1] if ended else ids)
    assert len(set(expected.values())) == 5, "four of the wishes change the greedy answer"

    async def run(names: Sequence[str]) -> dict[str, str]:
        async with engine_of(kind, model, num_slots=len(names)) as engine:
            samplings = [
                Sampling(**{"max_tokens": 16, "temperature": 0, **wishes[name][0]}) for name in names
            ]
            answers = await asyncio.gather(*(answer_of(engine, PROMPTS[0], each) for each in samplings))
        return dict(zip(names, answers, strict=True))

    assert asyncio.run(run(list(wishes))) == expected
    assert asyncio.run(run(["minimum"])) == {"minimum": expected["minimum"]}


@pytest.mark.parametrize("kind", KINDS)
def test_end_tokens_of_the_model_can_be_ignored_and_its_penalty_replaced(kind):
    plain = model_of()
    ids = generated(plain, PROMPTS[0])
    model = model_of(end=[ids[3]], repetition_penalty=1.5)

    async def run(**wishes: Any) -> list[AnswerPiece]:
        async with engine_of(kind, model) as engine:
            company = asyncio.create_task(answer_of(engine, PROMPTS[1], greedy()))
            pieces = await pieces_of(engine, PROMPTS[0], greedy(**wishes))
            await company
            return pieces

    pieces = asyncio.run(run(ignore_eos=True, repetition_penalty=1.0))
    assert "".join(piece.text for piece in pieces) == text_of(ids)
    assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("length", 16)
    pieces = asyncio.run(run(repetition_penalty=1.0))
    assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("stop", 3)
    with pytest.raises(DataError, match="min_tokens is 17"):
        asyncio.run(run(min_tokens=17))


def test_adjusted_scores_are_those_of_transformers_processors():
    scores_BV: Any = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    prompt, answer, ends = [2, 5, 7, VOCAB + 3], [9, 5, 9], [3, 11]
    sampling = Sampling(max_tokens=9, repetition_penalty=1.4, min_tokens=4)
    adjust = LogitAdjustments(sampling, prompt, ends, model_penalty=2.0)
    for number, token in enumerate(answer):
        adjust(scores_BV[0], number)
        adjust.add(token)
    ids_BT: Any = torch.tensor([[*prompt[:3], *answer]])
    expected_BV = RepetitionPenaltyLogitsProcessor(1.4)(ids_BT, scores_BV.clone())
    minimum = MinNewTokensLengthLogitsProcessor(3, 4, ends)
    assert torch.equal(adjust(scores_BV[0], 3), minimum(ids_BT, expected_BV)[0])
    assert torch.equal(adjust(scores_BV[0], 4), expected_BV[0])
    counted = LogitAdjustments(
        Sampling(max_tokens=9, presence_penalty=0.5, frequency_penalty=0.25), prompt, ends, model_penalty=1.0
    )
    for number, token in enumerate(answer):
        counted(scores_BV[0], number)
        counted.add(token)
    change_V = counted(scores_BV[0], 3) - scores_BV[0]
    expected_V = torch.zeros(VOCAB).index_add(0, torch.tensor([5, 9]), torch.tensor([-0.75, -1.0]))
    torch.testing.assert_close(change_V, expected_V, atol=1e-6, rtol=0)  # a difference of float32 near 1


@pytest.mark.parametrize(
    "wish",
    [
        {"top_k": 3},
        {"top_k": 5, "top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.2, "temperature": 0.7},
        {"top_k": 10**6, "min_p": 1e-9},
    ],
)
def test_tokens_are_drawn_from_those_that_transformers_leaves(wish):
    """With their probabilities, in a batch beside rows that ask for nothing or something else."""
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, 1.0, 0.7, -3.0])
    num = 3000
    sampling = Sampling(**{"max_tokens": 1, "temperature": 1.0, **wish})
    others = [Sampling(max_tokens=1), Sampling(max_tokens=1, temperature=0), Sampling(max_tokens=1, top_k=1)]
    draws = [SamplingState(each, torch.device("cpu")) for each in [sampling] * num + others]
    tokens_B = choose(logits_V.expand(len(draws), -1).clone(), draws, torch.Generator().manual_seed(0))
    assert tokens_B[-2:].tolist() == [1, 1]
    no_ids: Any = None  # which none of them reads
    scores_BV: Any = TemperatureLogitsWarper(sampling.temperature)(no_ids, logits_V[None].clone())
    warpers: list[tuple[Any, Any]] = [
        (TopKLogitsWarper, sampling.top_k),
        (TopPLogitsWarper, sampling.top_p),
        (MinPLogitsWarper, sampling.min_p),
    ]
    for warper, value in warpers:
        if value:
            scores_BV = warper(value)(no_ids, scores_BV)
    expected_V = scores_BV[0].softmax(-1)
    counted_V = torch.bincount(tokens_B[:num], minlength=8) / num
    # Five standard deviations of a proportion of 3000.
    assert (counted_V - expected_V).abs().max() < 5 * (0.25 / num) ** 0.5
    assert not counted_V[expected_V == 0].any()


# ------------------------------------------------------------------------------------------------------ text


def byte_level() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte, spelt as GPT-2 does; </s> ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Pieces with spaces before them, and a token for each byte, as Llama 2 has."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *"abc", "\u2581a", "bc", "\u00e9"]
    backend = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
TEXT = st.text(st.sampled_from("ab .\n\u00e9\u4e16\U0001f600\u0301\u200d"), max_size=60)


def streamed(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()]


@settings(deadline=None, max_examples=150)
@given(TEXT)
def test_no_character_is_ever_broken(text):
    ids = BYTE_LEVEL(text)["input_ids"]
    assert len(ids) == len(text.encode())
    given = streamed(BYTE_LEVEL, ids)
    assert "".join(given) == text
    assert not any("\ufffd" in piece for piece in given)
    assert given[-1] == ""
    ids = [*text.encode()]  # the byte tokens alone
    given = streamed(BYTE_FALLBACK, ids)
    assert "".join(given) == BYTE_FALLBACK.decode(ids)
    assert not any("\ufffd" in piece for piece in given)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_text_come_out_as_decoding_has_them(content):
    names = BYTE_LEVEL.backend_tokenizer.get_vocab()
    alphabet = {byte: name for name, byte in TokenNames(BYTE_LEVEL)._bytes_of.items()}
    ids = [names[alphabet[byte]] for byte in content]
    given = streamed(BYTE_LEVEL, ids)
    assert "".join(given) == BYTE_LEVEL.decode(ids) == content.decode("utf-8", errors="replace")


def test_text_comes_at_once_where_it_is_decided():
    assert streamed(BYTE_LEVEL, BYTE_LEVEL("h\u00e9\U0001f600!")["input_ids"]) == [
        "h", "", "\u00e9", "", "", "", "\U0001f600", "!", "",
    ]  # fmt: skip
    sentence = "a red dog on the left of a small blue cat ? yes , and the ring is in a green circle ."
    words = sentence.split()
    given = streamed(TOKENIZER, TOKENIZER(sentence, add_special_tokens=False)["input_ids"])
    assert given == [words[0], *(f" {word}" for word in words[1:]), ""]
    names = BYTE_FALLBACK.get_vocab()
    ids = [names[name] for name in ("\u2581a", "bc", "<0xE4>", "<0xB8>", "<0x96>", "\u2581", "b", "\u00e9")]
    assert streamed(BYTE_FALLBACK, ids * 4)[:9] == ["a", "bc", "", "", "\u4e16", " ", "b", "\u00e9", " a"]
    assert "".join(streamed(BYTE_FALLBACK, ids * 4)) == BYTE_FALLBACK.decode(ids * 4)


@settings(deadline=None, max_examples=200)
@given(
    st.text("ab\u00e9", max_size=40),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_across_tokens(text, stop):
    given = streamed(BYTE_LEVEL, BYTE_LEVEL(text)["input_ids"], stop)
    # The first that is complete ends the answer; where several are, the one that began first.
    read = text[: min([text.find(one) + len(one) for one in stop if one in text], default=len(text))]
    expected = read[: min([read.find(one) for one in stop if one in read], default=len(read))]
    assert "".join(given) == expected
    longest = max(map(len, stop))
    pushed = 0
    for number, character in enumerate(read[: len(expected)]):
        pushed += len(character.encode())
        # Never too early, and never more held back than a stop string may need.
        assert len("".join(given[:pushed])) > number + 1 - longest


def test_a_stop_string_of_the_first_tokens_is_text_where_a_minimum_is_asked_for():
    ids = BYTE_LEVEL("abcabcab")["input_ids"]
    stream = TextStream(BYTE_LEVEL, ["bc"])
    given = [stream.push(token, may_stop=number > 4) for number, token in enumerate(ids, 1)]
    assert "".join(given) == "abca"
    assert stream.stopped


def test_names_of_tokens():
    names = TokenNames(BYTE_LEVEL)
    ids = BYTE_LEVEL("a \u4e16")["input_ids"]
    assert [names.of(token) for token in ids] == [
        ("a", (97,)), (" ", (32,)), ("\ufffd", (0xE4,)), ("\ufffd", (0xB8,)), ("\ufffd", (0x96,)),
    ]  # fmt: skip
    fallback, known = TokenNames(BYTE_FALLBACK), BYTE_FALLBACK.get_vocab()
    assert fallback.of(known["\u2581a"]) == (" a", (32, 97))
    assert fallback.of(known["<0xE4>"]) == ("\ufffd", (0xE4,))
    assert fallback.of(known["\u00e9"]) == ("\u00e9", (0xC3, 0xA9))
    assert TokenNames(TOKENIZER).of(IMAGE_ID) == ("<image>", tuple(b"<image>"))
    assert TokenNames(TOKENIZER).of(10_000) == ("", ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_the_answer_and_frees_the_slot(kind):
    model = model_of()
    ids = generated(model, PROMPTS[1])
    whole = text_of(ids)
    words = whole.split(" ")
    stop = f"{words[4]} {words[5][:1]}"
    num_tokens = next(num for num in range(len(ids)) if stop in text_of(ids[:num]))

    async def run() -> tuple[list[AnswerPiece], dict[str, float]]:
        async with engine_of(kind, model) as engine:
            pieces = await pieces_of(engine, PROMPTS[1], greedy(stop=("nowhere", stop)))
            await until(lambda: engine.figures()["running"] == 0)
            return pieces, engine.figures()

    pieces, figures = asyncio.run(run())
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].num_tokens == len(pieces) == num_tokens
    assert figures["waiting"] == 0


# ------------------------------------------------------------------------------------ queue, context, faults


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_that_goes_frees_its_slot_within_a_step(kind):
    model = model_of()

    async def run() -> None:
        async with engine_of(kind, model, num_slots=2) as engine:
            gate = Gate(model)
            gate.delay_s = 0.005
            gone, stays = (engine.stream(PROMPTS[0], greedy(80)) for _ in range(2))
            await asyncio.gather(anext(gone), anext(stays))
            waits = asyncio.create_task(pieces_of(engine, PROMPTS[2], greedy(2)))
            await until(lambda: engine.figures()["waiting"] == 1)
            gate.open.clear()
            await gone.aclose()
            assert engine.figures()["running"] == 1
            before = gate.steps
            gate.open.set()
            if kind == "continuous":  # a batch of generate ends as a whole
                assert len(await waits) == 2
                assert gate.steps - before <= 5
            await stays.aclose()
            assert len(await waits) == 2
            task = asyncio.create_task(pieces_of(engine, PROMPTS[0], greedy(80)))
            await until(lambda: engine.figures()["running"] == 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert engine.figures() | {"step_s": 0} == {"running": 0, "waiting": 0, "slots": 2, "step_s": 0}

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_between_two_pieces_go_together_and_the_last_waits_for_nothing(kind):
    async def check() -> None:
        async with engine_of(kind, piece_interval_s=3600.0) as engine:
            async with asyncio.timeout(60):  # not the interval: an answer that has ended is handed out
                few = await pieces_of(engine, PROMPTS[0], greedy())
            assert len(few) <= 2
            assert few[-1].finish_reason is not None
            named = await pieces_of(engine, PROMPTS[0], greedy(top_logprobs=0))
        async with engine_of(kind) as engine:
            each = await pieces_of(engine, PROMPTS[0], greedy())
        assert len(each) > 2
        for pieces in (few, named):
            assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in each)
            assert pieces[-1].num_tokens == each[-1].num_tokens
        assert sum(piece.token is not None for piece in named) == named[-1].num_tokens

    asyncio.run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_behind_text_that_waits_follows_it(kind):
    said = []

    async def read_and_close(engine: GenerationEngine) -> None:
        async for piece in engine.stream(PROMPTS[0], greedy(max_tokens=CONTEXT)):
            said.append(piece.text)
            await engine.close()

    async def check() -> None:
        async with engine_of(kind, piece_interval_s=3600.0) as engine:
            with pytest.raises(RuntimeError, match="closed"):
                await read_and_close(engine)
        assert said

    asyncio.run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_wait_up_to_a_bound(kind):
    model = model_of()

    async def run() -> None:
        async with engine_of(kind, model, num_slots=2, max_waiting=3) as engine:
            gate = Gate(model)
            gate.open.clear()
            first = [asyncio.create_task(answer_of(engine, PROMPTS[0], greedy(4))) for _ in range(2)]
            await until(lambda: engine.figures()["running"] == 2)
            waiting = [asyncio.create_task(answer_of(engine, PROMPTS[0], greedy(4))) for _ in range(3)]
            await until(lambda: engine.figures()["waiting"] == 3)
            with pytest.raises(QueueFull, match="3 prompts wait"):
                await answer_of(engine, PROMPTS[0], greedy(4))
            waiting.pop().cancel()  # one that waits may leave the queue
            await until(lambda: engine.figures()["waiting"] == 2)
            waiting.append(asyncio.create_task(answer_of(engine, PROMPTS[0], greedy(4))))
            await until(lambda: engine.figures()["waiting"] == 3)
            gate.open.set()
            assert len(set(await asyncio.gather(*first, *waiting))) == 1

    asyncio.run(run())


def test_prefill_takes_prompts_together_up_to_a_bound_and_a_longer_one_alone():
    model = model_of()
    prompts = [prompt_of(1, length, 0) for length in (30, 8, 8, 8, 4)]

    async def run() -> list[tuple[int, int]]:
        async with engine_of(model=model, num_slots=8, max_prefill_tokens=24) as engine:
            gate = Gate(model)
            await asyncio.gather(*(answer_of(engine, prompt, greedy(6)) for prompt in prompts))
            return [width for width in gate.widths if width[1] > 1]

    assert asyncio.run(run()) == [(1, 30), (3, 8), (1, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_bounds_prompt_and_answer(kind):
    model = model_of()

    async def run() -> None:
        async with engine_of(kind, model) as engine:
            assert engine.context_length == CONTEXT
            pieces = await pieces_of(engine, prompt_of(1, CONTEXT - 5, 1), greedy(50))
            assert (len(pieces), pieces[-1].finish_reason) == (5, "length")
            for length in (CONTEXT, CONTEXT + 9):
                with pytest.raises(DataError, match=f"{length} tokens, and the context holds {CONTEXT}"):
                    await answer_of(engine, prompt_of(1, length, 1), greedy())
            with pytest.raises(DataError, match="has 0 tokens"):
                await answer_of(engine, Prompt(input_ids=(), image_embeds=images(0)), greedy())
        async with engine_of(kind, model, max_length=40) as engine:
            assert engine.context_length == 40
            pieces = await pieces_of(engine, prompt_of(1, 37, 1), greedy(50))
            assert (len(pieces), pieces[-1].finish_reason) == (3, "length")

    asyncio.run(run())


def test_prompts_that_would_fail_a_step_are_refused_before():
    slot = (IMAGE_ID,) * VISUAL
    wrong = images(1)
    wrong[0, 0] = np.nan
    for prompt, reason in (
        (Prompt(input_ids=(2, *slot), image_embeds=images(2)), "3 image placeholders and 2 images"),
        (Prompt(input_ids=(2, *slot), image_embeds=images(0)), "3 image placeholders and 0 images"),
        (Prompt(input_ids=(2, *slot), image_embeds=np.zeros((1, DIM + 1))), r"expected \(1, 16\)"),
        (Prompt(input_ids=(2, *slot), image_embeds=wrong), "all finite"),
        (Prompt(input_ids=(2, VOCAB + 7), image_embeds=images(0)), "outside the vocabulary"),
        (Prompt(input_ids=(2, -1), image_embeds=images(0)), "outside the vocabulary"),
    ):

        async def run(prompt: Prompt = prompt) -> None:
            async with engine_of() as engine:
                await answer_of(engine, prompt, greedy())

        with pytest.raises(DataError, match=reason):
            asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_step_reaches_every_request_and_the_engine_goes_on(kind, caplog):
    model = model_of()
    expected = text_of(generated(model, PROMPTS[0]))

    async def run() -> None:
        async with engine_of(kind, model) as engine:
            gate = Gate(model)
            streams = [engine.stream(prompt, greedy(60)) for prompt in PROMPTS[:3]]
            await asyncio.gather(*map(anext, streams))
            gate.broken = True

            async def rest(stream: Any) -> None:
                async for _ in stream:
                    pass

            errors = await asyncio.gather(*map(rest, streams), return_exceptions=True)
            assert [type(error) for error in errors] == [RuntimeError] * 3
            assert all("secret" not in str(error) for error in errors)
            assert len({id(error) for error in errors}) == 3
            with pytest.raises(RuntimeError, match="the language model failed"):
                await answer_of(engine, PROMPTS[0], greedy())
            assert engine.figures()["running"] == 0
            gate.broken = False
            assert await answer_of(engine, PROMPTS[0], greedy()) == expected

    asyncio.run(run())
    assert "a secret detail" in caplog.text  # with its traceback, in the log alone


def test_a_row_that_is_not_finite_ends_its_own_answer_alone():
    """And what it leaves in its slot harms no later one."""
    model = model_of()
    short, long = prompt_of(1, 9, 1), prompt_of(2, 50, 0)
    expected, expected_short = text_of(generated(model, long)), text_of(generated(model, short, 9))
    odd = Prompt(input_ids=(2, *(IMAGE_ID,) * VISUAL, *(9,) * 30), image_embeds=images(1) * np.float32(3e38))

    async def run() -> None:
        async with engine_of(model=model, num_slots=2) as engine:
            sound, failed = await asyncio.gather(
                *(answer_of(engine, prompt, greedy()) for prompt in (long, odd)), return_exceptions=True
            )
            assert isinstance(failed, RuntimeError)
            assert sound == expected
            Gate(model).delay_s = 0.005
            # The short one stands where the odd one stood, and the long one makes its masked rest visible.
            async with contextlib.aclosing(engine.stream(long, greedy())) as pieces:
                text = (await anext(pieces)).text
                assert await answer_of(engine, short, greedy(9)) == expected_short
                assert text + "".join([piece.text async for piece in pieces]) == expected

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_hangs_times_out_and_waiting_does_not(kind):
    model = model_of()

    async def run() -> None:
        async with engine_of(kind, model, num_slots=1, token_timeout_s=0.3) as engine:
            gate = Gate(model)
            gate.open.clear()
            hangs = asyncio.create_task(answer_of(engine, PROMPTS[0], greedy(3)))
            await until(lambda: engine.figures()["running"] == 1)
            waits = asyncio.create_task(answer_of(engine, PROMPTS[1], greedy(3)))
            with pytest.raises(TimeoutError, match=r"no token in 0\.3 s"):
                await hangs
            assert engine.figures()["step_s"] > 0.2
            gate.open.set()
            assert await waits
            assert engine.figures()["step_s"] < 0.2

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_every_answer(kind):
    model = model_of()

    async def run() -> None:
        engine = make_engine(model, TOKENIZER, EngineConfig(kind=kind, num_slots=1, max_length=CONTEXT))
        await engine.close()  # before anything ran
        engine = make_engine(model, TOKENIZER, EngineConfig(kind=kind, num_slots=1, max_length=CONTEXT))
        Gate(model).delay_s = 0.005
        both = [asyncio.create_task(pieces_of(engine, PROMPTS[0], greedy(90))) for _ in range(2)]
        await until(lambda: engine.figures()["running"] == 1)
        await engine.close()
        ended = await asyncio.gather(*both, return_exceptions=True)
        assert all("closed" in str(error) for error in ended)
        with pytest.raises(RuntimeError, match="closed"):
            await pieces_of(engine, PROMPTS[0], greedy())

    asyncio.run(run())


# ------------------------------------------------------------------------------------------- the saved model


def test_the_saved_model_is_served_without_its_image_tower(tmp_path):
    model = model_of("qwen2")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=DIM,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(vision)
    description = {"kind": "transformers", "config": tower.config.to_diff_dict(), "fingerprint": "f" * 64}
    model.image_tower, model.config.image_tower = FrozenImageTower(description, tower), description
    model.save_pretrained(tmp_path / "model")
    ReVisionProcessor(TOKENIZER, num_visual_tokens=VISUAL).save_pretrained(tmp_path / "model")
    expected = text_of(generated(model, PROMPTS[1]))

    async def run() -> tuple[str, LanguageModel]:
        served = LanguageModel(f"{tmp_path}/model/", EngineConfig(max_length=64, num_slots=2))
        served.check_health()
        async with contextlib.aclosing(served.stream(PROMPTS[1], greedy())) as pieces:
            text = "".join([piece.text async for piece in pieces])
        await served.close()
        return text, served

    text, served = asyncio.run(run())
    assert text == expected
    assert served.describe() == {
        "id": "model", "context_length": 64, "embedding_dim": DIM, "num_visual_tokens": VISUAL,
        "strategy": "", "domain": "", "image_fingerprint": "f" * 64, "text_fingerprint": "",
    }  # fmt: skip
    assert served._engine.model.image_tower is None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no model can be loaded"):
        LanguageModel(str(tmp_path / "nowhere"), EngineConfig())
