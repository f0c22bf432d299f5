"""Captions of a scene, short or long, and questions about it with their answers. All of them true."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from revision_ray.miniature.world import DOMAINS, DomainName, DrawnShape, Relation, Scene, place, relation

CaptionLength = Literal["short", "long"]
QuestionKind = Literal["colour", "shape", "count", "existence", "background", "relation"]

_OPENINGS = (
    "",
    "a picture of ",
    "a photo of ",
    "an image of ",
    "a drawing of ",
    "here is ",
    "there is ",
    "we see ",
)
_PLURAL_OPENINGS = (*_OPENINGS[:5], "here are ", "there are ", "we see ")
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_COLOURS = {"purple": ("purple", "violet"), "red": ("red", "crimson"), "turquoise": ("turquoise", "cyan")}
_SHAPES = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box"),
    "ring": ("ring", "loop"),
    "cross": ("cross", "plus"),
}
_PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses"}
_NUMBERS = {1: ("one",), 2: ("two", "a pair of"), 3: ("three",), 4: ("four",)}
_BACKGROUNDS = {
    "grass": ("grass", "a lawn", "a meadow"),
    "sand": ("sand", "a beach"),
    "brick": ("brick", "a wall"),
    "water": ("water", "a lake"),
    "snow": ("snow",),
    "asphalt": ("asphalt", "a road"),
    "carpet": ("carpet", "a striped rug"),
    "stars": ("stars", "a night sky"),
    "forest": ("forest", "dark leaves"),
    "steel": ("steel", "brushed metal"),
}
_PLACES = {
    "middle": ("in the middle", "in the centre"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "left": ("on the left", "at the left edge"),
    "right": ("on the right", "at the right edge"),
    "top left": ("at the top left", "in the upper left corner"),
    "top right": ("at the top right", "in the upper right corner"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
}
_RELATIONS: dict[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about one scene; the answer is one word."""

    kind: QuestionKind
    text: str
    answer: str


def caption(scene: Scene, rng: random.Random, length: CaptionLength = "short") -> str:
    """A true sentence (short: up to 26 words) or description (long: up to 80 words) of `scene`.

    Openings, synonyms, the order of a relation and of things vary with `rng`; a short caption drops each of
    size, background and position 20 % of the time, a long one drops nothing.
    """
    return _short(scene, rng) if length == "short" else _long(scene, rng)


def _short(scene: Scene, rng: random.Random) -> str:
    sized, grounded, placed = (rng.random() < 0.8 for _ in range(3))
    if len(scene.things) > 1 and _alike(scene):
        opening, body = rng.choice(_PLURAL_OPENINGS), _group(scene, rng, sized)
    else:
        opening, body = rng.choice(_OPENINGS), _pair(scene, rng, sized, placed)
    ground = f" {rng.choice(('on', 'over', 'in front of'))} {_say(_BACKGROUNDS, scene.background, rng)}"
    return opening + body + (ground if grounded else "")


def _long(scene: Scene, rng: random.Random) -> str:
    things = list(scene.things)
    rng.shuffle(things)
    if len(things) > 1 and _alike(scene):
        body, each = _group(scene, rng, sized=True), "one of them is"
        details = [f"{each} {_say(_PLACES, place(thing), rng)}." for thing in things]
    else:
        body = " and ".join(_noun(thing, rng, sized=False) for thing in things)
        details = [
            f"the {_name(thing, rng)} is {_say(_SIZES, thing.size, rng)} and lies "
            f"{_say(_PLACES, place(thing), rng)}."
            for thing in things
        ]
    count = len(things)
    if count == 2 and not _alike(scene):
        details.append(f"{_related(things, rng, sized=False, article='the')}.")
    details += [
        f"the background is {_say(_BACKGROUNDS, scene.background, rng)}.",
        f"in all {_NUMBERS[count][0]} thing{'s' if count > 1 else ''} can be seen.",
    ]
    rng.shuffle(details)
    return f"this picture shows {body}. " + " ".join(details)


def _pair(scene: Scene, rng: random.Random, sized: bool, placed: bool) -> str:
    """One thing with its place, or two with their relation; without either when not `placed`."""
    things = list(scene.things)
    if len(things) == 1:
        return _noun(things[0], rng, sized) + (f" {_say(_PLACES, place(things[0]), rng)}" if placed else "")
    rng.shuffle(things)
    if placed:
        return _related(things, rng, sized)
    return " and ".join(_noun(thing, rng, sized) for thing in things)


