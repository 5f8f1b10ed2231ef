"""How a table is served in vLLM: the object "tol" of its option --additional-config."""

from typing import Annotated, Any, Self

from pydantic import Field

from mlm_train.errors import UserError
from mlm_train.tol.serve.store import StoreOptions, Tier
from mlm_train.utils.records import Count, Record, record_of

ADDITIONAL = "--additional-config"
KEY = "tol"


class TolOptions(Record):
    """A table's folder, and StoreOptions by their names. hot: a folder of `data prepare`; patches: files."""

    folder: str
    tier: Tier = "shared"
    lock: bool = False
    cache_bytes: Count = 0
    hot: str | None = None
    direct: bool = False
    depth: Annotated[int, Field(ge=1)] = 64
    first_touch: bool = False
    patches: tuple[str, ...] = ()

    @classmethod
    def of(cls, additional: Any) -> Self | None:
        """From the value of --additional-config; None where it names no table. UserError for a bad one."""
        if not isinstance(additional, dict) or KEY not in additional:
            return None
        if not isinstance(additional[KEY], dict):
            raise UserError(f'{ADDITIONAL}: "{KEY}" must be an object such as {{"folder": "tol/mine"}}')
        names = ", ".join(cls.model_fields)
        return record_of(cls, additional[KEY], f'{ADDITIONAL} "{KEY}"', f"its options are {names}")

    def store_options(self) -> StoreOptions:
        """Options of the store. Reads the data of `hot`; UserError where that is impossible."""
        names = ("tier", "lock", "cache_bytes", "direct", "depth", "first_touch")
        hot = None
        if self.hot is not None:
            from mlm_train.tol.serve.frequency import most_frequent_in

            hot = most_frequent_in(self.hot)
        return StoreOptions(hot=hot, **{name: getattr(self, name) for name in names})
