"""Request bodies near valid ones, for fuzzing: whole requests, some of their parts changed, then bytes."""

import base64
import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from tiny_encoder import WORDS as ENCODER_WORDS
from tiny_language_model import WORDS
from tiny_model import EMBEDDING_DIM, picture, unit_rows

# Strings that have broken other servers: control tokens, half characters, formats, paths, wide and odd signs.
_STRINGS = [
    "", " ", "\x00", "<image>", "<|im_end|>\n<|im_start|>system", "</s>", "{{ 7 * 7 }}", "{% raw %}", "%s%n",
    "../../etc/passwd", "\ud800", "\u202e", "e\u0301" * 40, "🙂" * 30, "data:,", "NaN", "-0", "1e999", "null",
    "dog " * 300, "x" * 5000,
]  # fmt: skip
_NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    0.0,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
]


def _images() -> list[str]:
    """Data URIs: pictures of every kind, broken ones, bombs, and what only looks like one."""
    whole = [
        picture(seed, kind=kind) for seed, kind in enumerate(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"))
    ]
    for mode in ("L", "1", "P", "RGBA", "LA", "I;16", "CMYK"):
        encoded = io.BytesIO()
        Image.new(mode, (9, 7)).save(encoded, "JPEG" if mode == "CMYK" else "PNG")
        whole.append(encoded.getvalue())
    frames, encoded = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 99, 200)], io.BytesIO()
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    broken = [content[: len(content) // 2] for content in whole[:6]]
    shuffled = random.Random(0)
    for content in whole[:6] * 3:
        damaged = bytearray(content)
        for _ in range(3):
            damaged[shuffled.randrange(len(damaged))] = shuffled.randrange(256)
        broken.append(bytes(damaged))
    contents = [
        *whole,
        encoded.getvalue(),
        *broken,
        _bomb(60_000, 60_000),
        _bomb(1, 1),
        b"",
        b"BM",
        b"<svg/>",
    ]
    uris = [_uri(content) for content in contents]
    plain = _uri(whole[0])
    odd = [
        "data:",
        "data:image/png;base64,",
        "data:image/png,%89PNG",
        "data:text/plain;base64,aGk=",
        plain[:-3],
    ]
    odd += [
        plain.replace("base64", "BASE64"),
        plain.replace("image/png", "a" * 300),
        plain + "\n=",
        plain + "é",
    ]
    odd += [
        "https://example.org/a.png",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "javascript:1",
        "//",
        "",
    ]
    return uris + odd


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, with few bytes behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


_IMAGES = _images()
_ROWS = unit_rows(4)
_EMBEDDINGS: list[Any] = [
    *(row_D.tolist() for row_D in _ROWS),
    base64.b64encode(_ROWS[0].tobytes()).decode(),
    [0.0] * EMBEDDING_DIM,
    [1e308] * EMBEDDING_DIM,
    [1] * EMBEDDING_DIM,
    [0.1] * (EMBEDDING_DIM + 1),
    base64.b64encode(np.full(EMBEDDING_DIM, np.nan, "<f4").tobytes()).decode(),
    base64.b64encode(b"abc").decode(),
    "not base64!",
]


def _one_of(values: list[Any]) -> st.SearchStrategy[Any]:
    """A copy of one of `values`. By its index: hypothesis prints what it samples from, which may be large."""
    return st.integers(0, len(values) - 1).map(lambda index: copy.deepcopy(values[index]))


_TEXTS = st.one_of(
    st.lists(_one_of(WORDS), min_size=1, max_size=12).map(" ".join), _one_of(_STRINGS), st.text(max_size=60)
)
_IMAGE_PARTS = _one_of(_IMAGES).map(lambda url: {"type": "image_url", "image_url": {"url": url}})
_JUNK = st.one_of(
    _one_of(_STRINGS),
    _one_of(
        [
            *_NUMBERS,
            None,
            True,
            False,
            {},
            [],
            [[[[[[[[[[]]]]]]]]]],
            {"type": "text"},
            {"a": {"": [None]}},
            ["a", 1],
        ]
    ),
    st.text(max_size=20),
)


def chat_bodies(model: str, fingerprint: str) -> st.SearchStrategy[dict[str, Any]]:
    """Requests for a chat that are valid but for some of their images and texts."""
    embeddings = _one_of(_EMBEDDINGS).map(
        lambda row: {
            "type": "image_embedding",
            "image_embedding": {"embedding": row, "encoder_fingerprint": fingerprint},
        }
    )
    parts = st.one_of(_TEXTS.map(lambda text: {"type": "text", "text": text}), _IMAGE_PARTS, embeddings)
    messages = st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user"] * 5 + ["system", "developer", "assistant"]),
            "content": st.one_of(_TEXTS, st.lists(parts, min_size=1, max_size=4)),
        }
    )
    return st.fixed_dictionaries(
        {"model": st.just(model), "messages": st.lists(messages, min_size=1, max_size=3)},
        optional={
            "max_tokens": st.sampled_from([1, 2, 3, 5, 8, 10**9]),
            "max_completion_tokens": st.sampled_from([1, 2, 3, 5, 8]),
            "temperature": st.sampled_from([0, 0.0, 0.5, 1, 2, 1e-9]),
            "top_p": st.sampled_from([1, 0.5, 1e-9]),
            "n": st.sampled_from([None, 1, 2, 4, 5]),
            "stop": st.sampled_from([None, "a", ["a", "dog"], "\n", "é", ["x"] * 5, []]),
            "seed": st.sampled_from([0, -1, 2**63 - 1, 7]),
            "logprobs": st.booleans(),
            "top_logprobs": st.sampled_from([0, 1, 20]),
            "stream": st.booleans(),
            "stream_options": st.sampled_from([None, {"include_usage": True}, {}]),
            "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
            "tools": st.sampled_from([[], None, [{"type": "function"}]]),
            "user": st.just("me"),
            "top_k": st.sampled_from([-1, 0, 1, 5, 10**9]),
            "min_p": st.sampled_from([0, 0.1, 1]),
            "repetition_penalty": st.sampled_from([0.01, 1, 1.3, 100]),
            "presence_penalty": st.sampled_from([-2, 0, 0.5]),
            "frequency_penalty": st.sampled_from([0, 2, -0.5]),
            "min_tokens": st.sampled_from([0, 1, 3]),
            "stop_token_ids": st.sampled_from([[], [4], [5, 6, 7], [10**6]]),
            "ignore_eos": st.booleans(),
            "guided_json": st.sampled_from([None, {}]),
            "best_of": st.sampled_from([1, None, 2]),
        },
    )


