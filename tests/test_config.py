"""One YAML and `key=value` overrides become a checked dataclass; a mistake is answered in one line."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from revision_ray.core import config, storage
from revision_ray.core.config import MISSING, load
from revision_ray.core.errors import ConfigError


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
        (["images=x", "encoder=5"], r"^encoder=5: encoder: .*mapping.*encoder\.name"),
        (["images=x", "encoder=[a]"], r"encoder: .*list.*mapping"),
        (["images=x", "domains=a"], r"domains: .*list.*domains=\["),
        (["images=x", "domains={a: b}"], r"domains: .*mapping.*list"),
        (["images=x", "domains=[[a]]"], r"domains\[0\]: .*list"),
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


# --- text, and what YAML makes of it ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    path: str = ""
    size: int = 0
    switch: Literal["on", "off", "007"] = "on"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Text in every place that a schema can have it in."""

    text: str = ""
    maybe: str | None = "default"
    several: list[str] = field(default_factory=list)
    either: str | list[str] | None = None
    named: dict[str, str] = field(default_factory=dict)
    nested: dict[str, dict[str, str]] = field(default_factory=dict)
    entry: Entry = field(default_factory=Entry)
    entries: dict[str, Entry] = field(default_factory=dict)
    optional: Entry | None = None
    given: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    limit: int | None = 5
    share: float = 0.0
    flag: bool = False
    stage: Literal[0, 1, 2] = 0
    sizes: list[int] = field(default_factory=list)
    bounds: tuple[float, float] = (0.0, 1.0)


# Unquoted, none of these is this text to YAML.
CHANGED = ["007", "no", "Off", "true", "1_000", "1e3", "1.50", ".5", "+1", "0x10", "0b11", "12:30:00", "-0",
           "2026-01-01", "2026-01-01 10:00:00", ".inf", ".NaN", "~", "Null"]  # fmt: skip
# These are, or would be errors or other structures.
KEPT = ["word", "two words", "s3://bucket/a#b?c=d&e=f", "a=b,c", "runs/a #2", "a: b", "it's", "C:\\new",
        "&x", "*x", "!x", "%x", "@x", "`x`", "| x", "> x", "- x", "? x", "#x", " spaces around ", "", "]",
        "}", ",", "1.2.3", '"a" and "b"', "'", "y", "=", "<<",
        "caption, with [brackets]", "\U0001f600"]  # fmt: skip


@pytest.mark.parametrize("typed", [*CHANGED, *KEPT])
def test_text_is_taken_as_typed(typed):
    for key in (
        "text",
        "maybe",
        "either",
        "entry.path",
        "optional.path",
        "named.a",
        "nested.a.b",
        "entries.a.path",
    ):
        found: Any = load(Texts, [f"{key}={typed}"])
        for name in key.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        assert found == typed, key


@pytest.mark.parametrize("typed", CHANGED)
def test_text_in_lists_and_mappings_is_taken_as_typed(typed):
    argv = [f"several=[{typed},a]", f"either=[a,{typed}]", f"named={{a: {typed}, {typed}: b}}",
            f"nested={{{typed}: {{a: {typed}}}}}", f"entries={{{typed}: {{path: {typed}}}}}",
            f"entry={{path: {typed}}}"]  # fmt: skip
    found = load(Texts, argv)
    assert (found.several, found.either) == ([typed, "a"], ["a", typed])
    assert found.named == {"a": typed, typed: "b"}
    assert found.nested == {typed: {"a": typed}}
    assert found.entries == {typed: Entry(path=typed)}
    assert found.entry == Entry(path=typed)


def test_text_keeps_its_meaning_through_given_values(tmp_path):
    """Nothing is said of their type; the keys that name them say it."""
    in_file = write(tmp_path / "a.yaml", "given: {a: 007, b: no, c: [1_000, 8], d: 1e3, e: 2, f: ~}")
    typed = ["a=007", "b=no", "c=[1_000,8]", "d=1e3", "e=2", "f=null"]
    for source in ([in_file], [f"given.{each}" for each in typed]):
        argv = ["text=${given.a}", "maybe=${given.f}", "entry.path=runs/${given.a}_${given.d}",
                "number=${given.a}", "flag=${given.b}", "sizes=${given.c}", "share=${given.d}",
                "stage=${given.e}", "named.b=${given.b}", "named.e=${given.e}"]  # fmt: skip
        found = load(Texts, source + argv)
        assert (found.text, found.maybe, found.entry.path) == ("007", None, "runs/007_1e3")
        assert (found.number, found.flag, found.sizes, found.share) == (7, False, [1000, 8], 1000.0)
        assert (found.stage, found.named) == (2, {"b": "no", "e": "2"})


