"""The alignment methods, one file each, named like the method's section in `align` of params.yaml."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo.methods.spec import MethodSpec


def method_spec(name: str) -> MethodSpec:
    """The SPEC of a method's module, which is imported only here: no method depends on another's code."""
    spec: MethodSpec = import_module(f"spo.methods.{name}").SPEC
    return spec
