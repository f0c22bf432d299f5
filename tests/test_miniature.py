"""The miniature world: the same everywhere, captions and answers true, splits apart, files sound."""

import dataclasses
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from revision_ray.core.errors import ConfigError, DataError, OutputError
from revision_ray.miniature import dataset, language, world
from revision_ray.miniature.dataset import DatasetConfig
from revision_ray.miniature.render import render
from revision_ray.miniature.world import DrawnShape, Scene, WorldConfig

WORLDS = [WorldConfig(seed=3, domain=domain) for domain in ("day", "night")]
SCENES = [(config, world.scene(config, i)) for config in WORLDS for i in range(400)]


def tiny(output, **settings) -> DatasetConfig:
    sizes = {"num_pairs": 6, "num_heldout": 3, "num_images": 5, "num_texts": 7, "rows_per_file": 4}
    return DatasetConfig(**{"output": str(output), "captions_per_pair": 3, **sizes, **settings})


# --- the same everywhere ----------------------------------------------------------------------------------


def test_another_process_writes_the_same_bytes(tmp_path):
    """With another hash seed, and parts in another order: nothing depends on what was rendered before."""
    config = tiny("out", image_form="parquet")
    settings = {**dataset.settings(config), "output": "out"}
    program = (
        "import hashlib, json, sys\n"
        "from revision_ray.miniature.dataset import DatasetConfig, contents, parts\n"
        "from revision_ray.miniature.world import WorldConfig\n"
        "settings = json.loads(sys.argv[1])\n"
        "config = DatasetConfig(**{**settings, 'world': WorldConfig(**settings['world'])})\n"
        "files = {part: contents(config, part) for part in reversed(parts(config))}\n"
        "ordered = [item for part in parts(config) for item in files[part].items()]\n"
        "print(hashlib.sha256(repr(ordered).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", program, json.dumps(settings)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    here = [item for part in dataset.parts(config) for item in dataset.contents(config, part).items()]
    assert shown.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


def test_seed_domain_and_index_each_change_the_scene():
    scenes = [
        world.scene(WorldConfig(seed=seed, domain=domain), index)
        for seed in range(2) for domain in ("day", "night") for index in range(50)
    ]  # fmt: skip
    assert len(set(scenes)) == len(scenes)


def test_splits_share_no_scene_and_growing_one_keeps_its_beginning():
    small, large = tiny("out"), tiny("out", num_pairs=60, num_images=50)
    of = {
        split: {i for part in dataset.parts(large) if part.split == split
                for i in range(part.first, part.first + part.num_rows)}
        for split in dataset.SPLITS
    }  # fmt: skip
    assert {split: len(indices) for split, indices in of.items()} == {
        "pairs": 60, "heldout": 3, "images": 50, "texts": 7,
    }  # fmt: skip
    for one, other in itertools.combinations(of.values(), 2):
        assert not one & other
    assert dataset.parts(small)[0] == dataset.parts(large)[0]


# --- the picture shows the scene --------------------------------------------------------------------------


@pytest.mark.parametrize("config", WORLDS, ids=lambda config: config.domain)
def test_a_thing_has_its_colour_and_shape_where_the_scene_says(config):
    """The colour at a thing's centre is nearest to its own of the domain's; a ring shows the ground there."""
    colours = {name: np.array(world.COLOURS[name], float) for name in world.DOMAINS[config.domain].colours}
    right = total = 0
    for index in range(150):
        shown = np.asarray(world.render(config, index), float)
        for thing in world.scene(config, index).things:
            at = (int(thing.y), int(thing.x))
            nearest = min(colours, key=lambda name: np.linalg.norm(shown[at] - colours[name]))
            right += nearest == thing.colour if thing.shape != "ring" else True
            total += 1
            assert np.linalg.norm(shown[at] - colours[thing.colour]) < 120 or thing.shape == "ring"
    # Colours vary by 20 a channel and light by 18, so that a few lie between two names.
    assert right / total > 0.95


def test_things_lie_inside_and_apart():
    for _, scene in SCENES:
        for thing in scene.things:
            assert thing.radius < thing.x < world.SIZE - thing.radius
            assert thing.radius < thing.y < world.SIZE - thing.radius
        for a, b in itertools.combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_domains_differ_in_what_they_show():
    def shares(config, of):
        seen = [of(thing) for other, scene in SCENES if other == config for thing in scene.things]
        return {value: seen.count(value) / len(seen) for value in set(seen)}

    day, night = WORLDS
    assert set(shares(day, lambda thing: thing.shape)) & set(shares(night, lambda thing: thing.shape)) == {
        "circle"
    }
    assert (
        shares(night, lambda thing: thing.size)["small"]
        > shares(day, lambda thing: thing.size)["small"] + 0.1
    )
    grounds = [{scene.background for other, scene in SCENES if other == config} for config in WORLDS]
    assert len(grounds[0]) == len(grounds[1]) == 5
    assert not grounds[0] & grounds[1]


# --- captions and answers are true: checked by reading them, with tables of the test's own ----------------

COLOUR_WORDS = {"violet": "purple", "crimson": "red", "cyan": "turquoise"} | {
    name: name
    for name in ("red", "orange", "yellow", "green", "blue", "purple", "white", "pink", "turquoise")
}
SHAPE_WORDS = {
    "circle": "circle", "disc": "circle", "dot": "circle", "square": "square", "box": "square",
    "boxe": "square", "triangle": "triangle", "star": "star", "ring": "ring", "loop": "ring",
    "cross": "cross", "crosse": "cross", "plus": "cross", "pluse": "cross", "diamond": "diamond",
}  # fmt: skip
SIZE_WORDS = {
    "small": "small",
    "little": "small",
    "tiny": "small",
    "large": "large",
    "big": "large",
    "huge": "large",
}
GROUND_WORDS = {
    "grass": "grass", "lawn": "grass", "meadow": "grass", "sand": "sand", "beach": "sand",
    "brick": "brick", "wall": "brick", "water": "water", "lake": "water", "snow": "snow",
    "asphalt": "asphalt", "road": "asphalt", "carpet": "carpet", "rug": "carpet", "stars": "stars",
    "sky": "stars", "forest": "forest", "leaves": "forest", "steel": "steel", "metal": "steel",
}  # fmt: skip
NUMBER_WORDS = {"one": 1, "two": 2, "pair": 2, "three": 3, "four": 4}
NOUN = re.compile(
    rf"(?:({'|'.join(SIZE_WORDS)}) )?\b({'|'.join(COLOUR_WORDS)}) "
    rf"({'|'.join(sorted(SHAPE_WORDS, reverse=True))})(s?)\b"
)
RELATION = re.compile(
    r"^(?: is)? (?:to the )?(left of|right of|above|higher than|below|under|lower than) (?:a|an|the) "
)
IS_SO = {
    "left of": lambda a, b: a.x < b.x, "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y, "higher than": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y, "under": lambda a, b: a.y > b.y, "lower than": lambda a, b: a.y > b.y,
}  # fmt: skip


def matching(scene: Scene, size, colour, shape) -> list[DrawnShape]:
    return [
        thing for thing in scene.things
        if (thing.colour, thing.shape) == (COLOUR_WORDS[colour], SHAPE_WORDS[shape])
        and (not size or thing.size == SIZE_WORDS[size])
    ]  # fmt: skip


def place_is_so(words: str, things: list[DrawnShape]) -> bool:
    """Whether some thing lies where `words` say: a direction beyond 3/8 from its edge, the middle within."""
    low, high = world.SIZE * 3 / 8, world.SIZE * 5 / 8
    limits = {
        "left": lambda t: t.x < low, "right": lambda t: t.x > high,
        "top": lambda t: t.y < low, "upper": lambda t: t.y < low,
        "bottom": lambda t: t.y > high, "lower": lambda t: t.y > high,
        "middle": lambda t: low <= t.x <= high and low <= t.y <= high,
        "centre": lambda t: low <= t.x <= high and low <= t.y <= high,
    }  # fmt: skip
    said = [limit for word, limit in limits.items() if re.search(rf"\b{word}\b", words)]
    return any(all(limit(thing) for limit in said) for thing in things)


def claims(text: str, scene: Scene) -> dict[str, bool]:
    """Every statement of `text` that the tables above can read -> whether it holds of `scene`."""
    holds: dict[str, bool] = {}
    for sentence in text.split("."):
        nouns = list(NOUN.finditer(sentence))
        for i, noun in enumerate(nouns):
            found = matching(scene, *noun.groups()[:3])
            holds[f"there: {noun[0]}"] = bool(found)
            if noun[4]:
                number = re.findall(rf"\b({'|'.join(NUMBER_WORDS)})\b", sentence)
                holds[f"number: {sentence}"] = NUMBER_WORDS[number[0]] == len(found)
            elif relation := RELATION.match(sentence[noun.end() :]):
                other = matching(scene, *nouns[i + 1].groups()[:3])
                holds[f"relation: {sentence}"] = any(IS_SO[relation[1]](a, b) for a in found for b in other)
            if where := re.search(r" ((?:at|in|on) the .*)", sentence[noun.end() :]):
                holds[f"place: {sentence}"] = place_is_so(where[1].split(" over ")[0], found)
            if later := re.match(rf" is ({'|'.join(SIZE_WORDS)}) and", sentence[noun.end() :]):
                holds[f"size: {sentence}"] = any(t.size == SIZE_WORDS[later[1]] for t in found)
        if "one of them" in sentence:
            holds[f"place: {sentence}"] = place_is_so(sentence, list(scene.things))
        if "can be seen" in sentence:
            number = next(word for word in sentence.split() if word in NUMBER_WORDS)
            holds[f"count: {sentence}"] = NUMBER_WORDS[number] == len(scene.things)
        behind = re.search(r"\b(?:on|over|in front of|background is) (?:a )?([a-z ]+)$", sentence)
        words = re.findall(r"[a-z]+", behind[1]) if behind else []
        for word in set(words) & GROUND_WORDS.keys():
            holds[f"ground: {sentence}"] = GROUND_WORDS[word] == scene.background
    return holds


@pytest.mark.parametrize("length", ["short", "long"])
def test_captions_say_only_what_is_so(length):
    kinds = dict.fromkeys(("there", "number", "relation", "place", "ground"), 0)
    for i, (_, scene) in enumerate(SCENES):
        text = language.caption(scene, world.stream("test", i), length)
        read = claims(text, scene)
        assert all(read.values()), (text, scene, read)
        for kind in {statement.split(":")[0] for statement in read}:
            kinds[kind] = kinds.get(kind, 0) + 1
    assert min(kinds.values()) > 100, kinds  # each kind of statement was really read and checked


def test_the_checker_of_captions_sees_lies():
    """A caption read against the next scene is nearly always false: the checker can fail."""
    said = [language.caption(scene, world.stream("test", i), "long") for i, (_, scene) in enumerate(SCENES)]
    false = [not all(claims(text, SCENES[i - 1][1]).values()) for i, text in enumerate(said)]
    assert np.mean(false) > 0.99


def test_a_long_caption_names_everything():
    for i, (_, scene) in enumerate(SCENES):
        read = claims(language.caption(scene, world.stream(i), "long"), scene)
        kinds = {statement.split(":")[0] for statement in read}
        assert {"there", "place", "count", "ground"} <= kinds
        assert ("relation" in kinds) == (len({(t.shape, t.colour) for t in scene.things}) == 2)


@pytest.mark.parametrize(("length", "shortest", "longest"), [("short", 2, 24), ("long", 30, 70)])
def test_captions_vary_and_fit_the_context(length, shortest, longest):
    """24 words and 70 leave room for start and end token in the contexts of 26 and 72."""
    for i, (_, scene) in enumerate(SCENES):
        said = {language.caption(scene, world.stream(i, k), length) for k in range(8)}
        assert len(said) >= 4
        words = [len(re.findall(r"\w+|[^\w\s]", text)) for text in said]
        assert shortest <= min(words)
        assert max(words) <= longest


def test_answers_are_recounted_from_the_scene():
    answered = dict.fromkeys(("colour", "shape", "count", "existence", "background", "relation"), 0)
    numbers = {1: "one", 2: "two", 3: "three", 4: "four"}
    for i, (config, scene) in enumerate(SCENES):
        for asked in language.questions(scene, world.stream(i), config.domain):
            answered[asked.kind] += 1
            named = [thing for thing in scene.things if re.search(rf"\b{thing.shape}(e?s)?\b", asked.text)]
            painted = [thing for thing in scene.things if re.search(rf"\b{thing.colour}\b", asked.text)]
            if asked.kind == "colour":
                assert {thing.colour for thing in named} == {asked.answer}, asked
            elif asked.kind == "shape":
                assert {thing.shape for thing in painted} == {asked.answer}, asked
            elif asked.kind == "count":
                counted = scene.things if "things" in asked.text else named
                assert numbers[len(counted)] == asked.answer, asked
            elif asked.kind == "background":
                assert asked.answer == scene.background
            elif asked.kind == "existence":
                assert (asked.answer == "yes") == any(thing in painted for thing in named), asked
            else:
                first, second = re.findall(r"the (\w+) (\w+)", asked.text)
                a, b = (
                    next(t for t in scene.things if (t.colour, t.shape) == words) for words in (first, second)
                )
                direction = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
                assert max(direction, key=lambda side: direction[side]) == asked.answer, asked
    assert min(answered.values()) > 100, answered


def test_what_is_not_there_nearly_is():
    """Half of the existence questions are answered no, and those share a colour or a shape with the scene."""
    answers = []
    for i, (config, scene) in enumerate(SCENES):
        asked = next(
            q for q in language.questions(scene, world.stream(i), config.domain) if q.kind == "existence"
        )
        answers.append(asked.answer)
        colour, shape = re.findall(r"\w+", asked.text)[-2:]
        assert any(thing.colour == colour or thing.shape == shape for thing in scene.things)
    # 800 fair coins: four standard deviations are 0.07.
    assert abs(answers.count("no") / len(answers) - 0.5) < 0.07


# --- files ------------------------------------------------------------------------------------------------


def tar_members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_rendered_files_are_what_they_say_and_a_second_run_renders_nothing(cluster, tmp_path):
    config = tiny(tmp_path / "world")
    assert render(config) is True
    written = {
        path.relative_to(tmp_path / "world").as_posix(): path
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    manifest = json.loads(written["manifest.json"].read_text())
    assert {entry["file"] for entry in manifest["files"]} == set(written) - {"manifest.json"}
    contents = [dataset.contents(config, part) for part in dataset.parts(config)]
    assert {name: path.read_bytes() for name, path in written.items() if name != "manifest.json"} == {
        name: content for files in contents for name, content in files.items()
    }

    pairs = tar_members(written["pairs/part-00000.tar"].read_bytes())
    assert [name.split(".")[1] for name in pairs] == ["jpg", "txt", "json"] * 4
    for name, content in pairs.items():
        key, kind = name.split(".")
        if kind == "json":
            said = json.loads(content)["captions"]
            assert len(said) == 3
            assert pairs[f"{key}.txt"].decode() == said[0]
        elif kind == "jpg":
            assert Image.open(io.BytesIO(content)).size == (64, 64)
    texts = [json.loads(line) for line in written["texts/part-00001.jsonl"].read_text().splitlines()]
    assert [set(row) for row in texts] == [{"id", "text"}] * 3
    images = tar_members(written["images/part-00000.tar"].read_bytes())
    ids = {name.split(".")[0] for name in images} | {name.split(".")[0] for name in pairs}
    assert len(ids | {row["id"] for row in texts}) == 4 + 4 + 3

    before = {path: path.stat().st_mtime_ns for path in written.values()}
    assert render(config) is False
    assert {path: path.stat().st_mtime_ns for path in written.values()} == before
    with pytest.raises(OutputError, match=r"num_texts was 7, is now 8; world\.seed was 0, is now 1"):
        render(dataclasses.replace(config, num_texts=8, world=WorldConfig(seed=1)))


def test_an_unfinished_run_is_finished_and_leftovers_of_another_are_refused(cluster, tmp_path):
    config = tiny(tmp_path)
    dataset.write_part(config, dataset.parts(config)[2])
    assert render(config) is True
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(OutputError, match=r"pairs/part-00001\.tar: "):
        render(dataclasses.replace(config, num_pairs=4))


def written_world(folder) -> str:
    """A tiny world on disk, written without Ray."""
    config = tiny(folder)
    entries = [entry for part in dataset.parts(config) for entry in dataset.write_part(config, part)]
    dataset.write_manifest(config, entries)
    return str(folder)


def test_conversations_ask_about_the_worlds_images_in_their_order(tmp_path):
    made = written_world(tmp_path / "world")
    job = dataset.ConversationsJob(world=made, num_samples=7, output=str(tmp_path / "out"))
    said = dataset.run_conversations(job)
    file = tmp_path / "out" / dataset.FILE
    records = [json.loads(line) for line in file.read_text().splitlines()]
    first = dataset.SPLITS.index("images") * dataset.SCENES_PER_SPLIT
    asked = [one for number in range(5) for one in dataset.questions(tiny(made), first + number)][:7]
    assert [record["id"] for record in records] == [one["id"] for one in asked]
    for record, one in zip(records, asked, strict=True):
        human, gpt = (turn["value"] for turn in record["conversations"])
        assert (human, gpt) == (f"<image>\n{one['text']}", one["answer"])
        assert record["image"] == one["scene"]
    assert said == f"7 questions about {len({r['image'] for r in records})} images: {file}"
    time = file.stat().st_mtime_ns
    dataset.run_conversations(job)
    assert file.stat().st_mtime_ns == time, "what stands is not written again: later stages go by its time"


def test_conversations_ask_for_a_finished_world(tmp_path):
    job = dataset.ConversationsJob(world=str(tmp_path), output=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"name the output of jobs/render\.py"):
        dataset.run_conversations(job)


def test_images_as_folder_parquet_and_tar_are_the_same_images():
    forms = {}
    for form in ("folder", "parquet", "tar"):
        config = tiny("out", image_form=form)
        parts = [part for part in dataset.parts(config) if part.split == "images"]
        forms[form] = {name: c for part in parts for name, c in dataset.contents(config, part).items()}
    folder = {name.split("/")[1].removesuffix(".jpg"): c for name, c in forms["folder"].items()}
    rows = [row for c in forms["parquet"].values() for row in pq.read_table(io.BytesIO(c)).to_pylist()]
    packed = {name: c for tar in forms["tar"].values() for name, c in tar_members(tar).items()}
    assert folder == {row["id"]: row["image"] for row in rows}
    assert folder == {name.removesuffix(".jpg"): content for name, content in packed.items()}
    assert len(folder) == 5


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="num_pairs=-1"):
        tiny("out", num_pairs=-1)
    with pytest.raises(ConfigError, match="rows_per_file=0"):
        tiny("out", rows_per_file=0)
