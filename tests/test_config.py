"""One YAML and `key=value` overrides become a checked dataclass; a mistake is answered in one line."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from revision_ray import config, storage
from revision_ray.config import MISSING, load
from revision_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Encoder:
    name: str = "ViT-B-32"
    """Architecture of the image
    and text towers."""
    batch_size: int = 64
    """Rows a call."""


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0
    """Of every random choice."""


@dataclass(frozen=True, kw_only=True)
class EmbedJob(Base):
    """Unit rows of every image."""

    images: str = MISSING
    """URI of a folder."""
    strategy: Literal["realign", "none"] = "realign"
    """How texts are mapped."""
    fraction: float = 0.001
    """Share of rejected rows that is borne."""
    limit: int | None = None
    """Rows to read at most; all by default."""
    domains: list[str] = field(default_factory=lambda: ["general"])
    """Tags of the data."""
    encoder: Encoder = field(default_factory=lambda: Encoder(batch_size=32))
    teacher: Encoder | None = None
    """Another encoder to compare with."""


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_yaml_and_overrides_in_that_order(tmp_path):
    yaml = write(tmp_path / "a.yaml", "images: from-yaml\nseed: 1\nencoder: {batch_size: 8}\n")
    job = load(EmbedJob, [yaml, "seed=2", "encoder.name=RN50"])
    assert job == EmbedJob(images="from-yaml", seed=2, encoder=Encoder(name="RN50", batch_size=8))
    # Overrides win wherever they stand.
    assert load(EmbedJob, ["seed=2", "encoder.name=RN50", yaml]) == job


def test_lists_are_replaced_as_a_whole(tmp_path):
    yaml = write(tmp_path / "a.yaml", "images: x\ndomains: [art, maps]\n")
    assert load(EmbedJob, [yaml]).domains == ["art", "maps"]
    assert load(EmbedJob, [yaml, "domains=[medical]"]).domains == ["medical"]
    with pytest.raises(ConfigError, match=r"domains\.0=medical.*key=\[a,b\]"):
        load(EmbedJob, [yaml, "domains.0=medical"])


def test_values_keep_what_they_say():
    """URIs keep both slashes, `=` may stand in a value, `null` is none, numbers convert without loss."""
    uri = "s3://bucket/path?region=eu-west-1&endpoint_override=http://localhost:9000"
    job = load(EmbedJob, [f"images={uri}", "limit=null", "fraction=1"])
    assert job.images == uri
    assert job.limit is None
    assert job.fraction == 1.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"^images: a value is required; give it as images=VALUE"),
        (["images=x", "encoder.batchsize=3"], r"encoder\.batchsize.*Did you mean:? '(encoder\.)?batch_size'"),
        (["images=x", "sede=3"], r"sede.*Did you mean:? 'seed'"),
        (["images=x", "seed=many"], r"seed: .*'many'"),
        (["images=x", "seed=1.5"], r"seed: .*1\.5"),
        (["images=x", "strategy=best"], r"strategy: .*best"),
        (["images=x", "seed.deeper=1"], r"seed"),
        (["images=x", "encoder=5"], r"^encoder=5: "),
        (["images=x", "domains=[a"], r"domains=\[a"),
        (["--seed", "3"], r"expected one YAML file.*2"),
        (["-v"], r"unknown option '-v'; options are key=value"),
        (["one.yaml", "two.yaml"], r"expected one YAML file.*found 2"),
        (["nowhere.yaml"], r"configuration file nowhere\.yaml: "),
    ],
)
def test_a_mistake_is_named_in_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(EmbedJob, argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"images: x\nsede: 1\n", r"a\.yaml: .*sede.*Did you mean:? 'seed'"),
        (b"images: x\nencoder: {nam: RN50}\n", r"encoder\.nam.*Did you mean:? '(encoder\.)?name'"),
        (b"images: [x\n", r"a\.yaml: line 2: not YAML: "),
        (b"- images\n- x\n", r"a\.yaml: .*mapping.*list"),
        (b"images: \xff\xfe\n", r"a\.yaml: .*UTF-8"),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(EmbedJob, [str(tmp_path / "a.yaml")])
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(EmbedJob, [write(tmp_path / "a.yaml", "# all defaults\n"), "images=x"]) == EmbedJob(
        images="x"
    )


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    job = load(EmbedJob, ["images=s3://b/x y#z?k=v", "limit=5", "domains=[a,'1']", "encoder.batch_size=2"])
    assert job.encoder.batch_size == 2
    config.save_resolved(job, str(tmp_path / "resolved.yaml"))
    assert load(EmbedJob, [str(tmp_path / "resolved.yaml")]) == job


def test_help_holds_every_key_with_type_default_and_explanation():
    text = config.help_text(EmbedJob, "jobs/embed.py")
    assert text.startswith("usage: python jobs/embed.py [CONFIG.yaml] key=value ...")
    assert "Unit rows of every image." in text
    lines = [line.strip() for line in text.splitlines()]
    for key, explanation in {
        "images: str = required": "URI of a folder.",
        "seed: int = 0": "Of every random choice.",
        "strategy: Literal['realign', 'none'] = \"realign\"": "How texts are mapped.",
        "fraction: float = 0.001": "Share of rejected rows that is borne.",
        "limit: int | None = null": "Rows to read at most; all by default.",
        'domains: list[str] = ["general"]': "Tags of the data.",
        'encoder.name: str = "ViT-B-32"': "Architecture of the image and text towers.",
        "encoder.batch_size: int = 32": "Rows a call.",
        "teacher.batch_size: int = 64": "Rows a call.",
    }.items():
        assert lines[lines.index(key) + 1] == explanation


@dataclass(frozen=True, kw_only=True)
class Inner:
    path: str = MISSING
    """Where it lies."""
    size: int = 1
    """How large it is."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Entries that users name."""

    entries: dict[str, Inner] = field(default_factory=dict)
    """Each with a name of its own."""


