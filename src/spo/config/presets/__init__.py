"""Ready-made params.yaml files.

A file is complete, or has only what differs from the preset that its key `based_on` names. `_quick.yaml` is
what `quick` changes.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from spo.config import yaml_text
from spo.config.reading import ConfigError

QUICK = ("sd15", "sdxl")


def preset_names() -> list[str]:
    """The names that `preset` takes."""
    files = [p.name for p in resources.files("spo.config.presets").iterdir()]
    return sorted(n.removesuffix(".yaml") for n in files if n.endswith(".yaml") and n[0] != "_")


def preset(
    name: str, card: int | None = None, quick: bool = False, own: Mapping[str, Any] | None = None
) -> str:
    """The text of a ready-made params.yaml, with every key.

    Args:
        card: GiB of memory to plan for, in `device.memory`; None: those of this machine's GPU.
        quick: a first try of all its work, on few prompts.
        own: further values, nested as in params.yaml.
    """
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(preset_names())}")
    if card is not None and card < 1:
        raise ConfigError(f"--card {card}: give the GiB of a GPU, such as 24 or 80")
    if quick and name not in QUICK:
        raise ConfigError(f"--quick: not for the preset {name}; take {' or '.join(QUICK)}")
    text = _complete(name)
    changes = ([_read("_quick")] if quick else []) + ([own] if own else [])
    changes += [{"device": {"memory": card}}] if card else []
    if not changes:
        return text
    head = text[: text.index("\nname: ") + 1]
    if quick:
        head = head.replace(counted(head), counted(_read("_quick"), name))
    return head + yaml_text.changed(text, *changes)


def counted(text: str, name: str = "") -> str:
    """The line of a preset's head that says what it downloads, its disk space and hours; empty: none."""
    found = re.search(rf"(?m)^# {name and name + ': '}(downloads .*)", text)
    return found[1] if found else ""


@cache
def _complete(name: str) -> str:
    """The file of a preset, complete, with the comment at its own head."""
    text = _read(name)
    head, _, rest = text.partition("\nbased_on: ")
    if not rest:
        return text
    base, _, changes = rest.partition("\n")
    return f"{head}\n{yaml_text.changed(_complete(base), changes)}"


def _read(name: str) -> str:
    return resources.files("spo.config.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
