"""Records of the modality gap while a dual encoder trains, in a frame that is frozen at a step.

arXiv 2602.07026 sec. 3, app. A-C. Every probe estimates the frame anew until that step, then it is kept, so
that later changes are those of the gap and not of the frame. Embeddings and moments of gradients come in,
records of plain numbers go out; train/monitor.py calls this.

Shapes: N probe pairs, D embedding dim, R rank of U, S = D - R of V.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from revision_ray.core.errors import DataError
from revision_ray.geometry.fixed_frame import (
    Decomposition,
    FixedFrame,
    angle_by_chance_degrees,
    block_covariances,
    coupling,
    decompose,
    identities,
    leading_angle_degrees,
    leak_ref,
    pob_drift,
    pob_stability,
    reference_frame,
    rho_eig,
    sin_theta,
)
from revision_ray.geometry.spectra import effective_condition_number, eigenvalues_of


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Moments of the loss's gradients with respect to the unit embeddings, over some training batches."""

    image_DD: np.ndarray
    """E[g g'] over the image rows of all batches, not centred."""
    text_DD: np.ndarray
    """The same of the text rows."""
    covariance_DD: np.ndarray
    """Cov(g_x) + Cov(g_y), centred within each batch, then averaged over the batches: never pooled."""
    num_batches: int


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """Second-order figures of one probe in the coordinates of a frame, or their average over probes."""

    gamma_S: np.ndarray
    delta_RR: np.ndarray
    zeta_SS: np.ndarray
    gradient_RR: np.ndarray | None


@dataclass(kw_only=True)
class GapDynamics:
    """The frame and the former probes that a probe is compared with. Call `observe` in step order."""

    freeze_step: int
    """The first probe at or after this step estimates the frame for the last time: t0."""
    energy: float
    """Share of the trace of Cov(e_x) + Cov(e_y) that U holds."""
    kappa_energy: float
    """kappa_eff uses the leading eigenvalues that hold this share of their sum."""
    top_components: int
    """Number of leading eigenvalues that rho_eig uses and that are recorded."""
    late_window: int
    """Number of last probes, after the freeze, over which per-step covariances are averaged."""

    frame: FixedFrame | None = None
    frozen_at: int | None = None
    _reference_D: tuple[np.ndarray, np.ndarray] | None = None  # beta and gamma at t0
    _former_gamma_D: np.ndarray | None = None
    _late: deque[Residuals] = field(default_factory=deque)

    def observe(
        self, step: int, image_ND: np.ndarray, text_ND: np.ndarray, gradients: Gradients | None
    ) -> dict[str, Any]:
        """Return the record of a probe after `step` optimizer steps: numbers, lists of numbers and None.

        Row i of both arrays is a pair of unit embeddings. None: the figure does not exist, such as gradients
        before the first step, drift before the freeze, or a correlation of two numbers.

        Raises:
            DataError: embeddings that are not finite, not of unit length, or do not vary.
            ConfigError: a frame whose U takes the whole space.
        """
        if not (np.isfinite(image_ND).all() and np.isfinite(text_ND).all()):
            raise DataError(
                f"step {step}: the probe's embeddings are not finite: training has diverged; lower "
                "learning_rate or raise warmup_steps"
            )
        image_ND, text_ND = image_ND.astype(np.float64), text_ND.astype(np.float64)
        frame, now = self._frame_at(step, image_ND, text_ND)
        parts = decompose(image_ND, text_ND, frame)
        residuals = _residuals(parts, frame, gradients)
        record = {
            "step": step,
            "frozen": self.frozen_at is not None,
            **self._settings(len(image_ND), frame, now),
            **_biases(image_ND, text_ND, parts),
            **self._motion(parts, frame, now),
            **_leaks(gradients, frame),
            **self._spectra(residuals, frame),
            **_coupling(parts, frame),
            "late": self._late_figures(step, residuals, frame),
        }
        self._former_gamma_D = parts.gamma_D
        return record

    def _frame_at(
        self, step: int, image_ND: np.ndarray, text_ND: np.ndarray
    ) -> tuple[FixedFrame, FixedFrame]:
        """Return the frame to measure in, and the frame of these rows alone."""
        now = reference_frame(image_ND, text_ND, self.energy)
        if self.frozen_at is None:
            self.frame = now
            if step >= self.freeze_step:
                self.frozen_at = step
        assert self.frame is not None
        return self.frame, now

    def _settings(self, num_probe: int, frame: FixedFrame, now: FixedFrame) -> dict[str, Any]:
        return {
            "num_probe": num_probe,
            "embedding_dim": frame.u_DR.shape[0],
            "energy": self.energy,
            "kappa_energy": self.kappa_energy,
            "rank": frame.rank,
            "rank_now": now.rank,
            "frozen_at": self.frozen_at,
        }

    def _motion(self, parts: Decomposition, frame: FixedFrame, now: FixedFrame) -> dict[str, Any]:
        """Return how far frame and biases have moved.

        sin(theta) compares U with as many leading directions of these rows: 0 until the freeze.
        """
        leading_DR = np.concatenate([now.u_DR, now.v_DS], axis=1)[:, : frame.rank]
        if self.frozen_at is not None and self._reference_D is None:
            self._reference_D = parts.beta_D, parts.gamma_D
        beta_0_D, gamma_0_D = self._reference_D or (None, None)
        former_D = self._former_gamma_D
        return {
            "sin_theta": sin_theta(frame.u_DR, leading_DR),
            "pob_drift": None if gamma_0_D is None else pob_drift(parts.gamma_D, gamma_0_D),
            "pmb_drift": None if beta_0_D is None else pob_drift(parts.beta_D, beta_0_D),
            "pob_stability": None if former_D is None else pob_stability(parts.gamma_D, former_D),
        }

    def _spectra(self, residuals: Residuals, frame: FixedFrame) -> dict[str, Any]:
        return spectral_figures(residuals, frame, self.kappa_energy, self.top_components)

    def _late_figures(self, step: int, residuals: Residuals, frame: FixedFrame) -> dict[str, Any] | None:
        """Return spectral figures of covariances averaged over the last probes; None before the freeze."""
        if self.frozen_at is None:
            return None
        self._late.append(residuals)
        if len(self._late) > self.late_window:
            self._late.popleft()
        return {"num_probes": len(self._late), **self._spectra(averaged(self._late), frame)}


