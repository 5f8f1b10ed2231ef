"""Names of the interchangeable parts that a config chooses from.

Each kind has a registry, a plain dict, in its own package. config does not import the registries, since most
of them import torch; tests/test_extending.py compares the names. A user's class is named
"package.module:Name" (utils/extensions.py; docs/extending.md).
"""

import re
from typing import Annotated

from pydantic import AfterValidator

MEMORY_MODES = ("per_token", "unique", "table")  # memory/__init__.py: MODES
X0_TRANSPORTS = ("broadcast", "relay", "replicate")  # parallel/pipeline/x0.py: TRANSPORTS
ENGINES = ("fsdp", "deepspeed")  # parallel/engine/__init__.py: ENGINES
WRITERS = ("tensorboard", "jsonl", "wandb")  # monitor/writers/__init__.py: WRITERS

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether a name has the form of a user's class, package.module:Name."""
    return _CLASS.fullmatch(name) is not None


def one_of(*names: str) -> AfterValidator:
    """A validator that accepts one of the names, or the name of a user's class."""

    def check(name: str) -> str:
        if name not in names and not is_own(name):
            known = ", ".join(map(repr, names)) + " or " if names else ""
            raise ValueError(f'input should be {known}a class of yours as "package.module:Name"')
        return name

    return AfterValidator(check)


MemoryMode = Annotated[str, one_of("auto", *MEMORY_MODES)]
X0Transport = Annotated[str, one_of(*X0_TRANSPORTS)]
Engine = Annotated[str, one_of(*ENGINES)]
Writer = Annotated[str, one_of(*WRITERS)]
CallbackName = Annotated[str, one_of()]
