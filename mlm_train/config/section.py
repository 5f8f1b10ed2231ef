"""What all config sections share."""

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from mlm_train.errors import UserError


class Section(BaseModel):
    """A frozen group of fields. Unknown keys are refused (load.py names the nearest one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is neither true nor false")
        return value

    @field_validator("*")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        """What 64 bits do not hold, no tensor's size, file's size or counter does."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("is more than 64 bits hold")
        return value

    def _fill(self, name: str, value: Any) -> None:
        """Set a derived field while validating a frozen section."""
        object.__setattr__(self, name, value)


def blame(field: str, value: Any, fix: str) -> NoReturn:
    """Refuse a value: the message names the field, the value and the fix."""
    raise UserError(f"{field}={value!r}: {fix}" if value is not None else f"{field}: {fix}")
