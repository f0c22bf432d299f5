"""Pages that the documentation site makes from the code while it is built, and equations as MathML.

MkDocs calls the functions `on_...` (see `hooks` in mkdocs.yml). What they make is not committed.
"""

import ast
import asyncio
import html
import importlib
import inspect
import json
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from revision_ray.core import config as job_config  # noqa: E402

# Folders of the library in the order of the data, which is the order of the Python pages.
FOLDERS = ("data", "encode", "align", "geometry", "report", "studies", "model", "train", "evaluate", "serve",
           "pipeline", "doctor", "core", "miniature")  # fmt: skip

# Pages of wide tables, which get the room of the table of contents.
WIDE = ("results/claims.md", "results/faults.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    pages = {
        "Jobs": ["reference/jobs/index.md", *(f"reference/jobs/{name}.md" for name in job_names())],
        "Python API": ["reference/python/index.md", *(f"reference/python/{name}.md" for name in FOLDERS)],
    }
    for section in config.nav or []:
        for entry in section.get("Reference", []):
            for title in entry.keys() & pages.keys():
                entry[title] = pages[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files of the site."""
    for path, text in {**job_pages(), **python_pages(), **root_pages(), **rest_page()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, **_: Any) -> str:
    """Refuse a page that would load something from another server."""
    tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", output)
    loads = [tag for tag in tags if re.search(r"""\b(?:src|href)=["']?(?:https?:)?//""", tag)]
    outside = [tag for tag in loads if 'rel="canonical"' not in tag]
    if outside:
        raise PluginError(f"a page loads from elsewhere: {outside[0]}")
    return output


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn fenced blocks of the language `math` into MathML, which browsers draw without any script."""
    if page.file.src_uri == "guides/evaluate.md":
        markdown = markdown.replace("<!-- benchmarks -->", benchmark_table())
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return re.sub(r"^```math\n(.*?)^```$", _mathml, markdown, flags=re.DOTALL | re.MULTILINE)


def _mathml(block: re.Match) -> str:
    equations = [part for part in re.split(r"\\\\\s*\n", block[1].strip()) if part]
    return "\n\n".join(convert(equation.strip(), display="block") for equation in equations)


def root_pages() -> dict[str, str]:
    """Return the pages whose text lies in the root of the repository."""
    return {f"{name.lower()}.md": (ROOT / f"{name}.md").read_text() for name in ("CONTRIBUTING", "CHANGELOG")}


# --- jobs ---------------------------------------------------------------------------------------------------


def job_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def job_schema(name: str) -> type:
    """Return the dataclass that a job hands to `run_job`."""
    with mock.patch.object(job_config, "run_job") as run_job:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    return run_job.call_args.args[0]


def job_pages() -> dict[str, str]:
    """Return one page for each job, with all its keys, and a page that lists the jobs."""
    pages = {}
    rows = ["| job | what it does | what it must be given |", "| --- | --- | --- |"]
    for name in job_names():
        schema = job_schema(name)
        about = " ".join(inspect.cleandoc(schema.__doc__ or "").split())
        keys = job_config.keys(schema)
        pages[f"reference/jobs/{name}.md"] = _job_page(name, about, keys)
        needed = ", ".join(
            f"`{key}`" for key, _, default, _ in keys if default == "required" and "." not in key
        )
        rows.append(f"| [`{name}`]({name}.md) | {_cell(about)} | {needed} |")
    pages["reference/jobs/index.md"] = (
        "# Jobs\n\n`python jobs/NAME.py configs/NAME.yaml key=value ...` runs a job. `--help` prints the "
        "keys of these pages. [Configuration](../configuration.md) says how values are written.\n\n"
        + "\n".join(rows)
        + "\n"
    )
    return pages


def _job_page(name: str, about: str, keys: Sequence[tuple[str, str, str, str]]) -> str:
    longer = [other for other in job_names() if other.startswith(name) and other != name]
    configs = [
        path.name
        for path in sorted((ROOT / "configs").glob("*.yaml"))
        if re.match(rf"{name}(_|\.)", path.name) and not path.name.startswith(tuple(longer))
    ] + ["demo.yaml"] * (name == "pipeline")
    parts = [
        f"{_NO_CONTENTS}# {name}",
        about,
        f"```bash\npython jobs/{name}.py configs/{configs[0]} key=value ...\n```",
    ]
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for key, kind, default, explanation in keys:
        if re.match(r"stages\.NAME\.\w+\.", key):  # the other jobs' own keys, which have pages of their own
            continue
        stage = re.fullmatch(r"stages\.NAME\.(\w+)", key)
        linked = (
            f"The keys of [{stage[1]}]({stage[1]}.md)." if stage and stage[1] in job_names() else explanation
        )
        shown = "required" if default == "required" else f"`{default}`"
        rows.append(f"| `{key}` | {_type(kind)} | {shown} | {_cell(linked)} |")
    parts += ["\n".join(rows), "## Example files"]
    for config in configs:
        block = f"```yaml\n{(ROOT / 'configs' / config).read_text()}```"
        parts.append(f'??? note "configs/{config}"\n\n{textwrap.indent(block, "    ")}')
    return "\n\n".join(parts) + "\n"


# Wide tables get the room of the table of contents.
_NO_CONTENTS = "---\nhide: [toc]\n---\n\n"


def _type(kind: str) -> str:
    """Return a type as a table shows it: the values of a Literal, a class without its module."""
    kind = re.sub(r"revision_ray(\.\w+)*\.(\w+)", r"\2", kind).replace(
        "Optional[Literal[0, 1]]", "Literal[0, 1] | None"
    )
    values = re.fullmatch(r"Literal\[(.*)\]", kind)
    return ", ".join(f"`{value}`" for value in ast.literal_eval(f"[{values[1]}]")) if values else f"`{kind}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def benchmark_table() -> str:
    """Return the benchmarks that the evaluate job knows, with what it reads of each."""
    from revision_ray.evaluate.benchmarks import BENCHMARKS

    rows = ["| benchmark | splits | columns of its files |", "| --- | --- | --- |"]
    for name, spec in BENCHMARKS.items():
        columns = ", ".join(f"`{column}`" for column in spec.columns)
        rows.append(f"| `{name}` | {', '.join(spec.splits)} | {columns} |")
    return "\n".join(rows)


# --- Python API ---------------------------------------------------------------------------------------------


def python_pages() -> dict[str, str]:
    """Return a page for each folder of the library: its public names, and what its modules hold."""
    pages, rows = {}, []
    for folder in FOLDERS:
        package = importlib.import_module(f"revision_ray.{folder}")
        summary = (inspect.getdoc(package) or "").split("\n\n")[0].replace("\n", " ")
        names = getattr(package, "__all__", [])
        parts = [f"# revision_ray.{folder}", summary]
        if names:
            functions = [name for name in names if name.islower()]
            shown = ", ".join((functions or names)[:2])
            parts.append(f"```python\nfrom revision_ray.{folder} import {shown}\n```")
            parts.append("## Public names")
            parts += [f"::: {_place(package, name)}" for name in names]
        parts.append(
            "## Modules\n\n| module | what is in it |\n| --- | --- |\n" + "\n".join(_modules(folder))
        )
        pages[f"reference/python/{folder}.md"] = "\n\n".join(parts) + "\n"
        listed = ", ".join(f"`{name}`" for name in names) or "no public names"
        rows.append(f"| [`revision_ray.{folder}`]({folder}.md) | {_cell(summary)} | {listed} |")
    pages["reference/python/index.md"] = (
        _NO_CONTENTS
        + "# Python API\n\nEach folder of the library exports its public names. Everything else may move "
        "between versions.\n\n| folder | | names |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )
    return pages


def _place(package: ModuleType, name: str) -> str:
    """Return the dotted name under which a public name is defined, for mkdocstrings to find it."""
    value = getattr(package, name)
    if isinstance(value, ModuleType):
        return value.__name__
    module = getattr(value, "__module__", "")
    if module.startswith("revision_ray.") and getattr(value, "__name__", "") == name:
        return f"{module}.{name}"
    for path in sorted((ROOT / "revision_ray" / package.__name__.rpartition(".")[2]).glob("*.py")):
        tree = ast.parse(path.read_text())
        targets = [
            target
            for node in tree.body
            for target in ([node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", []))
        ]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return f"{package.__name__}.{path.stem}.{name}"
    return f"{package.__name__}.{name}"


def _modules(folder: str) -> Iterator[str]:
    for path in sorted((ROOT / "revision_ray" / folder).glob("*.py")):
        if path.stem != "__init__":
            about = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
            yield f"| `{path.stem}` | {_cell(about)} |"


# --- REST API -----------------------------------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of the server, without a model behind it."""
    from revision_ray.serve import http
    from revision_ray.serve.http import key_digests
    from revision_ray.serve.settings import ServeJob

    async def nothing() -> None: ...

    key = "documentation"
    ingress = SimpleNamespace(
        job=ServeJob(model="MODEL"), digests=key_digests(key), check_started=nothing, gate=http.RequestGate()
    )
    app: Any = http.asgi_app(ingress)  # pyright: ignore[reportArgumentType]
    body = bytearray()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        body.extend(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/openapi.json", "raw_path": b"/openapi.json", "query_string": b"", "root_path": "",
        "headers": [(b"authorization", f"Bearer {key}".encode())], "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return json.loads(body)


def rest_page() -> dict[str, str]:
    """Return the page of the REST API: routes, answers and every field of the bodies."""
    document = openapi()
    parts = [
        "# REST API",
        "The server speaks the OpenAI API with a few fields of its own. This page is made from its "
        "`/openapi.json`. [Serve](../guides/serve.md) says what each field does.",
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}")
            parts.append(route.get("description") or route["summary"])
            content = route.get("requestBody", {}).get("content", {})
            if content:
                parts.append(f"Body: {_schema(content['application/json']['schema'])}")
            parts.append("\n".join(["| status | answer |", "| --- | --- |", *_answers(route["responses"])]))
    parts.append("## Bodies")
    for name, schema in sorted(document["components"]["schemas"].items()):
        if "properties" not in schema:
            continue
        parts.append(f"### {name}")
        parts.append(schema.get("description", ""))
        required = set(schema.get("required", []))
        rows = ["| field | type | |", "| --- | --- | --- |"]
        for field, about in schema["properties"].items():
            text = about.get("description", "") + (" Required." if field in required else "")
            rows.append(f"| `{field}` | {_cell(_schema(about))} | {_cell(text.strip())} |")
        parts.append("\n".join(rows))
    return {"reference/rest.md": "\n\n".join(part for part in parts if part) + "\n"}


def _answers(responses: dict[str, Any]) -> Iterator[str]:
    """Yield a row for each kind of answer, with all its statuses."""
    statuses: dict[str, list[str]] = {}
    for status, answer in responses.items():
        content = answer.get("content", {}).items()
        kinds = ", ".join(f"{_schema(body.get('schema', {}))} ({kind})" for kind, body in content)
        statuses.setdefault(kinds or answer.get("description", ""), []).append(status)
    for kinds, listed in statuses.items():
        yield f"| {', '.join(listed)} | {_cell(kinds)} |"


def _schema(schema: dict[str, Any]) -> str:
    """Return a JSON schema in a few words, with links to the bodies of this page."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_schema(part) for part in schema[key]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_schema(schema.get('items', {}))}"
    return html.escape(str(schema.get("type", "any")))
