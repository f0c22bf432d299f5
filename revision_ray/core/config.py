"""Load typed job configuration from one YAML file and `key=value` overrides. The only import of OmegaConf.

YAML gives unquoted text types of its own: it reads 007 as a number, `no` as false and 2026-01-01 as a date.
Here the schema decides. Where it expects text, an override is taken as typed, and an unquoted word in a file
that YAML would convert is refused.
"""

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
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import NoneType, TracebackType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from revision_ray.core import artifact, logs, storage
from revision_ray.core.errors import ConfigError, RevisionError, quote, shorten, user_error

# The C loader accepts s3://bucket/a?b=c in a list, the Python loader does not. OmegaConf uses it, too.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def of_file(text: str, schema: type, name: str) -> Any:
    """Parse a YAML file into values for the keys of the dataclass `schema`; an empty file gives {}.

    Raises:
        ConfigError: unquoted text that YAML would convert; a key that occurs twice.
    """
    root = yaml.compose(text, _LOADER)
    return _Reader(name, text).value(root, schema, "") if root else {}


def of_override(override: str, schema: type) -> Any:
    """Parse the value of a key=value override by its type in the dataclass `schema`; text stays as typed.

    Raises:
        ConfigError: the value has a comment, or text of a list that has a meaning in YAML.
        YAMLError: a list or mapping is not YAML.
    """
    key, _, text = override.partition("=")
    type_ = _type_of(schema, key)
    may_nest = any(member is Any or get_origin(member) in (list, tuple, dict) for member in _members(type_))
    nested = may_nest and text.lstrip()[:1] in ("[", "{")
    if _takes_text(type_) and not nested and not _is_quoted(text):
        return None if text == "null" and {NoneType, Any} & {*_members(type_)} else _plain(text, type_)
    # Anchors, aliases and tags are for files only: here *.txt, &c and !x in a list must be quoted.
    for token in yaml.scan(text, _LOADER):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
            sign = text[token.start_mark.index]
            raise ConfigError(f"{override}: text that begins with {sign} has a meaning in YAML; quote it")
    root = yaml.compose(text, _LOADER)
    if root is None:
        return None
    if rest := text[root.end_mark.index :].strip():
        raise ConfigError(f"{override}: {rest!r} is a comment to YAML; quote the value, or leave that out")
    return _Reader(override, None).value(root, type_, key)


def check_texts(value: Any, type_: Any, key: str, name: str) -> None:
    """Check that values are text where the schema has text; a parser without the schema may convert it.

    Raises:
        ConfigError: another value stands where text is expected, or a key is not text.
    """
    if isinstance(value, Mapping):
        for below, inner in value.items():
            if not isinstance(below, str):
                raise ConfigError(f"{name}: {key}: the key {below!r} is no text; quote it")
            check_texts(inner, _type_below(type_, below), f"{key}.{below}".lstrip("."), name)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            check_texts(item, _type_of_items(type_), f"{key}[{place}]", name)
    elif not isinstance(value, str) and _takes_text(type_) and not {Any, type(value)} & {*_members(type_)}:
        raise ConfigError(
            f"{name}: {key}: found {value} ({type(value).__name__}) where text is expected; quote it there"
        )


def _type_of(schema: type, key: str) -> Any:
    """Return the type of the value at a dotted key of a dataclass; Any where there is no such key."""
    found: Any = schema
    for name in filter(None, re.split(r"[.\[\]]+", key)):
        found = _type_below(found, name)
    return found


def _type_below(type_: Any, name: str) -> Any:
    """Return the type of the value under `name` in a mapping or dataclass of this type."""
    for member in _members(type_):
        if dataclasses.is_dataclass(member):
            return typing.get_type_hints(member).get(name, Any)
        if get_origin(member) is dict:
            return get_args(member)[1]
    return Any


def _type_of_items(type_: Any) -> Any:
    """Return the type of the items of a list of this type; Any if unknown."""
    lists = [member for member in _members(type_) if get_origin(member) in (list, tuple)]
    return get_args(lists[0])[0] if lists else Any


def _members(type_: Any) -> tuple[Any, ...]:
    """Return the member types of a union, or the type itself if it is no union."""
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)


def _takes_text(type_: Any) -> bool:
    """Return whether this type accepts text; Any does."""
    return any(
        member in (str, Any) or any(isinstance(choice, str) for choice in _choices(member))
        for member in _members(type_)
    )


def _shape(member: Any) -> str:
    """Return in words whether a value of this type is a list, a mapping or a single value."""
    kind = get_origin(member) or member
    if kind in (list, tuple):
        return "a list"
    if kind is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return "anything" if kind in (Any, object) else "one value"


def _choices(member: Any) -> tuple[Any, ...]:
    return get_args(member) if get_origin(member) is Literal else ()


def _is_quoted(text: str) -> bool:
    """Return whether the whole text is one quoted YAML string."""
    if text[:1] not in ("'", '"') or text[-1:] != text[:1]:
        return False
    try:
        root = yaml.compose(text, _LOADER)
    except yaml.YAMLError:
        return False
    return isinstance(root, yaml.ScalarNode) and root.end_mark.index == len(text)