def averaged(window: Sequence[Residuals] | deque[Residuals]) -> Residuals:
    """Return the mean over probes of their covariances, each centred on its own mean.

    Pooling the rows of all probes instead would mix the drift of the mean into the covariance (app. B).
    """
    gradients = [each.gradient_RR for each in window if each.gradient_RR is not None]
    return Residuals(
        gamma_S=np.mean([each.gamma_S for each in window], axis=0),
        delta_RR=np.mean([each.delta_RR for each in window], axis=0),
        zeta_SS=np.mean([each.zeta_SS for each in window], axis=0),
        gradient_RR=np.mean(gradients, axis=0) if gradients else None,
    )


def spectral_figures(
    residuals: Residuals, frame: FixedFrame, kappa_energy: float, top_components: int
) -> dict[str, Any]:
    """Return traces, effective condition numbers, rho_eig, angle of gamma and leading eigenvalues."""
    delta, zeta = eigenvalues_of(residuals.delta_RR), eigenvalues_of(residuals.zeta_SS)
    kappa_u, rank_u = effective_condition_number(delta, kappa_energy)
    kappa_v, rank_v = effective_condition_number(zeta, kappa_energy)
    gradient, rho = None, None
    if residuals.gradient_RR is not None:
        gradient = eigenvalues_of(residuals.gradient_RR)[:top_components]
        # Two points always lie on a line.
        rho = rho_eig(delta[:top_components], gradient) if len(gradient) > 2 else None
    return {
        "trace_delta": float(np.trace(residuals.delta_RR)),
        "trace_zeta": float(np.trace(residuals.zeta_SS)),
        "kappa_eff_u": _plain(kappa_u),
        "kappa_eff_u_rank": int(rank_u),
        "kappa_eff_v": _plain(kappa_v),
        "kappa_eff_v_rank": int(rank_v),
        "rho_eig": _plain(rho),
        "gamma_angle_degrees": leading_angle_degrees(residuals.gamma_S, residuals.zeta_SS),
        "gamma_angle_by_chance_degrees": angle_by_chance_degrees(len(residuals.gamma_S)),
        "delta_eigenvalues": delta[:top_components].tolist(),
        "zeta_eigenvalues": zeta[:top_components].tolist(),
        "gradient_eigenvalues": None if gradient is None else gradient.tolist(),
    }


def _residuals(parts: Decomposition, frame: FixedFrame, gradients: Gradients | None) -> Residuals:
    delta_RR, zeta_SS = block_covariances(parts, frame)
    return Residuals(
        gamma_S=frame.v_DS.T @ parts.gamma_D,
        delta_RR=delta_RR,
        zeta_SS=zeta_SS,
        gradient_RR=None if gradients is None else frame.u_DR.T @ gradients.covariance_DD @ frame.u_DR,
    )


def _biases(image_ND: np.ndarray, text_ND: np.ndarray, parts: Decomposition) -> dict[str, Any]:
    """Return norms of the mean gap and its parts, traces, the mean squared gap, and the largest error of the
    decomposition's identities."""
    return {
        "gap_norm": float(np.linalg.norm(parts.mean_D)),
        "beta_norm": float(np.linalg.norm(parts.beta_D)),
        "gamma_norm": float(np.linalg.norm(parts.gamma_D)),
        "mean_squared_gap": float(np.mean(np.sum((image_ND - text_ND) ** 2, axis=1))),
        "trace_image": _trace(image_ND),
        "trace_text": _trace(text_ND),
        "identity_error": float(max(identities(parts).values())),
    }


def _trace(rows_ND: np.ndarray) -> float:
    """Mean squared distance to the centroid."""
    return float(np.mean(np.sum((rows_ND - rows_ND.mean(axis=0)) ** 2, axis=1)))


def _leaks(gradients: Gradients | None, frame: FixedFrame) -> dict[str, Any]:
    """Return leak_ref of both sides together and of each, and what isotropic gradients would give."""
    dim, outside = frame.v_DS.shape
    sides: dict[str, np.ndarray | None] = {"leak_ref": None, "leak_ref_image": None, "leak_ref_text": None}
    if gradients is not None:
        both_DD = gradients.image_DD + gradients.text_DD
        sides = dict(zip(sides, (both_DD, gradients.image_DD, gradients.text_DD), strict=True))
    leaks = {
        name: None if moment_DD is None else _plain(leak_ref(moment_DD, frame))
        for name, moment_DD in sides.items()
    }
    return {
        **leaks,
        "leak_isotropic": math.sqrt(outside / dim),
        "gradient_batches": 0 if gradients is None else gradients.num_batches,
    }


def _coupling(parts: Decomposition, frame: FixedFrame) -> dict[str, Any]:
    ridge = coupling(parts.delta_ND, parts.zeta_ND, frame)
    return {
        "coupling_norm": ridge.spectral_norm,
        "coupling_explained_variance": ridge.explained_variance,
        "coupling_chance_explained_variance": ridge.chance_explained_variance,
    }


def _plain(value: float | None) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(value)
