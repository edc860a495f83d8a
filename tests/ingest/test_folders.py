from pathlib import Path

import pytest
from PIL import Image

from spo.ingest.folders import list_images


def draw(path: Path, kind: str = "PNG") -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, kind)


def test_every_image_is_listed_by_its_number_whatever_its_ending(tmp_path) -> None:
    for name, kind in (
        ("2.PNG", "PNG"),
        ("10.jfif", "JPEG"),
        ("11.jpe", "JPEG"),
        ("12", "WEBP"),
        ("²", "PNG"),
    ):
        draw(tmp_path / name, kind)
    draw(tmp_path / "13.bmp", "BMP")  # the decoder refuses it by name
    for name in ("._2.png", ".DS_Store", "prompts.txt", "notes.md"):
        (tmp_path / name).write_bytes(b"\0\5\26\7 of the Finder")
    draw(tmp_path / "__MACOSX/._3.png")
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["2.PNG", "10.jfif", "11.jpe", "12", "13.bmp", "²"]


def test_images_that_would_be_skipped_are_refused(tmp_path) -> None:
    draw(tmp_path / "a/1.png")
    draw(tmp_path / "a/set_b/2.PNG")
    with pytest.raises(ValueError, match=r"a: images in sub-folders \(set_b\) are not read"):
        list_images(tmp_path / "a")


def test_an_ambiguous_order_is_refused(tmp_path) -> None:
    draw(tmp_path / "1.png")
    draw(tmp_path / "01.png")
    with pytest.raises(ValueError, match="01.png and 1.png have the same number"):
        list_images(tmp_path)