def test_a_misspelt_name_of_an_entry_is_noticed(tmp_path):
    """It would be a new entry, which lacks what it must have."""
    (tmp_path / "run.yaml").write_text("entries: {first: {path: a}, second: {path: b}}")
    assert load(Named, [str(tmp_path / "run.yaml"), "entries.first.path=c"]).entries["first"].path == "c"
    with pytest.raises(ConfigError, match=r"frist\.path: a value .*\(or was entries\.first meant\?\)"):
        load(Named, [str(tmp_path / "run.yaml"), "entries.frist.size=3"])


def test_keys_of_entries_stand_below_a_name():
    assert [key for key, *_ in config.keys(Named)] == ["entries.NAME.path", "entries.NAME.size"]


# --- as a user meets it -----------------------------------------------------------------------------------

JOB = '''
from dataclasses import dataclass

from revision_ray.config import MISSING, run_job
from revision_ray.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CountJob:
    """Counts."""

    rows: int = MISSING
    """How many."""


def count(job: CountJob) -> str:
    if job.rows < 0:
        raise DataError(f"rows is {job.rows}, expected 0 or more")
    return f"{100 // job.rows} each"


if __name__ == "__main__":
    run_job(CountJob, count)
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "count.py").write_text(JOB)

    def run(*argv: str):
        return subprocess.run(
            [sys.executable, "count.py", *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
        )

    return run


def test_a_job_says_its_result_and_exits_zero(run):
    result = run("rows=5")
    assert (result.returncode, result.stdout, result.stderr) == (0, "20 each\n", "")


@pytest.mark.parametrize("argument", ["row=5", "rows=five", "rows=-1", ""])
def test_a_mistake_of_the_user_exits_two_with_one_line(run, argument):
    result = run(*filter(None, [argument]))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(("ConfigError: ", "DataError: "))


def test_a_mistake_of_ours_exits_one_with_its_traceback(run):
    result = run("rows=0")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


VERBS = {"list": (), "copy": ("rows", "output")}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], []),
        (["rows=1"], ["rows=1"]),
        (["list"], ["action=list"]),
        (["list", "a.yaml", "rows=1"], ["action=list", "a.yaml", "rows=1"]),
        (["copy", "1e3", "to/it", "a.yaml"], ["action=copy", 'rows="1e3"', 'output="to/it"', "a.yaml"]),
        (["copy", "5", "output=x"], ["action=copy", 'rows="5"', "output=x"]),
        (["copy", "--help"], ["action=copy", "--help"]),
        (["a.yaml", "copy"], ["a.yaml", "copy"]),  # a verb leads, or it is none
        (["list", "stray"], ["action=list", "stray"]),
    ],
)
def test_a_verb_and_the_words_after_it_stand_for_keys(argv, expected):
    assert config.spelled_out(argv, VERBS) == expected


@dataclass(frozen=True, kw_only=True)
class CopyJob:
    action: str = "list"
    rows: str = ""
    output: str = ""


def test_a_word_that_looks_like_something_else_stays_text():
    argv = config.spelled_out(["copy", "1e3", 'a: "b", [c]'], VERBS)
    assert load(CopyJob, argv) == CopyJob(action="copy", rows="1e3", output='a: "b", [c]')


def test_help_names_the_verbs():
    usage = config.help_text(Base, "jobs/x.py", VERBS).splitlines()[0]
    assert usage == "usage: python jobs/x.py [list | copy ROWS OUTPUT] [CONFIG.yaml] key=value ..."


def test_help_needs_no_value(run):
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python count.py [CONFIG.yaml] key=value ...")
    assert "  rows: int = required\n      How many.\n" in result.stdout


def test_a_uri_with_a_query_is_a_file_and_no_override(bucket):
    storage.write_bytes(bucket("job.yaml"), b"seed: 7\n")
    job = load(EmbedJob, [bucket("job.yaml"), "images=s3://b/x?scheme=http"])
    assert (job.seed, job.images) == (7, "s3://b/x?scheme=http")
