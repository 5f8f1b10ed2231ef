"""Reader and writer of YAML: plain values by the core schema of YAML 1.2, of bounded size.

PyYAML reads YAML 1.1, where 0220 is 144, 1:30 is 90 and 1e-4 is text, and where eight lines of nested aliases
expand to 10**8 values. Here a value is what it looks like, and aliases are rejected.
"""

import re
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionStartEvent, NodeEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from mlm_train.utils.records import DEEPEST

__all__ = ["DEEPEST", "LONGEST", "yaml_text", "yaml_value"]

LONGEST = 2**16  # most characters of a file or a value; a config has about two thousand
_LONGEST_NUMBER = 64  # characters
_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2: by tag, the pattern of plain text, and the characters it may start with.
_CORE = {
    "null": (re.compile(r"null|Null|NULL|~|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """Rejects aliases, anchors, tags and deep nesting; resolves by the core schema."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as the base class has it
    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            raise _refused("aliases and anchors (* and &) are not supported: write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _refused("tags (!) are not supported: write the plain value", event)
        inside = isinstance(event, CollectionStartEvent)
        self.depth += inside
        if self.depth > DEEPEST:
            raise _refused(f"nested more than {DEEPEST} deep", event)
        node: Node | None = super().compose_node(parent, index)
        self.depth -= inside
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if isinstance(node, MappingNode) and len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
            twice = next((name for name in names if names.count(name) > 1), "a key")
            raise _refused(f"{twice} is given twice", node)
        return mapping

    def number(self, node: ScalarNode) -> int | float:
        """Parse an int or float of _CORE."""
        text = node.value
        if len(text) > _LONGEST_NUMBER:
            raise _refused(f"a number of {len(text)} characters: at most {_LONGEST_NUMBER} are allowed", node)
        if node.tag == f"{_TAG}float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return int(text, 10 if text[1:2] not in ("o", "x") else 0)

    def text(self, node: ScalarNode) -> str:
        """Text without the characters that escapes can spell but file names and terminals reject."""
        if "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refused("text with a NUL or half a surrogate pair", node)
        return str(node.value)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, and text that is not one plain line."""

    def text(self, value: str) -> ScalarNode:
        return self.represent_scalar(f"{_TAG}str", value, style=None if value.isprintable() else '"')


for _name, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
        _class.add_implicit_resolver(_TAG + _name, _whole, _first)
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.number)
_Loader.add_constructor(f"{_TAG}str", _Loader.text)
_Dumper.add_representer(str, _Dumper.text)


def _refused(what: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)


def yaml_value(text: str) -> Any:
    """The value of YAML text. Raises ValueError with a short reason."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters: at most {LONGEST} are allowed")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark is not None and text.count("\n", 0, -1) else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(str(error).splitlines()[0]) from None
    except (ValueError, OverflowError):  # an escape beyond Unicode
        raise ValueError("an escape is not a character") from None
    finally:
        if loader is not None:
            loader.dispose()


def yaml_text(tree: Any) -> str:
    """A value as YAML, keys in the given order; yaml_value reads it back."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))
