"""Typed job configuration from one YAML and `key=value` overrides. The only OmegaConf import."""

import ast
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from revision_ray import fence, logs, storage, yaml_values
from revision_ray.errors import ConfigError, RevisionError, quote, shorten, user_error

__all__ = [
    "MISSING",
    "from_mapping",
    "help_text",
    "keys",
    "load",
    "run_job",
    "save_resolved",
    "spelled_out",
    "to_yaml",
]

TEXTS = (
    "Text (str) is taken as typed, also 007, no or a #2. Quotes around all of it are left out; ${KEY} stands",
    "for another key's value; null is no value where the type allows None. In lists [a,b], mappings {a: b},",
    "quote text that holds a comma, a bracket, a colon and a space, or a #. In a YAML file quote text that",
    "YAML reads otherwise: 007, no, ~, 1e3, 2026-01-01.",
)
Schema = TypeVar("Schema")
Verbs = Mapping[str, Sequence[str]]  # of a command line, with the keys of the words that follow each


def load(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """The run that `[YAML] key=value ...` describes, checked against the dataclass `schema`.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type, missing value, unreadable YAML.
    """
    overrides = [argument for argument in argv if _is_override(argument)]
    yamls = [argument for argument in argv if not _is_override(argument)]
    if len(yamls) > 1:
        raise ConfigError(
            f"expected one YAML file and key=value overrides, found {len(yamls)}: {quote(yamls)}"
        )
    for argument in yamls:
        if argument.startswith("-"):
            raise ConfigError(f"unknown option {quote(argument)}; options are key=value, or --help")
    merged = OmegaConf.structured(schema)
    for argument in yamls + overrides:
        read = _read_override if argument in overrides else _read_yaml
        part = read(argument, schema)
        merged = _merged(merged, part, shorten(argument), schema)
    return _resolved(merged, schema)


def _is_override(argument: str) -> bool:
    """Whether it is key=value, and no URI with a query."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "://" not in key


def from_mapping(schema: type[Schema], values: Mapping[str, Any], name: str) -> Schema:
    """The run that nested mappings describe, as another tool read them from its own file; `name` says where.

    Raises:
        ConfigError: as `load`; also where that tool made a number, say, of what is text here.
    """
    yaml_values.check_texts(values, schema, "", name)
    try:
        part = OmegaConf.create(dict(values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {_explain(error, schema)}") from error
    return _resolved(_merged(OmegaConf.structured(schema), part, name, schema), schema)


def _merged(merged: DictConfig, part: DictConfig, name: str, schema: type) -> DictConfig:
    try:
        both = OmegaConf.merge(merged, part)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {_explain(error, schema)}") from error
    except TypeError as error:
        # OmegaConf's answer to a mapping where a list is expected, and the reverse.
        raise ConfigError(f"{name}: {shorten(error)}; a list is given as a whole: key=[a,b]") from error
    assert isinstance(both, DictConfig)
    return both


def _resolved(merged: DictConfig, schema: type[Schema]) -> Schema:
    try:
        resolved = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key or ""
        said = f"{key}: a value is required; give it as {key}=VALUE{_other_entry(merged, key)}"
        raise ConfigError(said) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    assert isinstance(resolved, schema)
    return resolved


def _other_entry(merged: DictConfig, key: str) -> str:
    """Of a key in a mapping whose entries users name: that entry with the nearest name, which was meant."""
    for length in range(1, len(names := key.split("."))):
        above = OmegaConf.select(merged, ".".join(names[:length]), default=None)
        if isinstance(above, DictConfig) and OmegaConf.get_type(above) is dict:
            others = [str(name) for name in above if name != names[length]]
            near = difflib.get_close_matches(names[length], others, n=1)
            return f" (or was {'.'.join([*names[:length], near[0]])} meant?)" if near else ""
    return ""


def _read_yaml(uri: str, schema: type) -> DictConfig:
    name = f"configuration file {shorten(uri)}"
    try:
        text = storage.read_bytes(uri).decode("utf-8")
        parsed = OmegaConf.create(text)  # refuses recursive aliases, duplicate keys and the like
    except RevisionError as error:
        raise ConfigError(f"{name}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}: line {line}: not YAML: {shorten(error.problem)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {shorten(' '.join(str(error).split()))}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {_explain(error, schema)}") from error
    values = yaml_values.of_file(text, schema, name)
    if not isinstance(parsed, DictConfig) or not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else quote(text.strip(), 100)
        raise ConfigError(f"{name}: expected a mapping of keys to values, found {found}")
    return OmegaConf.create(values)


def _read_override(override: str, schema: type) -> DictConfig:
    part = OmegaConf.create({})
    try:
        OmegaConf.update(part, override.partition("=")[0], yaml_values.of_override(override, schema))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{shorten(override)}: the value is not YAML: {shorten(problem)}; quote it"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{shorten(override)}: {_explain(error, schema)}") from error
    return part


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    text = shorten(str(error).splitlines()[0], 300)
    if error.full_key and error.full_key not in text:
        text = f"{shorten(error.full_key)}: {text}"
    if "Did you mean" not in text and "not in" in text and error.full_key:
        near = difflib.get_close_matches(error.full_key, [key for key, *_ in keys(schema)], n=1)
        text += f" Did you mean: '{near[0]}'?" if near else ""
    return f"{text} (run with --help for every key)"


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_resolved(config: Any, uri: str) -> None:
    """The resolved configuration stands at `uri`, written atomically."""
    storage.write_bytes(uri, to_yaml(config).encode())


def keys(schema: type, default: Any = None, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, explanation) of every field, nested dataclasses unfolded.

    Defaults are those of the instance `default` where there is one: a job may default an inner key otherwise
    than the inner dataclass does.
    """
    explanations = _field_docstrings(schema)
    rows = []
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        value = _default_of(field) if default is None else getattr(default, field.name)
        inner = [t for t in (field.type, *get_args(field.type)) if dataclasses.is_dataclass(t)]
        if not inner or value is None:
            shown = "required" if value == MISSING else json.dumps(value, default=str)
            name = field.type.__name__ if field.type in (str, int, float, bool) else str(field.type)
            rows.append((key, name.replace("typing.", ""), shown, explanations.get(field.name, "")))
        # In a mapping every entry has a name of the user's.
        below = f"{key}.NAME." if get_origin(field.type) is dict else f"{key}."
        for nested in inner:
            assert isinstance(nested, type)
            rows += keys(nested, value if isinstance(value, nested) else None, below)
    return rows


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def _field_docstrings(schema: type) -> dict[str, str]:
    """Explanations: the string literal that follows a field in the class body (base classes included)."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def help_text(schema: type, program: str, verbs: Verbs | None = None) -> str:
    """Every key of `schema` with its type, default and explanation."""
    about = inspect.cleandoc(schema.__doc__ or "").strip()
    led = " | ".join(" ".join([verb, *map(str.upper, names)]) for verb, names in (verbs or {}).items())
    lead = f"[{led}] " if led else ""
    lines = [f"usage: python {program} {lead}[CONFIG.yaml] key=value ...", "", about, "", *TEXTS, "", "keys:"]
    for key, type_text, default, explanation in keys(schema):
        lines.append(f"  {key}: {type_text} = {default}")
        lines += textwrap.wrap(explanation, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def spelled_out(argv: Sequence[str], verbs: Verbs) -> list[str]:
    """`argv` with a leading verb and the words that follow it as key=value: show X is action=show name=X."""
    if not argv or argv[0] not in verbs:
        return list(argv)
    given, rest = [f"action={argv[0]}"], list(argv[1:])
    for key in verbs[argv[0]]:
        if not rest or "=" in rest[0] or rest[0].startswith("-") or rest[0].endswith((".yaml", ".yml")):
            break
        # Quoted: a word is text, also where it looks like YAML.
        given.append(f"{key}={json.dumps(rest.pop(0), ensure_ascii=False)}")
    return given + rest


def with_flags(argv: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """`argv` with each of the `flags` as the key=value that it stands for; a {} in it is the flag's value,
    the word that follows or stands behind its "=".

    Raises:
        ConfigError: a flag's value is missing.
    """
    given, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        meaning = flags.get(name, "")
        if not meaning or (equals and "{}" not in meaning):
            given.append(word)
            continue
        if "{}" in meaning and not equals:
            if not words or words[0].startswith("-"):
                raise ConfigError(f"{name}: a value is required behind it")
            value = words.pop(0)
        given.append(meaning.replace("{}", value))
    return given


def run_job(
    schema: type[Schema],
    job: Callable[[Schema], str],
    flags: Mapping[str, str] | None = None,
    verbs: Verbs | None = None,
) -> None:
    """Parse the command line into `schema`, run `job`, say the result; exit 2 on an error of the user's.

    `job` returns one line that says where the result is. `flags` are options that stand for a key=value (see
    `with_flags`). `verbs` are words that may lead, each for action=VERB, with the keys that may follow
    without their names. While it runs, no other job writes to its `output`. Errors of ours keep their
    traceback and exit 1.
    """
    argv = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(help_text(schema, os.path.relpath(sys.argv[0]), verbs) + "\n")
        return
    logs.set_up()
    sys.excepthook = _without_secrets
    try:
        loaded = load(schema, with_flags(spelled_out(argv, verbs or {}), flags or {}))
        stage = os.path.splitext(os.path.basename(sys.argv[0]))[0]
        with _alone(loaded), logs.working_for(stage, getattr(loaded, "output", "")):
            result = job(loaded)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # what Ray's processes still write comes before the last line
        if logs.shows_traces():
            _without_secrets(type(error), error, error.__traceback__)
        said = re.sub(r"\s*\n\s*", " ", f"{type(known).__name__}: {known}".rstrip())
        sys.stderr.write(logs.without_secrets(f"{said}\n"))
        sys.exit(2)
    sys.stdout.write(logs.without_secrets(result.rstrip("\n") + "\n"))


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback as Python writes it, but for secrets."""
    sys.stderr.write(logs.without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _alone(job: Any) -> AbstractContextManager[None]:
    """The job is the only writer to its output. One that only shows something writes nothing."""
    shows = getattr(job, "inspect", 0) or getattr(job, "dry_run", False)
    output = getattr(job, "output", "")
    return fence.writing(output) if output and not shows else nullcontext()
