"""The shape of the repository: imports point downward, the README's tree is the disk, every YAML is a run."""

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from revision_ray.core import config
from revision_ray.core.errors import ConfigError

ROOT = Path(__file__).parents[1]

# A folder imports folders of lines above its own, never its neighbours.
LAYERS = [
    {"core"},
    {"data"},
    {"encode", "align"},
    {"geometry", "model"},
    {"report"},
    {"studies", "train", "evaluate", "serve"},
    {"miniature"},
    {"pipeline", "doctor"},
    {"jobs"},
]

# Mathematics, models, formats: they import no Ray, and nothing that does ...
RAY_FREE = ("align/", "encode/", "data/", "model/", "miniature/", "geometry/")
# ... but for the files that distribute the work of their folder.
DISTRIBUTED = {
    "align/apply.py",
    "align/fit.py",
    "align/fits.py",
    "align/map_reduce.py",
    "align/nearest.py",
    "data/finish.py",
    "data/imports.py",
    "encode/embed.py",
    "encode/pipeline.py",
    "miniature/documents.py",
    "miniature/language_model.py",
    "miniature/render.py",
    "miniature/study.py",
}


def files_of_the_repository() -> list[str]:
    """Paths of all files that git tracks or would track, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (ROOT / path).is_file()})


FILES = files_of_the_repository()
MODULES = [path for path in FILES if path.endswith(".py") and path.startswith(("revision_ray/", "jobs/"))]


def imports_of(source: str, path: str) -> list[str]:
    """Dotted names of every import statement in `source`, also those inside functions."""
    names = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@functools.cache
def imports_in(path: str) -> tuple[str, ...]:
    """The same of a file of the repository."""
    return tuple(imports_of((ROOT / path).read_text(), path))


def part_of(path: str) -> str:
    """The folder of the house that a module belongs to: `align`, `jobs`, or a single file's own name."""
    pieces = path.removesuffix(".py").split("/")
    return pieces[0] if pieces[0] == "jobs" else pieces[1]


def layer_of(part: str) -> int:
    heights = [height for height, parts in enumerate(LAYERS) if part in parts]
    assert heights, f"revision_ray/{part} has no place among the layers of this test"
    return heights[0]


def upward(path: str, names: Sequence[str]) -> list[str]:
    """The imports among `names` that a module at `path` must not have."""
    part = part_of(path)
    if part == "__init__":
        return [name for name in names if name.startswith("revision_ray")]
    wrong = [name for name in names if name.split(".")[0] == "jobs"]
    for name in names:
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "revision_ray" or other in ("", part):
            continue
        beside = layer_of(other) == layer_of(part)
        if beside or layer_of(other) > layer_of(part):
            wrong.append(name)
    return wrong


def packages(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_downward(path):
    assert upward(path, imports_in(path)) == []


def test_the_check_of_directions_sees_wrong_ones():
    source = (
        "def f():\n    from revision_ray.train import loop\nimport revision_ray.align.fit\nimport torch\n"
    )
    assert upward("revision_ray/serve/app.py", imports_of(source, "x")) == ["revision_ray.train.loop"]
    assert upward("revision_ray/data/shards.py", imports_of(source, "x")) == [
        "revision_ray.align.fit",
        "revision_ray.train.loop",
    ]
    assert upward("jobs/fit.py", imports_of(source, "x")) == []


def with_all_it_imports(path: str) -> set[str]:
    """`path` and every module of this repository that importing it can bring in."""
    seen: set[str] = set()
    todo = [path]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_in(path):
            module = name.replace(".", "/")
            candidates = {f"{module}.py", f"{module.rpartition('/')[0]}.py", f"{module}/__init__.py"}
            todo += candidates & set(MODULES)
    return seen


def ray_reached_from(path: str) -> list[str]:
    reached = with_all_it_imports(path)
    return [at for at in reached if "ray" in packages(imports_in(at))]


@pytest.mark.parametrize("path", MODULES)
def test_mathematics_and_models_know_no_ray(path):
    inner = path.removeprefix("revision_ray/")
    if inner.startswith(RAY_FREE) and inner not in DISTRIBUTED:
        assert ray_reached_from(path) == []


def test_every_exception_is_one():
    assert [inner for inner in DISTRIBUTED if not ray_reached_from(f"revision_ray/{inner}")] == []


def test_the_check_for_ray_sees_through_modules():
    assert "revision_ray/core/storage.py" in with_all_it_imports("revision_ray/data/shards.py")
    assert "ray" in packages(imports_of("def f():\n    from ray.data import Dataset", "x"))


FOLDERS = sorted(
    path.split("/")[1] for path in MODULES if re.fullmatch(r"revision_ray/\w+/__init__.py", path)
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_resolve_and_are_explained(folder):
    """Each name is imported from the folder, as the documentation shows it, and says what it is."""
    package = importlib.import_module(f"revision_ray.{folder}")
    assert package.__all__ == sorted(package.__all__) != []
    plain = str.__doc__
    values = {name: getattr(package, name) for name in package.__all__}
    silent = [name for name, value in values.items() if not value.__doc__ or (value.__doc__ == plain)]
    assert [name for name in silent if not isinstance(values[name], str)] == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("omegaconf", {"revision_ray/core/config.py"}),
        ("dill", set()),
        ("cloudpickle", set()),
        ("joblib", set()),
    ],
)
def test_one_file_alone_may_import(package, allowed):
    importers = {path for path in MODULES if package in packages(imports_in(path))}
    assert importers <= allowed


