"""Host a model behind an OpenAI-compatible API with Ray Serve."""

from .app import application, run_serve
from .settings import ServeJob

__all__ = [
    "ServeJob",
    "application",
    "run_serve",
]
