"""Encoded images, as sources hold them, to RGB pixels, or the reason why not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from revision_ray.errors import DataError

# Pillow opens MPO (JPEG with further pictures, as phones write) through its JPEG reader.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What Pillow's readers of these formats raise on damaged input. The first four were seen in half a million
# damaged files (tests/test_images.py holds a small version); the others are what their code can raise beyond
# that. OSError includes UnidentifiedImageError, ValueError includes UnicodeDecodeError.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    struct.error,
    zlib.error,
    EOFError,
    LookupError,
    ArithmeticError,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImage(DataError):  # noqa: N818
    """These bytes are no image that can be encoded; the message is the reason."""


def decode_image(content: bytes, *, max_pixels: int) -> Image.Image:
    """The first frame of `content` as an upright RGB image.

    The format is judged by content, never by name: JPEG (and MPO), PNG, WebP, GIF, BMP or TIFF. The size that
    the header states is checked before a pixel is decoded. EXIF rotation is applied; transparency is laid
    over white, the ground on which such images are usually shown (dropping alpha would reveal arbitrary
    hidden colours); 16-bit grey is divided by 257, so that its full range is kept; CMYK is converted without
    its colour profile.

    Pillow has a limit of its own (`2 * Image.MAX_IMAGE_PIXELS`, about 179 million) above which a larger
    `max_pixels` has no effect.

    Raises:
        UndecodableImage: empty, of another format, damaged, truncated, too large, or without a defined 8-bit
            range.
    """
    if not content:
        raise UndecodableImage("image has 0 bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UndecodableImage(
            f"no readable JPEG, PNG, WebP, GIF, BMP or TIFF image: {len(content)} bytes that begin with "
            f"{content[:8]!r}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableImage(f"more than max_pixels={max_pixels} pixels: {error}") from error
    except _PILLOW_ERRORS as error:
        raise UndecodableImage(f"image header is damaged: {_reason(error)}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise UndecodableImage(
                f"{width} x {height} = {width * height} pixels, more than max_pixels={max_pixels}"
            )
        try:
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
        except _PILLOW_ERRORS as error:
            raise UndecodableImage(f"{image.format} image cannot be decoded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # 32-bit integers and floats carry no agreed white point; guessing one would change the picture
        # silently.
        raise ValueError(
            f"pixels are of mode {image.mode!r}, whose range is undefined; store 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    # A copy even where it is RGB already, so that the caller holds no open file.
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8. Read after decoding: Pillow applies a TIFF's own then, and removes the tag."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS:
        return 1  # Damaged metadata beside sound pixels: shown as stored, as viewers do.


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
