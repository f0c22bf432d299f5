"""A saved model that encodes images and answers prompts in batches. No Ray; torch is imported when used.

Shapes: I images, D embedding_dim, B batch, T tokens.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from revision_ray.data.chat import ChatTemplate, as_date
from revision_ray.data.images import decode_image
from revision_ray.model.ending import until_end

Dtype = Literal["auto", "float32", "bfloat16"]


class Responder:
    """The model in memory, on a GPU where this process has one.

    Answers are decoded greedily. Prompts of a batch are padded on the left and masked, so a prompt's answer
    does not depend on its neighbours but for rounding, which can only decide between tokens that are equally
    likely to within it.
    """

    def __init__(
        self, folder: str, *, dtype: Dtype, max_new_tokens: int, num_threads: int | None, today: str = ""
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        import revision_ray.model  # noqa: F401  # registers its classes with the Auto classes

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        logging.disable_progress_bar()  # of the weights: in an actor's log it is noise
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = self.model.to(self._device).eval()
        self._max_new_tokens = max_new_tokens
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = tokenizer.eos_token_id
        if not tokenizer.chat_template:
            tokenizer.chat_template = getattr(self.processor, "chat_template", None)
        self._chat = ChatTemplate(tokenizer, as_date(today))

    def encode(self, images: Sequence[bytes], max_pixels: int) -> np.ndarray:
        """float32 unit rows (I, D) of encoded images, from the model's own image tower.

        Raises:
            UndecodableImage: an image cannot be decoded.
            ConfigError: the model was saved without an image tower.
        """
        import torch

        decoded = [decode_image(content, max_pixels=max_pixels) for content in images]
        pixels = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return self.model.encode_images(pixels.to(self._device)).cpu().numpy()

    def answer(self, prompts: Sequence[str], images_BD: np.ndarray | None) -> list[str]:
        """What the model says to each prompt, each about its row of `images_BD`, or without an image."""
        import torch

        rows = [self._input_ids(prompt, images_BD is not None) for prompt in prompts]
        tokens = self.processor.tokenizer.pad(
            {"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt"
        ).to(self._device)
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if images_BD is not None:
            inputs["image_embeds"] = torch.from_numpy(images_BD).to(self._device)
        with torch.inference_mode():
            out_BT = self.model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                # A checkpoint's sampling defaults would only bring warnings here.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        said_BT = out_BT[:, tokens["input_ids"].shape[1] :].tolist()
        answers = [until_end(said_T, self.model.generation_config) for said_T in said_BT]
        said = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in said]

    def _input_ids(self, prompt: str, with_image: bool) -> list[int]:
        image = self.processor.image_token
        # A question that spells the placeholder has no second image.
        prompt = prompt.replace(image, "").strip()
        content = "\n".join(part for part in (image if with_image else "", prompt) if part)
        rendered = self._chat.render([{"role": "user", "content": content}], prompt=True, slots=True)
        ids = self._chat.encode(rendered).input_ids.tolist()
        copies = self.processor.num_visual_tokens
        return [
            token_id
            for found in ids
            for token_id in [found] * (copies if found == self.processor.image_token_id else 1)
        ]
