"""What the miniature world's language model reads: documents made of text alone. No Ray.

A caption stands where the tokens of an image stand later; from there on documents have, token for token, the
form of what the multimodal model sees:

    caption paraphrase <e>                      <image> caption <e>                     (stage 1)
    caption <q> question <a> answer <e> ...     <image> <q> question <a> answer <e> ... (stage 2, evaluation)
    <q> question <a> answer <e> ...             the same without an image               (the blind control)

Its scenes are in no split of `dataset.py`: training begins at index 10^12, the examination at 10^13.
"""

import random
from dataclasses import dataclass, field

from revision_ray.core.errors import ConfigError
from revision_ray.miniature import language, world
from revision_ray.miniature.language import CaptionLength, QuestionKind
from revision_ray.miniature.world import Scene, WorldConfig
from revision_ray.train.language_model import ANSWER, END, QUESTION, Document

CONTEXT_WEIGHT, PARAPHRASE_WEIGHT, ANSWER_WEIGHT = 0.2, 1.0, 3.0
"""Weights in the loss: of what stands for an image and of questions, of paraphrases, of answers."""
FIRST_TRAINING_SCENE, FIRST_HELDOUT_SCENE = 10**12, 10**13
_NUM_DRAWS, _EASY = 3, ("background", "count")  # questions of these kinds are drawn once


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """What the language model reads."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """Which world its scenes are of."""
    caption_length: CaptionLength = "short"
    """short: one phrase of about 11 words. long: a description of about 50 words."""
    num_documents: int = 20000
    """One scene is told of in each."""
    questions_per_document: int = 6
    """At most this many different questions follow a caption."""
    paraphrase_fraction: float = 0.25
    """Share of the documents that say the same twice."""
    blind_fraction: float = 0.05
    """Share of the documents that ask without saying what there is to see."""

    def __post_init__(self) -> None:
        if self.num_documents < 1 or self.questions_per_document < 1:
            raise ConfigError(
                f"num_documents={self.num_documents}, questions_per_document={self.questions_per_document}; "
                "expected positive numbers"
            )
        rest = 1 - self.paraphrase_fraction - self.blind_fraction
        if min(self.paraphrase_fraction, self.blind_fraction, rest) < 0:
            raise ConfigError(
                f"paraphrase_fraction={self.paraphrase_fraction}, blind_fraction={self.blind_fraction}; "
                "expected shares whose sum is at most 1"
            )


def told_scene(config: DocumentConfig, number: int) -> Scene:
    """The scene that document `number` (from 0) tells of: of two, the one with more different things.

    What is said of which thing takes longest to learn, and scenes of one look do not teach it.
    """
    first = FIRST_TRAINING_SCENE + 2 * number
    return max((world.scene(config.world, index) for index in (first, first + 1)), key=_num_looks)


def _num_looks(scene: Scene) -> int:
    return len({(thing.shape, thing.colour) for thing in scene.things})


def document(config: DocumentConfig, number: int) -> Document:
    """What document `number` says: caption and paraphrase, or caption and questions, or questions alone."""
    shown, rng = told_scene(config, number), _stream(config, number, "document")
    caption, kind = language.caption(shown, rng, config.caption_length), rng.random()
    if kind < config.paraphrase_fraction:
        paraphrase = language.caption(shown, rng, config.caption_length)
        return [(caption, CONTEXT_WEIGHT), (f"{paraphrase} {END}", PARAPHRASE_WEIGHT)]
    asked = _questions(config, shown, rng)
    blind = kind >= 1 - config.blind_fraction
    pieces = [] if blind else [(caption, CONTEXT_WEIGHT)]
    return pieces + [piece for question in asked for piece in _asked(question)]


def _questions(config: DocumentConfig, shown: Scene, rng: random.Random) -> list[language.Question]:
    """Different questions in random order, one of each kind and more of those that take longest to learn."""
    drawn = [language.questions(shown, rng, config.world.domain) for _ in range(_NUM_DRAWS)]
    more = [question for again in drawn[1:] for question in again if question.kind not in _EASY]
    different = list({question.text: question for question in drawn[0] + more}.values())
    rng.shuffle(different)
    return different[: config.questions_per_document]


def _stream(config: DocumentConfig, number: int, purpose: str) -> random.Random:
    return world.stream(config.world.seed, config.world.domain, number, purpose, config.caption_length)


def _asked(question: language.Question) -> Document:
    return [
        (f"{QUESTION} {question.text} {ANSWER}", CONTEXT_WEIGHT),
        (f"{question.answer} {END}", ANSWER_WEIGHT),
    ]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Questions about held-out scenes, after a caption and without it, and paraphrases of the captions."""

    kinds: list[QuestionKind]
    sighted: list[Document]
    blind: list[Document]
    paraphrases: list[Document]


def examination(config: DocumentConfig, num_scenes: int) -> Examination:
    """One caption, its paraphrase and every kind of question about each of the first held-out scenes."""
    made = Examination(kinds=[], sighted=[], blind=[], paraphrases=[])
    for index in range(FIRST_HELDOUT_SCENE, FIRST_HELDOUT_SCENE + num_scenes):
        shown, rng = world.scene(config.world, index), _stream(config, index, "examination")
        caption, again = (language.caption(shown, rng, config.caption_length) for _ in range(2))
        made.paraphrases.append([(caption, 0.0), (f"{again} {END}", PARAPHRASE_WEIGHT)])
        for question in language.questions(shown, rng, config.world.domain):
            made.kinds.append(question.kind)
            made.blind.append(_asked(question))
            made.sighted.append([(caption, CONTEXT_WEIGHT), *_asked(question)])
    return made
