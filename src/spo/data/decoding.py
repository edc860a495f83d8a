"""Decode images to 8-bit RGB as a viewer shows them: one decoder for pairs, scores and the report.

The EXIF orientation is applied, transparency is composited on white, 16 bits are scaled to 8, and colours are
converted to sRGB from an embedded ICC profile or a PNG's gAMA chunk. As in browsers, damaged metadata, a
profile of another colour space than the image's, and the further images in a phone's JPEG are ignored. PNG's
cHRM and cICP chunks are not read.
"""

import io
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from spo.data import containers
from spo.runtime.messages import first_line

MAX_PIXELS = 64_000_000  # beyond any preference data set: a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP")  # not all of Pillow's: some of its decoders start other programs
SRGB_TOLERANCE = 2  # grey levels; a profile that shifts no colour by more is taken for sRGB
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # (offset, bytes at it, format)
    *((0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n\x1a\n", "PNG"), (8, b"WEBP", "WEBP")),
    *((0, b"GIF8", "GIF"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"8BPS", "PSD")),
    *((4, b"ftypavif", "AVIF"), (4, b"ftypavis", "AVIF"), (4, b"ftyphei", "HEIC"), (4, b"ftypmif1", "HEIC")),
    *((0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cjP  ", "JPEG 2000")),
)
_BITMAP = (b"BM", slice(6, 10), bytes(4))  # BMP: its two letters alone could begin a text file
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode: the colour space of its ICC profiles


def image_format(data: bytes) -> str | None:
    """Identify the image format by the first 16 bytes of a file; None if unknown."""
    for offset, signature, name in SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return name
    letters, reserved, zeros = _BITMAP
    return "BMP" if data.startswith(letters) and data[reserved] == zeros else None


def open_image(data: bytes) -> Image.Image:
    """Decode a still JPEG, PNG or WebP image of at most MAX_PIXELS to RGB; damaged files are refused."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of damaged EXIF blocks and the like
            return _decode(data)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not a readable image (its header is damaged, or its size is zero)") from None
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"not a readable image ({first_line(error)})") from None


def _decode(data: bytes) -> Image.Image:
    kind = image_format(data)
    if kind not in FORMATS:
        raise ValueError(_other_format(data))
    if kind != "WEBP":
        data = containers.png(data) if kind == "PNG" else containers.jpeg(data)
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    if getattr(image, "is_animated", False):
        raise ValueError(f"an animation of {getattr(image, 'n_frames', 0)} frames; give a still image")
    if kind == "PNG":
        containers.check_png_pixels(data)
    image.load()
    image = _upright(image)
    alpha = _alpha(image, data[24] if kind == "PNG" else 8)
    colours = _in_srgb(_eight_bits(image), image.info)
    if alpha is not None:
        white = Image.new("RGB", colours.size, "white")
        white.paste(colours, mask=alpha)
        return white
    return colours


def _other_format(data: bytes) -> str:
    if not data:
        return "0 bytes"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file; run `git lfs pull`"
    known = image_format(data)
    return f"{known}; give JPEG, PNG or WebP" if known else "neither JPEG, PNG nor WebP"


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.getexif()
        image.info.pop("exif", None)  # else Pillow writes it again, which fails for 1 in 1,000 damaged ones
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block, which viewers ignore
        return image


def _alpha(image: Image.Image, depth: int) -> Image.Image | None:
    """The opacity of each pixel as an L image, None if all are opaque; `depth` is that of the file."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A")
    key = image.info.get("transparency")
    if key is None:
        return None
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A")
    if image.mode == "RGB" and depth == 16:  # Pillow reads only 8 of the 16 bits to compare with the key
        raise ValueError("16-bit RGB with a transparent colour; save it with an alpha channel")
    if image.mode == "L" and depth < 8:  # Pillow scales the pixels, but not the key
        key = key * 255 // (2**depth - 1)
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    hidden = pixels == np.asarray(key)
    hidden = hidden.all(axis=-1) if hidden.ndim == 3 else hidden
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, L or CMYK without alpha."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips
        levels = (np.asarray(image).astype(np.int64) + 128) // 257
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # avoids Pillow's warning
    return image.convert("CMYK" if image.mode == "CMYK" else "RGB")


def _in_srgb(colours: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if profile:
        transform = _transform(profile, colours.mode)
        if transform is not None:
            return ImageCms.applyTransform(colours, transform)  # type: ignore[return-value]
    elif gamma and "srgb" not in info and abs(2.2 * gamma - 1) > 0.05 and colours.mode != "CMYK":
        light = (np.arange(256) / 255) ** (1 / gamma)
        encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        levels = (255 * encoded).round().astype(int).tolist()
        return colours.convert("RGB").point(3 * levels)
    return colours.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an image's profile to sRGB; None if it changes nothing or is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # a damaged profile raises several types
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    converted = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    shift = np.abs(converted - np.asarray(probe.convert("RGB"))).max()
    return None if shift <= SRGB_TOLERANCE else transform
