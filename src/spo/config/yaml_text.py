"""YAML 1.2, as DVC reads it: the one parser of params.yaml, dvc.lock, presets and overrides."""

import io
from collections.abc import Mapping
from typing import Any


def parse(text: str, source: str) -> Any:
    """Read a YAML 1.2 document; an empty one is None.

    Raises:
        ValueError: one line with `source`: not YAML, a duplicate key, an unknown tag, more than one document.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    try:
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark else ""
        what = error.problem or error.context
    except Exception as error:  # ruamel's constructors raise many types
        where, what = "", str(error) or type(error).__name__
    raise ValueError(f"{source}: not valid YAML: {where}{' '.join(str(what).split())[:300]}")


def dump(content: Any) -> str:
    """Write a mapping of plain values as YAML, in its own order of keys."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False  # type: ignore[assignment]
    yaml.allow_unicode, yaml.width = True, 4096
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def changed(text: str, *changes: str | Mapping[str, Any]) -> str:
    """A YAML document with other values, without the comment at its head; the other comments stay.

    Args:
        changes: nested as the document: a section is changed key by key, unless one of the two is null. The
            comments of a text replace those of the values that they stand beside.

    Raises:
        ValueError: a key that the document does not have.
    """
    from ruamel.yaml import YAML

    yaml, stream = YAML(), io.StringIO()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    content = yaml.load(text)
    content.ca.comment = None
    for change in changes:
        _change(content, yaml.load(change) if isinstance(change, str) else change)
    yaml.dump(content, stream)
    return stream.getvalue()


def _change(content: Any, changes: Any) -> None:
    comments = changes.ca.items if hasattr(changes, "ca") else {}
    for key, value in changes.items():
        if key not in content:
            raise ValueError(f"unknown key {key!r}")
        if isinstance(value, dict) and isinstance(content[key], dict):
            _change(content[key], value)
            continue
        if isinstance(content[key], dict):  # its comment is about a section
            content.ca.items.pop(key, None)
        content[key] = value
        if key in comments:
            content.ca.items[key] = comments[key]