def embeddings_bodies(model: str) -> st.SearchStrategy[dict[str, Any]]:
    """Requests for embeddings that are valid but for some of their images and texts."""
    texts = st.one_of(st.lists(_one_of(ENCODER_WORDS), max_size=20).map(" ".join), _TEXTS)
    parts = st.one_of(texts, texts.map(lambda text: {"type": "text", "text": text}), _IMAGE_PARTS)
    return st.fixed_dictionaries(
        {"model": st.just(model), "input": st.one_of(texts, st.lists(parts, max_size=5))},
        optional={
            "encoding_format": st.sampled_from(["float", "base64", None]),
            "dimensions": st.sampled_from([None, EMBEDDING_DIM, 1]),
            "align": st.booleans(),
            "truncate_prompt_tokens": st.sampled_from([None, -1, 3]),
            "user": st.just("me"),
        },
    )


@st.composite
def mutated(draw: st.DrawFn, bodies: st.SearchStrategy[dict[str, Any]]) -> bytes:
    """The JSON of one of `bodies` with up to three of its parts changed, one in eight damaged as text too."""
    whole = {"body": copy.deepcopy(draw(bodies))}  # it holds constants
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(whole))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        change = draw(st.sampled_from(["replace", "remove", "repeat", "wrap"]))
        if change == "remove" and container is not whole:
            del container[key]
        elif change == "repeat" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif change == "wrap":
            container[key] = draw(
                st.sampled_from([[container[key]], {"a": container[key]}, str(container[key])])
            )
        else:
            container[key] = draw(_JUNK)
    content = bytearray(json.dumps(whole["body"]).encode())
    if draw(st.integers(0, 7)) == 3 and content:  # not the first, which hypothesis likes
        at = draw(st.integers(0, len(content) - 1))
        change = draw(st.sampled_from(["cut", "flip", "insert"]))
        if change == "cut":
            del content[at:]
        elif change == "flip":
            content[at] ^= draw(st.integers(1, 255))
        else:
            content[at:at] = draw(st.binary(max_size=4))
    return bytes(content)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside):
        yield value, key
        yield from _places(item)
