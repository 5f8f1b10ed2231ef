"""Read YAML and dotted overrides into a Config, with errors that name the field, the value and the fix."""

import difflib
import re
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlm_train.config.renamed import refuse_old_names, with_new_names
from mlm_train.config.schema import Config
from mlm_train.config.section import Section
from mlm_train.config.yaml_text import DEEPEST, LONGEST, yaml_text, yaml_value
from mlm_train.errors import UserError
from mlm_train.utils.records import read_regular

_CREDENTIALS = re.compile(r"://[^/\s]*@")  # user name or password in a URL
# One of these lies beside a config.yaml that this program wrote: in a run, a copy of one, or an import.
_OURS = ("train.log", "checkpoints", "export.manifest.json")
_SHOWN = 200  # most characters of a value that a message repeats


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `train.steps=20` (values are YAML).

    A config.yaml written by a run or an import may use former field names. Raises UserError for a missing
    file, bad YAML, an unknown key, a former name elsewhere, or a value out of range.
    """
    path = Path(path)
    tree = read_yaml(path)
    if path.name == "config.yaml" and any((path.parent / name).exists() for name in _OURS):
        tree = with_new_names(tree, str(path))
    refuse_old_names(tree, str(path))
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a nested mapping. Raises UserError with one line for pydantic's first finding."""
    _refuse_credentials(tree, "")
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, in the schema's order; load_config reads it back."""
    tree = config.model_dump(mode="json", exclude_none=True)
    scales = tree["model"].get("memory_scale", [])
    if len(set(scales)) == 1:  # for a person: no list of eighty equal numbers
        tree["model"]["memory_scale"] = scales[0]
    return yaml_text(tree)


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every field in which two configs differ."""
    changed = {}
    trees = [config.model_dump(mode="json") for config in (old, new)]
    for section in Config.model_fields:
        before, after = ({} if tree[section] is None else tree[section] for tree in trees)
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                changed[f"{section}.{name}"] = (before.get(name), after.get(name))
    return changed


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    try:
        tree = yaml_value(read_regular(path, 4 * LONGEST).decode("utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
        raise UserError(f"config {path} does not exist; {hint}") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not UTF-8 text: save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"config {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: the top level must be sections such as model: and train:")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts, given = key.split("."), repr(override[:_SHOWN])
    if not equals or not all(parts) or len(parts) > DEEPEST:
        raise UserError(f"override {given}: write section.field=value, such as train.steps=20")
    try:
        value = yaml_value(text)
    except ValueError as error:
        raise UserError(f"override {given}: the value is not YAML: {error}") from None
    tree_of_override = value
    for part in reversed(parts):
        tree_of_override = {part: tree_of_override}
    refuse_old_names(tree_of_override, f"override {given}")
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {given}: {part} is a value, not a section")
        node = child
    node[parts[-1]] = value


def _refuse_credentials(value: Any, name: str) -> None:
    """Raise UserError for a URL with credentials: the run's folder, checkpoints and logs would keep them.

    The message names the field and does not repeat the value.
    """
    if isinstance(value, str) and _CREDENTIALS.search(value):
        raise UserError(f"{name} holds a URL with a user name or password: give a folder on this machine")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _refuse_credentials(item, f"{name}.{key}" if name else str(key))


def section_of(annotation: Any) -> type[Section] | None:
    """The Section in a field's annotation, also in `Section | None` and `list[Section]`; else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def _refuse_unknown(tree: dict[str, Any], section: type[Section], prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key)
        if field is None:
            raise UserError(
                f"unknown config key {prefix}{str(key)[:_SHOWN]}; {_nearest(str(key), section, prefix)}"
            )
        inner = section_of(field.annotation)
        if inner is None:
            continue
        if isinstance(value, dict):
            _refuse_unknown(value, inner, f"{prefix}{key}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(item, inner, f"{prefix}{key}.{number}.")
        elif value is not None:
            raise UserError(f"{prefix}{key} is a section: write fields below it, not {_shown(value)}")


def _nearest(key: str, section: type[Section], prefix: str) -> str:
    """A hint: the most similar key of this section, or of another one."""
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    for name, field in Config.model_fields.items():
        inner = section_of(field.annotation)
        near = difflib.get_close_matches(key, inner.model_fields, n=1, cutoff=0.7) if inner else []
        if near:
            return f"did you mean {name}.{near[0]}?"
    return f"known keys: {', '.join(section.model_fields)}"


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN]


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("list[", "float", "literal["))
    )
    if first["type"] == "missing":
        return f"config: {where} is missing; set it in the YAML or as {where}=..."
    text = first["msg"].removeprefix("Value error, ")
    given = " has no value" if first["input"] is None else f"={_shown(first['input'])}"
    return f"{where}{given}: {text[0].lower()}{text[1:]}"
