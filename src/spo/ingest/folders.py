"""Folders of image files in natural order of their names (2 before 10); no image is silently skipped."""

import re
from pathlib import Path

from spo.data.decoding import image_format

SUPPORTED = (".png", ".jpg", ".jpeg", ".webp")  # other endings are read by content
ENDINGS = {  # of all image files, so that unsupported ones are refused instead of skipped
    *(*SUPPORTED, ".jpe", ".jfif", ".jif", ".pjpeg", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dng", ".dds", ".qoi", ".eps"),
}


def list_images(folder: Path) -> list[Path]:
    """List the image files of a folder, known by ending or content. Hidden files (`._1.png`) are ignored.

    Images in sub-folders are refused, and two whose order is ambiguous (1.png, 01.png).
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with images ({', '.join(SUPPORTED)})")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if nested := [path.name for path in folders if _has_images(path)]:
        raise ValueError(
            f"{folder}: images in sub-folders ({', '.join(nested)[:100]}) are not read; "
            "give the folder that directly contains the images"
        )
    images: dict[tuple[str | int, ...], Path] = {}
    for path in find_images(folder):
        other = images.setdefault(_order(path.name), path)
        if other is not path:
            raise ValueError(
                f"{folder}: {other.name} and {path.name} have the same number; rename one of them"
            )
    if not images:
        raise ValueError(f"{folder}: no images in this folder ({', '.join(SUPPORTED)})")
    return [images[key] for key in sorted(images)]


def find_images(folder: Path) -> list[Path]:
    """List the image files of a folder, known by ending or content, in plain order of their names."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in visible if not path.is_dir() and _is_image(path)]


def _order(name: str) -> tuple[str | int, ...]:
    """The sort key of a name, text and numbers; equal for names that differ only in leading zeros."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in ENDINGS:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return image_format(file.read(16)) is not None


def _has_images(folder: Path) -> bool:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    return any(not path.name.startswith(".") and not path.is_dir() for path in files)
