"""Typed job configuration from one YAML and `key=value` overrides. The only OmegaConf import."""

import ast
import dataclasses
import difflib
import inspect
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from revision_ray import storage
from revision_ray.errors import ConfigError, RevisionError

__all__ = ["MISSING", "load", "run_job", "save_resolved", "to_yaml"]

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
    try:
        merged = OmegaConf.structured(schema)
        if yamls:
            merged = OmegaConf.merge(merged, OmegaConf.create(_read_yaml(yamls[0])))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(overrides))
        resolved = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value is required; give it as {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, schema)) from error
    assert isinstance(resolved, schema)
    return resolved


def _read_yaml(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8")
    except RevisionError as error:
        raise ConfigError(f"configuration file {uri}: {error}") from error


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    text = str(error).splitlines()[0]
    if error.full_key and error.full_key not in text:
        text = f"{error.full_key}: {text}"
    if "Did you mean" not in text and "not in" in text and error.full_key:
        near = difflib.get_close_matches(error.full_key, [key for key, *_ in _keys(schema)], n=1)
        text += f" Did you mean: '{near[0]}'?" if near else ""
    return f"{text} (run with --help for every key)"


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_resolved(config: Any, uri: str) -> None:
    """The resolved configuration stands at `uri`, written atomically."""
    storage.write_bytes(uri, to_yaml(config).encode())


def _keys(schema: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, explanation) of every field, nested dataclasses unfolded."""
    explanations = _field_docstrings(schema)
    rows = []
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        nested = field.type if isinstance(field.type, type) else None
        if nested is not None and dataclasses.is_dataclass(nested):
            rows += _keys(nested, key + ".")
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        shown = "required" if default in (MISSING, dataclasses.MISSING) else json.dumps(default, default=str)
        type_name = getattr(field.type, "__name__", None) if isinstance(field.type, type) else None
        type_text = (type_name or str(field.type)).replace("typing.", "")
        rows.append((key, type_text, shown, explanations.get(field.name, "")))
    return rows


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
    for key, type_text, default, explanation in _keys(schema):
        lines.append(f"  {key}: {type_text} = {default}")
        lines += textwrap.wrap(explanation, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def run_job(schema: type[Schema], job: Callable[[Schema], str]) -> None:
    """Parse the command line into `schema`, run `job`, say the result; exit 2 on an error of the user's.

    `job` returns one line that says where the result is. Errors of ours keep their traceback and exit 1.
    """
    argv = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(help_text(schema, os.path.relpath(sys.argv[0])) + "\n")
        return
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        result = job(load(schema, argv))
    except RevisionError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
    sys.stdout.write(result.rstrip("\n") + "\n")
