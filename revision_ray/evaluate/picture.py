"""A contact sheet: images, what the model says they show, questions, its answers and the true ones."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from revision_ray.core import storage
from revision_ray.data.images import decode_image
from revision_ray.evaluate.benchmarks import BenchmarkQuestion, ReadUnit, content_key, read_unit
from revision_ray.evaluate.prepare import MAX_IMAGE_PIXELS, PreparedBenchmark

# Pixels.
_IMAGE_SIDE = 256
_CELL = 320
_GAP = 24
_TEXT, _CAPTION = 17, 19
_BLACK, _GREY, _RIGHT, _WRONG = "#111111", "#555555", "#0a7a2f", "#b3261e"
_COLUMNS = 4
_QUESTIONS_PER_IMAGE = 3
_LONGEST = 160  # characters of a question or an answer

_Line = tuple[str, int, str]  # text, font size, colour


@dataclass(frozen=True, kw_only=True)
class PictureCell:
    """An image with its caption, and (question, answer given, true answer, whether it is right) below."""

    image: bytes
    caption: str
    questions: tuple[tuple[str, str, str, bool], ...]


def choose(units: Sequence[ReadUnit], prepared: PreparedBenchmark, count: int) -> dict[str, bytes]:
    """The first `count` different images of a benchmark that questions are about, by their key."""
    found: dict[str, bytes] = {}
    asked = set(prepared.keys)
    for unit in units:
        if len(found) >= count:
            break
        for item in read_unit(unit):
            if not isinstance(item, BenchmarkQuestion) or item.image is None:
                continue
            key = content_key(item.image)
            if key in asked and len(found) < count:
                found.setdefault(key, item.image)
    return found


def write(
    uri: str,
    heading: str,
    images: Mapping[str, bytes],
    captions: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> str:
    """The contact sheet of `images` stands at `uri`, made of rows of the answer tables; `uri`."""
    caption_of = {row["shown"]: row["raw"] for row in captions}
    cells = []
    for key, content in images.items():
        asked = [row for row in answers if row["shown"] == key][:_QUESTIONS_PER_IMAGE]
        rows = tuple((row["prompt"], row["raw"], row["answer"], bool(row["correct"])) for row in asked)
        cells.append(PictureCell(image=content, caption=caption_of.get(key, ""), questions=rows))
    storage.write_bytes(uri, contact_sheet(cells, heading))
    return uri


def contact_sheet(cells: Sequence[PictureCell], heading: str = "") -> bytes:
    """A PNG: `heading`, then cells side by side on white, each row as high as its longest text."""
    columns = min(_COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    lines = [[_lines(cell) for cell in row] for row in rows]
    heights = [_IMAGE_SIDE + _GAP // 2 + max(sum(map(_height, cell)) for cell in row) + _GAP for row in lines]
    width = columns * (_CELL + _GAP) + _GAP
    head = _wrapped(heading, _TEXT, _GREY, width - 2 * _GAP)
    head_height = sum(map(_height, head)) + (_GAP // 2 if head else 0)
    sheet = Image.new("RGB", (width, head_height + sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for line in head:
        draw.text((_GAP, top), line[0], font=_font(line[1]), fill=line[2])
        top += _height(line)
    top = head_height + _GAP
    for row, texts, height in zip(rows, lines, heights, strict=True):
        for column, (cell, text) in enumerate(zip(row, texts, strict=True)):
            left = _GAP + column * (_CELL + _GAP)
            sheet.paste(_scaled(cell.image), (left, top))
            y = top + _IMAGE_SIDE + _GAP // 2
            for line in text:
                draw.text((left, y), line[0], font=_font(line[1]), fill=line[2])
                y += _height(line)
        top += height
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _scaled(content: bytes) -> Image.Image:
    """The image within a white square; small ones are enlarged by whole pixels, so that they stay sharp."""
    image = decode_image(content, max_pixels=MAX_IMAGE_PIXELS)
    scale = _IMAGE_SIDE / max(image.size)
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    size = tuple(max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (_IMAGE_SIDE, _IMAGE_SIDE), "white")
    square.paste(image.resize((size[0], size[1]), method), (0, 0))
    return square


def _lines(cell: PictureCell) -> list[_Line]:
    lines = _wrapped(cell.caption or "(no caption)", _CAPTION, _BLACK)
    for question, said, truth, correct in cell.questions:
        lines += _wrapped(question.splitlines()[0] if question else "", _TEXT, _GREY)
        verdict = "" if correct else f"   (true: {truth})"
        lines += _wrapped(f"answer: {said or '(nothing)'}{verdict}", _TEXT, _RIGHT if correct else _WRONG)
    return lines


def _wrapped(text: str, size: int, colour: str, width: int = _CELL) -> list[_Line]:
    """`text` in lines of at most `width` pixels; words longer than a line are broken."""
    text = " ".join(text.split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
    font, lines, line = _font(size), [], ""
    for word in text.split():
        rest = word
        while font.getlength(rest) > width:
            fits = next(n for n in range(len(rest), 0, -1) if n == 1 or font.getlength(rest[:n]) <= width)
            lines += [line, rest[:fits]] if line else [rest[:fits]]
            line, rest = "", rest[fits:]
        longer = f"{line} {rest}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines.append(line)
            line = rest
    return [(entry, size, colour) for entry in [*lines, line] if entry]


def _height(line: _Line) -> int:
    return round(line[1] * 1.35)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font
