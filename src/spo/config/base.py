"""Base of every section of params.yaml: strict values, and the number types that sections share."""

from typing import Annotated, Any, Literal, get_args, get_origin

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
        """Refuse booleans for numbers (`steps: true` is not 1), text for either (`yes` of YAML 1.1 is not
        true), and text that no file system takes."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        for plain in () if any(hasattr(kind, "model_fields") for kind in kinds) else _plain(value):
            if isinstance(plain, bool) and bool not in kinds:
                raise ValueError("must not be true or false")
            if (
                isinstance(plain, str)
                and str not in kinds
                and (int in kinds or float in kinds or bool in kinds)
            ):
                raise ValueError("must not be text")
            if isinstance(plain, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in plain):
                raise ValueError("must not contain a NUL or surrogate character")
        return value


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of; of a mapping, those of its values."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [type(value) for value in inner]
    if get_origin(annotation) is dict:
        inner = inner[1:]
    return [kind for part in inner for kind in _kinds(part)] if inner else [annotation]


def _plain(value: Any) -> list[Any]:
    """The value itself, or the values in a list or mapping."""
    if isinstance(value, dict):
        return [v for v in value.values() if not isinstance(v, dict | list)]
    return [*value] if isinstance(value, list | tuple) else [value]