def _plain(text: str, type_: Any) -> str | int:
    """Return the text as typed, or an int where the type allows one and the text is its usual spelling."""
    number = {Any, int} & {*_members(type_)} and re.fullmatch(r"0|-?[1-9][0-9]*", text)
    return int(text) if number else text


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Converter of YAML nodes to values of the types that a schema declares."""

    name: str
    """Source of the YAML; error messages begin with it."""
    text: str | None
    """The whole text of a file; None for a command line, where words are taken as typed."""

    def value(self, node: yaml.Node, type_: Any, key: str) -> Any:
        """Return the value of `node` for a key of this type.

        Raises:
            ConfigError: unquoted text that YAML would convert; a key that occurs twice; a list, mapping or
                single value where another of these is expected.
        """
        if key:
            self._check_shape(node, type_, key)
        if isinstance(node, yaml.SequenceNode):
            items = _type_of_items(type_)
            return [self.value(item, items, f"{key}[{place}]") for place, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, type_, key)
        assert isinstance(node, yaml.ScalarNode)
        if node.style:  # quoted, or a block
            return node.value
        return self._text(node, type_, key) if _takes_text(type_) else self._other(node, key)

    def _check_shape(self, node: yaml.Node, type_: Any, key: str) -> None:
        """Raise ConfigError if the type does not accept a list, mapping or single value like `node`."""
        shapes = [_shape(member) for member in _members(type_)]
        found = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}.get(type(node), "one value")
        later = found == "one value" and (node.value in ("", "???") or "${" in node.value)
        null = isinstance(node, yaml.ScalarNode) and not node.style and _as_yaml(node) is None
        if found in shapes or "anything" in shapes or later or null:
            return
        forms = {"a list": f"{key}=[a,b]", "a mapping": f"{key}={{name: value}} or {key}.name=value"}
        expected = " or ".join(dict.fromkeys(shapes))
        hint = "".join(f"; give it as {form}" for shape, form in forms.items() if shape in shapes)
        raise ConfigError(f"{self._where(node)}: {key}: found {found}, expected {expected}{hint}")

    def _mapping(self, node: yaml.MappingNode, type_: Any, key: str) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        keys_are_text = any(get_origin(member) is dict for member in _members(type_))
        for key_node, below in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                parts = below.value if isinstance(below, yaml.SequenceNode) else [below]
                for part in parts:
                    merged = self._mapping(part, type_, key) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._where(key_node)}: found a list or mapping where a key is expected")
            name, inner = key_node.value, f"{key}.{key_node.value}".lstrip(".")
            if keys_are_text:
                self.value(key_node, str, inner)
            if name in own:
                raise ConfigError(f"{self._where(key_node)}: {inner}: this key was given before; remove one")
            own[name] = self.value(below, _type_below(type_, name), inner)
        return merged | own

    def _text(self, node: yaml.ScalarNode, type_: Any, key: str) -> Any:
        members, in_file = _members(type_), self.text is not None
        as_yaml = _as_yaml(node)
        if as_yaml is None and {NoneType, Any} & {*members} and (in_file or node.value == "null"):
            return None
        self._check_comment(node, key)
        taken = _plain(node.value, type_)
        if in_file and not isinstance(as_yaml, str) and isinstance(taken, str) and Any not in members:
            raise ConfigError(
                f"{self._where(node)}: {key}: found {node.value or 'nothing'}, which YAML reads as {as_yaml} "
                f"({type(as_yaml).__name__}), where text is expected; quote it: "
                f"{json.dumps(node.value, ensure_ascii=False)}"
            )
        return taken

    def _other(self, node: yaml.ScalarNode, key: str) -> Any:
        """Return a number, boolean or None, or else the text, which OmegaConf refuses later."""
        value = _as_yaml(node)
        if not isinstance(value, bool | int | float | NoneType):
            return node.value
        digits = node.value.replace("_", "")
        is_octal = re.fullmatch(r"[-+]?[0-9]+", digits) and int(digits) != value
        if is_octal or ":" in node.value:
            raise ConfigError(
                f"{self._where(node)}: {key}: found {node.value}, YAML reads it as {value}; write digits"
            )
        return value

    def _check_comment(self, node: yaml.ScalarNode, key: str) -> None:
        """Raise ConfigError if text is followed by, say, " #2", which may belong to it; "# " is a comment."""
        rest = self.text[node.end_mark.index :].splitlines()[:1] if self.text and node.value else []
        if rest and re.match(r"\s+#[^\s#]", rest[0]):
            raise ConfigError(
                f"{self._where(node)}: {key}: found {node.value} and behind it {rest[0].strip()}, which YAML "
                "leaves out as a comment; quote the whole value, or write a space behind the #"
            )

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.text is None else f"{self.name}: line {node.start_mark.line + 1}"


def _as_yaml(node: yaml.ScalarNode) -> Any:
    """Convert an unquoted word as YAML does; unlike YAML, accept 1e3 without a dot as a number."""
    if node.tag in ("tag:yaml.org,2002:value", "tag:yaml.org,2002:merge"):
        return node.value
    if re.fullmatch(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", node.value):
        return float(node.value)
    try:
        return yaml.SafeLoader("").construct_object(yaml.ScalarNode(node.tag, node.value))
    except ValueError:  # a month 13, say
        return node.value


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
Verbs = Mapping[str, Sequence[str]]  # verb of a command line -> keys of the words that follow it


def load(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Parse the arguments `[YAML] key=value ...` into an instance of the dataclass `schema`.

    Raises:
        ConfigError: unknown key (a similar one is suggested), wrong type, missing value, unreadable YAML.
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
    """Return whether an argument is key=value, and not a URI with a query."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "://" not in key


