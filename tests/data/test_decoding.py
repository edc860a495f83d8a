"""Images as a viewer shows them. Expected colours are by hand; PNG files of rare kinds are written here."""

import io
import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from png_files import PRIMARIES, encoded, key, png, profile

from spo.data.decoding import open_image

WHITE = (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_plain_image_is_what_pillow_decodes(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 17, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({}, {"icc_profile": srgb}):
        data = encoded(Image.fromarray(noise), kind, **options)
        assert open_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, "ab"), (2, "ba"), (3, "dc"), (4, "cd"), (5, "ac"), (6, "ca"), (7, "db"), (8, "bd"), (9, "ab")],
)
def test_every_exif_orientation_is_applied(kind: str, orientation: int, corner: str) -> None:
    """Quarters a b / c d in grey; `corner` is the upper row that EXIF's standard asks for."""
    level = {"a": 0, "b": 80, "c": 160, "d": 240}
    image = Image.new("RGB", (64, 32))
    for (x, y), name in zip([(0, 0), (32, 0), (0, 16), (32, 16)], "abcd", strict=True):
        image.paste((level[name],) * 3, (x, y, x + 32, y + 16))
    exif = Image.Exif()
    exif[0x112] = orientation
    shown = open_image(encoded(image, kind, exif=exif))
    assert shown.size == ((32, 64) if 5 <= orientation <= 8 else (64, 32))
    levels = [shown.getpixel((x, 5))[0] for x in (5, shown.width - 5)]
    assert levels == pytest.approx([level[name] for name in corner], abs=3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_is_white_and_never_the_hidden_colour(kind: str) -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (100, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black: 255 - 51
    shown = open_image(encoded(image, kind, lossless=True, exact=True))
    assert [shown.getpixel((x, 0)) for x in range(3)] == [WHITE, (100, 0, 0), (204, 204, 204)]


@pytest.mark.parametrize(
    ("data", "second"),
    [
        (png(8, 4, bytes([9, 0, 60, 255])), 60),  # grey and alpha
        (png(16, 4, struct.pack(">4H", 9, 0, 60 * 257, 65535)), 60),
        (png(8, 3, b"\0\1", (b"PLTE", bytes([9, 9, 9, 60, 60, 60])), (b"tRNS", b"\0")), 60),
        (png(1, 3, b"\x40", (b"PLTE", bytes([9, 9, 9, 60, 60, 60])), (b"tRNS", b"\0\xff")), 60),
        (png(1, 0, b"\x80", key(1)), 0),
        (png(2, 0, b"\x90", key(2)), 85),  # levels 2 and 1 of 0 to 3
        (png(4, 0, b"\x58", key(5)), 136),
        (png(8, 0, bytes([5, 60]), key(5)), 60),
        (png(16, 0, struct.pack(">2H", 300, 301), key(300)), 1),
        (png(8, 2, bytes([1, 2, 3, 60, 60, 60]), key(1, 2, 3)), 60),
    ],
)
def test_the_first_pixel_is_transparent_and_the_second_is_not(data: bytes, second: int) -> None:
    shown = open_image(data)
    assert [shown.getpixel((x, 0)) for x in range(2)] == [WHITE, (second,) * 3]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = struct.pack(">2H", 128 * 257, 65535)
    shown = open_image(png(16, 0, levels))
    assert [shown.getpixel((x, 0))[0] for x in range(2)] == [128, 255]
    assert open_image(png(16, 2, levels * 3)).getpixel((0, 0)) == (128, 255, 128)
    assert open_image(png(1, 0, b"\x40")).getpixel((1, 0)) == WHITE


def test_cmyk_is_shown_in_its_colours() -> None:
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")  # Adobe's, so inverted in the file
    assert open_image(red).getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_icc_profile_is_converted_to_srgb(kind: str) -> None:
    """A profile whose red is sRGB's green and the other way round."""
    swapped = profile(primaries=(PRIMARIES[1], PRIMARIES[0], PRIMARIES[2]))
    red = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), kind, icc_profile=swapped, lossless=True)
    assert open_image(red).getpixel((8, 8)) == pytest.approx((0, 255, 0), abs=4)


def test_linear_light_is_converted_whatever_the_mode() -> None:
    """128 of 255 in linear light is 188 in sRGB: 255 (1.055 (128/255)^(1/2.4) - .055)."""
    grey, rgb = profile(b"GRAY"), profile()
    cases = [("L", 128, grey), ("LA", (128, 255), grey), ("RGB", (128,) * 3, rgb), ("RGBA", (128,) * 3, rgb)]
    for mode, colour, icc in cases:
        data = encoded(Image.new(mode, (2, 2), colour), icc_profile=icc)
        assert open_image(data).getpixel((0, 0)) == pytest.approx((188,) * 3, abs=1), mode
    assert open_image(png(8, 0, bytes([128, 0]), (b"gAMA", struct.pack(">I", 100000)))).getpixel(
        (0, 0)
    ) == pytest.approx((188,) * 3, abs=1)
    assert (
        open_image(png(8, 0, bytes([128, 0]), (b"gAMA", struct.pack(">I", 45455)))).getpixel((0, 0))[0] == 128
    )


def test_what_browsers_ignore_is_ignored() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for options in ({"icc_profile": b"no profile" * 20}, {"icc_profile": profile(b"GRAY")}):
        assert open_image(encoded(red, **options)).getpixel((0, 0)) == (255, 0, 0)
    damaged = encoded(red, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\1\x12")
    assert open_image(damaged).getpixel((0, 0)) == (255, 0, 0)


def refused() -> dict[str, tuple[bytes, str]]:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    more = {"save_all": True, "append_images": [Image.new("RGB", (40, 40))]}
    return {
        "animated webp": (encoded(red, "WEBP", **more), "animation of 2 frames"),
        "animated png": (encoded(red, "PNG", **more), "animation of 2 frames"),
        "gif": (encoded(red, "GIF"), "GIF; give JPEG, PNG or WebP"),
        "bmp": (encoded(red, "BMP"), "BMP; give"),
        "tiff": (encoded(red, "TIFF"), "TIFF; give"),
        "truncated png": (encoded(red)[:-30], "truncated"),
        "truncated jpeg": (encoded(red, "JPEG")[:-100], "Truncated"),
        "truncated webp": (encoded(red, "WEBP")[:-4], "decoder"),
        "header only": (b"\x89PNG\r\n\x1a\n", "header is damaged"),
        "no width": (encoded(red).replace(struct.pack(">II", 40, 40), struct.pack(">II", 0, 40)), "header"),
        "text": (b"<html>404</html>", "neither JPEG, PNG nor WebP"),
        "nothing": (b"", "0 bytes"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "16-bit key": (png(16, 2, bytes(12), key(1, 2, 3)), "alpha channel"),
    }


@pytest.mark.parametrize("name", refused())
def test_other_files_are_refused_with_the_true_reason(name: str) -> None:
    data, reason = refused()[name]
    with pytest.raises(ValueError, match=f"^not a readable image .*{re.escape(reason)}") as error:
        open_image(data)
    assert "0x" not in str(error.value) and "\n" not in str(error.value)


def test_a_phones_jpeg_with_a_preview_is_its_first_image() -> None:
    red, preview = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16))
    data = encoded(red, "MPO", save_all=True, append_images=[preview])
    assert open_image(data).getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)
