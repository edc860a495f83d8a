"""Base of every section of params.yaml: strict values, and the number types that sections share."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average; at 1 it would never move
Rate = Annotated[float, Field(gt=0, le=1e9)]  # in fp32 its square is finite too
Amount = Annotated[float, Field(ge=0, le=1e9)]
Eta = Annotated[float, Field(ge=0, le=1)]  # DDIM's; 0: no noise, 1: the variance of DDPM's posterior
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Guidance = Annotated[float, Field(ge=0, le=100)]  # guidance scale; up to 1: conditional prediction only


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_conversion(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans for numbers (`steps: true` is not 1) and text that no file system takes."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("must not be true or false")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("must not contain a NUL or surrogate character")
        return value
