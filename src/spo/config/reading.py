"""params.yaml read and checked; a mistake is one line, an unknown key comes with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from spo.config.sections import Params


class ConfigError(ValueError):
    """A mistake in params.yaml, told in one line."""


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check an experiment.

    Raises:
        ConfigError: one line naming file, key, what is wrong and, for a mistyped key, the nearest one.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; run in the repository root, or `spo preset scenes`") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except (RecursionError, TypeError, AttributeError):  # of PyYAML's constructors
        raise ConfigError(f"{path}: not valid YAML: nested too deeply, or a tag of another kind") from None
    return validate(raw, source=str(path))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key comes twice: the last would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(name.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name.value!r} is there twice", name.start_mark
                )
            seen.add(str(name.value))
        return super().construct_mapping(node, deep)


def validate(raw: Any, source: str = "params.yaml") -> Params:
    """Check a mapping as `load` does."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping of sections, is {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(e, source) for e in error.errors()[:3])) from None


# how it is called, how a stage runs, where it is logged, and the gate after the last stage
NOT_OF_THE_RESULT = ("name", "processes", "tracking", "registry")


def left_out(params: Params) -> dict[str, Any]:
    """{dotted key: value} of the keys that params.yaml leaves out, with the values that the code gives them.

    DVC sees no change of these; the stage `inputs` writes them to a file that the others depend on.
    """
    parts = [name for name in type(params).model_fields if name not in NOT_OF_THE_RESULT]
    return _unset(params, parts, params.model_dump(mode="json", include=set(parts)))


def _unset(
    section: BaseModel, names: Iterable[str], dumped: dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            found |= _unset(value, type(value).model_fields, dumped[name], f"{key}.")
        elif name not in section.model_fields_set:
            found[key] = dumped[name]
    return found


def preset_names() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("spo.config.presets").iterdir()
        if p.name.endswith(".yaml")
    )


def preset(name: str) -> str:
    """The text of a ready-made params.yaml."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(preset_names())}")
    return resources.files("spo.config.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _line(error: Any, source: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key {key[:200]!r}; {hint}"
    if error["type"] == "missing":
        return f"{source}: key {key!r} is missing"
    return f"{source}: {key}: {error['msg'].removeprefix('Value error, ')} (got {_short(error['input'])})"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # it contains itself, or a number of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fields(location: tuple[Any, ...]) -> list[str]:
    model: Any = Params
    for part in location:
        told = model.model_fields[part].annotation
        model = next((t for t in get_args(told) if t is not type(None)), told)
    return list(model.model_fields)
