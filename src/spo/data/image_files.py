"""The image files of a folder in the order of their names; none is passed over in silence."""

from __future__ import annotations

import re
from pathlib import Path

from spo.data.images import is_image

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
OTHER_ENDINGS = (  # of images that `open_image` refuses by name
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".pbm", ".pgm"),
    *(".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff", ".ico", ".exr", ".hdr", ".dng", ".mpo"),
)
HIDDEN_FOLDER = "__MACOSX"  # what macOS adds to archives


def image_files(folder: Path) -> list[Path]:
    """Lists the image files of a folder, 2 before 10; hidden files and files of other kinds are none.

    Raises:
        ValueError: images in a folder below, without an ending, or of names that have no order.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if _is_hidden(path):
            continue
        if path.is_dir():
            _refuse_images_below(path, folder)
        elif path.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS):
            files.append(path)
        elif path.is_file() and _begins_as_image(path):
            raise ValueError(f"{path}: an image, but its name does not say so; rename it, or take it away")
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no file (a broken link, or no regular file)")
    return _in_order(files)


def _is_hidden(path: Path) -> bool:
    """Tells whether it is what a system keeps beside files: ._1.png, .DS_Store, .ipynb_checkpoints."""
    return path.name.startswith(".") or path.name == HIDDEN_FOLDER


def _refuse_images_below(path: Path, folder: Path) -> None:
    for file in sorted(path.rglob("*")):
        parts = [folder / part for part in file.relative_to(folder).parts]
        if file.suffix.lower() in (*ENDINGS, *OTHER_ENDINGS) and not any(map(_is_hidden, parts)):
            raise ValueError(
                f"{file}: folders below {folder} are not read; give the folder of the images themselves"
            )


def _begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_image(file.read(64))
    except OSError:
        return False


def _in_order(files: list[Path]) -> list[Path]:
    ordered = sorted(files, key=lambda path: _key(path.name))
    names = sorted(ordered, key=lambda path: (_key(path.stem), path.name))
    for first, second in zip(names, names[1:], strict=False):
        if _key(first.stem) == _key(second.stem):
            raise ValueError(
                f"{first.parent}: {first.name} and {second.name} have no order; which comes first? rename one"
            )
    return ordered


def _key(name: str) -> list[int | str]:
    """Splits a name into texts and numbers in turn, so that 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]
