"""Fit maps of text embeddings onto the image distribution, and apply them (arXiv 2602.07026 sec. 4)."""

from .alignment import Alignment, load_alignment, load_moments, save_alignment
from .apply import AlignJob, aligned_rows, open_pair, run_align
from .fit import FitJob, fit_alignment, run_fit
from .fits import FitsJob, run_fits
from .maps import Affine
from .moments import Moments, modality_gap
from .strategies import StrategyConfig, fit_map

__all__ = [
    "Affine",
    "AlignJob",
    "Alignment",
    "FitJob",
    "FitsJob",
    "Moments",
    "StrategyConfig",
    "aligned_rows",
    "fit_alignment",
    "fit_map",
    "load_alignment",
    "load_moments",
    "modality_gap",
    "open_pair",
    "run_align",
    "run_fit",
    "run_fits",
    "save_alignment",
]
