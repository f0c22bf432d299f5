"""Values of YAML files and of key=value, read as the types of a schema want them; for config.py.

YAML has types of its own for unquoted text: 007 is a number to it, `no` is false, 2026-01-01 a date. Here
the schema decides. Where it says text, an override is taken as typed, and a word of a file that YAML would
change is refused.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from revision_ray.errors import ConfigError

# Of the two, that one takes s3://bucket/a?b=c in a list. OmegaConf reads with it, too.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def of_file(text: str, schema: type, name: str) -> Any:
    """The values that a YAML file gives to the keys of the dataclass `schema`; {} of an empty file.

    Raises:
        ConfigError: unquoted text that YAML would change; a key that occurs twice.
    """
    root = yaml.compose(text, _LOADER)
    return _Reader(name, text).value(root, schema, "") if root else {}


def of_override(override: str, schema: type) -> Any:
    """The value that key=value gives to a key of the dataclass `schema`. Text is taken as typed.

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
    # Anchors, aliases and tags belong to files: *.txt, &c and !x in a list are text that wants quotes.
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
    """Refuse what is no text where the schema has text: a parser without the schema changed it."""
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
    """The type of the value at a dotted key of a dataclass; Any where there is no such key."""
    found: Any = schema
    for name in filter(None, re.split(r"[.\[\]]+", key)):
        found = _type_below(found, name)
    return found


def _type_below(type_: Any, name: str) -> Any:
    """The type of what stands at `name` in a mapping of this type."""
    for member in _members(type_):
        if dataclasses.is_dataclass(member):
            return typing.get_type_hints(member).get(name, Any)
        if get_origin(member) is dict:
            return get_args(member)[1]
    return Any


def _type_of_items(type_: Any) -> Any:
    """The type of the items of a list of this type."""
    lists = [member for member in _members(type_) if get_origin(member) in (list, tuple)]
    return get_args(lists[0])[0] if lists else Any


def _members(type_: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is none by itself."""
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)


def _takes_text(type_: Any) -> bool:
    """Whether text is a value of this type. Where nothing is said of the type, text is text."""
    return any(
        member in (str, Any) or any(isinstance(choice, str) for choice in _choices(member))
        for member in _members(type_)
    )


def _shape(member: Any) -> str:
    """Whether a value of this type is a list, a mapping or one value."""
    kind = get_origin(member) or member
    if kind in (list, tuple):
        return "a list"
    if kind is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return "anything" if kind in (Any, object) else "one value"


def _choices(member: Any) -> tuple[Any, ...]:
    return get_args(member) if get_origin(member) is Literal else ()


def _is_quoted(text: str) -> bool:
    """Whether all of the text is one string between quotes of YAML."""
    if text[:1] not in ("'", '"') or text[-1:] != text[:1]:
        return False
    try:
        root = yaml.compose(text, _LOADER)
    except yaml.YAMLError:
        return False
    return isinstance(root, yaml.ScalarNode) and root.end_mark.index == len(text)


def _plain(text: str, type_: Any) -> str | int:
    """Text as typed; a number where the type allows one too, and it has no other spelling."""
    number = {Any, int} & {*_members(type_)} and re.fullmatch(r"0|-?[1-9][0-9]*", text)
    return int(text) if number else text


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the nodes of parsed YAML as the types of a schema want them."""

    name: str
    """What messages begin with."""
    text: str | None
    """The whole text of a file; None for a command line, where words are taken as typed."""

    def value(self, node: yaml.Node, type_: Any, key: str) -> Any:
        """What `node` holds, for a key of this type.

        Raises:
            ConfigError: unquoted text that YAML would change; a key that occurs twice; a list where a mapping
                is expected, and the like.
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
        """Refuse a list, a mapping or a single value where the type has none of its kind."""
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
        """A number, a yes or no, or what is neither, which is refused later."""
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
        """Refuse a text behind which #2 stands, say: does that belong to it? A comment begins with "# "."""
        rest = self.text[node.end_mark.index :].splitlines()[:1] if self.text and node.value else []
        if rest and re.match(r"\s+#[^\s#]", rest[0]):
            raise ConfigError(
                f"{self._where(node)}: {key}: found {node.value} and behind it {rest[0].strip()}, which YAML "
                "leaves out as a comment; quote the whole value, or write a space behind the #"
            )

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.text is None else f"{self.name}: line {node.start_mark.line + 1}"


def _as_yaml(node: yaml.ScalarNode) -> Any:
    """What YAML makes of an unquoted word by itself. Its scientific notation wants a dot, ours does not."""
    if node.tag in ("tag:yaml.org,2002:value", "tag:yaml.org,2002:merge"):
        return node.value
    if re.fullmatch(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", node.value):
        return float(node.value)
    try:
        return yaml.SafeLoader("").construct_object(yaml.ScalarNode(node.tag, node.value))
    except ValueError:  # a month 13, say
        return node.value
