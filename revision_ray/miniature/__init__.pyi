"""The procedural world of the demo, and its models."""

from .dataset import DatasetConfig
from .language_model import LanguageTraining, run_train_language_model
from .render import run_render
from .study import MiniatureStudyJob, run_miniature_study

__all__ = [
    "DatasetConfig",
    "LanguageTraining",
    "MiniatureStudyJob",
    "run_miniature_study",
    "run_render",
    "run_train_language_model",
]