def _related(things: Sequence[DrawnShape], rng: random.Random, sized: bool, article: str = "a") -> str:
    where = relation(things[0], things[1])
    assert where is not None, "things of a pair stand in a relation"
    first, second = (_noun(thing, rng, sized, article) for thing in things)
    verb = "is " if article == "the" else ""
    return f"{first} {verb}{_say(_RELATIONS, where, rng)} {second}"


def _group(scene: Scene, rng: random.Random, sized: bool) -> str:
    thing, count = scene.things[0], len(scene.things)
    return f"{_say(_NUMBERS, count, rng)} {_adjective(thing, rng, sized)}{_name(thing, rng, plural=True)}"


def _noun(thing: DrawnShape, rng: random.Random, sized: bool, article: str = "a") -> str:
    words = f"{_adjective(thing, rng, sized)}{_name(thing, rng)}"
    return f"{_article(words) if article == 'a' else article} {words}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _adjective(thing: DrawnShape, rng: random.Random, sized: bool) -> str:
    return f"{_say(_SIZES, thing.size, rng)} " if sized else ""


def _name(thing: DrawnShape, rng: random.Random, plural: bool = False) -> str:
    shape = _say(_SHAPES, thing.shape, rng)
    return f"{_say(_COLOURS, thing.colour, rng)} {_plural(shape) if plural else shape}"


def _plural(shape: str) -> str:
    return _PLURALS.get(shape, f"{shape}s")


def _say(words: dict, key: object, rng: random.Random) -> str:
    return rng.choice(words.get(key, (key,)))


def _alike(scene: Scene) -> bool:
    return len({(thing.shape, thing.colour) for thing in scene.things}) == 1


def questions(scene: Scene, rng: random.Random, domain: DomainName) -> list[Question]:
    """One question of each kind that `scene` admits, in random order.

    Half of the existence questions are answered "no"; those ask for what nearly is there: the colour of one
    thing with the shape of the other, or one attribute changed.
    """
    asked = [
        _count(scene, rng),
        _existence(scene, rng, domain),
        Question(
            kind="background",
            text=rng.choice(("what is the background?", "what is behind it?")),
            answer=scene.background,
        ),
    ]
    one = rng.choice(scene.things)
    others = [thing for thing in scene.things if thing is not one]
    if all(thing.colour == one.colour or thing.shape != one.shape for thing in others):
        noun = f"are the {_plural(one.shape)}" if _alike(scene) and others else f"is the {one.shape}"
        asked.append(Question(kind="colour", text=f"what colour {noun}?", answer=one.colour))
    if all(thing.shape == one.shape or thing.colour != one.colour for thing in others):
        noun = f"are the {one.colour} things" if _alike(scene) and others else f"is the {one.colour} thing"
        asked.append(Question(kind="shape", text=f"what shape {noun}?", answer=one.shape))
    if len(scene.things) == 2 and not _alike(scene):
        other = others[0]
        where = relation(one, other)
        assert where is not None, "things of a pair stand in a relation"
        text = f"where is the {one.colour} {one.shape}, seen from the {other.colour} {other.shape}?"
        asked.append(Question(kind="relation", text=text, answer=where))
    rng.shuffle(asked)
    return asked


def _count(scene: Scene, rng: random.Random) -> Question:
    shape = rng.choice(scene.things).shape
    if rng.random() < 0.5:
        noun, count = _plural(shape), sum(thing.shape == shape for thing in scene.things)
    else:
        noun, count = "things", len(scene.things)
    return Question(kind="count", text=f"how many {noun} are there?", answer=_NUMBERS[count][0])


def _existence(scene: Scene, rng: random.Random, domain: DomainName) -> Question:
    there = {(thing.colour, thing.shape) for thing in scene.things}
    asked, answer = rng.choice(sorted(there)), "yes"
    if rng.random() < 0.5:
        colours, shapes = zip(*sorted(there), strict=True)
        swapped = {(colour, shape) for colour in colours for shape in shapes} - there
        near = {(colour, asked[1]) for colour in DOMAINS[domain].colours}
        near |= {(asked[0], shape) for shape in DOMAINS[domain].shapes}
        use_swapped = swapped and rng.random() < 0.7
        asked, answer = rng.choice(sorted(swapped if use_swapped else near - there)), "no"
    return Question(
        kind="existence", text=f"is there {_article(asked[0])} {asked[0]} {asked[1]}?", answer=answer
    )
