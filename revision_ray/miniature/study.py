"""Studies of the miniature world, with the inputs that the demo's stores lack.

These are another domain, long captions, held-out images, and labels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from revision_ray.core import cluster, config, storage
from revision_ray.core.errors import ConfigError, DataError
from revision_ray.encode import embed
from revision_ray.encode.encoder import EncoderConfig
from revision_ray.miniature import dataset, world
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.miniature.world import Scene, WorldConfig
from revision_ray.studies import study
from revision_ray.studies.study import StudyJob


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """Place of the miniature world and its encoder, and how much more of it to render and embed."""

    world: str = config.MISSING
    """Directory of the rendered world that the stores were made from."""
    encoder: str = config.MISSING
    """Folder of the dual encoder that made the stores (open_clip)."""
    num_images: int = 4096
    """Images of the other domain."""
    num_texts: int = 8192
    """Captions of the other domain, and long captions of this one."""


@dataclass(frozen=True, kw_only=True)
class MiniatureStudyJob(StudyJob):
    """Study a modality gap and what closes it: sample efficiency, precision, centroid steps, domain transfer,
    caption length, C3's noise, and the cross-modal probe. Each study writes a table, a plot and JSON."""

    miniature: Miniature | None = None
    """For the demo's stores: make what else the studies need in OUTPUT/prepared."""


def run_miniature_study(job: MiniatureStudyJob) -> str:
    """Run the job's studies; first make the inputs that they lack if it names a miniature world."""
    cluster.connect()
    plain = {name: getattr(job, name) for name in StudyJob.__dataclass_fields__}
    return study.run_study(
        StudyJob(**(plain if job.miniature is None else _prepared(job, job.miniature, plain)))
    )


def _prepared(job: MiniatureStudyJob, miniature: Miniature, plain: dict[str, Any]) -> dict[str, Any]:
    """Make stores and labels in OUTPUT/prepared; return the fields of the job with these filled in."""
    excluded = [name for name in ("domains", "lengths", "labels", "heldout_images") if getattr(job, name)]
    if excluded:
        raise ConfigError(
            f"{', '.join(excluded)}: miniature makes these itself; leave them out, or set miniature=null"
        )
    if not isinstance(job.texts, str) or not isinstance(job.images, str):
        raise ConfigError("texts, images: with miniature, name one store each, those of its world")
    here = _world_of(miniature.world)
    below = storage.join(storage.absolute(job.output), "prepared")
    encoder = EncoderConfig(kind="open_clip", model=miniature.encoder)
    night = replace(
        here, world=replace(here.world, domain="day" if here.world.domain == "night" else "night")
    )
    other = _rendered(
        night, storage.join(below, night.world.domain), miniature, num_images=miniature.num_images
    )
    long = _rendered(
        replace(here, caption_length="long"), storage.join(below, "long"), miniature, num_images=0
    )
    names = (here.world.domain, night.world.domain)
    return plain | {
        "domains": {
            names[0]: {"texts": job.texts, "images": job.images},
            names[1]: {
                "texts": _embedded(encoder, other, names[1], texts=storage.join(other, "texts")),
                "images": _embedded(encoder, other, names[1], images=storage.join(other, "images")),
            },
        },
        "lengths": {
            "short": job.texts,
            "long": _embedded(encoder, long, names[0], texts=storage.join(long, "texts")),
        },
        "heldout_images": _embedded(
            encoder, below, names[0], name="heldout", images=storage.join(miniature.world, "heldout")
        ),
        "labels": [_labelled(here, storage.join(below, "labels.jsonl"))],
    }


def _world_of(uri: str) -> DatasetConfig:
    """Read the settings of the world at `uri`.

    Raises:
        DataError: there is no finished world.
    """
    manifest = storage.join(uri, "manifest.json")
    if not storage.exists(manifest):
        raise DataError(
            f"{uri}: has no finished world (no manifest.json); run `make demo` first, or name another with "
            "miniature.world=FOLDER"
        )
    settings = dict(storage.read_json(manifest)["settings"])
    return DatasetConfig(**{**settings, "world": WorldConfig(**settings["world"]), "output": uri})


def _rendered(like: DatasetConfig, output: str, miniature: Miniature, num_images: int) -> str:
    """Render captions and images of a world like that one to `output`; return `output`."""
    render(
        replace(
            like,
            output=output,
            num_pairs=0,
            num_heldout=0,
            num_images=num_images,
            num_texts=miniature.num_texts,
        )
    )
    return output


def _embedded(
    encoder: EncoderConfig, below: str, domain: str, name: str = "", *, texts: str | None = None,
    images: str | None = None,
) -> str:  # fmt: skip
    """Embed these texts or images into a store in the directory `below`; return its URI."""
    output = storage.join(below, f"{name or ('texts' if texts else 'images')}_store")
    embed.run_embed(embed.EmbedJob(texts=texts, images=images, output=output, domain=domain, encoder=encoder))
    return output


def _labelled(here: DatasetConfig, uri: str) -> str:
    """Write labels of all scenes of the world's texts, images and held-out pairs to `uri`; return `uri`."""
    settings = dataset.settings(here)
    about = uri.removesuffix(".jsonl") + ".json"
    if storage.exists(uri) and storage.exists(about) and storage.read_json(about) == settings:
        return uri
    rows = "".join(json.dumps(row) + "\n" for row in _labels(here))
    storage.write_bytes(uri, rows.encode())
    storage.write_json(about, settings)
    return uri


def _labels(here: DatasetConfig) -> Iterator[dict[str, str]]:
    for part in dataset.parts(replace(here, num_pairs=0)):
        for index in range(part.first, part.first + part.num_rows):
            yield {"id": dataset.scene_id(here.world, index), **attributes(world.scene(here.world, index))}


def attributes(scene: Scene) -> dict[str, str]:
    """Return background and count of a scene, and colour, shape and size if all its things agree in them."""
    labels = {"background": scene.background, "count": str(len(scene.things))}
    for name in ("colour", "shape", "size"):
        values = {getattr(thing, name) for thing in scene.things}
        if len(values) == 1:
            labels[name] = values.pop()
    return labels