def test_values_of_the_environment_are_text(monkeypatch):
    monkeypatch.setenv("SOME_VALUE", "007")
    found = load(Texts, ["text=${oc.env:SOME_VALUE}", "number=${oc.env:SOME_VALUE}"])
    assert (found.text, found.number) == ("007", 7)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("maybe=null", Texts(maybe=None)),
        ("either=null", Texts()),
        ("maybe='null'", Texts(maybe="null")),
        ("text=null", Texts(text="null")),
        ("named={null: null}", Texts(named={"null": "null"})),
        ("text='no'", Texts(text="no")),
        ('text="a #2"', Texts(text="a #2")),
        ("text='it''s'", Texts(text="it's")),
        ("text=[a,b]", Texts(text="[a,b]")),
        ("text={a: b}", Texts(text="{a: b}")),
        ("either='[a,b]'", Texts(either="[a,b]")),
        ("several=['a, b', \"c #d\", e]", Texts(several=["a, b", "c #d", "e"])),
        ("entry.switch=off", Texts(entry=Entry(switch="off"))),
        ("entry.switch=007", Texts(entry=Entry(switch="007"))),
        ("optional=null", Texts()),
        ("number=1_000", Texts(number=1000)),
        ("number=0x10", Texts(number=16)),
        ("limit=null", Texts(limit=None)),
        ("share=1e-3", Texts(share=0.001)),
        ("share=.inf", Texts(share=float("inf"))),
        ("flag=yes", Texts(flag=True)),
        ("stage=2", Texts(stage=2)),
        ("sizes=[1_000, 2]", Texts(sizes=[1000, 2])),
        ("bounds=[1e-3, 5]", Texts(bounds=(0.001, 5.0))),
    ],
)
def test_what_else_an_override_can_be(argument, expected):
    assert load(Texts, [argument]) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("number=010", r"number: found 010.* 8\b"),  # octal to YAML, ten to everybody else
        ("number=1:30", r"number: found 1:30.* 90\b"),
        ("number=5 #2", r"number=5 #2: '#2'"),
        ("sizes=[1,2] #3", r"sizes=\[1,2\] #3: '#3'"),
        ("several=[a #2,b]", r"several=\[a #2,b\]: .*quote"),
        ("several=[&x y]", r"&.*quote"),
        ("several=[!x y]", r"!.*quote"),
        ("several=[*x]", r"\*.*quote"),
        ("named={a: x, a: y}", r"named\.a: .*before"),
        ("text=${", r"text=\$\{: "),
        ("text=${nowhere}", r"text: .*nowhere"),
        ("entry.switch=no", r"entry\.switch: .*'no'"),
    ],
)
def test_what_an_override_cannot_be(argument, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(Texts, [argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("typed", [*CHANGED, "null", ""])
def test_a_word_of_a_file_that_yaml_would_change_is_refused(tmp_path, typed):
    """Where text is expected, with line, key, what was found; quoted it is taken as it is."""
    as_yaml = OmegaConf.create(f"a: {typed}").a
    for content, key, line in [
        ("text: {}", "text", 1),
        ("number: 5\nseveral: [a, {}]", r"several\[1\]", 2),
        ("either:\n- a\n- {}", r"either\[1\]", 3),
        ("named:\n  a: {}", r"named\.a", 2),
        ("nested: {{b: {{a: {} }}}}", r"nested\.b\.a", 1),
        ("entries:\n  b:\n    path: {}\n    size: 5", r"entries\.b\.path", 3),
        ("optional:\n  path: {}", r"optional\.path", 2),
        ("base: &base {{path: {} }}\nentry: {{<<: *base}}", r"entry\.path", 1),
        ("entry: {{switch: {} }}", r"entry\.switch", 1),
    ]:
        if not typed and "[a, {}]" in content:
            continue  # a list of one
        path = write(tmp_path / "a.yaml", content.format(typed))
        with pytest.raises(ConfigError, match=rf"a\.yaml: line {line}: {key}: found ") as caught:
            load(Texts, [path])
        message = str(caught.value)
        assert (typed or "nothing") in message
        assert "\n" not in message
        if as_yaml != typed:
            assert f"{as_yaml}" in message
    for quote in "'\"":
        path = write(
            tmp_path / "a.yaml", f"text: {quote}{typed}{quote}\nnamed: {{a: {quote}{typed}{quote}}}\n"
        )
        assert load(Texts, [path]) == Texts(text=typed, named={"a": typed})


def test_keys_of_a_file_that_yaml_would_change_are_refused(tmp_path):
    for key in ("007", "no", "2026-01-01", "1"):
        with pytest.raises(ConfigError, match=rf"a\.yaml: line 2: named\.{key}: found {key}.*quote"):
            load(Texts, [write(tmp_path / "a.yaml", f"named:\n  {key}: x\n")])
        quoted = write(tmp_path / "a.yaml", f"named:\n  '{key}': x\n")
        assert load(Texts, [quoted]).named == {key: "x"}


def test_what_else_a_file_can_hold(tmp_path):
    content = """
maybe: null
either: ~   # no value
text: runs/a  # a comment is one
several: ["a #2", plain words, s3://b/c#d?e=f]
base: &base {path: '007', size: 0x10}
entry: *base
entries: {b: {<<: *base, size: 5}}
limit:
share: 1e3
flag: on
stage: 2
named: {a: !!str 007, b: |-
    no}
"""
    content = content.replace("{a: !!str 007, b: |-\n    no}", "\n  a: !!str 007\n  b: |-\n    no")
    found = load(Texts, [write(tmp_path / "a.yaml", content.replace("base: &base", "optional: &base"))])
    assert (found.maybe, found.either, found.text) == (None, None, "runs/a")
    assert found.several == ["a #2", "plain words", "s3://b/c#d?e=f"]
    assert found.entry == found.optional == Entry(path="007", size=16)
    assert found.entries == {"b": Entry(path="007", size=5)}
    assert (found.limit, found.share, found.flag, found.stage) == (None, 1000.0, True, 2)
    assert found.named == {"a": "007", "b": "no"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("number: 1\ntext: runs/a #2\n", r"line 2: text: found runs/a and behind it #2"),
        ("number: 010\n", r"line 1: number: found 010.* 8\b"),
        ("given: {1: a, '1': b}\n", r"given\.1: "),
        ("text: ${\n", r"a\.yaml: "),
        ("a: &a [*a]\n", r"line 1: not YAML: .*recursive"),
        ("text: \x07\n", r"not YAML"),
        ("just words\n", r"mapping.*just words"),
        ("? [a]\n: b\n", r"a\.yaml: "),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(Texts, [write(tmp_path / "a.yaml", content)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": 7}, r"args: text: found 7 \(int\)"),
        ({"text": None}, r"args: text: found None"),
        ({"entry": {"path": False}}, r"args: entry\.path: found False"),
        ({"several": ["a", 1.5]}, r"args: several\[1\]: found 1\.5"),
        ({"either": [7]}, r"args: either\[0\]: found 7"),
        ({"named": {7: "a"}}, r"args: named: the key 7"),
    ],
)
def test_what_another_parser_changed_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config.from_mapping(Texts, values, "args")
    kept = {
        "text": "007",
        "maybe": None,
        "either": ["no"],
        "number": 5,
        "given": {"a": 7},
        "entry": {"size": 3},
    }
    assert config.from_mapping(Texts, kept, "args").given == {"a": 7}


# What YAML can print at all, but for OmegaConf's own marks.
PRINTABLE = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="$\u2028\u2029\ufeff"),
    max_size=20,
).filter(lambda text: text != "???")


@given(texts=st.lists(PRINTABLE, max_size=30, unique=True))
@example(texts=CHANGED + KEPT)
@settings(max_examples=10, deadline=None)
def test_any_text_survives_the_saved_configuration(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.yaml"
    named = {text: text for text in texts if text}
    job = Texts(text="".join(texts[:1]), several=texts, either=texts, named=named)
    config.save_resolved(job, str(path))
    assert load(Texts, [str(path)]) == job


# --- as a user meets it -----------------------------------------------------------------------------------

JOB = '''
from dataclasses import dataclass

from revision_ray.core.config import MISSING, run_job
from revision_ray.core.errors import DataError


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
