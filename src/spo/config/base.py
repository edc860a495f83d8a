"""Base of every section of params.yaml: strict values, and the number types that sections share."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average; at 1 it would never move
Rate = Annotated[float, Field(gt=0, le=1e9)]  # in fp32 its square is finite too
Amount = Annotated[float, Field(ge=0, le=1e9)]
Eta = Annotated[float, Field(ge=0, le=1)]  # DDIM's; 0: no noise, 1: the variance of DDPM's posterior
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Guidance = Annotated[float, Field(ge=0, le=100)]  # guidance scale; up to 1: conditional prediction only
Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Field(strict=False)]  # YAML has lists, not tuples


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys, values of another type, NaN and infinity.

    `steps: true` is not 1, and `yes` of YAML 1.1 is not true.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @field_validator("*")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        """Refuse text that no file system takes."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for text in (part for part in parts if isinstance(part, str)):
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("must not contain a NUL or surrogate character")
        return value
