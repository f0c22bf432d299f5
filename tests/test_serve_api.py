"""The server as clients see it: real Serve, a tiny model, the official openai client."""

import base64
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import torch
from ray import serve
from tiny_model import EMBEDDING_DIM, picture, tiny_model, unit_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from revision_ray.align.alignment import Alignment, FitInputs, ModalityGap, save_alignment
from revision_ray.align.maps import Affine
from revision_ray.align.moments import of_block
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core import storage
from revision_ray.data.shards import EncoderIdentity
from revision_ray.encode.encoder import EncoderConfig, backend
from revision_ray.serve import app
from revision_ray.serve.protocol import ChatCompletion, Embeddings, ErrorResponse, Models
from revision_ray.serve.settings import EngineConfig, Replicas, ReplicaSettings, ServeJob

ROOT = Path(__file__).parents[1]
CONTEXT, VISUAL = 1024, 3
NAME = "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_fit(folder: Path, fingerprint: str) -> Alignment:
    """A fit that moves and scales texts, of the encoder with this fingerprint."""
    random = np.random.default_rng(0)
    text, image = (
        of_block(unit_rows(200, seed) + random.standard_normal(EMBEDDING_DIM))[0] for seed in (1, 2)
    )
    identity = EncoderIdentity(name="tiny", fingerprint=fingerprint)
    alignment = Alignment(
        strategy=StrategyConfig(),
        affine=Affine(scale=1.5, offset=random.standard_normal(EMBEDDING_DIM)),
        text_centroid=text.centroid,
        image_centroid=image.centroid,
        drifted_centroids=np.empty((0, EMBEDDING_DIM)),
        text_trace=text.trace,
        image_trace=image.trace,
        num_texts=200,
        num_images=200,
        domain="tests",
        text_encoder=identity,
        image_encoder=identity,
        modality_gap=ModalityGap(before=1.0, after=0.1, before_standard_error=0.1, after_standard_error=0.1),
        text_centroid_standard_error=0.1,
        image_centroid_standard_error=0.1,
        drifted_centroid_standard_error=0.1,
        inputs=FitInputs(texts=("t",), images=("i",)),
    )
    save_alignment(alignment, text, image, str(folder))
    return alignment


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model, its dual encoder and fit, in folders; and the model in this process, to compare with."""

    job: ServeJob
    encoder: EncoderConfig
    fingerprint: str
    alignment: Alignment
    model: Any
    processor: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.job.port}"

    def answer(self, messages: list[dict[str, Any]], images_ID: np.ndarray, max_tokens: int) -> str:
        """What `generate` says, greedily."""
        rendered = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(
            text=rendered,
            image_embeds=images_ID if len(images_ID) else None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        inputs["input_ids"] = torch.atleast_2d(inputs["input_ids"])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            out_BT = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        said = out_BT[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(said, skip_special_tokens=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("served")
    model = tiny_model(root, num_visual_tokens=VISUAL, context=CONTEXT)
    # Random weights say the end token now and then: answers here end where they are told to.
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    encoder = EncoderConfig(kind="open_clip", model=str(root / "encoder"))
    fingerprint = backend(encoder).fingerprint(encoder)
    alignment = write_fit(root / "fit", fingerprint)
    small = ReplicaSettings(num_cpus=0.1, max_ongoing=100)
    job = ServeJob(
        model=str(model),
        name=NAME,
        port=free_port(),
        alignment=str(root / "fit"),
        encoder=encoder,
        engine=EngineConfig(num_slots=8, max_waiting=16, max_length=CONTEXT, num_threads=1),
        replicas=Replicas(ingress=small, image_encoder=small, language_model=small, text_encoder=small),
    )
    return Made(
        job=job,
        encoder=encoder,
        fingerprint=fingerprint,
        alignment=alignment,
        model=AutoModelForImageTextToText.from_pretrained(model).eval(),
        processor=AutoProcessor.from_pretrained(model),
    )


def run(job: ServeJob) -> None:
    built = app.application(app.checked(job), ())
    serve.run(built, name="revision_ray", route_prefix="/", logging_config=app.QUIET)


@pytest.fixture(scope="module")
def served(cluster, made) -> Iterator[Made]:
    http = {"host": made.job.host, "port": made.job.port}
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=app.QUIET)
    run(made.job)
    yield made
    serve.shutdown()


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)


def image_part(content: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def embedding_part(row_D: np.ndarray, fingerprint: str) -> dict[str, Any]:
    inner = {"embedding": row_D.tolist(), "encoder_fingerprint": fingerprint}
    return {"type": "image_embedding", "image_embedding": inner}


def user(*content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def asked(client: openai.OpenAI, messages: list[Any], **settings: Any) -> Any:
    keywords = {"model": NAME, "temperature": 0, "max_tokens": 12} | settings
    return client.chat.completions.create(messages=messages, **keywords)


def said(client: openai.OpenAI, messages: list[Any], **settings: Any) -> str:
    return asked(client, messages, **settings).choices[0].message.content


def embedded(client: openai.OpenAI, *inputs: Any, model: str = NAME, **settings: Any) -> np.ndarray:
    """float32 rows (N, D) of texts and images."""
    made = client.embeddings.create(model=model, input=list(inputs), encoding_format="float", **settings)
    return np.array([row.embedding for row in made.data], np.float32)


def raw(
    url: str, body: bytes | None = None, content_type: str = "application/json", method: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": content_type}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def eventually(condition: Callable[[], bool], within_s: float = 15.0) -> bool:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.1)
    return False


def running() -> float:
    handle = serve.get_deployment_handle("LanguageModel", "revision_ray")
    return handle.figures.remote().result(timeout_s=10)["running"]


# --- chat ---------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "what colour is the dog ?"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "and the cat ?"},
]


def test_a_greedy_answer_is_that_of_generate(client, served):
    none_ID, rows_ID = np.empty((0, EMBEDDING_DIM), np.float32), unit_rows(2)
    assert said(client, TURNS) == served.answer(TURNS, none_ID, 12)
    first, second = (embedding_part(row_D, served.fingerprint) for row_D in rows_ID)
    content = user(first, "what is on the left of", second, "?")
    slots = user({"type": "image"}, "what is on the left of", {"type": "image"}, "?")
    assert said(client, content) == served.answer(slots, rows_ID, 12)
    swapped = user(second, "what is on the left of", first, "?")
    assert said(client, swapped) == served.answer(slots, rows_ID[::-1].copy(), 12)


def test_a_picture_is_the_same_as_its_embedding(client, served):
    pictures = [picture(seed) for seed in range(3)]
    rows_ID = embedded(client, *map(image_part, pictures))
    by_picture = user("which", *map(image_part, pictures), "?")
    by_row = user("which", *(embedding_part(row_D, served.fingerprint) for row_D in rows_ID), "?")
    answer = asked(client, by_picture)
    assert answer.choices[0].message.content == said(client, by_row)
    details = answer.usage.prompt_tokens_details
    assert details.visual_tokens == 3 * VISUAL
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert said(client, user("which", image_part(picture(7)), "?")) != said(
        client, user("which", image_part(picture(8)), "?")
    ), "the model does not look"


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = asked(client, TURNS, max_tokens=40)
    stream = asked(client, TURNS, max_tokens=40, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len(chunks) >= 4, "the role, the first token at once, the others in pieces, the end"
    assert last.choices == []
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in asked(client, TURNS, stream=True))


def test_a_seed_draws_the_same_choices_again(client):
    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
    first, again = (asked(client, TURNS, n=3, **drawn) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 24
    # Each choice has a seed of its own.
    assert texts[2] == said(client, TURNS, **(drawn | {"seed": 7}))


def test_a_stop_string_ends_the_answer_before_it(client):
    words = said(client, TURNS, max_tokens=30).split()
    stop = next(word for word in words[2:] if word not in words[:2])
    for given in (stop, ["never said", stop]):
        answer = asked(client, TURNS, max_tokens=30, stop=given).choices[0]
        assert answer.finish_reason == "stop"
        assert answer.message.content.split() == words[: words.index(stop)]


def test_log_probabilities_are_those_of_the_tokens(client):
    answer = asked(client, TURNS, logprobs=True, top_logprobs=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 12
    for token in tokens:
        assert len(token.top_logprobs) == 5
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob), "greedy takes the likeliest"
        assert token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token
    streamed = asked(client, TURNS, logprobs=True, top_logprobs=5, stream=True)
    again = [t for chunk in streamed if (p := chunk.choices[0].logprobs) for t in p.content]
    assert [token.token for token in again] == [token.token for token in tokens]
    assert asked(client, TURNS).choices[0].logprobs is None


def test_requests_in_company_get_the_answers_that_they_get_alone(client, served):
    conversations = [
        user(
            *(image_part(picture(seed)) for _ in range(seed % 3)), "what colour is the dog ?" + " yes" * seed
        )
        for seed in range(16)
    ]
    alone = [said(client, messages) for messages in conversations]
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda messages: said(client, messages), conversations))
    assert together == alone
    assert len(set(alone)) > 8


def test_an_answer_has_the_documented_shape(served):
    body = {"model": NAME, "messages": TURNS, "logprobs": True, "top_logprobs": 1, "max_tokens": 3, "n": 2}
    _, headers, content = raw(f"{served.url}/v1/chat/completions", json.dumps(body).encode())
    ChatCompletion.model_validate_json(content, strict=True, extra="forbid")
    assert headers["x-content-type-options"] == "nosniff"
    body = {"model": NAME, "input": ["dog", image_part(picture(0))]}
    _, _, content = raw(f"{served.url}/v1/embeddings", json.dumps(body).encode())
    Embeddings.model_validate_json(content, strict=True, extra="forbid")
    Models.model_validate_json(raw(f"{served.url}/v1/models")[2], strict=True, extra="forbid")


# --- embeddings ---------------------------------------------------------------------------------------------

WORDS = ["word1 word2", "word3", "word1 word2 word4 word5"]


def test_texts_are_embedded_by_the_text_tower(client, served):
    module = backend(served.encoder)
    tokens = module.text_preparer(served.encoder)(WORDS)
    expected_ND = module.text_tower(served.encoder).encode([each.ids for each in tokens])
    as_floats = client.embeddings.create(model=NAME, input=WORDS, encoding_format="float")
    rows_ND = np.array([row.embedding for row in as_floats.data], np.float32)
    # One batch or another: rounding of sums of some ten float32 products.
    np.testing.assert_allclose(rows_ND, expected_ND, atol=2e-6)
    assert [row.index for row in as_floats.data] == [0, 1, 2]
    assert as_floats.usage.prompt_tokens == sum(len(each.ids) for each in tokens)
    assert as_floats.encoder_fingerprint == served.fingerprint
    in_base64 = client.embeddings.create(model=NAME, input=WORDS)  # what the client asks for by itself
    np.testing.assert_allclose([row.embedding for row in in_base64.data], rows_ND, atol=2e-6)
    one = client.embeddings.create(model=NAME, input=WORDS[1], dimensions=EMBEDDING_DIM)
    np.testing.assert_allclose(one.data[0].embedding, rows_ND[1], atol=2e-6)


def test_texts_are_aligned_by_the_fit_and_images_stay(client, served):
    inputs = [WORDS[0], image_part(picture(3)), WORDS[1]]
    raw_rows, aligned = (embedded(client, *inputs, extra_body={"align": align}) for align in (False, True))
    np.testing.assert_allclose(aligned[1], raw_rows[1], atol=2e-6)
    expected_ND, _ = served.alignment.affine.apply(raw_rows[[0, 2]])
    np.testing.assert_allclose(aligned[[0, 2]], expected_ND, atol=1e-5)
    assert np.abs(aligned[0] - raw_rows[0]).max() > 0.1


# --- the other routes ---------------------------------------------------------------------------------------


def test_the_model_says_what_it_is(client, served):
    (model,) = client.models.list()
    assert model.id == NAME
    found = client.models.retrieve(NAME)
    assert (found.context_length, found.num_visual_tokens) == (CONTEXT, VISUAL)
    assert (found.embedding_dim, found.encoder_fingerprint) == (EMBEDDING_DIM, served.fingerprint)
    assert found.image_input


def test_health_page_schema_and_metrics_answer(served, client):
    said(client, TURNS)
    assert raw(f"{served.url}/health")[0] == 200
    status, headers, page = raw(f"{served.url}/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<html" in page
    schema = json.loads(raw(f"{served.url}/openapi.json")[2])
    assert set(schema["paths"]) == {
        "/", "/health", "/metrics", "/openapi.json", "/v1/chat/completions", "/v1/drift", "/v1/embeddings",
        "/v1/models", "/v1/models/{model_id}",
    } - {"/openapi.json"}  # fmt: skip
    status, headers, _ = raw(f"{served.url}/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")


def test_served_images_are_counted_against_the_fit(served, client):
    def report() -> Any:
        return json.loads(raw(f"{served.url}/v1/drift")[2])

    before = report()["num_images"]
    same = [image_part(picture(50))] * 2
    said(client, user(*same, embedding_part(unit_rows(1)[0], served.fingerprint), "?"))
    assert eventually(lambda: report()["num_images"] == before + 3), report()
    assert report()["domain"] == "tests"


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.UnprocessableEntityError, "less_than_equal"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None),
        ({"messages": [{"role": "user", "content": "dog " * CONTEXT}]}, openai.BadRequestError, None),
        ({"messages": user(image_part(b"<svg/>"))}, openai.BadRequestError, "invalid_image"),
        ({"messages": user(image_part(picture(0)[:300]))}, openai.BadRequestError, "invalid_image"),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})},
            openai.BadRequestError,
            "remote_images_off",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})},
            openai.BadRequestError,
            "remote_images_off",
        ),
        (
            {"messages": user(embedding_part(unit_rows(1)[0], "e" * 64))},
            openai.BadRequestError,
            "wrong_encoder",
        ),
        ({"messages": user(*[image_part(picture(0))] * 17)}, openai.BadRequestError, None),
    ],
)
def test_an_error_is_the_client_s_own_exception(client, changes, error, code):
    with pytest.raises(error) as caught:
        asked(client, changes.pop("messages", TURNS), **changes)
    assert caught.value.message
    if code:
        assert caught.value.code == code


def test_embeddings_refuse_what_they_cannot_do(client):
    for changes in ({"dimensions": 3}, {"input": ["x"] * 257}):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**({"model": NAME, "input": "dog"} | changes))
    for given in ([1, 2, 3], [], ""):
        with pytest.raises(openai.UnprocessableEntityError):
            client.embeddings.create(model=NAME, input=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "body", "content_type", "method", "status"),
    [
        ("/v1/chat/completions", b"{", "application/json", None, 400),
        ("/v1/chat/completions", b"{}", "text/plain", None, 415),
        ("/v1/chat/completions", b"{}", "application/json", None, 422),
        ("/v1/chat/completions", None, "application/json", None, 405),
        ("/v1/nothing", b"{}", "application/json", None, 404),
        ("/nothing", None, "application/json", None, 404),
        ("/v1/models", b"{}", "application/json", "PUT", 405),
    ],
)
def test_http_s_own_errors_are_error_objects(served, path, body, content_type, method, status):
    found, headers, content = raw(served.url + path, body, content_type, method)
    assert found == status
    assert headers["content-type"] == "application/json"
    ErrorResponse.model_validate_json(content, strict=True, extra="forbid")


def test_a_body_that_is_too_large_is_refused_with_and_without_a_stated_length(client, served):
    large = b'{"model": "' + b"x" * (65 << 20) + b'"}'
    assert posted(served, [large], len(large)) == 413
    chunks = [large[at : at + (1 << 20)] for at in range(0, len(large), 1 << 20)]
    assert posted(served, chunks, None) == 413
    assert raw(f"{served.url}/health")[0] == 200


def posted(served: Made, chunks: list[bytes], length: int | None) -> int:
    """The status of a request that is sent as far as the server lets it."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if length is None else f"Content-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.job.port), timeout=30) as connection:
        connection.sendall(head.encode())
        try:
            for chunk in chunks:
                framed = chunk if length is not None else f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"
                connection.sendall(framed)
        except OSError:
            pass  # it answered and closed before the end
        return int(connection.recv(1000).split()[1])


