"""The benchmarks: what their files must hold, how a row becomes a question, what is reported."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from revision_ray.errors import ConfigError, quote
from revision_ray.evaluate import questions, scores
from revision_ray.evaluate.questions import Item, Row


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How one benchmark is read, asked and scored."""

    name: str
    columns: tuple[str, ...]
    """That a file must have."""
    item: Callable[[Row], Item | str]
    """The question of a row, or why it is left out."""
    optional: tuple[str, ...] = ()
    """Read where there."""
    splits: tuple[str, ...] = ("test",)
    """Files of other splits (`dev-*.parquet`) are passed over in a directory."""
    shown: tuple[str, ...] = ()
    """Groupings whose groups are listed in the results; the others only serve the metrics."""
    family: str = ""
    """Of the variants of one benchmark, which count as one in the average."""
    metrics: Callable[[Sequence[scores.Answered]], dict[str, Any]] | None = None
    """Figures beside accuracy."""


def benchmark(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"benchmark {quote(name, 80)} is not known; {hint}known are {', '.join(sorted(BENCHMARKS))}"
        )
    return BENCHMARKS[name]


_MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_MMMU_REST = (*_MMMU_IMAGES, "question_type", "subject")

BENCHMARKS = {
    spec.name: spec
    for spec in (
        Benchmark(
            name="mme",
            columns=("question_id", "image", "question", "answer", "category"),
            item=questions.mme,
            shown=("category",),
            metrics=scores.mme,
        ),
        Benchmark(
            name="mmstar",
            columns=("index", "question", "image", "answer", "category", "l2_category"),
            item=questions.mmstar,
            splits=("val", "validation"),
            shown=("category", "l2_category"),
            metrics=scores.mmstar,
        ),
        Benchmark(
            name="science_qa",
            columns=("image", "question", "choices", "answer", "hint"),
            optional=("subject",),
            item=questions.science_qa,
            splits=("validation", "val", "test"),
            shown=("subject",),
        ),
        Benchmark(
            name="real_world_qa", columns=("image", "question", "answer"), item=questions.real_world_qa
        ),
        Benchmark(
            name="mmmu",
            columns=("id", "question", "options", "answer"),
            optional=_MMMU_REST,
            item=questions.mmmu,
            splits=("validation", "val"),
            shown=("subject",),
        ),
        Benchmark(
            name="mmmu_pro_standard",
            family="mmmu_pro",
            columns=("id", "question", "options", "answer"),
            optional=_MMMU_REST,
            item=questions.mmmu,
            shown=("subject",),
        ),
        Benchmark(
            name="mmmu_pro_vision",
            family="mmmu_pro",
            columns=("id", "options", "answer"),
            optional=("image", "image_1", "subject"),
            item=questions.mmmu_pro_vision,
            shown=("subject",),
        ),
        Benchmark(
            name="visulogic",
            columns=("image_path", "question", "label", "tag"),
            optional=("id",),
            item=questions.visulogic,
            shown=("tag",),
        ),
        Benchmark(name="logic_vista", columns=("question", "image", "answer"), item=questions.logic_vista),
        Benchmark(
            name="crpe",
            columns=("image", "text", "correct_option"),
            optional=("category",),
            item=questions.crpe,
            shown=("part", "category"),
            metrics=scores.crpe,
        ),
        Benchmark(
            name="pope",
            columns=("question_id", "question", "answer", "image_source", "image", "category"),
            item=questions.pope,
            shown=("category",),
            metrics=scores.pope,
        ),
        Benchmark(
            name="hallusion_bench",
            columns=(
                "category",
                "subcategory",
                "set_id",
                "figure_id",
                "question_id",
                "question",
                "gt_answer",
                "image",
            ),
            item=questions.hallusion_bench,
            splits=("image",),
            shown=("category", "subcategory"),
            metrics=scores.hallusion_bench,
        ),
        Benchmark(
            name="miniature",
            columns=("id", "scene", "kind", "text", "answer"),
            item=questions.miniature,
            splits=("heldout",),
            shown=("kind",),
        ),
    )
}
