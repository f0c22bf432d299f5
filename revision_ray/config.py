"""Typed job configuration from one YAML and `key=value` overrides. The only OmegaConf import."""

import ast
import dataclasses
import difflib
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from revision_ray import logs, storage
from revision_ray.errors import ConfigError, RevisionError

__all__ = ["MISSING", "from_mapping", "help_text", "keys", "load", "run_job", "save_resolved", "to_yaml"]

Schema = TypeVar("Schema")


def load(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """The run that `[YAML] key=value ...` describes, checked against the dataclass `schema`.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type, missing value, unreadable YAML.
    """
    yamls = [argument for argument in argv if "=" not in argument]
    overrides = [argument for argument in argv if "=" in argument]
    if len(yamls) > 1:
        raise ConfigError(f"expected one YAML file and key=value overrides, found {len(yamls)}: {yamls}")
    for argument in yamls:
        if argument.startswith("-"):
            raise ConfigError(f"unknown option {argument!r}; options are key=value, or --help")
    merged = OmegaConf.structured(schema)
    for argument in yamls + overrides:
        part = _read_override(argument) if argument in overrides else _read_yaml(argument)
        merged = _merged(merged, part, argument, schema)
    return _resolved(merged, schema)


def from_mapping(schema: type[Schema], values: Mapping[str, Any], name: str) -> Schema:
    """The run that nested mappings describe, as another tool read them from its own file; `name` says where.

    Raises:
        ConfigError: as `load`.
    """
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
        raise ConfigError(f"{name}: {error}; a list is given as a whole: key=[a,b]") from error
    assert isinstance(both, DictConfig)
    return both


def _resolved(merged: DictConfig, schema: type[Schema]) -> Schema:
    try:
        resolved = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key}: a value is required; give it as {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    assert isinstance(resolved, schema)
    return resolved


def _read_yaml(uri: str) -> DictConfig:
    try:
        parsed = OmegaConf.create(storage.read_bytes(uri).decode("utf-8"))
    except RevisionError as error:
        raise ConfigError(f"configuration file {uri}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration file {uri}: not UTF-8 text: {error}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"configuration file {uri}: line {line}: not YAML: {error.problem}") from error
    if not isinstance(parsed, DictConfig):
        raise ConfigError(f"configuration file {uri}: expected a mapping of keys to values, found a list")
    return parsed


def _read_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except MarkedYAMLError as error:
        raise ConfigError(f"{override}: the value is not YAML: {error.problem}; quote it") from error


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    text = str(error).splitlines()[0]
    if error.full_key and error.full_key not in text:
        text = f"{error.full_key}: {text}"
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
        for nested in inner:
            assert isinstance(nested, type)
            rows += keys(nested, value if isinstance(value, nested) else None, key + ".")
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


def help_text(schema: type, program: str) -> str:
    """Every key of `schema` with its type, default and explanation."""
    about = inspect.cleandoc(schema.__doc__ or "").strip()
    lines = [f"usage: python {program} [CONFIG.yaml] key=value ...", "", about, "", "keys:"]
    for key, type_text, default, explanation in keys(schema):
        lines.append(f"  {key}: {type_text} = {default}")
        lines += textwrap.wrap(explanation, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def run_job(
    schema: type[Schema], job: Callable[[Schema], str], flags: Mapping[str, str] | None = None
) -> None:
    """Parse the command line into `schema`, run `job`, say the result; exit 2 on an error of the user's.

    `job` returns one line that says where the result is. `flags` are options that stand for a key=value.
    Errors of ours keep their traceback and exit 1.
    """
    argv = [(flags or {}).get(argument, argument) for argument in sys.argv[1:]]
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(help_text(schema, os.path.relpath(sys.argv[0])) + "\n")
        return
    logs.set_up()
    try:
        config = load(schema, argv)
        stage = os.path.splitext(os.path.basename(sys.argv[0]))[0]
        with logs.working_for(stage, getattr(config, "output", "")):
            result = job(config)
    except RevisionError as error:
        sys.stderr.write(logs.without_secrets(f"{type(error).__name__}: {error}\n"))
        sys.exit(2)
    sys.stdout.write(result.rstrip("\n") + "\n")