# --- load ---------------------------------------------------------------------------------------------------


def test_beyond_the_queue_s_bound_the_server_says_when_to_come_again(client, served):
    """24 answers at once are more than run and wait; none of them is lost, all others are refused at once."""

    def one(_: int) -> Any:
        try:
            return asked(client, TURNS, max_tokens=150, n=8)
        except openai.InternalServerError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        results = list(threads.map(one, range(10)))
    refused = [result for result in results if isinstance(result, Exception)]
    answered = [result for result in results if not isinstance(result, Exception)]
    assert refused
    assert answered
    assert {error.status_code for error in refused} == {503}
    assert {error.response.headers["retry-after"] for error in refused} == {"1"}
    assert {choice.finish_reason for answer in answered for choice in answer.choices} == {"length"}
    assert eventually(lambda: running() == 0)
    assert said(client, TURNS)


def test_a_client_that_leaves_frees_its_slot(client, served):
    before = time.monotonic()
    list(asked(client, TURNS, max_tokens=900, stream=True))
    whole = time.monotonic() - before
    stream = asked(client, TURNS, max_tokens=900, stream=True)
    next(iter(stream))
    assert eventually(lambda: running() == 1, 2)
    before = time.monotonic()
    stream.close()
    assert eventually(lambda: running() == 0)
    assert time.monotonic() - before < whole / 2


