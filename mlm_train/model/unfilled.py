"""Modules without weights, to read shapes from or to be given weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules made inside have no storage (device meta), and torch does not try to initialise them.

    It would do so by its reference functions, which import its compiler: over a second of every command.
    """
    with torch.device("meta"), _Untouched():
        yield


class _Untouched(TorchFunctionMode):
    """Functions of torch.nn.init return the tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
