"""Step-aware Preference Optimization.

The names below are the Python API (docs/python.md). They are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo.api import PreferenceModel, judge, load_params, train

__all__ = ["PreferenceModel", "judge", "load_params", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("spo.api"), name)
