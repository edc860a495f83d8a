"""Files of a store behind a URL (hf://datasets/..., s3://..., memory://...), through fsspec."""

from __future__ import annotations

from typing import Any


def is_remote(source: object) -> bool:
    """Whether it is a URL, not a path."""
    return "://" in str(source)


def find(url: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """The store, the root of `url` in it, and what the store tells of each file below, by path in order.

    A `*` in the last part of the URL chooses files: `hf://datasets/OWNER/NAME/data/validation_unique-*.parquet`.

    Raises:
        ValueError: the store cannot be reached.
    """
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
        if "*" in root:
            return files, root.rpartition("/")[0], dict(sorted(files.glob(root, detail=True).items()))
        return files, root, dict(sorted(files.find(root, detail=True).items()))
    except Exception as error:  # each store has its own kinds
        raise ValueError(
            f"{url}: cannot be reached ({type(error).__name__}); download it where there is a network "
            "and give its folder in params.yaml"
        ) from None
