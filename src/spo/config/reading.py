"""Read and check params.yaml: an error is one line, with a suggestion for an unknown key."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from spo.config import yaml_text
from spo.config.params import Params


class ConfigError(ValueError):
    """A mistake in params.yaml, as one line: the file, the key, what is wrong and, for an unknown key, the
    nearest one."""


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check an experiment."""
    return validate(read(path), source=str(path))


def read(path: str | Path) -> Any:
    """Read the content of a params.yaml, unchecked."""
    path = Path(path)
    try:
        return yaml_text.parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; run in the repository root, or write one by `spo preset scenes`"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def validate(raw: Any, source: str = "params.yaml") -> Params:
    """Check the content of a params.yaml."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, not {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(e, source) for e in error.errors()[:3])) from None


# sections that change no output: the name, how stages run, where runs are logged, and the registry's gate
WITHOUT_EFFECT_ON_OUTPUTS = ("name", "processes", "device", "tracking", "registry")


def code_defaults(params: Params) -> dict[str, Any]:
    """Collect the keys that params.yaml omits, as {dotted key: default}.

    DVC cannot see a change of these defaults; the stage `inputs` writes them to a file on which the other
    stages depend.
    """
    parts = [name for name in type(params).model_fields if name not in WITHOUT_EFFECT_ON_OUTPUTS]
    return _unset(params, parts, params.model_dump(mode="json", include=set(parts)))


def _unset(
    section: BaseModel, names: Iterable[str], dumped: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for name in names:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            defaults |= _unset(value, type(value).model_fields, dumped[name], f"{key}.")
        elif name not in section.model_fields_set:
            defaults[key] = dumped[name]
    return defaults


def _line(error: Any, source: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key {key[:200]!r}; {hint}"
    if error["type"] == "missing":
        return f"{source}: key {key!r} is missing; add it"
    found = "" if isinstance(error["input"], dict) else f" (got {_short(error['input'])})"
    where = f"{source}: {key}" if key else source
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{found}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a value that contains itself, or a number of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fields(location: tuple[Any, ...]) -> list[str]:
    model: Any = Params
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next((t for t in get_args(annotation) if t is not type(None)), annotation)
    return list(model.model_fields)
