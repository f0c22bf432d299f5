"""Image-caption pairs of WebDataset shards, and which of them make up a step's batch. No Ray."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from revision_ray.core import storage
from revision_ray.core.errors import DataError, quote
from revision_ray.data.fields import RowError
from revision_ray.data.images import IMAGE_EXTENSIONS, decode_image, is_image
from revision_ray.data.records import TEXT_ENDINGS, images_in, record_of_sample, samples
from revision_ray.data.sources import tar_shards
from revision_ray.data.turns import captions_of

_MAX_BYTES = 2**28
_MAX_PIXELS = 2**27


@dataclass(frozen=True, kw_only=True)
class ImageTextPair:
    """An image file's bytes and what may be said about it, at least one caption."""

    key: str
    image: bytes
    captions: list[str]


def read_pairs(uris: Sequence[str]) -> list[ImageTextPair]:
    """All pairs of the tar shards at `uris` (directories or files), in the order of shards and members.

    A sample holds KEY.jpg (or another image) and KEY.txt, or KEY.json with a caption or a list of them.
    Images stay encoded in memory: about 3 kB each at 64 pixels.

    Raises:
        DataError: no shard, no sound tar archive, or a sample without an image or a caption.
    """
    return [pair for shard in tar_shards(uris) for pair in _pairs(shard)]


def _pairs(shard: str) -> Iterator[ImageTextPair]:
    wanted = {*IMAGE_EXTENSIONS, *TEXT_ENDINGS, "json"}
    for sample in samples(shard, wanted, _MAX_BYTES, by_content=is_image):
        image = next((member.content for member in images_in(sample)), None)
        if image is None:
            raise DataError(
                f"{shard}: sample {quote(sample.key, 80)} has no image ({', '.join(IMAGE_EXTENSIONS)}); "
                "remove it or complete it"
            )
        try:
            captions = captions_of(record_of_sample(shard, sample).fields())
        except RowError as error:
            raise DataError(
                f"{shard}: sample {quote(sample.key, 80)} has no caption in .txt or .json: {error}; "
                "remove it or complete it"
            ) from error
        yield ImageTextPair(key=sample.key, image=image, captions=captions)


def content_hash(pairs: Sequence[ImageTextPair]) -> str:
    """Hex digest of everything that training reads, whatever the shards it was cut into."""
    return storage.sha256(
        *(
            part
            for pair in pairs
            for part in (pair.key.encode(), pair.image, json.dumps(pair.captions).encode())
        )
    )


def pixels(pair: ImageTextPair, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the image, its shorter side resized to `size`, cut to its middle.

    Raises:
        UndecodableImage: not an image, or a damaged one.
    """
    image = decode_image(pair.image, max_pixels=_MAX_PIXELS)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def batch_rows(num_pairs: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """int64 (batch_size,): which pairs step `step` (from 0) takes; epochs follow each other without a rest.

    A function of its arguments alone: any worker, and a run that resumes, sees the same batches.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_pairs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_pairs)
        here = positions // num_pairs == epoch
        rows[here] = order[positions[here] % num_pairs]
    return rows


def drawn_captions(chosen: Sequence[ImageTextPair], step: int, seed: int) -> list[str]:
    """One caption of each of the pairs of step `step`, drawn anew every time."""
    share = np.random.default_rng([seed, step, 1]).random(len(chosen))
    return [pair.captions[int(u * len(pair.captions))] for pair, u in zip(chosen, share, strict=True)]
