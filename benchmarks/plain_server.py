"""The least that serves a model: one FastAPI process that calls generate for one request at a time.

    python -m benchmarks.plain_server MODEL PORT

What benchmarks/serve.py compares with: greedy answers as a whole, no checks, no streams.
"""

import asyncio
import base64
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForImageTextToText, AutoProcessor

from revision_ray.data.images import decode_image

MAX_PIXELS = 50_000_000


class Answerer:
    """The model in this process, and how a request is put to it."""

    def __init__(self, folder: str) -> None:
        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the model says to the messages, with `max_tokens` of the body."""
        images, messages = [], []
        for message in body["messages"]:
            parts = []
            for part in message["content"]:
                if part["type"] == "image_url":
                    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    images.append(decode_image(content, max_pixels=MAX_PIXELS))
                    parts.append({"type": "image"})
                else:
                    parts.append(part)
            messages.append(message | {"content": parts})
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self._processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out_BT = self._model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=False)
        said = out_BT[0, inputs["input_ids"].shape[1] :]
        return {
            "choices": [{"message": {"content": self._processor.tokenizer.decode(said)}}],
            "usage": {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(said)},
        }


def app_of(answerer: Answerer) -> FastAPI:
    app, one_at_a_time = FastAPI(), asyncio.Lock()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        body = await request.json()
        async with one_at_a_time:
            return await asyncio.to_thread(answerer.answer, body)

    return app


if __name__ == "__main__":
    uvicorn.run(app_of(Answerer(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
