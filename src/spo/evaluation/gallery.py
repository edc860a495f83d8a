"""The gallery: every test prompt with the images of all variants, on one page that works without a network.

The page holds a thumbnail of every image; the large ones are files beside it. Sorting, filter and the large
view are in templates/gallery.js. Without JavaScript the page lists the prompts in order.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from spo.evaluation.report import environment
from spo.evaluation.statistics import metrics
from spo.evaluation.verdict import name
from spo.runtime.files import remove, write_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL import Image

# longer side at most, in pixels: 500 prompts x 4 variants of photographs give a page of 13 MB
THUMBNAIL = 160
QUALITY, THUMBNAIL_QUALITY = 90, 70  # of WebP
LOSSLESS = 192  # longer side in pixels up to which images are stored as they are


def write(
    page: Path,
    title: str,
    scores: Mapping[str, DataFrame],
    images: Mapping[str, Iterable[Image.Image]],
    compared: tuple[str, str],
) -> None:
    """Write `page`, and the large images to the folder of the same name without `.html`.

    Args:
        scores: the table of each variant, in the order of the columns; rows are the prompts.
        images: by variant, in the order of the rows; read one at a time.
        compared: the variant and the baseline whose difference is shown first.
    """
    folder = page.with_suffix("")
    remove(folder)
    thumbnails = _write_images(folder, images, sum(map(len, scores.values())))
    first = next(iter(scores.values()))
    rows = [
        {
            "prompt": prompt,  # and of each image the variant, a thumbnail as data: URI, and the large one
            "images": [(name(v), thumbnails[v][i], quote(f"{folder.name}/{_file(v, i)}")) for v in scores],
        }
        for i, prompt in enumerate(first["prompt"])
    ]
    template = environment().get_template("gallery.html.j2")
    data = _data(scores, compared)
    write_text(page, template.render(title=title, rows=rows, variants=list(scores), data=data))


def _data(scores: Mapping[str, DataFrame], compared: tuple[str, str]) -> dict[str, Any]:
    """What the script of the page reads; `scores` is a list over prompts, variants and metrics."""
    first = next(iter(scores.values()))
    shown, variants = metrics(first), list(scores)
    values = [scores[v][shown].to_numpy(float).round(6).tolist() for v in variants]
    return {
        "variants": [{"key": v, "title": name(v)} for v in variants],
        "metrics": [{"key": m, "title": name(m)} for m in shown],
        "scores": [list(of_prompt) for of_prompt in zip(*values, strict=True)],
        "seeds": first["seed"].tolist(),
        "variant": compared[0],
        "over": compared[1],
    }


def _write_images(
    folder: Path, images: Mapping[str, Iterable[Image.Image]], total: int
) -> dict[str, list[str]]:
    """Write the large images; returns the thumbnails as data: URIs."""
    from PIL import ImageOps
    from tqdm import tqdm

    thumbnails: dict[str, list[str]] = {}
    with tqdm(total=total, desc="gallery", unit="image") as bar:
        for variant, drawn in images.items():
            thumbnails[variant] = []
            (folder / variant).mkdir(parents=True)
            for i, image in enumerate(drawn):
                (folder / _file(variant, i)).write_bytes(_webp(image, QUALITY))
                small = image
                if max(image.size) > THUMBNAIL:
                    small = ImageOps.contain(image.convert("RGB"), (THUMBNAIL, THUMBNAIL))
                encoded = base64.b64encode(_webp(small, THUMBNAIL_QUALITY, lossless=small is image))
                thumbnails[variant].append(f"data:image/webp;base64,{encoded.decode()}")
                bar.update()
    return thumbnails


def _webp(image: Image.Image, quality: int, lossless: bool | None = None) -> bytes:
    buffer = io.BytesIO()
    lossless = max(image.size) <= LOSSLESS if lossless is None else lossless
    image.convert("RGB").save(buffer, format="WEBP", quality=quality, lossless=lossless)
    return buffer.getvalue()


def _file(variant: str, number: int) -> str:
    return f"{variant}/{number:05d}.webp"
