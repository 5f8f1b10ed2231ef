"""Packages of the extra `analyze`."""

import importlib.util

from mlm_train.errors import UserError


def require(package: str, name: str, what: str) -> None:
    """Raise UserError if a package is missing, before any work; name: as pip has it, what: who needs it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {name}: pip install 'mlm-train[analyze]'")