@pytest.mark.parametrize("path", MODULES)
def test_one_file_alone_unpickles(path):
    """Others may name the error that a refused file raises, and nothing else of the module."""
    tree = ast.parse((ROOT / path).read_text(), path)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    }
    from_import = {name for name in imports_in(path) if name.startswith("pickle.")}
    if path != "revision_ray/data/imports.py":
        assert used | {name.removeprefix("pickle.") for name in from_import} <= {"UnpicklingError"}


def test_no_file_names_a_path_of_a_machine():
    """Nor this checkout's place, nor a home directory: a clone elsewhere must read the same."""
    # The cluster's containers have the user `ray`, its machines the user `ubuntu`.
    home = re.compile(r"(?<![\w.])/(?:home/(?!ray\b|ubuntu\b)|Users/|root/)\w")
    wrong = []
    for path in FILES:
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        if path != "tests/test_architecture.py" and (str(ROOT) in text or home.search(text)):
            wrong.append(path)
    assert wrong == []


# --- README -----------------------------------------------------------------------------------------------


def tree_in(markdown: str) -> dict[str, str]:
    """path -> explanation of every line of the first fenced block below a heading that says "tree".

    Depth is the width of the indentation, drawn with spaces or with box characters; a line without an
    explanation is a folder's, or stands beside others that are listed with it (`a.py  b.py`).
    """
    section = re.search(r"^#+ [^\n]*\btree\b[^\n]*\n(.*)", markdown, re.IGNORECASE | re.DOTALL | re.MULTILINE)
    assert section, "the README has no heading with the word 'tree'"
    block = re.search(r"^```[^\n]*\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    assert block, "no fenced block follows the README's tree heading"
    tree: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        found = re.match(r"([\s│├└─|`]*)(\S.*?)?(?:\s+#\s*(.*))?$", line)
        assert found, line
        indent, names, explanation = len(found[1]), found[2], found[3] or ""
        if not names or names in (".", "./"):
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        folder = parents[-1][1] if parents else ""
        for name in names.split():
            path = folder + name
            assert path not in tree, f"{path} stands in the README's tree twice"
            tree[path] = explanation
        if names.endswith("/"):
            parents.append((indent, folder + names))
    return tree


@pytest.mark.parametrize(
    "drawn",
    [
        "Makefile  # targets\nsrc/  # code\n  a.py  # one\n  deep/\n    b.py  # two\ntests/\n  s.py  t.py\n",
        ".\n├── Makefile  # targets\n├── src/  # code\n│   ├── a.py  # one\n│   └── deep/\n"
        "│       └── b.py  # two\n└── tests/\n    ├── s.py\n    └── t.py\n",
    ],
)
def test_a_tree_is_read_as_drawn(drawn):
    assert tree_in(f"# Title\n```\nnot this\n```\n## The tree\nwords\n\n```text\n{drawn}```\n") == {
        "Makefile": "targets",
        "src/": "code",
        "src/a.py": "one",
        "src/deep/": "",
        "src/deep/b.py": "two",
        "tests/": "",
        "tests/s.py": "",
        "tests/t.py": "",
    }


def test_the_readme_tree_is_the_disk():
    """Both ways: every listed path exists, and every file is listed, or its folder as a whole."""
    tree = tree_in((ROOT / "README.md").read_text())
    missing = [path for path in tree if not (ROOT / path).exists()]
    assert missing == [], "the README lists what is not there"
    closed = tuple(
        path
        for path in tree
        if path.endswith("/") and not any(other.startswith(path) and other != path for other in tree)
    )
    skipped = ("__init__.py", ".gitignore", "py.typed")
    unlisted = [
        path
        for path in FILES
        if path not in tree and not path.startswith(closed) and not path.endswith(skipped)
    ]
    assert unlisted == [], "the README does not list what is there"
    unexplained = [path for path in tree if path.endswith(".py") and not tree[path]]
    assert unexplained == [], "a file without a line that says what it does"


# --- jobs and configs -------------------------------------------------------------------------------------

JOBS = [path for path in FILES if re.fullmatch(r"jobs/\w+\.py", path)]
CONFIGS = [path for path in FILES if re.fullmatch(r"configs/\w+\.yaml", path)]


def schema_of(job: str) -> type:
    """The schema of `run_job(Schema, function)`, the last statement of every job."""
    source = (ROOT / job).read_text()
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.If), f"{job}: expected `if __name__ == '__main__'` at the end"
    assert ast.unparse(last.test) == "__name__ == '__main__'", job
    call = next(node for node in ast.walk(last) if isinstance(node, ast.Call))
    assert ast.unparse(call.func).endswith("run_job"), f"{job}: expected run_job(Schema, function)"
    spec = importlib.util.spec_from_file_location("job_" + Path(job).stem, ROOT / job)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # `inspect.getsource`, which reads the explanations, looks the module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, ast.unparse(call.args[0]))


