"""The base class of all config sections."""

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from mlm_train.errors import UserError


class Section(BaseModel):
    """A frozen group of fields. Unknown keys are rejected (load.py names the nearest known one)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for other fields: pydantic would accept true as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is not a boolean field")
        return value

    @field_validator("*")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        """Reject integers beyond 64 bits: no tensor size, file size or counter could hold them."""
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("does not fit in 64 bits")
        return value

    def _fill(self, name: str, value: Any) -> None:
        """Set a derived field during validation, in spite of frozen=True."""
        object.__setattr__(self, name, value)


def reject(field: str, value: Any, fix: str) -> NoReturn:
    """Raise UserError for a field: the message names the field, the value and the fix."""
    raise UserError(f"{field}={value!r}: {fix}" if value is not None else f"{field}: {fix}")
