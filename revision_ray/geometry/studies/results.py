"""The files of a study: NAME.json, NAME.csv, NAME.txt, NAME.png and NAME.svg, the JSON last."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from revision_ray import storage
from revision_ray.errors import ConfigError, DataError

FORMAT_VERSION = 1


def standing(output: str, name: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The result of study `name` at `output`, where one of the same settings and inputs stands.

    Raises:
        ConfigError: one of other settings or inputs stands there.
        DataError: it is no result of a study.
    """
    uri = storage.join(output, f"{name}.json")
    if not storage.exists(uri):
        return None
    found = storage.read_json(uri)
    if not isinstance(found, dict) or "asked" not in found or found.get("study") != name:
        raise DataError(f"{uri}: is no result of study {name}; name another output, or remove the file")
    if found.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{uri}: format_version is {found.get('format_version')}, this version writes {FORMAT_VERSION}; "
            "name another output"
        )
    different = [key for key in asked if found["asked"].get(key) != asked[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"{uri}: this study was made with {key} = {_shown(found['asked'].get(key))}, asked for is "
            f"{_shown(asked[key])}; name another output, or remove the study's files yourself"
        )
    return found


def _shown(value: Any) -> str:
    return str(value) if len(str(value)) < 200 else f"{str(value)[:200]}..."


def write(
    output: str, name: str, asked: dict[str, Any], result: dict[str, Any], rows: Sequence[dict[str, Any]],
    reading: str, images: dict[str, bytes],
) -> str:  # fmt: skip
    """Every file of the study stands below `output`; the text of its table."""
    text = f"{name.replace('_', ' ')}\n{reading}\n\n{table(rows)}\n"
    for suffix, content in images.items():
        storage.write_bytes(storage.join(output, f"{name}.{suffix}"), content)
    storage.write_bytes(storage.join(output, f"{name}.csv"), _csv(rows))
    storage.write_bytes(storage.join(output, f"{name}.txt"), text.encode())
    document = {"format_version": FORMAT_VERSION, "study": name, "asked": asked, "reading": reading, **result}
    storage.write_json(storage.join(output, f"{name}.json"), document)
    return text


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text: the first column to the left, others to the right, a dash for nothing."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(line[at]) for line in [heads, *cells]) for at in range(len(heads))]
    lines = []
    for line in [heads, *cells]:
        padded = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("   ".join([line[0].ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = io.StringIO()
    heads = list(dict.fromkeys(head for row in rows for head in row))
    writer = csv.DictWriter(sink, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()
