"""Overrides of params.yaml by dotted key: checked as they will be read, before any is written."""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from spo import config
from spo.config import yaml_text
from spo.runtime.files import atomic

FILE = Path("params.yaml")


def parse(text: str) -> tuple[str, Any]:
    """Split `key=value` of a command line; the value is read as YAML 1.2 (1e-4 is a number).

    Raises:
        ArgumentTypeError: no `=`, no key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, yaml_text.parse(value, key)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not valid YAML") from None


def merged(overrides: Mapping[str, Any]) -> config.Params:
    """Read params.yaml as it will be with the overrides, without writing it.

    Raises:
        ConfigError: one line, as `config.load`.
    """
    return _rendered(overrides)[1]


def override(raw: Any, overrides: Mapping[str, Any]) -> Any:
    """Copy nested mappings, with new values at dotted keys.

    Raises:
        ConfigError: a part of a key before the last names a value instead of a section.
    """
    raw = copy.deepcopy(raw)
    for key, value in overrides.items():
        section = raw
        *parents, last = key.split(".")
        for part in parents:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise config.ConfigError(f"override {key!r}: {part!r} is a value, not a section")
        section[last] = value
    return raw


def write(overrides: Mapping[str, Any]) -> None:
    """Write the overrides to params.yaml, if it can be read then; its comments stay.

    Raises:
        ConfigError: as `merged`.
    """
    _replace(_rendered(overrides)[0])


@contextmanager
def applied(overrides: Mapping[str, Any]) -> Iterator[config.Params]:
    """Write the overrides, and yield the parameters; if the body fails, params.yaml is as it was before.

    A file that was edited meanwhile stays as it is.

    Raises:
        ConfigError: as `merged`.
    """
    (content, params), before = _rendered(overrides), FILE.read_bytes()
    _replace(content)
    try:
        yield params
    except BaseException:
        if FILE.read_bytes() == content:
            _replace(before)
        raise


def _rendered(overrides: Mapping[str, Any]) -> tuple[bytes, config.Params]:
    """The content of params.yaml with the overrides, and the parameters that are read from it."""
    params = config.load(FILE)
    before = FILE.read_bytes()
    if not overrides:
        return before, params
    text, source = _dumped(override(YAML().load(before), overrides)), f"{FILE} with overrides"
    try:
        raw = yaml_text.parse(text, source)
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    params = config.validate(raw, source)
    if raw != override(_unshared(yaml_text.parse(before.decode(), source)), overrides):
        raise config.ConfigError(f"{source}: an anchor shares the section; write it out where it is used")
    return text.encode(), params


def _dumped(content: Any) -> str:
    yaml, stream = YAML(), io.StringIO()
    yaml.preserve_quotes, yaml.width = True, 110
    try:
        yaml.dump(content, stream)
    except Exception as error:  # ruamel's representers raise many types
        raise config.ConfigError(f"{FILE} with overrides: cannot be written as YAML: {error}") from None
    return stream.getvalue()


def _unshared(value: Any) -> Any:
    """Copy nested values, those of an anchor for each of its uses."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _replace(content: bytes) -> None:
    if content != FILE.read_bytes():
        with atomic(FILE) as partial:
            partial.write_bytes(content)