def from_mapping(schema: type[Schema], values: Mapping[str, Any], name: str) -> Schema:
    """Convert nested mappings that another tool has read into an instance of the dataclass `schema`.

    Error messages begin with `name`, the source of the mappings.

    Raises:
        ConfigError: as `load`; also where the other tool converted a text to, say, a number.
    """
    check_texts(values, schema, "", name)
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
    """Return a hint that suggests a similar entry of a mapping with free keys, or "" if there is none."""
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
    values = of_file(text, schema, name)
    if not isinstance(parsed, DictConfig) or not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else quote(text.strip(), 100)
        raise ConfigError(f"{name}: expected a mapping of keys to values, found {found}")
    return OmegaConf.create(values)


def _read_override(override: str, schema: type) -> DictConfig:
    part = OmegaConf.create({})
    try:
        OmegaConf.update(part, override.partition("=")[0], of_override(override, schema))
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
    """Return the resolved configuration as YAML text that `load` can read."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_resolved(config: Any, uri: str) -> None:
    """Write the resolved configuration to `uri` as YAML, atomically."""
    storage.write_bytes(uri, to_yaml(config).encode())


def keys(schema: type, default: Any = None, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (dotted key, type, default, explanation) of every field, nested dataclasses included.

    Defaults are those of the instance `default`, if given, because a job may give a nested dataclass other
    defaults than its own.
    """
    explanations = _field_docstrings(schema)
    rows = []
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        explanation = explanations.get(field.name, field.metadata.get("explanation", ""))
        value = _default_of(field) if default is None else getattr(default, field.name)
        inner = [t for t in (field.type, *get_args(field.type)) if dataclasses.is_dataclass(t)]
        if not inner or value is None:
            shown = "required" if value == MISSING else json.dumps(value, default=str)
            name = (
                field.type.__name__
                if field.type in (str, int, float, bool)
                else re.sub(r"[\w.]+\.", "", str(field.type))
            )
            rows.append((key, name.replace("typing.", ""), shown, explanation))
        # The entries of a mapping have names that users choose.
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
    """Return the string literal below each field in the class body, by field name, base classes included."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except OSError:  # `make_dataclass` leaves no source; explanations are in the fields' metadata
            continue
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
    """Return the text of --help: every key of `schema` with its type, default and explanation."""
    about = inspect.cleandoc(schema.__doc__ or "").strip()
    led = " | ".join(" ".join([verb, *map(str.upper, names)]) for verb, names in (verbs or {}).items())
    lead = f"[{led}] " if led else ""
    lines = [f"usage: python {program} {lead}[CONFIG.yaml] key=value ...", "", about, "", *TEXTS, "", "keys:"]
    for key, type_text, default, explanation in keys(schema):
        lines.append(f"  {key}: {type_text} = {default}")
        lines += textwrap.wrap(explanation, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def spelled_out(argv: Sequence[str], verbs: Verbs) -> list[str]:
    """Rewrite a leading verb and its words as key=value: `show X` becomes `action=show name=X`."""
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
    """Replace each of the `flags` in `argv` by its key=value; a {} there takes the flag's value.

    The value is the next word, or the text after "=".

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
    """Parse the command line into `schema`, run `job` and print its result.

    `job` returns the text to print. `flags` are options that stand for a key=value, see `with_flags`.
    `verbs` may come first on the command line, see `spelled_out`. While the job runs, no other job can write
    to its `output`. A user's error is printed as one line and exits with 2; any other error keeps its
    traceback and exits with 1.
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
            sys.modules["ray"].shutdown()  # so that output of Ray's processes comes before the error line
        if logs.shows_traces():
            _without_secrets(type(error), error, error.__traceback__)
        said = re.sub(r"\s*\n\s*", " ", f"{type(known).__name__}: {known}".rstrip())
        sys.stderr.write(logs.without_secrets(f"{said}\n"))
        sys.exit(2)
    sys.stdout.write(logs.without_secrets(result.rstrip("\n") + "\n"))


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write a traceback to standard error as Python does, without secrets."""
    sys.stderr.write(logs.without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _alone(job: Any) -> AbstractContextManager[None]:
    """Return the lock of the job's output, or a null context for a job that only shows something."""
    shows = getattr(job, "inspect", 0) or getattr(job, "dry_run", False)
    output = getattr(job, "output", "")
    return artifact.writing(output) if output and not shows else nullcontext()
