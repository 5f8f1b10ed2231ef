"""The environment variables by which a launcher tells each rank its position, as torchrun names them."""

import os

from mlm_train.errors import UserError

_FIX = "start the ranks with `mlm-train launch` or torchrun, which set it, or unset it for a single process"


def check_environment() -> None:
    """Raise UserError where a rank's environment is incomplete or inconsistent.

    LOCAL_WORLD_SIZE may be missing, as torch allows. LOCAL_RANK chooses the GPU; a single rank needs none.
    """
    world = _number("WORLD_SIZE", 1, None)
    if "RANK" not in os.environ:
        if world not in (None, 1):
            raise _missing("RANK", f"WORLD_SIZE={world}")
        return
    if world is None:
        raise _missing("WORLD_SIZE", f"RANK={os.environ['RANK']}")
    _number("RANK", 0, world)
    local_world = _number("LOCAL_WORLD_SIZE", 1, world + 1)
    if _number("LOCAL_RANK", 0, local_world or world) is None and world > 1:
        raise _missing("LOCAL_RANK", f"WORLD_SIZE={world}")
    if not os.environ.get("MASTER_ADDR"):
        raise _missing("MASTER_ADDR", "RANK")
    if _number("MASTER_PORT", 1, 2**16) is None:
        raise _missing("MASTER_PORT", "RANK")


def _number(name: str, minimum: int, end: int | None) -> int | None:
    """A variable's value, in [minimum, end); None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    value = int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else -1
    if value < minimum or (end is not None and value >= end):
        shown = text if text.isprintable() else repr(text)
        limits = f"at least {minimum}" if end is None else f"{minimum} to {end - 1}"
        raise UserError(f"{name}={shown} in the environment: must be an integer, {limits}; {_FIX}")
    return value


def _missing(name: str, other: str) -> UserError:
    return UserError(f"{name} is missing in the environment, but {other} is set; {_FIX}")
