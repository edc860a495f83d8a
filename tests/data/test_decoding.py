"""Images as a viewer shows them. Expected colours are by hand; PNG files of rare kinds are written here."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from spo.data.decoding import open_image

WHITE = (255, 255, 255)
PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139))  # sRGB's, at D50


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_file(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def header(width: int, height: int, depth: int, colour_type: int, interlaced: bool = False) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced))


def png(depth: int, colour_type: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """One row of two pixels."""
    parts = [*chunks, (b"IDAT", zlib.compress(b"\0" + row))]
    return png_file(header(2, 1, depth, colour_type), *(chunk(*part) for part in parts))


def key(*levels: int) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(levels)}H", *levels)


def profile(space: bytes = b"RGB ", primaries=PRIMARIES, gamma: float = 1.0) -> bytes:
    """A minimal ICC profile of version 2."""

    def numbers(values) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + numbers(values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = [
        (b"desc", b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0".ljust(82, b"\0")),
        (b"wtpt", xyz(white)),
    ]
    if space == b"RGB ":
        tags += [(n, xyz(v)) for n, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)]
        tags += [(n, curve) for n in (b"rTRC", b"gTRC", b"bTRC")]
    else:
        tags += [(b"kTRC", curve)]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02100000, b"mntr", space, b"XYZ ")
    return (head + bytes(12) + b"acsp" + bytes(28) + numbers(white)).ljust(128, b"\0") + table + body


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

    scan = encoded(Image.effect_noise((64, 64), 80), "JPEG", quality=95, restart_marker_blocks=4)
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
