"""What all config sections share."""

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict

from mlm_train.errors import UserError


class Section(BaseModel):
    """A frozen group of fields. Unknown keys are refused (load.py names the nearest one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    def _fill(self, name: str, value: Any) -> None:
        """Set a derived field while validating a frozen section."""
        object.__setattr__(self, name, value)


def blame(field: str, value: Any, fix: str) -> NoReturn:
    """Refuse a value: the message names the field, the value and the fix."""
    raise UserError(f"{field}={value!r}: {fix}" if value is not None else f"{field}: {fix}")
