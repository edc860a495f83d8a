"""PNG files of rare kinds, chunk by chunk, and ICC profiles."""

import io
import struct
import zlib

from PIL import Image

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
