"""The rows that travel between reading and encoding, and the splits they are read from."""

from dataclasses import dataclass
from typing import Literal

from revision_ray import storage

SplitKind = Literal["image_files", "image_tar", "image_parquet", "image_json", "text_files", "text_lines",
                    "text_jsonl", "text_json", "text_parquet", "text_tar"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Split:
    """A piece of a source that one task reads from start to end, always the same rows in the same order.

    `start` and `stop` count what the kind counts: bytes of a line or JSON file (a record belongs to the range
    where it begins), row groups of a Parquet file; both 0 where the whole file is one split. `files` lists
    the members of an `image_files` or `text_files` split, whose `uri` is the folder that ids are relative to,
    and is empty otherwise. `identity` changes when the content may have changed (sizes and modification
    times).
    """

    kind: SplitKind
    uri: str
    start: int = 0
    stop: int = 0
    files: tuple[str, ...] = ()
    identity: str = ""

    @property
    def key(self) -> str:
        """16 hex digits, a function of what is read and not of when: names the shards made from it."""
        parts = [self.kind, self.uri, str(self.start), str(self.stop), *self.files]
        return storage.sha256(*(part.encode() for part in parts))[:16]


@dataclass(frozen=True, kw_only=True)
class TextRow:
    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """An image as stored: `content` is the encoded file, decoded by `data.images`."""

    id: str
    uri: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A row that did not make it, and why. `uri` names where it was found."""

    id: str
    uri: str
    reason: str
