"""Damage and metadata of PNG and JPEG files: damage that shows is refused, what does not show is ignored."""

import random
import re
import struct
import zlib

import pytest
from PIL import Image
from png_files import chunk, encoded, header, png, png_file, profile

from spo.data.decoding import open_image

WHITE = (255, 255, 255)


def segment(marker: int, content: bytes) -> bytes:
    """Of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_metadata() -> dict[str, bytes]:
    """Grey pixels in files that Pillow alone refuses, or with damage that no viewer shows."""
    grey = Image.new("L", (8, 8), 60)
    start, pixels = header(2, 1, 8, 0), chunk(b"IDAT", zlib.compress(b"\0" + bytes([60, 60])))
    profile_of = chunk(b"iCCP", b"x\0\0" + zlib.compress(profile(b"GRAY", gamma=2)))
    text = chunk(b"tEXt", b"Comment\0by hand")
    chunks = {
        "text with a wrong checksum": text[:-1] + bytes([text[-1] ^ 1]),
        "text of an unknown compression": chunk(b"zTXt", b"a\0\1xx"),
        "text of 3 MB": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20))),
        "profile with a wrong checksum": profile_of[:-1] + bytes([profile_of[-1] ^ 1]),
        "profile of an unknown compression": chunk(b"iCCP", b"a\0\1xx"),
        "empty profile": chunk(b"iCCP", b""),
        "half a gamma": chunk(b"gAMA", b"\0"),
        "half of the primaries": chunk(b"cHRM", b"\0"),
        "no density": chunk(b"pHYs", b""),
        "no intent": chunk(b"sRGB", b""),
        "private chunk": chunk(b"spOt", b"any"),
    }
    plain = encoded(grey, "JPEG")
    segments = {
        "no profile": segment(0xE2, b"ICC_PROFILE\0"),
        "half a JFIF header": segment(0xE0, b"JFIF\0"),
        "half of Adobe's": segment(0xEE, b"Adobe"),
        "half of Photoshop's": segment(0xED, b"Photoshop 3.0\x008BIM\0\0"),
        "half an index of images": segment(0xE2, b"MPF\0MM\0*"),
        "damaged EXIF": segment(0xE1, b"Exif\0\0MM\0*\xff\xff"),
        "fill bytes": b"\xff\xff",
    }
    return {
        **{f"png, {name}": png_file(start, extra, pixels) for name, extra in chunks.items()},
        **{f"jpeg, {name}": plain[:2] + extra + plain[2:] for name, extra in segments.items()},
        "png and more": png_file(start, pixels) + b"more",
        "jpeg and more": plain + b"\xff\x02more",
        "webp and more": encoded(grey, "WEBP", lossless=True) + b"more",
    }


@pytest.mark.parametrize("name", with_metadata())
def test_metadata_that_no_viewer_shows_refuses_no_picture(name: str) -> None:
    assert open_image(with_metadata()[name]).getpixel((1, 0)) == (60, 60, 60)


ADAM7 = ("16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777")


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5), (5, 3), (8, 8), (9, 17)])
@pytest.mark.parametrize(("depth", "colour_type", "bits"), [(8, 2, 24), (1, 0, 1), (16, 6, 64)])
def test_an_interlaced_picture_is_whole(
    size: tuple[int, int], depth: int, colour_type: int, bits: int
) -> None:
    """Passes by the pattern that PNG's standard draws; all pixels are at their highest level."""
    width, height = size
    rows = b""
    for number in "1234567":
        for y in range(height):
            if count := sum(ADAM7[y % 8][x % 8] == number for x in range(width)):
                rows += b"\0" + b"\xff" * ((count * bits + 7) // 8)
    start = header(width, height, depth, colour_type, interlaced=True)
    shown = open_image(png_file(start, chunk(b"IDAT", zlib.compress(rows))))
    assert shown.size == size and set(shown.getdata()) == {WHITE}
    with pytest.raises(ValueError, match="end early"):
        open_image(png_file(start, chunk(b"IDAT", zlib.compress(rows[:-1]))))


def flipped(data: bytes, name: bytes, offset: int = 4) -> bytes:
    """A PNG with a bit of its first chunk `name` turned."""
    at = data.index(name) + offset
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


def damaged() -> dict[str, tuple[bytes, str]]:
    start, rows = header(2, 2, 8, 0), b"\0\x3c\x3c" * 2
    packed = zlib.compress(rows)
    palette = png(8, 3, b"\0\1", (b"PLTE", bytes([9, 9, 9, 60, 60, 60])), (b"tRNS", b"\0"))

    def of(*parts: bytes) -> bytes:
        return png_file(start, *(chunk(b"IDAT", part) for part in parts))

    noise = Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64))
    scan = encoded(noise, "JPEG", quality=95, restart_marker_blocks=4)
    middle = scan.index(b"\xff\xd3")
    return {
        "pixels": (flipped(of(packed), b"IDAT"), "checksum of its pixels is wrong"),
        "header": (flipped(of(packed), b"IHDR", 12), "checksum of its header is wrong"),
        "palette": (flipped(palette, b"PLTE"), "checksum of its palette is wrong"),
        "transparency": (flipped(palette, b"tRNS"), "checksum of its chunk b'tRNS' is wrong"),
        "name of the palette": (flipped(palette, b"PLTE", 0), "checksum of its chunk b'pLTE' is wrong"),
        "name of the pixels": (flipped(of(packed), b"IDAT", 0), "checksum of its chunk b'iDAT' is wrong"),
        "checksum of the rows": (of(packed[:-1] + b"\0"), "cannot be decompressed"),
        "their checksum apart": (of(packed[:-4], bytes(4)), "cannot be decompressed"),
        "no checksum of the rows": (of(packed[:-4]), "pixels end early"),
        "a row less": (of(zlib.compress(rows[:3])), "pixels end early"),
        "no end": (of(packed)[:-12], "truncated: it has no end"),
        "half an end": (of(packed)[:-2], "truncated: it has no end"),
        "reserved marker": (scan[:middle] + b"\xff\x02" + scan[middle + 2 :], "a marker at byte"),
        "lost part": (scan[:middle] + scan[scan.index(b"\xff\xd4") :], "missing or overwritten"),
        "no end of a jpeg": (scan[:-2], "truncated"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_pixels_are_refused(name: str) -> None:
    data, reason = damaged()[name]
    with pytest.raises(ValueError, match=f"^not a readable image .*{re.escape(reason)}"):
        open_image(data)


def test_a_bit_that_turns_anywhere_in_a_png_changes_no_pixel() -> None:
    """Each byte of a file with a text: either the picture is refused, or it is as before."""
    text = chunk(b"tEXt", b"Comment\0x")
    good = png_file(header(2, 2, 8, 0), text, chunk(b"IDAT", zlib.compress(b"\0\x3c\x50" * 2)))
    for at in range(8, len(good)):
        for bit in (1, 0x20, 0x80):
            data = good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
            try:
                assert open_image(data).tobytes() == open_image(good).tobytes(), (at, bit)
            except ValueError:
                pass
