"""Documents and the comments of configs/: their commands are accepted, their paths and names exist."""

import ast
import functools
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from test_architecture import FILES, ROOT, placeholder

from revision_ray.core import config
from revision_ray.core.errors import ConfigError

DOCUMENTS = [path for path in FILES if re.fullmatch(r"(README|CONTRIBUTING|CHANGELOG)\.md|docs/.+\.md", path)]
COMMENTED = [
    path
    for path in FILES
    if re.fullmatch(r"(configs/.+\.ya?ml|cluster\.yaml|Makefile|docs/.+\.sh|benchmarks/.+\.py)", path)
]

# Words that stand for what a reader puts there, so that a line with them is no command.
PLACEHOLDERS = re.compile(r"\b(NAME|key=value)\b")


def blocks_in(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield language and text of every fenced block."""
    for found in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", markdown, re.DOTALL | re.MULTILINE):
        yield found[2], found[3]


def commands_in(text: str, starts: str = r"python (?:jobs/|-m )|make ") -> list[list[str]]:
    """Return the words of every command of a shell text that runs this project: a job, a module, a target."""
    commands = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.search(rf"(?:^|[\s`(\"]|\S*/)((?:{starts})[^`]*)", line)
        if not found or PLACEHOLDERS.search(found[1]):
            continue
        try:
            words = shlex.split(found[1], comments=True)
        except ValueError:  # an apostrophe of the prose behind the command
            words = found[1].split()
        ends = [number for number, word in enumerate(words) if word in ("|", "&&", "&", ";", "||")]
        commands.append(words[: ends[0]] if ends else words)
    return commands


def commands_of_document(markdown: str) -> list[list[str]]:
    """Return the commands of fenced shell blocks, and of `code` in the text between the blocks."""
    commands = []
    for language, text in blocks_in(markdown):
        if language in ("bash", "sh", "console"):
            commands += commands_in(text)
    prose = re.sub(r"^( *)```.*?^\1```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if span.startswith(("python ", "make ")):
            commands += commands_in(span)
    return commands


def commands_of_comments(text: str) -> list[list[str]]:
    """Return the jobs that run in comments: `# python jobs/NAME.py ...`. Two spaces end a command."""
    comments = re.sub(r"\\\n\s*#\s*", "", "\n".join(re.findall(r"^\s*#.*", text, re.MULTILINE)))
    return commands_in(
        re.sub(r"(\S)  +\S.*", r"\1", re.sub(r"^\s*#+\s*", "", comments, flags=re.M)), "python jobs/"
    )


@functools.cache
def job_call(job: str) -> tuple[type, dict[str, Any]]:
    """Return the schema that a job hands to `run_job`, and its flags and verbs."""
    with mock.patch.object(config, "run_job") as run_job:
        runpy.run_path(str(ROOT / job), run_name="__main__")
    return run_job.call_args.args[0], run_job.call_args.kwargs


def parse_job(job: str, words: Sequence[str]) -> None:
    """Load a job's command line into its schema. A word `...` stands for values that were left out.

    Raises:
        ConfigError: the command line is wrong or incomplete.
    """
    schema, options = job_call(job)
    given = config.spelled_out([word for word in words if word != "..."], options.get("verbs") or {})
    given = config.with_flags(given, options.get("flags") or {})
    given = [re.sub(r"=\.\.\.$", "=x", word) for word in given]
    types = {key: name for key, name, default, _ in config.keys(schema) if default == "required"}
    for _ in range(len(types) + 1):
        try:
            config.load(schema, given)
            return
        except ConfigError as error:
            missing = re.match(r"([\w.]+): a value is required", str(error))
            if not missing or "..." not in " ".join(words):
                raise
        given.append(f"{missing[1]}={placeholder(types[missing[1]])}")


def check(command: Sequence[str]) -> None:
    """Raise where a command of this project would be refused as it is written."""
    program, *words = command
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            name, equals, _ = word.partition("=")
            pattern = rf"^{name} *\?=|\$\({name}\)|\$\(if \$\({name}\)" if equals else rf"^{name}:"
            assert re.search(pattern, makefile, re.MULTILINE), f"make {word}: the Makefile has no {name}"
    elif words[0] == "-m" and words[1] == "pytest":
        files = [word for word in words[2:] if word.startswith("tests/")]
        assert [file for file in files if not (ROOT / file).exists()] == []
    elif words[0] == "-m":
        module = words[1].replace(".", "/") + ".py"
        assert not module.startswith(("benchmarks/", "jobs/", "revision_ray/")) or (ROOT / module).exists()
    else:
        assert (ROOT / words[0]).exists(), f"{words[0]} does not exist"
        parse_job(words[0], words[1:])


@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands_of_documents_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands_of_document((ROOT / path).read_text()):
        check(command)


@pytest.mark.parametrize("path", COMMENTED)
def test_commands_in_comments_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / path).read_text()
    for command in commands_in(text) if path.startswith("docs/") else commands_of_comments(text):
        if not any("$" in word for word in command):  # of a loop in a script
            check(command)


def test_the_readme_has_the_commands_of_the_whole_way():
    """So that the tests above cannot pass because no command was found."""
    commands = commands_of_document((ROOT / "README.md").read_text())
    jobs = [command[1] for command in commands if command[1].startswith("jobs/")]
    assert {f"jobs/{name}.py" for name in ("embed", "fit", "pretrain", "finetune", "evaluate")} <= set(jobs)
    assert ["make", "demo"] in commands


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/fit.py configs/fit.yaml texts=a images=b outptu=c",
        "python jobs/fit.py configs/fit.yaml texts=a images=b",
        "python jobs/fit.py configs/fat.yaml texts=a images=b output=c",
        "python jobs/fat.py texts=a",
        "python jobs/fits.py lost registry=runs",
        "ray job submit -- \\\n    python jobs/pretrain.py data=[a] model=m output=o num_workers=many",
        "make demos",
        "make demo PYTHONN=python3",
        "python -m benchmarks.fat",
        "python -m pytest tests/test_fat.py",
    ],
)
def test_wrong_commands_are_seen(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands_of_document(f"Say:\n\n```bash\n{line}   # comment\n```\n")
    with pytest.raises((ConfigError, AssertionError)):
        check(command)


def test_commands_are_found_wherever_they_stand():
    shell = "RAY=1 .venv/bin/python jobs/a.py \\\n  b=c && make d"
    document = f"A `make demo`.\n\n```bash\n{shell}\n```\n\n```python\nmake = 1\n```\n"
    assert commands_of_document(document) == [["python", "jobs/a.py", "b=c"], ["make", "demo"]]
    comment = "# In two lines:\n#   python jobs/a.py b=c \\\n#       d=e   what it does\n# make it so\nx: 1\n"
    assert commands_of_comments(comment) == [["python", "jobs/a.py", "b=c", "d=e"]]


PATHS = re.compile(
    r"(?:revision_ray|jobs|configs|tests|benchmarks|docs|\.ci)/[\w./-]*\w|[\w-]+\.(?:yaml|toml|md)"
)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_paths_in_documents_exist(path):
    """Paths of the repository in `code`; those with a NAME or KIND in capitals are the reader's."""
    missing = []
    for span in re.findall(
        r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
    ):
        for name in PATHS.findall(span) if " " not in span else ():
            if re.search("NAME|KIND", name) or "*" in span or name != span:
                continue
            places = [name, *(f"{folder}/{name}" for folder in ("configs", "configs/cluster/kuberay"))]
            written = name in ("config.yaml", "pipeline.yaml")  # by jobs, into their outputs
            if not written and not any((ROOT / place).exists() for place in places):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS)
def test_names_imported_in_documents_exist(path):
    for language, text in blocks_in((ROOT / path).read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("revision_ray"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
