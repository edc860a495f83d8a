"""Whether a config.json announces the architecture of a base's UNet."""

import inspect
from pathlib import Path
from typing import Any

from spo.backbones.description import config_file


def check(unet: Any, file: Path) -> None:
    """Refuse a UNet of another class, or with another value of an argument of its constructor."""
    config = config_file(str(file.parent), None, file.name, str(file.parent))
    own = type(unet).__name__
    name = config.get("_class_name", own)
    if name != own:
        raise ValueError(f"{file}: _class_name is {name}, but the backbone has a {own}")
    for key, default in inspect.signature(type(unet).__init__).parameters.items():
        announced = config.get(key, default.default)
        if key in unet.config and _plain(announced) != _plain(unet.config[key]):
            raise ValueError(
                f"{file}: {key} is {announced!r}, but the backbone's UNet has {unet.config[key]!r}"
            )


def _plain(value: Any) -> Any:
    """Unify spellings of different versions of diffusers: [8, 8] is 8 for every block, null is false."""
    if isinstance(value, list | tuple):
        elements = [_plain(element) for element in value]
        return elements[0] if elements and all(e == elements[0] for e in elements) else elements
    return value or None
