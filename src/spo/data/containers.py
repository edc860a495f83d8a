"""Detect damage in PNG and JPEG files, and drop metadata that no viewer reads.

Pillow's decoders skip checksums and fill missing pixels with black or grey, but reject an image because of a
text or a tag that no viewer reads. Here damaged pixels are refused, and metadata that does not change the
displayed image is dropped. A JPEG has no checksums: damage is found by markers in wrong places. A WebP file
has neither, so only libwebp finds damage in it.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

# PNG's chunks of pixels and animations; WORDS names those that a message may name
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
WORDS = {b"IHDR": "header", b"PLTE": "palette", b"IDAT": "pixels", b"IEND": "end"}
# PNG's chunks of colours and orientation, each with a check that its content can be read
READ: dict[bytes, Callable[[bytes], bool]] = {
    b"eXIf": lambda content: True,
    b"gAMA": lambda content: len(content) == 4,
    b"sRGB": lambda content: len(content) == 1,
    # zlib, the only method of the standard
    b"iCCP": lambda content: content.partition(b"\0")[2][:1] == b"\0",
}
# chunks that browsers ignore if damaged; another may be a chunk of pixels with a damaged name
IGNORED = (
    *(*READ, b"bKGD", b"cHRM", b"cICP", b"cLLI", b"dSIG", b"hIST", b"iTXt", b"mDCV", b"oFFs", b"pCAL"),
    *(b"pHYs", b"sBIT", b"sCAL", b"sPLT", b"sTER", b"tEXt", b"tIME", b"zTXt"),
)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK = 1 << 16  # bytes of compressed pixels at a time

END, SCAN, FILL, FIRST = 0xD9, 0xDA, 0xFF, 0xC0  # JPEG's markers; those below FIRST are reserved
# JPEG's segments of metadata that are read: what they begin with, and the length that libjpeg and Pillow need
TAGS = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 6), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}
METADATA = (*range(0xE0, 0xF0), 0xFE)
SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")


def png(data: bytes) -> bytes:
    """A PNG without the chunks that no viewer reads and without bytes after its end; refuses other damage."""
    kept, names = [data[:8]], []
    for name, chunk, intact in _chunks(data):
        if not intact and name not in IGNORED:
            raise ValueError(
                f"damaged: the checksum of its {WORDS.get(name, 'chunk ' + repr(name))} is wrong"
            )
        if name in PIXELS or (intact and name in READ and READ[name](chunk[8:-4])):
            kept.append(chunk)
        names.append(name)
    if names[:1] != [b"IHDR"]:
        raise ValueError("its header is damaged")
    if names[-1] != b"IEND":
        raise ValueError("truncated: it has no end")
    return b"".join(kept)


def check_png_pixels(data: bytes) -> None:
    """Check that the compressed pixels of a PNG are whole: Pillow takes missing rows for black ones."""
    expected = _raw_size(*struct.unpack(">IIBBxxB", data[16:29]))
    inflate, count = zlib.decompressobj(), 0
    for name, chunk, _ in _chunks(data):
        pixels = chunk[8:-4] if name == b"IDAT" else b""
        for start in range(0, len(pixels), BLOCK):
            if count <= expected and not inflate.eof:
                count += len(_inflated(inflate, pixels[start : start + BLOCK]))
    if count < expected or (count == expected and not inflate.eof):
        raise ValueError("truncated: its pixels end early")


def _inflated(inflate: Any, block: bytes) -> bytes:
    try:
        return inflate.decompress(block)
    except zlib.error:
        raise ValueError("damaged: its pixels cannot be decompressed") from None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Name, bytes and whether the checksum is right, of each whole chunk up to the end of the image."""
    at, name = 8, b""
    while name != b"IEND" and at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            return
        yield name, chunk, zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        at += len(chunk)


def _raw_size(width: int, height: int, depth: int, colours: int, interlaced: int) -> int:
    """The bytes of a PNG's rows before compression, each with the number of its filter."""
    bits, size = depth * CHANNELS[colours], 0
    for x, y, dx, dy in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = (width - x + dx - 1) // dx, (height - y + dy - 1) // dy
        size += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    return size


def jpeg(data: bytes) -> bytes:
    """A JPEG without metadata that no viewer reads and without bytes after its end; refuses other damage."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == FILL:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == FILL:
            at += 1
            continue
        if marker == END:
            break
        if marker < FIRST:
            raise ValueError(f"damaged: a marker at byte {at} that no JPEG has")
        if marker == SCAN:
            end = _end_of_scan(data, end)
        if marker not in METADATA or _is_read(marker, data[at + 4 : end]):
            kept.append(data[at:end])
        at = end
    return b"".join(kept) + (data[at : at + 2] if data[at + 1 : at + 2] == bytes([END]) else data[at:])


def _end_of_scan(data: bytes, start: int) -> int:
    """Where the next segment begins, or the file ends."""
    found = SCAN_END.search(data, start)
    end = found.start() if found else len(data)
    numbers = b"".join(RESTART.findall(data, start, end))
    if numbers != (bytes(range(0xD0, 0xD8)) * (len(numbers) // 8 + 1))[: len(numbers)]:
        raise ValueError(f"damaged: a part of its pixels before byte {end} is missing or overwritten")
    return end


def _is_read(marker: int, content: bytes) -> bool:
    start, length = TAGS.get(marker, (b"", 0))
    return bool(start) and content.startswith(start) and len(content) >= length
