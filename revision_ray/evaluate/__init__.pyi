"""Benchmarks: ask a model, judge its answers, score them, compare runs."""

from .answers import judge
from .evaluation import EvaluateJob, run_evaluate

__all__ = [
    "EvaluateJob",
    "judge",
    "run_evaluate",
]
