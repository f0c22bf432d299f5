"""The demo's second half: a language model that never saw an image learns to answer about images.

Stage 1 on aligned text alone, stage 2 on a few questions about real images; beside it the same stage 2 from a
projector that skipped stage 1.
"""

from dataclasses import dataclass, field, replace

from revision_ray import config, storage
from revision_ray.evaluate import run as evaluate
from revision_ray.evaluate.run import EvaluateJob
from revision_ray.miniature.conversations import write_conversations
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.train import run as stages
from revision_ray.train import untrained
from revision_ray.train.language_model import LanguageTraining, train_language_model
from revision_ray.train.run import FinetuneJob, PretrainJob

MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class AnswersDemo:
    """Stage 1 on texts without images, stage 2 on few questions about images, and what that is worth."""

    language_model: LanguageTraining = field(default_factory=LanguageTraining)
    """How the language model is trained, on text alone."""
    pretrain: PretrainJob = config.MISSING
    """Stage 1."""
    num_questions: int = 500
    """Questions about real images that stage 2 learns from."""
    finetune: FinetuneJob = config.MISSING
    """Stage 2."""
    evaluate: EvaluateJob = config.MISSING
    """Questions about images that nothing trained on."""


def show_answers(demo: AnswersDemo, world: DatasetConfig, output: str) -> str:
    """Both models and their answers stand below `output`, the better one in its folder `model`; the tables of
    what they got right."""
    train_language_model(demo.language_model)
    questions = demo.finetune.data[0]
    num_images = write_conversations(world, "images", demo.num_questions, questions)
    stages.pretrain(demo.pretrain)
    stages.finetune(demo.finetune)
    tables = [evaluate.run(demo.evaluate)]
    beside = storage.join(output, "without_stage_1")
    start = untrained.write_untrained(demo.pretrain, storage.join(beside, "start"))
    stages.finetune(replace(demo.finetune, model=start, output=storage.join(beside, "finetune")))
    tables.append(
        evaluate.run(
            replace(
                demo.evaluate,
                model=storage.join(beside, "finetune", "model"),
                output=storage.join(beside, "evaluate"),
                controls=[],
                caption_model="",
                num_pictures=0,
            )
        )
    )
    _copy(demo.evaluate.model, storage.join(output, MODEL))
    return (
        f"Stage 2 saw {demo.num_questions} questions about {num_images} images. Held-out questions about "
        f"held-out images:\n\nWith stage 1 on aligned text:\n{tables[0]}\n\nWithout stage 1:\n{tables[1]}"
    )


def _copy(folder: str, to: str) -> None:
    folder = storage.absolute(folder)  # as files are listed
    for uri, _ in storage.list_files(folder, recursive=True):
        storage.write_bytes(storage.join(to, storage.relative_path(uri, folder)), storage.read_bytes(uri))
