import io
import zipfile

import pytest
import torch
from PIL import Image

from spo.data import decoding, images


def image(width=8, height=6, colour=(10, 200, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_to_pil_and_back_keeps_every_grey_level() -> None:
    levels = torch.arange(256).float().view(1, 16, 16).expand(3, 16, 16) / 127.5 - 1
    assert torch.equal(images.to_tensor(images.to_pil(levels)), levels)
    outside = images.to_tensor(images.to_pil(torch.tensor([[[-9.0]], [[9.0]], [[0.0]]])))
    assert outside[:, 0, 0].tolist() == pytest.approx([-1, 1, 0], abs=0.005)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_make_no_image(value) -> None:
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        images.to_pil(pixels)


def test_a_folder_of_images_comes_back_in_order(tmp_path) -> None:
    drawn = [image(colour=(i, 0, 0)) for i in range(3)]
    images.save_images(tmp_path, drawn, ["a, b", 'say "x"', "c"], [7, 8, 9])
    loaded = list(images.load_images(tmp_path))
    assert [(p, s) for _, p, s in loaded] == [("a, b", 7), ('say "x"', 8), ("c", 9)]
    assert [i.getpixel((0, 0)) for i, _, _ in loaded] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_prompts_with_line_ends_come_back_as_they_were(tmp_path) -> None:
    prompts = [f"a{end}b, {end}" for end in "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"] + ["a\r\nb", "plain"]
    images.save_images(tmp_path, [image()] * len(prompts), prompts, range(len(prompts)))
    assert [prompt for _, prompt, _ in images.load_images(tmp_path)] == prompts


def test_images_of_an_archive_are_read_when_they_are_asked_for(tmp_path) -> None:
    drawn = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 20, 30)]
    images.save_images(tmp_path, drawn, ["a", "b", "c"], [5, 6, 7])
    pictures, prompts, seeds = images.archived(tmp_path)
    assert (len(pictures), prompts, seeds) == (3, ["a", "b", "c"], [5, 6, 7])
    assert [image.tobytes() for image in pictures[1:]] == [image.tobytes() for image in drawn[1:]]
    assert pictures[0].tobytes() == drawn[0].tobytes()
    (tmp_path / "images.zip").unlink()
    with pytest.raises(ValueError, match="images.zip: no such archive"):
        pictures[0]


def test_equal_images_give_equal_archives(tmp_path) -> None:
    for name in "ab":
        images.save_images(tmp_path / name, [image()], ["p"], [1])
    assert (tmp_path / "a/images.zip").read_bytes() == (tmp_path / "b/images.zip").read_bytes()


def test_an_interrupted_write_leaves_no_archive(tmp_path) -> None:
    def drawing():
        yield image()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images.save_images(tmp_path, drawing(), ["a", "b"], [1, 2])
    assert not (tmp_path / "images.zip").exists()


def test_a_damaged_archive_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ValueError, match="spo generate"):
        list(images.load_images(tmp_path))
    images.save_images(tmp_path, [image()], ["p"], [1])
    path = tmp_path / "images.zip"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        list(images.load_images(tmp_path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.csv", "file,prompt,seed\n00000.png,p,1\n")
    with pytest.raises(ValueError, match="00000.png"):
        list(images.load_images(tmp_path))


def test_truncated_bytes_and_bombs_are_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="not a readable image"):
        images.decode_image(b"\x89PNG nothing")
    with pytest.raises(ValueError, match="not a readable image"):
        images.decode_image(png(image(200, 200))[:60])
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40)
    with pytest.raises(ValueError, match="8 x 6 pixels"):
        images.decode_image(png(image()))


def test_other_sizes_are_covered_and_cropped() -> None:
    wide = Image.new("RGB", (90, 30))
    wide.paste((255, 255, 255), (30, 0, 60, 30))  # the centre is white
    fitted = images.decode_image(png(wide), (16, 16))
    assert fitted.shape == (3, 16, 16) and fitted.mean() > 0.9
    assert images.decode_image(png(image()), (6, 8)).shape == (3, 6, 8)


@pytest.mark.parametrize("shape", [(60000, 1), (1, 60000), (700, 30), (30, 700)])
def test_a_very_long_image_is_its_centre(shape) -> None:
    image = Image.new("RGB", shape)
    width, height = shape
    box = (width // 4, 0, 3 * width // 4, 1000) if width > height else (0, height // 4, 1000, 3 * height // 4)
    image.paste((255, 255, 255), box)
    fitted = images.fit(image, (16, 24))
    assert fitted.size == (24, 16) and fitted.getcolors() == [(16 * 24, (255, 255, 255))]
