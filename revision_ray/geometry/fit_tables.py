"""The fits job's results as text for a terminal."""

from collections.abc import Sequence
from typing import Any


def listed(document: dict[str, Any]) -> str:
    """A line a fit, then the damaged ones with their reasons."""
    sound = [line for line in document["fits"] if not line["damage"]]
    damaged = [line for line in document["fits"] if line["damage"]]
    head = (
        "name",
        "strategy",
        "domain",
        "encoder",
        "d",
        "texts",
        "images",
        "gap before -> after (s.e.)",
        "hash",
    )
    rows = [
        (
            line["name"],
            line["strategy"],
            line["domain"] or "-",
            _encoders(line["text_encoder"], line["image_encoder"]),
            str(line["embedding_dim"]),
            f"{line['num_texts']:,}",
            f"{line['num_images']:,}",
            _gap(line["modality_gap"], line["modality_gap_standard_error"]),
            line["content_hash"][:12],
        )
        for line in sound
    ]
    text = table(head, rows, right=(4, 5, 6)) if rows else "no sound fit"
    text += "".join(f"\ndamaged: {line['name']}: {line['damage']}" for line in damaged)
    return text


def _encoders(text: dict[str, str], image: dict[str, str]) -> str:
    names = [f"{e['name']} {e['fingerprint'][:8]}" if e["fingerprint"] else "unknown" for e in (text, image)]
    return " | ".join(dict.fromkeys(names))


def _gap(gap: dict[str, float], errors: dict[str, float | None]) -> str:
    before, after = (_error(errors[name]) for name in ("before", "after"))
    return f"{gap['before']:.4f} ({before}) -> {gap['after']:.2e} ({after})"


def _error(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def shown(document: dict[str, Any]) -> str:
    """Every key of the fit, nested ones with dots."""
    return "\n".join(f"{key}: {value}" for key, value in _flat(document["fit"]))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)]


def ranked(document: dict[str, Any]) -> str:
    """The sample, a line a fit, those that cannot be compared, and how to read it."""
    lines = [_sample(modality, sample) for modality, sample in document["sample"].items()]
    sides = list(document["sample"])
    head = ("rank", "name", "strategy", "domain", "distance (s.e.)", "floor", "verdict", "of spread")
    head += ("farther by (s.e.)", *(f"{side} trace - fit's (s.e.)" for side in sides))
    rows = [
        (
            str(fit["rank"]),
            fit["name"],
            fit["strategy"],
            fit["domain"] or "-",
            f"{fit['distance']:.4f} ({_error(fit['standard_error'])})",
            f"{fit['sampling_floor']:.4f}",
            fit["verdict"],
            "-" if fit["share_of_spread"] is None else f"{fit['share_of_spread']:.1%}",
            f"{fit['farther_than_nearest']:.4f} ({_error(fit['farther_standard_error'])})",
            *(
                f"{fit['sides'][side]['trace_difference']:+.4f} "
                f"({_error(fit['sides'][side]['trace_difference_standard_error'])})"
                for side in sides
            ),
        )
        for fit in document["ranked"]
    ]
    lines += ["", table(head, rows, right=(0, 5, 7)), ""]
    lines += [f"not comparable: {line['name']}: {line['reason']}" for line in document["not_comparable"]]
    lines.append(
        "The order is that of the distance between the centroids of sample and fit. Standard errors are the "
        "sample's.\nfloor: the distance that so many rows of the fit's own domain have by chance; beyond "
        "chance: three floors.\nof spread: distance over the root of the fit's trace."
    )
    return "\n".join(lines)


def _sample(modality: str, sample: dict[str, Any]) -> str:
    encoder = sample["encoder"]
    known = f"encoder {encoder['name']} {encoder['fingerprint'][:8]}"
    known = known if encoder["fingerprint"] else "encoder unknown, so not compared"
    return (
        f"{modality} sample: {sample['num_rows']:,} of {sample['num_rows_in_store']:,} rows of "
        f"{', '.join(sample['stores'])}; d = {sample['embedding_dim']}, {known}, "
        f"domain {sample['domain'] or '-'}, trace {sample['trace']:.4f}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces between; those numbered in `right` flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
