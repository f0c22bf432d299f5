"""Every strategy by name: what it needs, and the map that it fits from unpaired statistics."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from revision_ray.align import baselines, optimal_transport, realign
from revision_ray.align.affine import Affine
from revision_ray.align.moments import Moments
from revision_ray.errors import ConfigError

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
    return baselines.fit_c3(text, image, noise=0.01 if config.noise is None else config.noise)


def _blockwise(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    return baselines.fit_blockwise(text, image, shrinkage=config.shrinkage, energy=config.frame_energy)


def _gaussian_ot(text: Moments, image: Moments, config: StrategyConfig) -> Affine:
    noise = config.noise or 0.0
    return optimal_transport.fit_gaussian_ot(text, image, shrinkage=config.shrinkage, noise=noise)


STRATEGIES: dict[str, Strategy] = {
    "none": Strategy(fit=lambda text, image, config: baselines.fit_none(text)),
    "mean_shift": Strategy(fit=lambda text, image, config: baselines.fit_mean_shift(text)),
    "c3": Strategy(fit=_c3, settings=("noise",)),
    "anchor": Strategy(fit=lambda text, image, config: realign.fit_anchor(text, image)),
    "anchor_trace": Strategy(fit=lambda text, image, config: realign.fit_anchor_trace(text, image)),
    "realign": Strategy(
        fit=lambda text, image, config: realign.fit_anchor_trace(text, image), settings=("centroid_steps",)
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
