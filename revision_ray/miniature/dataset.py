"""Write the miniature world to disk: scenes, the bytes of every file, and conversations. No Ray.

Layout below the output URI (KEY is the scene's id, in it domain, seed and index):

    pairs/part-00000.tar     KEY.jpg, KEY.txt (one caption), KEY.json {"id", "captions"}: for an encoder
    heldout/part-00000.tar   the same, other scenes: for measuring
    images/                  other scenes, images alone: part-*.tar, part-*.parquet {id, image}, or KEY.jpg
    texts/part-00000.jsonl   yet other scenes, {"id", "text"} alone
    questions/SPLIT-00000.jsonl  {"id", "scene", "kind", "text", "answer"}; SPLIT is pairs, heldout or texts
    manifest.json            written last: the settings, and size and hash of every file

Every split has a billion scene indices to itself, so no scene is in two of them, whatever their sizes, and a
larger split begins with the scenes of a smaller one.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from revision_ray.core import artifact, config, storage
from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.core.stage import Stage, StageKind, StageWork, reads_keys
from revision_ray.miniature import language, world
from revision_ray.miniature.language import CaptionLength
from revision_ray.miniature.world import WorldConfig

FORMAT_VERSION = 1
SPLITS = ("pairs", "heldout", "images", "texts")
SCENES_PER_SPLIT = 1_000_000_000
_JPEG_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Write scenes of the miniature world to disk: images, captions and questions, in splits that share no
    scene. Run again with the same settings, it renders nothing."""

    output: str = MISSING
    """URI of the directory that receives the files."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """Which world."""
    caption_length: CaptionLength = "short"
    """short: one phrase of about 11 words. long: a description of about 50 words."""
    num_pairs: int = 16384
    """Scenes with image and captions, for training an encoder."""
    num_heldout: int = 2000
    """Scenes with image and caption that nothing trains on."""
    num_images: int = 8192
    """Scenes of which only the image is written."""
    num_texts: int = 40960
    """Scenes of which only a caption is written."""
    captions_per_pair: int = 8
    """Different captions of each scene of the pairs, so that training can draw a fresh one each time."""
    image_form: Literal["tar", "parquet", "folder"] = "tar"
    """How the images alone are written."""
    rows_per_file: int = 2048
    """Scenes in each tar, Parquet or JSONL file."""
    cpus_per_task: float = 1.0
    """CPUs that Ray reserves for each rendering task; a fraction lets more tasks share a core."""

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_heldout", "num_images", "num_texts"):
            if not 0 <= getattr(self, name) <= SCENES_PER_SPLIT:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 0 to {SCENES_PER_SPLIT:,}")
        for name in ("captions_per_pair", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class SceneRange:
    """Scenes `first` to `first + num_rows - 1` of a split, written by one task."""

    split: str
    number: int
    first: int
    num_rows: int


def parts(config: DatasetConfig) -> list[SceneRange]:
    """All parts of the dataset, in order."""
    step = config.rows_per_file
    planned = []
    for block, split in enumerate(SPLITS):
        total = getattr(config, f"num_{split}")
        for number, offset in enumerate(range(0, total, step)):
            first = block * SCENES_PER_SPLIT + offset
            planned.append(
                SceneRange(split=split, number=number, first=first, num_rows=min(step, total - offset))
            )
    return planned


def scene_id(config: WorldConfig, index: int) -> str:
    return f"{config.domain}-{config.seed}-{index:010d}"


def captions(config: DatasetConfig, index: int, count: int) -> list[str]:
    """The first `count` captions of scene `index`."""
    shown = world.scene(config.world, index)
    key = (config.world.seed, config.world.domain, index, "caption", config.caption_length)
    return [language.caption(shown, world.stream(*key, k), config.caption_length) for k in range(count)]


def questions(config: DatasetConfig, index: int) -> list[dict[str, str]]:
    """The questions about scene `index`, one of each kind that it admits, as rows of a questions file."""
    shown, scene = world.scene(config.world, index), scene_id(config.world, index)
    rng = world.stream(config.world.seed, config.world.domain, index, "questions")
    return [
        {"id": f"{scene}-{asked.kind}", "scene": scene, **dataclasses.asdict(asked)}
        for asked in language.questions(shown, rng, config.world.domain)
    ]


def contents(config: DatasetConfig, part: SceneRange) -> dict[str, bytes]:
    """path below the output -> bytes of every file of `part`; the same bytes in every process."""
    stem = f"{part.split}/part-{part.number:05d}"
    indices = range(part.first, part.first + part.num_rows)
    if part.split == "texts":
        rows = [{"id": scene_id(config.world, i), "text": captions(config, i, 1)[0]} for i in indices]
        files = {f"{stem}.jsonl": _jsonl(rows)}
    elif part.split == "images":
        files = _image_files(config, stem, indices)
    else:
        count = config.captions_per_pair if part.split == "pairs" else 1
        files = {f"{stem}.tar": _tar([member for i in indices for member in _pair(config, i, count)])}
    if part.split != "images":
        asked = [question for i in indices for question in questions(config, i)]
        files[f"questions/{part.split}-{part.number:05d}.jsonl"] = _jsonl(asked)
    return files


def _image_files(config: DatasetConfig, stem: str, indices: range) -> dict[str, bytes]:
    images = {scene_id(config.world, i): jpeg(config.world, i) for i in indices}
    if config.image_form == "folder":
        return {f"images/{name}.jpg": content for name, content in images.items()}
    if config.image_form == "tar":
        return {f"{stem}.tar": _tar([(f"{name}.jpg", content) for name, content in images.items()])}
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": list(images), "image": list(images.values())}), sink, use_dictionary=False)
    return {f"{stem}.parquet": sink.getvalue()}


def _pair(config: DatasetConfig, index: int, count: int) -> list[tuple[str, bytes]]:
    name, said = scene_id(config.world, index), captions(config, index, count)
    return [
        (f"{name}.jpg", jpeg(config.world, index)),
        (f"{name}.txt", said[0].encode()),
        (f"{name}.json", json.dumps({"id": name, "captions": said}).encode()),
    ]


def jpeg(config: WorldConfig, index: int) -> bytes:
    sink = io.BytesIO()
    # Chroma at full resolution: at half of it the colours of small things run into the background.
    world.render(config, index).save(sink, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return sink.getvalue()


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)  # owner and time stay zero: equal content is equal bytes
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return sink.getvalue()


def _jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def settings(config: DatasetConfig) -> dict[str, Any]:
    """What decides the bytes: everything but where they go and on how many CPUs they are made."""
    fields = dataclasses.asdict(config)
    return {key: value for key, value in fields.items() if key not in ("output", "cpus_per_task")}


def write_part(config: DatasetConfig, part: SceneRange) -> list[dict[str, Any]]:
    """The files of `part` stand below the output; their entries for the manifest."""
    entries = []
    for path, content in contents(config, part).items():
        storage.write_bytes(storage.join(config.output, path), content)
        entries.append({"file": path, "num_bytes": len(content), "sha256": storage.sha256(content)})
    return entries


def finished(config: DatasetConfig) -> bool:
    """Return whether the output holds exactly this dataset already.

    Raises:
        OutputError: it holds another one, or files that are no part of this one.
    """
    output = config.output
    if artifact.finished(output, "manifest.json", settings(config), "a dataset", key="settings"):
        return True
    planned = {(part.split, part.number) for part in parts(config)}
    for split in (*SPLITS, "questions"):
        uris = [uri for uri, _ in storage.list_files(storage.join(output, split))]
        artifact.refuse_files(
            "this dataset",
            (uri for uri in uris if not _is_planned(planned, split, storage.name_of(uri), config.image_form)),
        )
    return False


def _is_planned(planned: set[tuple[str, int]], split: str, name: str, image_form: str) -> bool:
    stem, _, suffix = name.partition(".")
    if split == "images" and image_form == "folder":
        return suffix == "jpg"
    expected = {"texts": "jsonl", "questions": "jsonl", "images": image_form}.get(split, "tar")
    owner, _, number = stem.rpartition("-")
    known = (owner if split == "questions" else split, int(number) if number.isdigit() else -1) in planned
    return known and suffix == expected


def write_manifest(config: DatasetConfig, entries: list[dict[str, Any]]) -> None:
    """The dataset at the output is complete: its settings and files are written down."""
    splits = {
        split: {"first_index": block * SCENES_PER_SPLIT, "num_rows": getattr(config, f"num_{split}")}
        for block, split in enumerate(SPLITS)
    }
    document = {
        "format_version": FORMAT_VERSION,
        "settings": settings(config),
        "splits": splits,
        "files": sorted(entries, key=lambda entry: entry["file"]),
    }
    storage.write_json(storage.join(config.output, "manifest.json"), document)


FILE = "conversations.jsonl"


@dataclass(frozen=True, kw_only=True)
class ConversationsJob:
    """Write questions about the images of a rendered world, with their answers, as conversations."""

    world: str = MISSING
    """Output of jobs/render.py."""
    split: Literal["pairs", "heldout", "images", "texts"] = "images"
    """Whose scenes are asked about, from the first one on."""
    num_samples: int = 500
    """Questions, each of them a conversation."""
    output: str = MISSING
    """Directory of conversations.jsonl."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples}; expected 1 or more")


