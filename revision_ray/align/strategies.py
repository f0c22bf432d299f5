"""Alignment strategies: the closed form of each, and the table that names them.

`realign` is the method's (arXiv 2602.07026 sec. 4.1-4.2); its centroid step (sec. 4.3) needs a second pass
over the texts and is added by `Affine.with_centroid_step`. The others are those that it is compared with.

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
    """Bases of U (D, R) and of its orthogonal complement V (D, D - R).

    U is spanned by the top eigenvectors of `reference_DD`, R being the smallest rank whose eigenvalues
    reach the share `energy` of the trace. The sign of each vector is fixed by its largest component.
    """
    eigenvalues, vectors_DD = scipy.linalg.eigh(reference_DD)
    eigenvalues, vectors_DD = np.maximum(eigenvalues[::-1], 0.0), vectors_DD[:, ::-1]
    largest = np.argmax(np.abs(vectors_DD), axis=0)
    vectors_DD = vectors_DD * np.sign(vectors_DD[largest, np.arange(len(largest))])
    share = np.cumsum(eigenvalues) / eigenvalues.sum()
    rank = min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(eigenvalues))
    return vectors_DD[:, :rank], vectors_DD[:, rank:]


def of_symmetric(matrix_DD: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of a symmetric positive semi-definite matrix by its eigenvalues; negatives are rounding."""
    eigenvalues, vectors_DD = scipy.linalg.eigh(matrix_DD)
    return (vectors_DD * function(np.maximum(eigenvalues, 0.0))) @ vectors_DD.T


def shrunk(covariance_DD: np.ndarray, shrinkage: float) -> np.ndarray:
    """(1 - l) Sigma + l tr(Sigma)/D I: pulled towards isotropic, with the same trace."""
    dim = len(covariance_DD)
    if not dim:
        return covariance_DD
    return (1 - shrinkage) * covariance_DD + shrinkage * np.trace(covariance_DD) / dim * np.eye(dim)


