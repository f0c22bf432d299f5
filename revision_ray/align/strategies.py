"""Alignment strategies: the closed form of each map, and the table `STRATEGIES` of them by name.

`realign` is the paper's method (arXiv 2602.07026 sec. 4.1-4.2). Its centroid step (sec. 4.3) needs another
pass over the texts and is added by `centroid_steps`. The other strategies are there for comparison.

Shapes: D embedding dim, R rank of the principal subspace.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.linalg

from revision_ray.align.maps import Affine
from revision_ray.align.moments import Moments
from revision_ray.core.errors import AlignmentError, ConfigError


def fixed_frame(reference_DD: np.ndarray, energy: float) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal bases of the subspace U (D, R) and of its orthogonal complement V (D, D - R).

    U is spanned by the top R eigenvectors of `reference_DD`. R is the smallest rank whose eigenvalues sum to
    at least the share `energy` of the trace. The largest component of each vector is made positive.
    """
    eigenvalues, vectors_DD = scipy.linalg.eigh(reference_DD)
    eigenvalues, vectors_DD = np.maximum(eigenvalues[::-1], 0.0), vectors_DD[:, ::-1]
    largest = np.argmax(np.abs(vectors_DD), axis=0)
    vectors_DD = vectors_DD * np.sign(vectors_DD[largest, np.arange(len(largest))])
    share = np.cumsum(eigenvalues) / eigenvalues.sum()
    rank = min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(eigenvalues))
    return vectors_DD[:, :rank], vectors_DD[:, rank:]


