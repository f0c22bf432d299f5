"""The language model of the server: a saved model without its image tower, behind an engine.

A plain class, so that it runs without Ray too; `app.py` makes it a deployment.
"""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from revision_ray.core import storage
from revision_ray.core.errors import ConfigError
from revision_ray.model import ReVisionConfig, ReVisionForConditionalGeneration
from revision_ray.serve.engine import AnswerPiece, Prompt, Sampling, make_engine
from revision_ray.serve.metrics import instruments
from revision_ray.serve.settings import EngineConfig


class _WithoutTower(ReVisionForConditionalGeneration):
    """Images come as embeddings: the tower's weights stay on the disk."""

    _keys_to_ignore_on_load_unexpected = [r"^image_tower\."]  # noqa: RUF012


class LanguageModel:
    """Prompts with image embeddings in, pieces of text out."""

    def __init__(self, model: str, engine: EngineConfig) -> None:
        """
        Raises:
            ConfigError: the folder holds no ReVision model, or the engine cannot run this one.
        """
        if engine.num_threads is not None:
            torch.set_num_threads(engine.num_threads)
        transformers_logging.disable_progress_bar()  # of the weights: in a replica's log it is noise
        folder = storage.local_copy(model)
        config = _configuration(folder)
        self._description = _described(model, config)
        config.image_tower = None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention: dict[str, Any] = (
            {} if engine.attention is None else {"attn_implementation": engine.attention}
        )
        loaded = _WithoutTower.from_pretrained(
            folder, config=config, dtype=_dtype(engine, device), **attention
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._engine = make_engine(loaded.to(device), tokenizer, engine)  # type: ignore[arg-type]
        self._description["context_length"] = self._engine.context_length
        self._timeout_s = engine.token_timeout_s

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[AnswerPiece, None]:
        """As `Engine.stream`, and the queue's metrics are up to date when it begins, speaks and ends."""
        begun = False
        self._report()
        try:
            async with contextlib.aclosing(self._engine.stream(prompt, sampling)) as pieces:
                async for piece in pieces:
                    if not begun:
                        begun = True
                        self._report(begun)
                    yield piece
        finally:
            self._report()

    def check_health(self) -> None:
        """Raises RuntimeError when a step hangs: Serve then replaces the replica."""
        step_s = self._engine.figures()["step_s"]
        if step_s > self._timeout_s:
            raise RuntimeError(f"a step of the language model has run for {step_s:.0f} s")

    def figures(self) -> dict[str, float]:
        """running, waiting and slots of this replica."""
        return self._engine.figures()

    def describe(self) -> dict[str, Any]:
        """What is served: id (the folder's name), context_length, embedding_dim, num_visual_tokens, strategy
        and domain of the alignment, image_fingerprint and text_fingerprint of its encoder ("" if unknown)."""
        return dict(self._description)

    async def close(self) -> None:
        await self._engine.close()

    def _report(self, begun: bool = False) -> None:
        figures = self._engine.figures()
        with contextlib.suppress(Exception):  # metrics fail no request
            metrics = instruments()
            metrics.queue_depth.set(figures["waiting"])
            metrics.running.set(figures["running"])
            if begun:  # once an answer: once a step would cost more than it says
                metrics.batch_size.observe(max(1, figures["running"]), tags={"part": "language_model"})


def _configuration(folder: str) -> ReVisionConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={folder}: no model can be loaded from there; name a folder that jobs/finetune.py or "
            "jobs/export.py wrote"
        ) from error
    if not isinstance(config, ReVisionConfig):
        raise ConfigError(f"model={folder}: its model_type is {config.model_type}, expected revision")
    return config


def _described(model: str, config: ReVisionConfig) -> dict[str, Any]:
    alignment, tower = config.alignment or {}, config.image_tower or {}
    return {
        "id": storage.name_of(model),
        "embedding_dim": config.embedding_dim,
        "num_visual_tokens": config.num_visual_tokens,
        "strategy": alignment.get("strategy", ""),
        "domain": alignment.get("domain", ""),
        "image_fingerprint": tower.get("fingerprint") or alignment.get("image_fingerprint") or "",
        "text_fingerprint": alignment.get("text_fingerprint") or "",
    }


def _dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    if engine.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[engine.dtype]