# Named for what they make.
CHAINS = {"demo": "pipeline"}


def job_of(path: str) -> str:
    """`configs/fit_large.yaml` is a run of `jobs/fit.py`: the longest job name that it begins with."""
    stem = CHAINS.get(Path(path).stem, Path(path).stem)
    named = [job for job in JOBS if re.match(rf"{Path(job).stem}(_|$)", stem)]
    assert named, f"{path}: no job has this name; expected one of {JOBS}"
    return max(named, key=len)


@pytest.mark.parametrize("path", JOBS)
def test_a_job_is_a_screen_and_explains_every_key(path):
    assert len((ROOT / path).read_text().splitlines()) <= 60
    schema = schema_of(path)
    assert schema.__doc__, f"{schema.__name__} has no docstring for --help"
    silent = [key for key, _, _, explanation in config.keys(schema) if not explanation]
    assert silent == [], "keys that --help cannot explain"


def placeholder(type_name: str) -> str:
    """Some value of a required key's type."""
    if type_name.startswith("Literal["):
        return ast.literal_eval(type_name.removeprefix("Literal"))[0]
    return "[x]" if type_name.startswith("list") else "x"


# Of these keys one must be given (texts or images, model or compare), so none is required by itself.
ALTERNATIVES = {"jobs/embed.py": ["texts=x"], "jobs/evaluate.py": ["model=x"]}


@pytest.mark.parametrize("path", CONFIGS)
def test_a_yaml_loads_into_the_schema_of_its_job(path):
    """All but the values that no file can know, such as where the data lies: those are given here."""
    schema = schema_of(job_of(path))
    types = {key: name for key, name, default, _ in config.keys(schema) if default == "required"}
    argv = [str(ROOT / path), *ALTERNATIVES.get(job_of(path), [])]
    for _ in range(len(types) + 1):
        try:
            config.load(schema, argv)
            return
        except ConfigError as error:
            missing = re.match(r"([\w.]+): a value is required", str(error))
            if not missing:
                raise
        argv.append(f"{missing[1]}={placeholder(types[missing[1]])}")
    raise AssertionError(f"{argv}: still incomplete")


def test_every_job_has_a_yaml():
    assert {job_of(path) for path in CONFIGS} == set(JOBS)
