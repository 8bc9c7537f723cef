"""YAML 1.2 text to plain values and back: keys are text, duplicates are errors, dates are text, `1e-3` is a number.

Only the core schema is known: null, true and false, whole and decimal numbers, text, lists and mappings. Tags that
build other things are refused, and nesting and size are bounded, so that aliases cannot blow a file up.
"""

import re
from typing import Any

import yaml

from fedrt.errors import ConfigurationError

MAX_DEPTH = 40
MAX_NODES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]{1,40}\Z|0x[0-9A-Fa-f]{1,15}\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,3})?\Z")

_ADVICE = {  # part of PyYAML's message: what to do
    r"'\t'": "indent with spaces, not with tabs",
    "mapping values are not allowed": "check the indentation, or put text that holds ': ' in quotes",
    "expected the node content": "put text that begins with ':' or '[' in quotes, such as '[::1]:7443'",
    "undefined alias": "put text that begins with '*' in quotes",
}


class _Loader(yaml.SafeLoader):
    """Finds the types of plain scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - a class attribute of PyYAML


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else; never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML loses the Unicode line breaks unless they are escaped, which double quotes make it do."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def parse_mapping(text: bytes, source: str) -> dict[str, Any]:
    """The mapping that `text` holds; `source` names it in errors. Raises `ConfigurationError` with the line."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigurationError(f"{source}: must hold keys and values such as 'log: {{level: info}}'")
        values: dict[str, Any] = _Reader().read(node, 0)
        return values
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        advice = next((f"; {advice}" for part, advice in _ADVICE.items() if part in str(error.problem)), "")
        raise ConfigurationError(f"{source}: {place}{error.problem}{advice}") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{source}: not YAML text in UTF-8 ({reason}); save it as plain text") from None
    except RecursionError:
        raise ConfigurationError(f"{source}: nested more than {MAX_DEPTH} levels deep; flatten it") from None


def dump_mapping(values: dict[str, Any]) -> str:
    """The YAML of plain values in block style and the order given; `parse_mapping` gives the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Reader:
    """Turns a tree of nodes into values, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def read(self, node: yaml.Node, depth: int) -> Any:
        self._count += 1
        if depth > MAX_DEPTH:
            raise _problem(node, f"nested more than {MAX_DEPTH} levels deep; flatten it")
        if self._count > MAX_NODES:
            raise _problem(node, f"more than {MAX_NODES} values; use fewer, or fewer aliases")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.read(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        raise _problem(node, f"tag '{node.tag}' is not supported; remove it")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem(key_node, "a key must be text, not a list or a mapping")
            key = key_node.value
            if key in values:
                raise _problem(key_node, f"key {key!r} is given twice, first in line {lines[key]}; remove one")
            lines[key] = key_node.start_mark.line + 1
            values[key] = self.read(value_node, depth + 1)
        return values


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "str":
            return text
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" if _INTEGER.match(text):
            return int(text, 16) if text.startswith("0x") else int(text)
        case "float" if _FLOAT.match(text):
            return float(text)
    raise _problem(node, f"tag '{node.tag}' is not supported; remove it")


def _problem(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
