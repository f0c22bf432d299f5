"""A procedural world of coloured shapes on textured backgrounds: scenes, and images of them.

Scene `index` of a world is a function of (seed, domain, index) alone, so that any process renders any part
of the world, in any order, to the same pixels.

Coordinates are pixels of the 64 x 64 image, x to the right and y downwards. Shapes: H height, W width, C 3.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Pixels along each side of an image."""
_SUPERSAMPLING = 2
_TILE = 192  # pixels of a texture tile, from which every background is cut

DomainName = Literal["day", "night"]
Size = Literal["small", "large"]
Relation = Literal["left", "right", "above", "below"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "orange": (245, 136, 22),
    "yellow": (246, 222, 48),
    "green": (22, 132, 52),
    "blue": (30, 64, 210),
    "purple": (132, 40, 168),
    "white": (240, 240, 240),
    "pink": (246, 128, 182),
    "turquoise": (40, 206, 198),
}
"""Mean RGB of each colour name; every thing's own colour varies around it."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What the scenes of a domain are made of, and how often."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    kinds: tuple[float, float, float]  # probabilities of: one thing, a group of equals, two that differ
    large: float  # probability that a thing is large


DOMAINS: dict[DomainName, Domain] = {
    "day": Domain(
        colours=("red", "orange", "yellow", "green", "blue", "purple"),
        shapes=("circle", "square", "triangle", "star"),
        backgrounds=("grass", "sand", "brick", "water", "snow"),
        kinds=(0.3, 0.25, 0.45),
        large=0.5,
    ),
    "night": Domain(
        colours=("red", "blue", "purple", "white", "pink", "turquoise"),
        shapes=("circle", "ring", "cross", "diamond"),
        backgrounds=("asphalt", "carpet", "stars", "forest", "steel"),
        kinds=(0.2, 0.45, 0.35),
        large=0.3,
    ),
}


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Which of the endlessly many worlds."""

    seed: int = 0
    """Worlds of different seeds have nothing in common."""
    domain: DomainName = "day"
    """day: bright backgrounds, six colours, four shapes. night: other backgrounds, colours and shapes, dark,
    more groups and smaller things. The language is one."""


@dataclass(frozen=True, kw_only=True)
class DrawnShape:
    """One shape in the picture; `radius` in pixels, `angle` in degrees, (x, y) its centre."""

    shape: str
    colour: str
    size: Size
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One thing, 2 to 4 things of one shape, colour and size, or two that differ in shape or colour."""

    background: str
    things: tuple[DrawnShape, ...]


def stream(*key: object) -> random.Random:
    """Random numbers that are a function of `key` alone (Python seeds from the SHA-512 of a string)."""
    return random.Random("/".join(map(str, key)))


def scene(config: WorldConfig, index: int) -> Scene:
    """Scene `index` of the world."""
    rng = stream(config.seed, config.domain, index, "scene")
    domain = DOMAINS[config.domain]
    kind = rng.choices(("one", "group", "pair"), domain.kinds)[0]
    count = {"one": 1, "group": rng.randint(2, 4), "pair": 2}[kind]
    looks = [(rng.choice(domain.shapes), rng.choice(domain.colours)) for _ in range(2)]
    while looks[0] == looks[1]:
        looks[1] = (rng.choice(domain.shapes), rng.choice(domain.colours))
    # Four large things do not fit into the picture.
    sizes: list[Size] = ["large" if rng.random() < domain.large and count < 4 else "small" for _ in range(2)]
    each: list[tuple[tuple[str, str], Size]] = [(looks[0], sizes[0])] * count
    if kind == "pair":
        each = list(zip(looks, sizes, strict=True))
    background = rng.choice(domain.backgrounds)
    while True:
        things = tuple(_thing(rng, shape, colour, size, count) for (shape, colour), size in each)
        if _apart(things) and (kind != "pair" or relation(*things) is not None):
            return Scene(background=background, things=things)


def _thing(rng: random.Random, shape: str, colour: str, size: Size, count: int) -> DrawnShape:
    largest = 15.0 if count < 3 else 12.5
    radius = rng.uniform(8.0, 10.0) if size == "small" else rng.uniform(12.0, largest)
    x, y = (rng.uniform(radius + 1, SIZE - radius - 1) for _ in range(2))
    return DrawnShape(
        shape=shape, colour=colour, size=size, x=x, y=y, radius=radius, angle=rng.uniform(-15, 15)
    )


def _apart(things: tuple[DrawnShape, ...]) -> bool:
    return all(
        math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 1
        for i, a in enumerate(things)
        for b in things[:i]
    )


def relation(a: DrawnShape, b: DrawnShape) -> Relation | None:
    """Where `a` is as seen from `b`; None where neither direction clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def place(thing: DrawnShape) -> str:
    """The third of the picture, each way, that holds the centre: "top left", "top", ..., "middle"."""
    vertical = "top" if thing.y < SIZE * 3 / 8 else "bottom" if thing.y > SIZE * 5 / 8 else ""
    horizontal = "left" if thing.x < SIZE * 3 / 8 else "right" if thing.x > SIZE * 5 / 8 else ""
    return f"{vertical} {horizontal}".strip() or "middle"


