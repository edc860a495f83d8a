"""Ids of models on the hub, as against paths."""

from __future__ import annotations


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME and is no path of this workspace."""
    return name.count("/") == 1 and not name.startswith((".", "/", "data/", "outputs/"))
