"""Images as clients send them, to bytes that look like an image; cheap enough for the HTTP side.

What a data URI declares is not believed: the first bytes say what it is. Decoding, with its limits on
pixels, is done where images are encoded.
"""

import base64
import binascii
import hashlib

import numpy as np

from revision_ray.data.images import (
    FORMATS,
    HEAD_BYTES,
    ImageTooLarge,
    UndecodableImage,
    data_uri_content,
    is_image,
)
from revision_ray.serve.api_error import ApiError
from revision_ray.serve.protocol import ImageEmbedding

_SHORTEST_NORM = 1e-8


def bytes_of_data_uri(uri: str, *, max_bytes: int, param: str) -> bytes:
    """The bytes of a data URI in base64, or percent-encoded.

    Raises:
        ApiError: 400 no data URI, or not an image's; 413 more than `max_bytes`.
    """
    try:
        content = data_uri_content(uri, max_bytes=max_bytes)
    except ImageTooLarge as error:
        raise too_large(max_bytes, param) from error
    except UndecodableImage as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
    return checked(content, max_bytes=max_bytes, param=param)


def checked(content: bytes, *, max_bytes: int, param: str) -> bytes:
    """`content`, which begins as an image does and has at most `max_bytes`.

    Raises:
        ApiError: 400 something else; 413 too large.
    """
    if len(content) > max_bytes:
        raise too_large(max_bytes, param)
    if not content:
        raise ApiError(400, f"{param}: the image has 0 bytes", param=param, code="invalid_image")
    if not is_image(content[:HEAD_BYTES]):
        raise ApiError(
            400,
            f"{param}: the data is no {FORMATS} image, whatever it is declared as; send one of these",
            param=param,
            code="invalid_image",
        )
    return content


def too_large(max_bytes: int, param: str) -> ApiError:
    return ApiError(
        413, f"{param}: the image has more than {max_bytes} bytes; send a smaller one", param=param
    )


def digest(content: bytes) -> bytes:
    """The image's identity: SHA-256 of its bytes."""
    return hashlib.sha256(content).digest()


def embedding_row(part: ImageEmbedding, *, dim: int, fingerprint: str | None, param: str) -> np.ndarray:
    """float32 (dim,) of length one.

    `fingerprint` is that of the encoder that the model knows; None takes any.

    Raises:
        ApiError: 400 of another encoder or dimension, not finite, or zero.
    """
    if fingerprint and part.encoder_fingerprint != fingerprint:
        raise ApiError(
            400,
            f"{param}.encoder_fingerprint: the model was trained on the space of another encoder "
            f"({fingerprint[:12]}...), where the same picture has another embedding; embed it with that one",
            param=f"{param}.encoder_fingerprint",
            code="wrong_encoder",
        )
    param = f"{param}.embedding"
    if isinstance(part.embedding, str):
        try:
            content = base64.b64decode(part.embedding, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{param}: not base64; encode it again", param=param) from error
        if len(content) % 4:
            raise ApiError(400, f"{param}: {len(content)} bytes are no whole float32", param=param)
        row_D = np.frombuffer(content, "<f4").astype(np.float64)
    else:
        row_D = np.asarray(part.embedding, np.float64)
    if len(row_D) != dim:
        raise ApiError(400, f"{param}: has {len(row_D)} numbers, the model takes {dim}", param=param)
    # Scaled first: the square of a large float64 would overflow.
    largest = float(np.abs(row_D).max())
    if not np.isfinite(largest):
        raise ApiError(400, f"{param}: holds a number that is not finite (NaN or infinity)", param=param)
    if largest < _SHORTEST_NORM:
        raise ApiError(400, f"{param}: is zero, and so has no direction", param=param)
    row_D = row_D / largest
    return (row_D / np.linalg.norm(row_D)).astype(np.float32)
