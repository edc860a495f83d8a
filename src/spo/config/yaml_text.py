"""YAML 1.2, as DVC reads it: the one parser of params.yaml, dvc.lock, presets and overrides."""

import io
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