def run_conversations(job: ConversationsJob) -> str:
    """The conversations stand at the job's output; how many, about how many images.

    Raises:
        DataError: there is no finished world.
    """
    manifest = storage.join(job.world, "manifest.json")
    if not storage.exists(manifest):
        raise DataError(f"{job.world}: no manifest.json there; name the output of jobs/render.py")
    settings = storage.read_json(manifest)["settings"]
    world = config.from_mapping(DatasetConfig, {**settings, "output": job.world}, manifest)
    output = storage.join(storage.absolute(job.output), FILE)
    num_images = write_conversations(world, job.split, job.num_samples, output)
    return f"{job.num_samples} questions about {num_images} images: {output}"


def write_conversations(world: DatasetConfig, split: str, num_samples: int, output: str) -> int:
    """The JSONL file `output` holds `num_samples` records, a question and its answer each, about the first
    scenes of `split`; returns how many images they are about. A file that holds them already is not touched.

    `image` is the scene's id, which is the image's id in an embedding store of that split.
    """
    first = SPLITS.index(split) * SCENES_PER_SPLIT
    records: list[dict] = []
    num_images = 0
    while len(records) < num_samples:
        for asked in questions(world, first + num_images):
            turns = [("human", f"<image>\n{asked['text']}"), ("gpt", asked["answer"])]
            records.append(
                {
                    "id": asked["id"],
                    "image": asked["scene"],
                    "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
                }
            )
        num_images += 1
    content = "".join(json.dumps(record) + "\n" for record in records[:num_samples]).encode()
    # Its time says to later stages whether it has changed.
    if not storage.exists(output) or storage.read_bytes(output) != content:
        storage.write_bytes(output, content)
    return num_images


def _summary(stages: Sequence[Stage]) -> str:
    """Return how many questions about how many images stage 2 learnt from."""
    parts = []
    for stage in stages:
        content = storage.read_bytes(storage.join(stage.output, FILE)).decode()
        records = [json.loads(line) for line in content.splitlines()]
        images = {record["image"] for record in records}
        parts.append(f"{len(records)} questions about {len(images)} images to learn from: {stage.output}")
    return "\n\n".join(parts)


STAGE = StageKind(
    name="conversations",
    job=ConversationsJob,
    run=run_conversations,
    reads=reads_keys("world"),
    proof=FILE,
    work=lambda _, stage: StageWork(rows=stage.job.num_samples),
    rows_at=lambda job, uri: job.num_samples,
    summary=_summary,
)
