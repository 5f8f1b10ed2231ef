"""Parts that users add without a change to ours: classes that a config names, and packages' entry points.

docs/extending.md shows one of each kind.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mlm_train.errors import UserError


def find(field: str, name: str, known: Mapping[str, Any], base: type | None = None) -> Any:
    """What `known` has under a name, else the user's class "package.module:Name".

    field: the config field that names it. base: what the class must be derived from. Raises UserError in one
    line where it cannot be imported, is not there, or is no such class.
    """
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # one that it imports
            raise UserError(f"{field}={name}: {module_name} cannot be imported: {error}") from error
        raise UserError(
            f"{field}={name}: there is no module {error.name}: install its package, or add its folder to "
            "PYTHONPATH"
        ) from error
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
        raise UserError(f"{field}={name}: {module_name} cannot be imported: {line}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(f"{field}={name}: {module_name} ({module.__file__}) has no {attribute}")
    if not callable(found) or (base and not (isinstance(found, type) and issubclass(found, base))):
        what = f"a class derived from {base.__module__}.{base.__name__}" if base else "a class"
        raise UserError(f"{field}={name}: {attribute} is not {what}")
    return found


def added(group: str, ours: Mapping[str, object]) -> dict[str, EntryPoint]:
    """Name -> entry point of a group that installed packages add to `ours`.

    Raises UserError for a name that is there already: what it would mean must not hang on what is installed.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in ours or (point.name in found and found[point.name].value != point.value):
            raise UserError(
                f"{package_of(point)} adds {point.name} to {group}, which is there already: uninstall it, "
                "or have it choose another name"
            )
        found[point.name] = point
    return found


def load(point: EntryPoint) -> Any:
    """What an entry point names. Raises UserError where it cannot be had."""
    try:
        return point.load()
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{point.value}, which {package_of(point)} adds as {point.name}, cannot be imported: {line}"
        ) from error


def package_of(point: EntryPoint) -> str:
    """Who adds it."""
    return point.dist.name if point.dist is not None else point.value