def render(config: WorldConfig, index: int) -> Image.Image:
    """The image of scene `index`: RGB, 64 x 64, drawn at twice the resolution."""
    shown = scene(config, index)
    rng = stream(config.seed, config.domain, index, "pixels")
    large = SIZE * _SUPERSAMPLING
    tile_HWC = _texture(shown.background)
    left, top = rng.randrange(_TILE - large), rng.randrange(_TILE - large)
    canvas = Image.fromarray(tile_HWC[top : top + large, left : left + large])
    draw = ImageDraw.Draw(canvas)
    for thing in shown.things:
        _draw(draw, thing, rng)
    small_HWC = np.asarray(canvas.reduce(_SUPERSAMPLING)).astype(np.int16)
    noise = np.random.default_rng(rng.getrandbits(64)).integers(-6, 7, small_HWC.shape, dtype=np.int8)
    light = rng.randrange(-18, 19)
    return Image.fromarray(np.clip(small_HWC + noise + light, 0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, thing: DrawnShape, rng: random.Random) -> None:
    fill = tuple(min(255, max(0, channel + rng.randrange(-20, 21))) for channel in COLOURS[thing.colour])
    edge = tuple(channel // 2 for channel in fill)
    x, y, r = (_SUPERSAMPLING * value for value in (thing.x, thing.y, thing.radius))
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=edge, width=2)
    elif thing.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(4, round(r * 0.4)))
    else:
        turn = math.radians(thing.angle)
        corners = [
            (x + r * reach * math.sin(turn + at), y - r * reach * math.cos(turn + at))
            for at, reach in _corners(thing.shape)
        ]
        draw.polygon(corners, fill=fill, outline=edge, width=2)


@lru_cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """(angle from the top in radians, distance as a share of the radius) of every corner, in order."""
    if shape == "cross":
        arm = math.atan2(1, 3)  # arms a third as wide as the cross
        inner = math.sqrt(2) / math.sqrt(10)
        quarter = [(-arm, 1.0), (arm, 1.0), (math.pi / 4, inner)]
        return tuple((at + turn * math.pi / 2, reach) for turn in range(4) for at, reach in quarter)
    corners, offset, inner = {
        "triangle": (3, 0.0, None),
        "square": (4, math.pi / 4, None),
        "diamond": (4, 0.0, None),
        "star": (5, 0.0, 0.45),
    }[shape]
    step = 2 * math.pi / corners
    outer = [(offset + i * step, 1.0) for i in range(corners)]
    if inner is None:
        # A diamond is a narrow square on its tip.
        return tuple((at, 0.6 if shape == "diamond" and i % 2 else 1.0) for i, (at, _) in enumerate(outer))
    return tuple(corner for at, _ in outer for corner in ((at, 1.0), (at + step / 2, inner)))


@lru_cache
def _texture(background: str) -> np.ndarray:
    """uint8 (192, 192, 3): the tile that images of `background` are cut from."""
    rng = np.random.default_rng(int.from_bytes(background.encode(), "little"))
    y_HW, x_HW = np.mgrid[:_TILE, :_TILE].astype(np.float32)
    fine_HW = rng.standard_normal((_TILE, _TILE), dtype=np.float32)
    coarse_HW = _smooth(rng, 8)
    base, pattern_HW = {
        "grass": ((104, 168, 72), 9 * fine_HW + 12 * np.sin(x_HW * 1.1 + 2 * coarse_HW)),
        "sand": ((222, 194, 142), 8 * fine_HW + 10 * coarse_HW),
        "brick": ((158, 92, 70), 5 * fine_HW + 50 * _mortar(x_HW, y_HW)),
        "water": ((128, 182, 214), 3 * fine_HW + 18 * np.sin(y_HW * 0.45 + 1.5 * coarse_HW)),
        "snow": ((232, 236, 242), 4 * fine_HW - 30 * (fine_HW > 2.2)),
        "asphalt": ((70, 70, 74), 14 * fine_HW),
        "carpet": ((84, 30, 44), 4 * fine_HW + 22 * np.sign(np.sin((x_HW + y_HW) * 0.3))),
        "stars": ((12, 14, 34), 3 * fine_HW + 190 * (fine_HW > 2.5)),
        "forest": ((24, 62, 36), 6 * fine_HW + 20 * coarse_HW),
        "steel": ((112, 122, 136), 16 * _smooth(rng, 1, 48)),
    }[background]
    return np.clip(np.asarray(base, np.float32) + pattern_HW[..., None], 0, 255).astype(np.uint8)


def _mortar(x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """1 on the joints of a wall of 32 x 16 bricks, 0 elsewhere."""
    shifted_HW = x_HW + 16 * (y_HW // 16 % 2)
    return ((y_HW % 16 < 3) | (shifted_HW % 32 < 3)).astype(np.float32)


def _smooth(rng: np.random.Generator, height: int, width: int | None = None) -> np.ndarray:
    """Standard normal noise on a coarse grid with cells of `height` x `width` pixels, interpolated."""
    grid = (_TILE // height, _TILE // (width or height))
    noise = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
    return np.asarray(noise.resize((_TILE, _TILE), Image.Resampling.BICUBIC))