# --- replicas that die, updates, and the job as a whole -----------------------------------------------------


def replicas(name: str) -> list[psutil.Process]:
    """Processes of a deployment's replicas in this cluster: children of this process, not of another Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ServeReplica:revision_ray:{name}" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["LanguageModel", "ImageEncoder"])
def test_a_killed_replica_costs_no_request_that_was_not_streaming(client, part):
    """A killed replica costs no request that was not streaming."""
    messages = user(image_part(picture(60)), "what colour is the dog ?")
    expected = said(client, messages, max_tokens=300)
    (victim,) = replicas(part)

    def ask(seed: int) -> str:
        fresh = user(image_part(picture(60)), image_part(picture(seed)), "what colour ?")
        said(client, fresh)
        return said(client, messages, max_tokens=300)

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(ask, 100 + number) for number in range(12)]
        time.sleep(0.5)
        victim.kill()
        began = time.monotonic()
        assert {answer.result(timeout=600) for answer in answers} == {expected}
    print(f"{part}: all 12 answered {time.monotonic() - began:.1f} s after the kill")
    assert replicas(part) != [victim]


@pytest.mark.slow
def test_a_stream_whose_replica_dies_ends_with_an_error(client):
    """A stream whose replica dies ends with an error, and the next request is answered."""
    stream = asked(client, TURNS, max_tokens=900, stream=True)
    next(iter(stream))
    (victim,) = replicas("LanguageModel")
    victim.kill()
    began = time.monotonic()
    with pytest.raises(openai.APIError, match="not available"):
        list(stream)
    assert said(client, TURNS)
    print(f"answers again {time.monotonic() - began:.1f} s after the kill")


@pytest.mark.slow
def test_a_rolling_update_loses_nothing(client, served):
    """A rolling update loses no request and replaces every replica."""
    expected, before = said(client, TURNS, max_tokens=100), replicas("LanguageModel")
    ended = threading.Event()

    def load() -> int:
        number = 0
        while not ended.is_set():
            assert said(client, TURNS, max_tokens=100) == expected
            number += 1
        return number

    # New replicas start beside the old ones; without, requests wait for as long as a start takes.
    surge = replace(served.job.replicas, surge_percent=100)
    changed = replace(served.job, engine=replace(served.job.engine, num_slots=4), replicas=surge)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(load) for _ in range(4)]
        try:
            run(changed)
        finally:
            ended.set()
        assert sum(load.result() for load in loads) > 4
    assert not {process.pid for process in before} & {process.pid for process in replicas("LanguageModel")}


@pytest.mark.slow
def test_replicas_come_and_go_with_the_load(client, served):
    """Replicas come and go with the load."""
    part = replace(served.job.replicas.language_model, max_replicas=2, target_ongoing=2.0)
    quick = replace(served.job.replicas, language_model=part, upscale_delay_s=1, downscale_delay_s=3)
    run(replace(served.job, replicas=quick))
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            said(client, TURNS, max_tokens=200)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        loads = [threads.submit(load) for _ in range(8)]
        assert eventually(lambda: len(replicas("LanguageModel")) == 2, 600)
        ended.set()
        for each in loads:
            each.result()
    assert eventually(lambda: len(replicas("LanguageModel")) == 1, 600)


@contextlib.contextmanager
def as_a_job(*settings: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """jobs/serve.py with a Ray of its own, and the address of its API once it answers."""
    folder = tempfile.mkdtemp(prefix="rv", dir="/tmp")
    port = free_port()
    variables = os.environ | {
        "RAY_TMPDIR": folder,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        **environment,
    }
    variables.pop("RAY_ADDRESS", None)
    command = [sys.executable, "jobs/serve.py", "configs/serve.yaml", f"port={port}", *settings]
    command += [f"engine.max_length={CONTEXT}", "replicas.ingress.min_replicas=1"]
    job = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout
        line = next(line for line in job.stdout if "Serving" in line)
        assert line == f"Serving model at http://127.0.0.1:{port}  (page: /, API: /v1)\n"
        yield job, f"http://127.0.0.1:{port}/v1"
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(300)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_job_asks_for_keys_and_finishes_what_it_has_when_it_is_stopped(made):
    """jobs/serve.py asks for keys, and finishes its requests when it is stopped."""
    with as_a_job(f"model={made.job.model}", REVISION_RAY_API_KEYS="first, second") as (job, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="third").models.list()
        client = openai.OpenAI(base_url=url, api_key="second", max_retries=0)
        stream = asked(client, TURNS, model="model", max_tokens=900, stream=True)
        first = next(iter(stream))
        job.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert job.wait(300) == 0


@pytest.mark.slow
def test_model_encoder_and_fit_may_lie_on_an_object_store(made, bucket, tmp_path):
    """jobs/serve.py answers the same with model, encoder and fit on S3."""
    folders = {"model": made.job.model, "encoder": made.encoder.model, "fit": made.job.alignment}
    for key, folder in folders.items():
        for path in Path(folder).rglob("*"):
            if path.is_file():
                storage.write_bytes(bucket(f"{key}/{path.relative_to(folder)}"), path.read_bytes())
    settings = [f"model={bucket('model')}", f"alignment={bucket('fit')}"]
    settings += [f"encoder.model={bucket('encoder')}", "encoder.kind=open_clip"]
    with as_a_job(*settings, REVISION_RAY_CACHE=str(tmp_path)) as (_, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        assert said(client, TURNS, model="model") == made.answer(TURNS, np.empty((0, EMBEDDING_DIM)), 12)
        shown = image_part(picture(1))
        row_D, text_D = embedded(client, shown, WORDS[0], model="model")
        by_row = user(embedding_part(row_D, made.fingerprint), "what colour ?")
        assert said(client, user(shown, "what colour ?"), model="model") == said(
            client, by_row, model="model"
        )
        expected_ND, _ = made.alignment.affine.apply(text_D[None])
        np.testing.assert_allclose(
            embedded(client, WORDS[0], model="model", extra_body={"align": True}), expected_ND, atol=1e-5
        )
