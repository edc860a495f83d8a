"""The alignment methods: a new one is a file here, and a line below."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo.methods.spec import MethodSpec

MODULES = {
    "spo": "spo.methods.spo",
    "diffusion_dpo": "spo.methods.diffusion_dpo",
    "lpo": "spo.methods.lpo",
}


def method_spec(name: str) -> MethodSpec:
    """The SPEC of a method's module, which is imported only here: no method depends on another's code."""
    spec: MethodSpec = import_module(MODULES[name]).SPEC
    return spec
