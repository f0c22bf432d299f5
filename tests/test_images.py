"""Decoding: every picture that is one comes out right; nothing else comes out at all."""

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from revision_ray.core.errors import DataError
from revision_ray.data.images import UndecodableImage, decode_image

MAX_PIXELS = 1_000_000


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, without symmetry, and with three different channels."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 10, y * 15, (x + y) * 6], axis=-1).astype(np.uint8))


def png(width: int, height: int, *, bits: int = 8, raw: bytes = b"\0" * 1000) -> bytes:
    """An RGB PNG written by hand, whose header may claim more than the `raw` rows hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def pixels(content: bytes) -> np.ndarray:
    image = decode_image(content, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_formats_give_the_very_pixels(kind, options):
    assert (pixels(encoded(picture(), kind, **options)) == np.asarray(picture())).all()


def test_jpeg_avif_and_mpo_are_close_to_the_picture():
    for content in (
        encoded(picture(), "JPEG", quality=95),
        encoded(picture(), "AVIF", quality=95),
        encoded(picture(), "MPO", quality=95, save_all=True, append_images=[picture().rotate(180)]),
    ):
        # Quantisation and chroma subsampling at quality 95 move a pixel by a few of 256 levels.
        assert np.abs(pixels(content) - np.asarray(picture())).mean() < 6


def test_grey_bilevel_and_palette_become_rgb():
    grey = picture().convert("L")
    assert (pixels(encoded(grey, "PNG")) == np.asarray(grey)[..., None]).all()
    bilevel = picture().convert("1")
    assert (pixels(encoded(bilevel, "PNG")) == 255 * np.asarray(bilevel).astype(int)[..., None]).all()
    palette = picture().quantize(16)
    for kind in ("PNG", "GIF"):
        assert (pixels(encoded(palette, kind)) == np.asarray(palette.convert("RGB"))).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], dtype=np.uint16)
    expected = np.round(levels / 257).astype(int)[..., None].repeat(3, axis=-1)
    big_endian = Image.frombytes("I;16B", (7, 1), levels.astype(">u2").tobytes())
    for image, kind in (
        (Image.fromarray(levels), "PNG"),
        (Image.fromarray(levels), "TIFF"),
        (big_endian, "TIFF"),
    ):
        assert (pixels(encoded(image, kind)) == expected).all()
    assert expected[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]  # clipped: 0, 128, 129, 255 ...


def test_sixteen_bits_a_channel_keep_their_range():
    levels = np.array([[[0, 257, 65535], [32896, 128, 65280]]], dtype=">u2")
    raw = b"\0" + levels.tobytes()
    # Pillow itself reduces these to their high byte, at most one level from the rounded value.
    assert np.abs(pixels(png(2, 1, bits=16, raw=raw)) - np.round(levels / 257)).max() <= 1


def test_thirty_two_bit_grey_is_refused_with_the_reason():
    for dtype in (np.int32, np.float32):
        content = encoded(Image.fromarray(np.full((4, 4), 70000, dtype=dtype)), "TIFF")
        with pytest.raises(UndecodableImage, match="range is undefined"):
            decode_image(content, max_pixels=MAX_PIXELS)


def test_cmyk_is_converted():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for content in (encoded(red, "JPEG", quality=95), encoded(red, "TIFF")):
        # Saturated ink stays saturated up to JPEG's rounding; read as RGBA or inverted it would be far off.
        assert np.abs(pixels(content) - [255, 0, 0]).max() < 6


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))  # colours that nobody is meant to see
    grey = Image.new("LA", (4, 4), (0, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (pixels(encoded(clear, kind, **options)) == 255).all()
        assert np.abs(pixels(encoded(half, kind, **options)) - [255, 127, 127]).max() <= 1
    assert (pixels(encoded(grey, "PNG")) == 255).all()


def test_transparent_palette_entries_and_colour_keys_are_white_too():
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.paste(1, (2, 0, 4, 2))
    for kind in ("PNG", "GIF"):
        found = pixels(encoded(palette, kind, transparency=0))
        assert (found[:, :2] == 255).all()
        assert (found[:, 2:] == [0, 0, 200]).all()
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (pixels(encoded(key, "PNG", transparency=(1, 2, 3))) == 255).all()


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_of_many_frames_the_first_is_taken(kind, options):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    content = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert (pixels(content) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_exif_rotation_is_applied_once(kind, options, orientation):
    upright = np.asarray(picture())
    # What a camera stores so that a viewer following EXIF 2.3, table of tag 0x0112, sees `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert (pixels(content) == upright).all()


def test_damaged_exif_beside_sound_pixels_is_passed_over():
    content = encoded(picture(), "PNG", exif=b"Exif\0\0" + b"XX\0*\xff\xff\xff\xff")
    assert (pixels(content) == np.asarray(picture())).all()


def test_zero_bytes_and_other_files_are_named_as_such():
    with pytest.raises(UndecodableImage, match="0 bytes"):
        decode_image(b"", max_pixels=MAX_PIXELS)
    for content in (b"<html>not found</html>", b"\0" * 1000, b"%PDF-1.7", picture().tobytes()):
        with pytest.raises(UndecodableImage, match="no readable JPEG"):
            decode_image(content, max_pixels=MAX_PIXELS)
    assert issubclass(UndecodableImage, DataError)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "EPS", "TGA", "PCX"])
def test_formats_off_the_list_are_refused(kind):
    # Pillow would open each of these; EPS would even start Ghostscript.
    with pytest.raises(UndecodableImage, match="no readable JPEG"):
        decode_image(encoded(picture(), kind), max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_file_cut_in_half_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    decode_image(content, max_pixels=MAX_PIXELS)
    with pytest.raises(UndecodableImage, match=r".+"):
        decode_image(content[: len(content) // 2], max_pixels=MAX_PIXELS)


def test_max_pixels_is_exact():
    content = encoded(picture(20, 10), "PNG")
    assert decode_image(content, max_pixels=200).size == (20, 10)
    with pytest.raises(UndecodableImage, match=r"20 x 10 = 200 pixels, more than max_pixels=199"):
        decode_image(content, max_pixels=199)


def test_a_tiff_whose_offset_is_a_float_is_refused():
    # Pillow raises TypeError here: the fuzz below meets that too rarely to hold it.
    content = bytearray(encoded(picture(), "TIFF"))
    at = content.index(struct.pack("<HHI", 273, 4, 1))  # tag StripOffsets, type LONG, one value
    (offset,) = struct.unpack_from("<I", content, at + 8)
    struct.pack_into("<HHIf", content, at, 273, 11, 1, float(offset))
    with pytest.raises(UndecodableImage, match="TypeError"):
        decode_image(bytes(content), max_pixels=MAX_PIXELS)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [1100, 9000, 12000, 40000])
def test_bombs_are_refused_by_their_header_below_and_above_pillows_own_limits(side):
    with pytest.raises(UndecodableImage, match="max_pixels=1000000"):
        decode_image(png(side, side), max_pixels=MAX_PIXELS)


def test_a_bomb_takes_no_memory():
    webp = bytearray(
        encoded(picture(), "WEBP", lossless=True, save_all=True, append_images=[picture().rotate(180)])
    )
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = (16383 - 1).to_bytes(3, "little") * 2
    script = (
        "import resource, sys\n"
        "from revision_ray.data.images import UndecodableImage, decode_image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for content in map(bytes.fromhex, sys.argv[1:]):\n"
        "    try: decode_image(content, max_pixels=1_000_000)\n"
        "    except UndecodableImage: continue\n"
        "    sys.exit('decoded')\n"
        "sys.stdout.write(str(peak() - before))\n"
    )
    bombs = [png(12000, 12000).hex(), webp.hex()]
    done = subprocess.run([sys.executable, "-c", script, *bombs], capture_output=True, text=True, check=True)
    # 144 and 268 million pixels would be 432 MB and 1 GB; reading headers takes a few MB (in KB here).
    assert int(done.stdout) < 30_000


def samples_of_every_format() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, rgba = picture(), picture().convert("RGBA")
    grey16 = Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170)
    found = {
        "jpeg": encoded(rgb, "JPEG", exif=exif),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png": encoded(rgb, "PNG", exif=exif),
        "png palette": encoded(rgb.quantize(16), "PNG", transparency=2),
        "png rgba": encoded(rgba, "PNG"),
        "png la": encoded(rgb.convert("LA"), "PNG"),
        "png 16": encoded(grey16, "PNG"),
        "apng": encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp animated": encoded(rgba, "WEBP", save_all=True, append_images=[rgba.rotate(180)]),
        "gif": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        "avif": encoded(rgba, "AVIF", exif=exif),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(rgb.quantize(16), "BMP"),
        "tiff 16": encoded(grey16, "TIFF", exif=exif),
    }
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        found[f"tiff {compression}"] = encoded(rgb, "TIFF", compression=compression, exif=exif)
    return found


def damaged(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    if chance.random() < 0.25:
        return bytes(data[: chance.randrange(len(data))])
    # Half of the damage in the header, where sizes, offsets and types stand.
    reach = len(data) if chance.random() < 0.5 else min(len(data), 120)
    for _ in range(chance.choice([1, 1, 2, 4, 10])):
        data[chance.randrange(reach)] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then reads anyhow
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_an_image_or_a_reason_and_nothing_else(seed):
    chance = random.Random(seed)
    refused = decoded = 0
    for content in samples_of_every_format().values():
        decode_image(content, max_pixels=MAX_PIXELS)
        for _ in range(60):
            try:
                image = decode_image(damaged(content, chance), max_pixels=100_000)
            except UndecodableImage:
                refused += 1
            else:
                assert image.mode == "RGB"
                assert image.width * image.height <= 100_000
                decoded += 1
    assert refused > 200
    assert decoded > 200
