"""Overrides of params.yaml by dotted key: the result is checked before any is written."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo import config
from spo.runtime.files import atomic

FILE = Path("params.yaml")


def parse(text: str) -> tuple[str, Any]:
    """Split `key=value` of a command line; the value is read as YAML 1.2 (1e-4 is a number).

    Raises:
        ArgumentTypeError: no `=`, no key, or a value that is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, YAML(typ="safe").load(value)
    except YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not valid YAML") from None


def merged(overrides: Mapping[str, Any]) -> config.Params:
    """Read params.yaml with the overrides, without writing it.

    Raises:
        ConfigError: one line, as `config.load`.
    """
    import yaml

    config.load(FILE)
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return config.validate(override(raw, overrides), source=f"{FILE} with overrides")


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
    """Write the overrides to params.yaml; its comments stay."""
    if not overrides:
        return
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 110
    content = override(yaml.load(FILE.read_text(encoding="utf-8")), overrides)
    with atomic(FILE) as partial:
        yaml.dump(content, partial)
