"""The licence that a released model states in the front matter of its README."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

README = "README.md"


def stated(folder: str | Path) -> str | None:
    """The licence in the README of a model's folder, or None."""
    path = Path(folder) / README
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n"):
        return None
    try:
        name = metadata(text).license
    except Exception:  # neither YAML nor a mapping: the parser raises several types
        return None
    return name if isinstance(name, str) else None


def metadata(card: str) -> Any:
    """The front matter of a card, a ModelCardData; the hub's own type says less than it has."""
    return ModelCard(card, ignore_metadata_errors=True).data