def of_symmetric(matrix_DD: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply `function` to the eigenvalues of a symmetric positive semi-definite matrix.

    Negative eigenvalues are rounding errors and count as 0.
    """
    eigenvalues, vectors_DD = scipy.linalg.eigh(matrix_DD)
    return (vectors_DD * function(np.maximum(eigenvalues, 0.0))) @ vectors_DD.T


def shrunk(covariance_DD: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return (1 - l) Sigma + l tr(Sigma)/D I: the covariance shrunk towards isotropic, with equal trace."""
    dim = len(covariance_DD)
    if not dim:
        return covariance_DD
    return (1 - shrinkage) * covariance_DD + shrinkage * np.trace(covariance_DD) / dim * np.eye(dim)


def inverse_root(eigenvalues: np.ndarray) -> np.ndarray:
    """Return 1 / sqrt(eigenvalues), and 0 where an eigenvalue is zero within rounding."""
    cut = eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    filled = eigenvalues > cut
    return np.where(filled, 1.0 / np.sqrt(np.where(filled, eigenvalues, 1.0)), 0.0)


def fit_anchor(text: Moments, image: Moments) -> Affine:
    """Return the map u - mu_y + mu_x of the text centroid onto the image centroid (sec. 4.1)."""
    return Affine(scale=1.0, offset=image.centroid - text.centroid)


def fit_anchor_trace(text: Moments, image: Moments) -> Affine:
    """Return the map mu_x + s (u - mu_y) of text centroid and trace onto those of the images (sec. 4.2).

    The scale is s = sqrt(T_x / T_y), see `trace_scale`.

    Raises:
        AlignmentError: a side is empty, or does not vary.
    """
    scale = trace_scale(text, image)
    return Affine(scale=scale, offset=image.centroid - scale * text.centroid)


def trace_scale(text: Moments, image: Moments) -> float:
    """Return the scale s = sqrt(T_x / (T_y + 1e-10)); the constant is that of the reference code.

    Raises:
        AlignmentError: the trace of a side is zero within rounding.
    """
    for side, moments in (("text", text), ("image", image)):
        if moments.trace < 1e-12:
            raise AlignmentError(
                f"all {moments.count} {side} embeddings are equal (trace {moments.trace:.1e}); "
                "a fit needs rows that vary"
            )
    return math.sqrt(image.trace / (text.trace + 1e-10))


def fit_none(text: Moments) -> Affine:
    """Return the identity map of unit text rows."""
    return Affine(scale=1.0, offset=np.zeros(text.embedding_dim), unit_output=False)


def fit_mean_shift(text: Moments) -> Affine:
    """Return the map u - mu_y, without scaling to unit length (Unicorn, arXiv 2503.22655)."""
    return Affine(scale=1.0, offset=-text.centroid, unit_output=False)


def fit_c3(text: Moments, image: Moments, *, noise: float) -> Affine:
    """Return the map normalise(u - mu_y + mu_x + sigma n), n ~ N(0, I) (C3, arXiv 2401.08567).

    This is the form that ReVision compares with; sigma is `noise`.
    """
    anchor = fit_anchor(text, image)
    return Affine(scale=1.0, offset=anchor.offset, noise=noise)


def fit_blockwise(text: Moments, image: Moments, *, shrinkage: float, energy: float) -> Affine:
    """Return the map that anchors, then whitens and colours within the blocks U and V of a fixed frame.

    The paper reports it as a failure (app. F). U and V come from `fixed_frame` of Sigma_x + Sigma_y. Within
    each block A = Sx^1/2 Sy^-1/2, where Sx and Sy are the block's covariances shrunk towards isotropic.

    Raises:
        AlignmentError: a side is empty or does not vary, or has no second moments.
    """
    trace_scale(text, image)  # raises AlignmentError where a side does not vary
    text_DD, image_DD = text.covariance, image.covariance
    matrix_DD = np.zeros_like(text_DD)
    for basis_DR in fixed_frame(text_DD + image_DD, energy):
        whiten_RR = of_symmetric(shrunk(basis_DR.T @ text_DD @ basis_DR, shrinkage), inverse_root)
        colour_RR = of_symmetric(shrunk(basis_DR.T @ image_DD @ basis_DR, shrinkage), np.sqrt)
        matrix_DD += basis_DR @ colour_RR @ whiten_RR @ basis_DR.T
    return Affine(matrix=matrix_DD, offset=image.centroid - matrix_DD @ text.centroid)


def fit_gaussian_ot(text: Moments, image: Moments, *, shrinkage: float, noise: float) -> Affine:
    """Return the map mu_x + A (u - mu_y) + sigma n, A the Bures-Wasserstein map of shrunk covariances.

    A = Sy^-1/2 (Sy^1/2 Sx Sy^1/2)^1/2 Sy^-1/2 is symmetric positive definite; n ~ N(0, I/D). Not in the
    paper. With Sx = c Sy, or with shrinkage 1, A is ReAlign's scale times the identity.

    Raises:
        AlignmentError: a side is empty or does not vary, or has no second moments.
    """
    trace_scale(text, image)  # raises AlignmentError where a side does not vary
    text_DD = shrunk(text.covariance, shrinkage)
    root_DD = of_symmetric(text_DD, np.sqrt)
    inverse_root_DD = of_symmetric(text_DD, inverse_root)
    middle_DD = of_symmetric(root_DD @ shrunk(image.covariance, shrinkage) @ root_DD, np.sqrt)
    matrix_DD = inverse_root_DD @ middle_DD @ inverse_root_DD
    matrix_DD = (matrix_DD + matrix_DD.T) / 2
    return Affine(
        matrix=matrix_DD,
        offset=image.centroid - matrix_DD @ text.centroid,
        noise=noise / math.sqrt(len(matrix_DD)),
    )


StrategyName = Literal[
    "none", "mean_shift", "c3", "anchor", "anchor_trace", "realign", "blockwise", "gaussian_ot"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Name and settings of an alignment strategy; settings that it does not use must keep their defaults."""

    strategy: StrategyName = "realign"
    """Alignment strategy: none, mean_shift (Unicorn), c3, anchor, anchor_trace, realign (the paper's),
    blockwise or gaussian_ot."""
    centroid_steps: int = 1
    """realign, blockwise, gaussian_ot: number of centroid steps; the paper takes 1. Each step needs one more
    pass over the texts."""
    noise: float | None = None
    """c3: sigma of the N(0, I) noise, 0.01 if not given. gaussian_ot: sigma of the N(0, I/D) noise, 0 if not
    given."""
    shrinkage: float = 0.1
    """gaussian_ot, blockwise: share of the isotropic covariance mixed into each covariance, 0 to 1."""
    frame_energy: float = 0.9
    """blockwise: smallest share of the trace in the principal subspace U, above 0 and up to 1."""
    seed: int = 0
    """Seed of the noise and of samples. The noise of a row depends only on this seed and on the row's id."""

    def __post_init__(self) -> None:
        if self.centroid_steps < 1:
            raise ConfigError(f"centroid_steps is {self.centroid_steps}; at least 1 (or use anchor_trace)")
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage is {self.shrinkage}; expected 0 to 1")
        if not 0 < self.frame_energy <= 1:
            raise ConfigError(f"frame_energy is {self.frame_energy}; expected more than 0, up to 1")
        if self.noise is not None and self.noise < 0:
            raise ConfigError(f"noise is {self.noise}; expected 0 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")
        used = STRATEGIES[self.strategy].settings
        for setting in ("centroid_steps", "noise", "shrinkage", "frame_energy"):
            if setting not in used and getattr(self, setting) != getattr(StrategyConfig, setting):
                raise ConfigError(f"{setting} has no effect on {self.strategy}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How to fit a map. `second`: the fit needs second moments. `settings`: keys of the config it reads."""

    fit: Callable[[Moments, Moments, StrategyConfig], Affine]
    second: bool = False
    settings: tuple[str, ...] = ()

    @property
    def centroid_step(self) -> bool:
        return "centroid_steps" in self.settings


def _c3(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    # The paper does not give sigma for C3. 0.01 flattens a 1280-d spectrum about as much as the paper's C3
    # does (alpha from 1.33 to 1.06).
    return fit_c3(text, image, noise=0.01 if config.noise is None else config.noise)


def _blockwise(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    return fit_blockwise(text, image, shrinkage=config.shrinkage, energy=config.frame_energy)


def _gaussian_ot(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    noise = config.noise or 0.0
    return fit_gaussian_ot(text, image, shrinkage=config.shrinkage, noise=noise)


STRATEGIES: dict[StrategyName, Strategy] = {
    "none": Strategy(fit=lambda text, image, config: fit_none(text)),
    "mean_shift": Strategy(fit=lambda text, image, config: fit_mean_shift(text)),
    "c3": Strategy(fit=_c3, settings=("noise",)),
    "anchor": Strategy(fit=lambda text, image, config: fit_anchor(text, image)),
    "anchor_trace": Strategy(fit=lambda text, image, config: fit_anchor_trace(text, image)),
    "realign": Strategy(
        fit=lambda text, image, config: fit_anchor_trace(text, image), settings=("centroid_steps",)
    ),
    "blockwise": Strategy(
        fit=_blockwise, second=True, settings=("centroid_steps", "shrinkage", "frame_energy")
    ),
    "gaussian_ot": Strategy(fit=_gaussian_ot, second=True, settings=("centroid_steps", "shrinkage", "noise")),
}


def fit_map(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    """Return the map of `config.strategy` without its centroid steps, from moments of unpaired rows.

    Raises:
        AlignmentError: dimensions differ, a side is empty, or a side does not vary.
    """
    return replace(STRATEGIES[config.strategy].fit(text, image, config), seed=config.seed)


def centroid_steps(
    affine: Affine, image: Moments, config: StrategyConfig, measure: Callable[..., Moments]
) -> tuple[Affine, list[Moments]]:
    """Return the map with its centroid steps, and the moments of the aligned texts before each step.

    One step is that of arXiv 2602.07026 sec. 4.3. `measure(name, affine=map)` must return the moments of the
    texts aligned by the map so far. A strategy without centroid steps returns `affine` and an empty list.
    """
    drifted: list[Moments] = []
    for step in range(config.centroid_steps if STRATEGIES[config.strategy].centroid_step else 0):
        drifted.append(measure(f"mu' step {step + 1}", affine=affine))
        affine = affine.with_centroid_step(image.centroid - drifted[-1].centroid)
    return affine, drifted
