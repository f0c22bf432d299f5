"""What a chain has made, for a person: the gaps that fits leave, what models answer, where everything is."""

import json
from collections.abc import Sequence

from revision_ray import storage
from revision_ray.align.alignment import load_alignment
from revision_ray.evaluate.report import table
from revision_ray.pipeline.chain import Stage


def report(stages: Sequence[Stage], run: str) -> str:
    """One part for each kind of stage that has finished, from what stands at their outputs."""
    done = [stage for stage in stages if stage.finished]
    parts = [part for make in (_encoders, _gaps, _answers) if (part := make(done))]
    (last,) = [stage for stage in stages if stage.kind.name in _MODELS][-1:] or [None]
    model = f", the model in {storage.join(last.output, last.kind.result)}" if last and last.finished else ""
    left = [stage.name for stage in stages if not stage.finished]
    missing = f" Not there yet: {', '.join(left)}." if left else ""
    return "\n\n".join([*parts, f"Everything is in {run}{model}{'.' if left else ''}{missing}"])


_MODELS = ("pretrain", "finetune", "export")


def _encoders(stages: Sequence[Stage]) -> str:
    lines = []
    for stage in stages:
        if stage.kind.name == "train_encoder":
            found = storage.read_json(storage.join(stage.output, stage.kind.proof))["heldout"]
            lines.append(
                f"Encoder trained from scratch: R@1 of {found['num_pairs']} held-out pairs "
                f"{found['image_to_text_r1']:.2f} image to text, "
                f"{found['text_to_image_r1']:.2f} text to image."
            )
    return "\n".join(lines)


def _gaps(stages: Sequence[Stage]) -> str:
    """The gap that each fit leaves. Fits of the same strategy go by the names of their stages."""
    fits = [(stage, load_alignment(stage.output)) for stage in stages if stage.kind.name == "fit"]
    if not fits:
        return ""
    last = fits[-1][1]
    strategies = [found.strategy.strategy for _, found in fits]
    lines = [f"{'strategy':<14}{'modality gap':>14}   {'sampling floor':>14}"]
    for (stage, found), strategy in zip(fits, strategies, strict=True):
        name = stage.title or (strategy if strategies.count(strategy) == 1 else stage.name)
        gap = found.modality_gap
        lines.append(f"{name:<14}{gap.after:>14.5f}   {gap.after_standard_error:>14.5f}")
    sizes = f"Fitted on {last.num_texts:,} texts and {last.num_images:,} images, unpaired."
    return f"{sizes}\n\n" + "\n".join(lines)


def _answers(stages: Sequence[Stage]) -> str:
    parts = [_asked(stage) for stage in stages if stage.kind.name == "conversations"]
    pictures = []
    for stage in stages:
        if stage.kind.name == "evaluate":
            results = storage.read_json(storage.join(stage.output, stage.kind.proof))
            parts.append(f"{stage.title or stage.name}:\n{table(results, ['image', *stage.job.controls])}")
            picture = storage.join(stage.output, "picture.png")
            pictures += [picture] if storage.exists(picture) else []
    if pictures:
        parts.append("\n".join(f"Captions and answers, drawn: {picture}" for picture in pictures))
    return "\n\n".join(parts)


def _asked(stage: Stage) -> str:
    """What stage 2 learnt from, and what it is asked."""
    content = storage.read_bytes(storage.join(stage.output, stage.kind.proof)).decode()
    records = [json.loads(line) for line in content.splitlines()]
    images = {record["image"] for record in records}
    return f"{len(records)} questions about {len(images)} images to learn from: {stage.output}"
