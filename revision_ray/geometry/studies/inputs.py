"""What the studies work on: text and image stores, and the rows of each that no fit sees. Ray."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray

from revision_ray.align import apply
from revision_ray.align.affine import Affine
from revision_ray.align.map_reduce import Sample, draw_sample, moments_here, store_moments
from revision_ray.align.moments import Moments
from revision_ray.align.strategies import STRATEGIES, StrategyConfig, centroid_steps, fit_map
from revision_ray.cluster import connect, one_thread, user_errors
from revision_ray.data.rejected import check_rejected
from revision_ray.data.store import Store
from revision_ray.errors import DataError

log = logging.getLogger(__name__)

# Rows without a direction have no place in a statistic; more than this share of them is a fault of the store.
_MOST_REJECTED = 0.001
_FEWEST_HELD_OUT = 8
# Row groups that a task of a study reads.
GROUPS_PER_TASK = 16


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Texts and images of one encoder, and the rows of each that are kept from every fit."""

    texts: Store
    images: Store
    heldout_texts: Sample
    heldout_images: Sample

    @property
    def num_rest(self) -> int:
        """Rows that a fit may use, of the side that has fewer."""
        return min(
            side.num_rows - num_rows(held)
            for side, held in ((self.texts, self.heldout_texts), (self.images, self.heldout_images))
        )


def num_rows(sample: Sample) -> int:
    return sum(sample.rows.values())


def open_pair(texts: str | Sequence[str], images: str | Sequence[str]) -> tuple[Store, Store]:
    """The text and the image store, of one encoder.

    Raises:
        DataError: a store is missing or of another modality, or the texts are aligned already.
        AlignmentError: the two do not belong together.
    """
    text, image = apply.open_pair(texts, images)
    if text.alignment:
        raise DataError(f"{text.uris[0]}: is aligned already; study the store that it was made from")
    return text, image


def hold_out(texts: Store, images: Store, most: int, seed: int) -> Stores:
    """A uniform sample of each side, `most` rows and at most a quarter, is set apart.

    Raises:
        DataError: too few rows to set any apart.
    """
    samples = []
    for place, store in enumerate((texts, images)):
        size = min(most, store.num_rows // 4)
        if size < _FEWEST_HELD_OUT:
            raise DataError(
                f"{', '.join(store.uris)}: has {store.num_rows} rows and {size} would be held out (at most a "
                f"quarter); the studies need {4 * _FEWEST_HELD_OUT} rows a side and heldout_rows of "
                f"{_FEWEST_HELD_OUT} or more"
            )
        samples.append(draw_sample(store, size, derived_seed(seed, place)))
    return Stores(texts=texts, images=images, heldout_texts=samples[0], heldout_images=samples[1])


def derived_seed(seed: int, *place: int) -> int:
    """A seed of its own for every `place` of a study."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


def moments_of(
    store: Store,
    name: str,
    *,
    affine: Affine | None = None,
    second: bool = False,
    sample: Sample | None = None,
) -> Moments:
    """Moments of the store's rows by map-reduce.

    Raises:
        DataError: rows without a direction are more than a few.
    """
    moments, rejected = store_moments(store, name, affine=affine, second=second, sample=sample)
    if rejected:
        log.warning("%s: %d rows without a direction are left out", ", ".join(store.uris), len(rejected))
    first = f"first: {rejected[0].id} in {rejected[0].uri}" if rejected else ""
    check_rejected(rejected, moments.count + len(rejected), _MOST_REJECTED, first)
    return moments


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A map and the statistics that it came from."""

    affine: Affine
    text: Moments
    image: Moments


def fit_rest(stores: Stores, config: StrategyConfig) -> Fitted:
    """The strategy fitted to every row that is not held out, by map-reduce."""
    text_sample = draw_sample(stores.texts, stores.texts.num_rows, config.seed, stores.heldout_texts)
    image_sample = draw_sample(stores.images, stores.images.num_rows, config.seed, stores.heldout_images)
    return _fitted(stores, config, text_sample, image_sample, moments_of)


def fit_here(stores: Stores, config: StrategyConfig, size: int, seed: int) -> Fitted:
    """The strategy fitted in this process to `size` rows a side that are not held out."""
    text_sample = draw_sample(stores.texts, size, derived_seed(seed, 0), stores.heldout_texts)
    image_sample = draw_sample(stores.images, size, derived_seed(seed, 1), stores.heldout_images)
    return _fitted(stores, config, text_sample, image_sample, lambda s, _, **how: moments_here(s, **how)[0])


def _fitted(
    stores: Stores,
    config: StrategyConfig,
    texts: Sample | None,
    images: Sample | None,
    moments: Callable[..., Moments],
) -> Fitted:
    second = STRATEGIES[config.strategy].second
    text = moments(stores.texts, "texts", second=second, sample=texts)
    image = moments(stores.images, "images", second=second, sample=images)
    with one_thread():
        affine = fit_map(text, image, config)
    affine, _ = centroid_steps(affine, image, config, partial(moments, stores.texts, sample=texts))
    return Fitted(affine=affine, text=text, image=image)


def spectrum(moments: Moments) -> np.ndarray:
    """Eigenvalues (D,) of the covariance, descending; those that the sums of unit rows do not resolve are 0.

    E[ee'] has entries of up to 1, so its difference from mu mu' is known to D times the resolution of 1,
    however little the rows vary.
    """
    values_D = np.linalg.eigvalsh(moments.covariance)[::-1]
    return np.where(values_D > len(values_D) * np.finfo(np.float64).eps, values_D, 0.0)


def sampling_floor(text: Moments, image: Moments) -> float:
    """Root mean square distance that sampling alone leaves between the centroids of these rows, were the two
    populations' centroids equal: sqrt(T_x / N_x + T_y / N_y)."""
    return math.sqrt(text.trace / text.count + image.trace / image.count)


def sizes_for(asked: Sequence[int], available: int, what: str) -> list[int]:
    """The sizes of the list that `available` rows allow, and `available` itself in place of larger ones.

    Raises:
        DataError: not even the smallest is there.
    """
    sizes = sorted(size for size in set(asked) if size <= available)
    if not sizes:
        raise DataError(
            f"{what}: {available} rows can be used and the smallest size asked for is {min(asked)}; embed "
            "more rows, or ask for smaller sizes"
        )
    return sizes if len(sizes) == len(set(asked)) or sizes[-1] == available else [*sizes, available]


def gathered(references: Sequence[Any]) -> list[Any]:
    """What Ray tasks returned, in order; an error of ours from one is raised as itself."""
    with user_errors():
        return ray.get(list(references))


def remote(function: Any) -> Any:
    """`function` as Ray tasks of one CPU, with BLAS on one thread, so that the bits are the same anywhere."""
    connect()

    def work(*arguments: Any) -> Any:
        with one_thread():
            return function(*arguments)

    return ray.remote(work).remote