def inverse_root(eigenvalues: np.ndarray) -> np.ndarray:
    """1 / sqrt, with 0 for directions that hold nothing (zero within rounding) instead of a blow-up."""
    cut = eigenvalues.max(initial=0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    filled = eigenvalues > cut
    return np.where(filled, 1.0 / np.sqrt(np.where(filled, eigenvalues, 1.0)), 0.0)


def fit_anchor(text: Moments, image: Moments) -> Affine:
    """Carry the text centroid onto the image centroid, spread unchanged: u - mu_y + mu_x (sec. 4.1)."""
    return Affine(scale=1.0, offset=image.centroid - text.centroid)


def fit_anchor_trace(text: Moments, image: Moments) -> Affine:
    """Carry text centroid and trace onto the image's: mu_x + s (u - mu_y), s = sqrt(T_x / T_y) (sec. 4.2).

    Raises:
        AlignmentError: a side is empty, or the texts do not vary.
    """
    scale = trace_scale(text, image)
    return Affine(scale=scale, offset=image.centroid - scale * text.centroid)


def trace_scale(text: Moments, image: Moments) -> float:
    """s = sqrt(T_x / (T_y + 1e-10)); the constant is the reference's.

    Raises:
        AlignmentError: the trace of a side is zero within rounding, so there is nothing to scale.
    """
    for side, moments in (("text", text), ("image", image)):
        if moments.trace < 1e-12:
            raise AlignmentError(
                f"all {moments.count} {side} embeddings are equal (trace {moments.trace:.1e}); "
                "a fit needs rows that vary"
            )
    return math.sqrt(image.trace / (text.trace + 1e-10))


def fit_none(text: Moments) -> Affine:
    """Unit text rows as they are."""
    return Affine(scale=1.0, offset=np.zeros(text.embedding_dim), unit_output=False)


def fit_mean_shift(text: Moments) -> Affine:
    """u - mu_y, not scaled back to unit length (Unicorn, arXiv 2503.22655)."""
    return Affine(scale=1.0, offset=-text.centroid, unit_output=False)


def fit_c3(text: Moments, image: Moments, *, noise: float) -> Affine:
    """normalise(u - mu_y + mu_x + sigma n), n ~ N(0, I) (C3, arXiv 2401.08567, as ReVision uses it)."""
    anchor = fit_anchor(text, image)
    return Affine(scale=1.0, offset=anchor.offset, noise=noise)


def fit_blockwise(text: Moments, image: Moments, *, shrinkage: float, energy: float) -> Affine:
    """Anchor, then whiten and colour within the fixed-frame blocks U and V (paper, app. F: a known failure).

    The frame is of Sigma_x + Sigma_y; within each block A = Sx^1/2 Sy^-1/2 of covariances shrunk towards
    isotropic.
    """
    trace_scale(text, image)  # refuses a side that does not vary
    text_DD, image_DD = text.covariance, image.covariance
    matrix_DD = np.zeros_like(text_DD)
    for basis_DR in fixed_frame(text_DD + image_DD, energy):
        whiten_RR = of_symmetric(shrunk(basis_DR.T @ text_DD @ basis_DR, shrinkage), inverse_root)
        colour_RR = of_symmetric(shrunk(basis_DR.T @ image_DD @ basis_DR, shrinkage), np.sqrt)
        matrix_DD += basis_DR @ colour_RR @ whiten_RR @ basis_DR.T
    return Affine(matrix=matrix_DD, offset=image.centroid - matrix_DD @ text.centroid)


def fit_gaussian_ot(text: Moments, image: Moments, *, shrinkage: float, noise: float) -> Affine:
    """mu_x + A (u - mu_y) + sigma n, with A the Bures-Wasserstein map between the shrunk covariances.

    A = Sy^-1/2 (Sy^1/2 Sx Sy^1/2)^1/2 Sy^-1/2 is symmetric positive definite; n ~ N(0, I/D). Not in the
    paper. With Sx = c Sy, or with shrinkage 1, A is ReAlign's scale times the identity.
    """
    trace_scale(text, image)  # refuses a side that does not vary
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
    """Which map, and its settings. Settings that the strategy has no use for must stay at their defaults."""

    strategy: StrategyName = "realign"
    """none, mean_shift (Unicorn), c3, anchor, anchor_trace, realign (the paper), blockwise, gaussian_ot."""
    centroid_steps: int = 1
    """realign, blockwise, gaussian_ot: how often the centroid step is repeated; 1 is the paper. Each costs
    one more pass over the texts."""
    noise: float | None = None
    """c3: sigma of N(0, I) noise, default 0.01. gaussian_ot: sigma of N(0, I/D) noise, default 0."""
    shrinkage: float = 0.1
    """gaussian_ot, blockwise: share of the isotropic covariance mixed into each covariance, 0 to 1."""
    frame_energy: float = 0.9
    """blockwise: share of the trace that the principal subspace U holds."""
    seed: int = 0
    """Of the noise (a row's noise depends on this and on the row's id alone) and of samples."""

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
    """How a map is fitted. `second`: from second moments too. `settings`: those that it reads."""

    fit: Callable[[Moments, Moments, StrategyConfig], Affine]
    second: bool = False
    settings: tuple[str, ...] = ()

    @property
    def centroid_step(self) -> bool:
        return "centroid_steps" in self.settings


def _c3(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    # 0.01 flattens a 1280-d spectrum about as far as the paper's C3 (alpha 1.33 to 1.06); it names no sigma.
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
    """The map of `config.strategy` without its centroid steps, from moments of unpaired rows.

    Raises:
        AlignmentError: dimensions differ, a side is empty, or a side does not vary.
    """
    return replace(STRATEGIES[config.strategy].fit(text, image, config), seed=config.seed)


def centroid_steps(
    affine: Affine, image: Moments, config: StrategyConfig, measure: Callable[..., Moments]
) -> tuple[Affine, list[Moments]]:
    """The map with its centroid steps (arXiv 2602.07026 sec. 4.3, repeated), and the moments before each of
    the aligned texts, which are those of `measure(name, affine=map)`."""
    drifted: list[Moments] = []
    for step in range(config.centroid_steps if STRATEGIES[config.strategy].centroid_step else 0):
        drifted.append(measure(f"mu' step {step + 1}", affine=affine))
        affine = affine.with_centroid_step(image.centroid - drifted[-1].centroid)
    return affine, drifted
