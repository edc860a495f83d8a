"""Images as tensors, and the generated images of a variant as one archive."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.data.decoding import MAX_PIXELS, open_image
from spo.runtime.files import atomic, remove_partials
from spo.runtime.messages import first_line

# mean and standard deviation of the pixels of CLIP's training images, [3,1,1], in [0,1]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
ARCHIVE, INDEX = "images.zip", "index.csv"
MAX_BYTES = 4 * MAX_PIXELS  # of an archive's entry, uncompressed
LONG = 16  # aspect ratio above which an image is cropped and resized in one step, to bound the memory
_EPOCH = (1980, 1, 1, 0, 0, 0)  # time stamp of every entry, so that equal images give equal archives


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image [3,H,W] in about [-1,1], clamped, to 8-bit RGB; refuses NaN and infinity."""
    if not image.isfinite().all():
        raise ValueError("an image has NaN or infinite pixels; check the model that generated it")
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to [3,H,W] in [-1,1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def pack(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size to uint8 [N,H,W,3]."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])


def unpack(pixels: Tensor) -> list[Image.Image]:
    """Invert `pack`."""
    return [Image.fromarray(image) for image in pixels.numpy()]


def decode_image(data: bytes, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image to [3,H,W] in [-1,1], resized and centre-cropped to `size` (H, W) if given."""
    image = open_image(data)
    if size is not None and (image.height, image.width) != size:
        image = fit(image, size)
    return to_tensor(image)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize (bicubic) to cover `size` (H, W), then centre-crop."""
    height, width = size
    factor = max(height / image.height, width / image.width)
    new = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    return resize_and_crop(image, new, (width, height))


def resize_and_crop(image: Image.Image, new: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Resize (bicubic) to `new`, then centre-crop to `size`, both (W, H)."""
    (width, height), (left, top) = size, ((n - s) // 2 for n, s in zip(new, size, strict=True))
    if max(image.size) > LONG * min(image.size):  # resizing all of 4000 x 1 pixels would take gigabytes
        x, y = image.width / new[0], image.height / new[1]
        right, bottom = min(image.width, (left + width) * x), min(image.height, (top + height) * y)
        return image.resize(size, Image.Resampling.BICUBIC, (left * x, top * y, right, bottom))
    image = image.resize(new, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def save_images(
    folder: Path, images: Iterable[Image.Image], prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write `folder`/images.zip: 00000.png ... and index.csv (file, prompt, seed), all or nothing."""
    rows = []
    remove_partials(folder)
    with atomic(folder / ARCHIVE) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for number, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            name = f"{number:05d}.png"
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), buffer.getvalue())
            rows.append((name, prompt, seed))
        lines = map(_csv_line, [("file", "prompt", "seed"), *rows])
        archive.writestr(zipfile.ZipInfo(INDEX, _EPOCH), "".join(lines))


def _csv_line(fields: Sequence[object]) -> str:
    """A row and a line feed; csv quotes a carriage return in a field only if it ends lines, too."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(fields)
    return line.getvalue().removesuffix("\r\n") + "\n"


class LazyImages(Sequence[Image.Image]):
    """Images that are read when they are indexed, so that no more than a slice is in memory."""

    def __init__(self, names: Sequence[Any], read: Callable[[Sequence[Any]], Iterable[Image.Image]]) -> None:
        self._names, self._read = names, read  # `read` opens the images of some of the names, in order

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._read(self._names))

    def __getitem__(self, index: Any) -> Any:
        """The image at a number, or the list of those in a slice."""
        if isinstance(index, slice):
            return list(self._read(self._names[index]))
        return next(iter(self._read([self._names[index]])))


def archived(folder: Path) -> tuple[LazyImages, list[str], list[int]]:
    """The images of `folder`/images.zip, which is opened when they are read, their prompts and seeds."""

    def read(files: Sequence[str]) -> Iterator[Image.Image]:
        with _archive(folder) as archive:
            for file in files:
                yield open_image(_entry(archive, file))

    with _archive(folder) as archive:
        rows = list(csv.DictReader(io.StringIO(_entry(archive, INDEX).decode(), newline="")))
        files, prompts, seeds = ([row[name] for row in rows] for name in ("file", "prompt", "seed"))
        return LazyImages(files, read), prompts, list(map(int, seeds))


def load_images(folder: Path) -> Iterator[tuple[Image.Image, str, int]]:
    """Iterate over (image, prompt, seed) in order, with one image in memory at a time."""
    return zip(*archived(folder), strict=True)


@contextmanager
def _archive(folder: Path) -> Iterator[zipfile.ZipFile]:
    path = folder / ARCHIVE
    if not path.exists():
        raise ValueError(f"{path}: no such archive; run `make repro` or `spo generate {folder.name}`")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises many types for truncated files
        raise ValueError(
            f"{path}: damaged ({first_line(error, 200)}); delete it and run `dvc repro`"
        ) from None


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an entry into memory: no archive is ever extracted to the paths that it names."""
    if archive.getinfo(name).file_size > MAX_BYTES:
        raise ValueError(f"{name} unpacks to more than {MAX_BYTES} bytes")
    return archive.read(name)
