"""Encoded images, as files and fields hold them, to bytes and to RGB pixels, or the reason why not."""

import base64
import binascii
import io
import re
import struct
import urllib.parse
import zlib

import numpy as np
from PIL import Image

from revision_ray.core.errors import DataError, quote, shorten

# Pillow opens MPO (JPEG with further pictures, as phones write) through its JPEG reader.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
HEAD_BYTES = 64
"""As many of its first bytes tell whether a file is an image of these formats (`is_image`)."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "jif", "png", "apng", "webp", "gif", "bmp", "dib", "tif",
                    "tiff", "avif", "avifs")  # fmt: skip
# Downloads keep what stood behind the name: .jpg_large, .jpg:orig, .jpg?w=640.
_IMAGE_ENDING = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})(\?[^/]*|[^a-z0-9./?][^./]*)?$", re.IGNORECASE)

_DATA_URI = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)
_MAX_URI_HEADER = 256
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_SHORTEST_BASE64 = 32  # less is a name, whatever it says
_LONGEST_LOCATION = 4096  # of paths; keys of object stores are shorter

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
    RuntimeError,  # of the AVIF reader, for every kind of damage
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


def without_image_ending(path: str) -> str:
    """`path` without the ending of an image file, if it has one."""
    return _IMAGE_ENDING.sub("", path)


def has_image_ending(path: str) -> bool:
    return _IMAGE_ENDING.search(path) is not None


class UndecodableImage(DataError):  # noqa: N818
    """These bytes are no image that can be encoded; the message is the reason."""


class ImageTooLarge(UndecodableImage):
    """The image has more bytes than are allowed."""


def is_image(head: bytes) -> bool:
    """Whether content that begins with `head` (HEAD_BYTES, or all) is of a format that is decoded here."""
    if head[4:8] == b"ftyp":
        brand, compatible = head[8:12], head[16:]
        return brand in (b"avif", b"avis") or (brand in (b"mif1", b"msf1") and b"avif" in compatible)
    if head.startswith(b"BM"):  # two letters alone prove nothing
        return head[6:10] == b"\0\0\0\0"
    return head.startswith(
        (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    ) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def image_value(value: object) -> bytes | str | None:
    """Return what a field says about an image: its encoded bytes, else where it lies; None where it is null.

    Bytes are given as such, as a list of their numbers, as base64 or as a `data:` URI; {bytes, path} holds
    either. A string is base64 only where it decodes to what begins as an image does: every other one is a
    path or a URI.

    Raises:
        UndecodableImage: of another type, or a string that can be neither.
    """
    if isinstance(value, dict):
        inner = value.get("bytes")
        if inner is None or len(inner) == 0:
            place = next((value[name] for name in ("path", "url", "uri") if value.get(name)), None)
            return image_value(inner if place is None else place)
        found = image_value(inner)
        if isinstance(found, str):
            raise UndecodableImage(f"'bytes' is a string that is no image in base64: {quote(found, 60)}")
        return found
    if value is None or value != value:  # NaN: what pandas makes of a missing string
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, list | tuple) and value and all(type(part) is int for part in value):
        try:
            return bytes(value)
        except ValueError as error:
            raise UndecodableImage("is a list of numbers that are no bytes") from error
    if not isinstance(value, str):
        raise UndecodableImage(f"is of type {type(value).__name__}, expected bytes, base64, a path or a URI")
    if value[:5].lower() == "data:":
        return data_uri_content(value)
    content = _base64_image(value)
    if content is None and len(value) > _LONGEST_LOCATION:
        raise UndecodableImage(
            f"is text of {len(value)} characters, no base64 of a {FORMATS} image and too long for a path: "
            f"{quote(value, 60)}"
        )
    return value if content is None else content


def data_uri_content(uri: str, *, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a `data:` URI in base64, or percent-encoded.

    Raises:
        UndecodableImage: no data URI, or its base64 is damaged; ImageTooLarge: more than about `max_bytes`.
    """
    header = _DATA_URI.match(uri[:_MAX_URI_HEADER])
    if header is None:
        raise UndecodableImage("expected data:image/TYPE;base64,DATA")
    encoded = uri[header.end() :]
    in_base64 = header["parameters"].lower().endswith(";base64")
    # The least that would come out is known before: 3 bytes of 4 characters, 1 byte of 3 (%FF).
    if max_bytes is not None and (
        len(encoded) // 4 * 3 > max_bytes + 3 if in_base64 else len(encoded) > 3 * max_bytes
    ):
        raise ImageTooLarge(f"the data URI holds more than {max_bytes} bytes")
    if not in_base64:
        return urllib.parse.unquote_to_bytes(encoded)
    content = _from_base64(urllib.parse.unquote(encoded) if "%" in encoded else encoded)
    if content is None:
        raise UndecodableImage("the data is not base64; encode it again")
    return content


def _base64_image(text: str) -> bytes | None:
    """The image that `text` is in base64; None where it is something else.

    Raises:
        UndecodableImage: it begins as one, is too long for a path, and breaks.
    """
    head = _from_base64("".join(text[: 4 * HEAD_BYTES].split())[: HEAD_BYTES // 3 * 4])
    if len(text) < _SHORTEST_BASE64 or head is None or not is_image(head):
        return None
    content = _from_base64(text)
    if content is None and len(text) > _LONGEST_LOCATION:
        raise UndecodableImage(
            f"is base64 of an image that breaks within its {len(text)} characters; encode it again"
        )
    return content


def _from_base64(text: str) -> bytes | None:
    """The bytes of base64 with or without line breaks and padding, in either alphabet; None of other text."""
    packed = "".join(text.split()).replace("-", "+").replace("_", "/")
    if _BASE64.fullmatch(packed) is None:
        return None
    packed = packed.rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None  # a single character over


def decode_image(content: bytes, *, max_pixels: int) -> Image.Image:
    """The first frame of `content` as an upright RGB image.

    The format is judged by content, never by name: JPEG (and MPO), PNG, WebP, GIF, BMP, TIFF or AVIF. The
    size that the header states is checked before a pixel is decoded. EXIF rotation is applied; transparency
    is laid over white, the ground on which such images are usually shown (dropping alpha would reveal
    arbitrary hidden colours); 16-bit grey is divided by 257, so that its full range is kept; CMYK is
    converted without its colour profile.

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
            f"no readable {FORMATS} image: {len(content)} bytes that begin with {content[:8]!r}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableImage(f"more than max_pixels={max_pixels} pixels: {shorten(error)}") from error
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
    return f"{type(error).__name__}: {shorten(error)}"


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
