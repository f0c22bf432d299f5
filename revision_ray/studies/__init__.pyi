"""Experiments on the modality gap and on what closes it, one file a study."""

from .study import StudyJob, run_study

__all__ = [
    "StudyJob",
    "run_study",
]
