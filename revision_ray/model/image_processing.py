"""open_clip's preprocessing as an image processor of transformers, saved beside the model."""

from typing import Any

import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_transforms import convert_to_rgb, to_pil_image
from transformers.image_utils import make_flat_list_of_images


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
