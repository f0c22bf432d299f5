"""The processor (text with `<image>` slots, images or embeddings) and open_clip's image processor."""

import functools
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_transforms import convert_to_rgb, to_pil_image
from transformers.image_utils import make_flat_list_of_images

from revision_ray.core.errors import ConfigError, DataError


class OpenClipImageProcessor(BaseImageProcessor):
    """Pixels as open_clip prepares them, bit by bit: it runs open_clip's own transform.

    The library's CLIP processor is near but not equal: where the margin to crop is odd, it rounds the other
    way, which shifts the picture by a pixel. Transparency is laid over white.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int | list[int] = 224,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        **kwargs: Any,
    ) -> None:
        """The fields of open_clip's `PreprocessCfg`; mean and standard deviation default to OpenAI's."""
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, image_mean, image_std
        self.interpolation, self.resize_mode, self.fill_color = interpolation, resize_mode, fill_color

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """`pixel_values` float32 (images, 3, height, width)."""
        from open_clip.transform import image_transform  # costs a second: not every model needs it

        transform: Any = image_transform(
            self.size if isinstance(self.size, int) else (self.size[0], self.size[1]),
            is_train=False,
            mean=None if self.image_mean is None else tuple(self.image_mean),
            std=None if self.image_std is None else tuple(self.image_std),
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
            fill_color=self.fill_color,
        )
        fetched: Any = self.fetch_images(images)
        flat: Any = make_flat_list_of_images(fetched)
        pixels = [transform(_rgb(image)) for image in flat]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)


def _rgb(image: Any) -> Image.Image:
    picture = image if isinstance(image, Image.Image) else to_pil_image(image)
    pixels_HWC: Any = convert_to_rgb(picture, return_numpy=True)
    return Image.fromarray(pixels_HWC)


IMAGE_TOKEN = "<image>"

# Most language models' chat templates take a message's content as text. This part, in front of one, turns
# content in parts ({"type": "image"}, {"type": "text", "text": ...}) into that text: a line for each part.
_PARTS_TO_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is not defined or content is string or content is not iterable -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set lines = namespace(all=[]) -%}
    {%- for part in content -%}
      {%- set lines.all = lines.all + ['<image>' if part['type'] == 'image' else part['text']] -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=lines.all | join('\\n'))] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""


def add_image_token(tokenizer: Any) -> int:
    """`tokenizer` knows `<image>` as one special token; returns its id."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


class ReVisionProcessor(ProcessorMixin):
    """Tokenizer and image processor of a ReVision model.

    `<image>` in a text becomes `num_visual_tokens` placeholders. Batches are padded on the left, as
    generation needs. Without an image processor (a model without image tower) it takes embeddings only.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        chat_template: str | None = None,
        num_visual_tokens: int = 1,
    ) -> None:
        """
        Raises:
            ConfigError: the tokenizer has no `<image>` token.
        """
        self.num_visual_tokens = num_visual_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {IMAGE_TOKEN} token; call "
                "revision_ray.model.add_image_token(tokenizer) before"
            )
        template = chat_template or getattr(tokenizer, "chat_template", None)
        if isinstance(template, str) and "'image'" not in template and '"image"' not in template:
            template = _PARTS_TO_TEXT + template
        if image_processor is None:
            # The library takes every part that the signature names for present, and would save it.
            self.get_attributes = functools.partial(list, ("tokenizer",))
            super().__init__(tokenizer, chat_template=template)
            self.image_processor = None
        else:
            super().__init__(tokenizer, image_processor, chat_template=template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        if (processor_dict or {}).get("image_processor") is not None:
            return super()._get_arguments_from_pretrained(
                pretrained_model_name_or_path, processor_dict, **kwargs
            )
        subfolder = kwargs.pop("subfolder", "")
        return [
            cls._load_tokenizer_from_pretrained(
                "tokenizer", pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            ),
            None,
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        image_embeds: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, `pixel_values` or `image_embeds` of the images.

        Images (PIL, arrays, paths, nested or flat) or embeddings (images, D) stand in the order of their
        `<image>`. With neither, texts may hold `<image>` all the same: the embeddings can join later.

        Raises:
            ConfigError: images, but the model has no image tower.
            DataError: neither text nor images, or not one image for each `<image>`.
        """
        if text is None and images is None:
            raise DataError("the processor was given neither text nor images")
        options = self._merge_kwargs(
            tokenizer_init_kwargs=self.tokenizer.init_kwargs, **{"padding_side": "left", **kwargs}
        )
        data, num_images = self._images(images, image_embeds, options["images_kwargs"])
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            data = {**self._texts(texts, num_images, options["text_kwargs"]), **data}
        return BatchFeature(
            data,
            tensor_type=options["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _images(
        self, images: Any, image_embeds: Any, options: dict[str, Any]
    ) -> tuple[dict[str, Any], int | None]:
        if images is not None and image_embeds is not None:
            raise DataError("give each image as a picture or as its embedding, one of the two")
        if image_embeds is not None:
            embeds_ID = torch.as_tensor(image_embeds)
            return {"image_embeds": embeds_ID}, len(embeds_ID)
        if images is None:
            return {}, None
        if self.image_processor is None:
            raise ConfigError(
                "images were given, but the model has no image tower; attach one with "
                "revision_ray.model.attach.attach_image_tower, or give image_embeds"
            )
        flat: list[Any] = []
        for item in _leaves(images):
            one_or_several: Any = make_flat_list_of_images(self.image_processor.fetch_images(item))
            flat += one_or_several
        return dict(self.image_processor(flat, **options)), len(flat)

    def _texts(self, texts: list[str], num_images: int | None, options: dict[str, Any]) -> dict[str, Any]:
        num_slots = sum(text.count(IMAGE_TOKEN) for text in texts)
        if num_images is not None and num_slots != num_images:
            raise DataError(
                f"{num_slots} {IMAGE_TOKEN} in {len(texts)} texts and {num_images} images, expected one "
                f"image for each {IMAGE_TOKEN}, in order"
            )
        options.pop("return_mm_token_type_ids", None)
        with_offsets = options.pop("return_text_replacement_offsets", False)
        texts, offsets = self.get_text_with_replacements(
            texts, [IMAGE_TOKEN * self.num_visual_tokens] * num_slots
        )
        encoding = dict(self.tokenizer(texts, **options))
        self._check_special_mm_tokens(texts, encoding, modalities=["image"])  # type: ignore[arg-type]
        return {**encoding, "text_replacement_offsets": offsets} if with_offsets else encoding


def _leaves(images: Any) -> list[Any]:
    """Every image of lists in lists; a conversation without images holds an empty one, or None."""
    if isinstance(images, list | tuple):
        return [image for part in images for image in _leaves(part)]
    return [] if images is None else [images]
