"""The mathematics of every figure about the modality gap; NumPy alone."""

from .angles import js_divergence, pair_cosines
from .dynamics import GapDynamics
from .fixed_frame import FixedFrame, decompose, reference_frame
from .probe import LogisticHead, train_head
from .spectra import covariance, effective_rank, spectral_correlation

__all__ = [
    "FixedFrame",
    "GapDynamics",
    "LogisticHead",
    "covariance",
    "decompose",
    "effective_rank",
    "js_divergence",
    "pair_cosines",
    "reference_frame",
    "spectral_correlation",
    "train_head",
]
