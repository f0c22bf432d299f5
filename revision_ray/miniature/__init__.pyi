"""The procedural world of the demo, and its models."""

from .dataset import DatasetConfig
from .render import run_render

__all__ = [
    "DatasetConfig",
    "run_render",
]
