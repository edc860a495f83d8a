import numpy as np
import pytest
import torch
from PIL import Image

from spo.data import images
from spo.rewards import hps, pixels


def plain(width: int, height: int, colour: tuple[int, int, int] = (255, 0, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_preprocess_normalises_each_channel() -> None:
    red = pixels.preprocess(plain(30, 40, (255, 0, 51)), 24)
    assert red.shape == (3, 24, 24) and red.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert torch.allclose(red, torch.tensor(expected).view(3, 1, 1).expand(3, 24, 24), atol=1e-6)


@pytest.mark.parametrize("tall", [False, True])
def test_preprocess_crops_the_centre_of_the_long_side(tall: bool) -> None:
    """Thirds of red, green and red: only the green one is left."""
    image = plain(16, 48) if tall else plain(48, 16)
    image.paste((0, 255, 0), (0, 16, 16, 32) if tall else (16, 0, 32, 16))
    assert torch.equal(pixels.preprocess(image, 16), pixels.preprocess(plain(16, 16, (0, 255, 0)), 16))


def test_preprocess_takes_any_mode_of_image() -> None:
    grey = pixels.preprocess(plain(8, 8, (90, 90, 90)).convert("L"), 8)
    assert torch.equal(grey, pixels.preprocess(plain(8, 8, (90, 90, 90)), 8))


def test_preprocess_refuses_floating_point_pixels() -> None:
    """Pillow makes black of NaN, and of [0, 1] too."""
    nothing = np.full((8, 8), np.nan, np.float32)
    for prepare in (pixels.preprocess, hps.preprocess):
        with pytest.raises(ValueError, match="floating-point pixels; give 8-bit RGB"):
            prepare(Image.fromarray(nothing), 8)


@pytest.mark.parametrize("shape", [(900, 40), (40, 900)])
def test_a_very_long_image_is_cropped_as_any_other(monkeypatch, shape: tuple[int, int]) -> None:
    """Within a grey level of resizing the whole image, as shorter ones are."""
    levels = torch.randint(256, (shape[1], shape[0], 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(levels.to(torch.uint8).numpy())
    cropped = pixels.preprocess(image, 24)
    monkeypatch.setattr(images, "LONG", 1000)
    torch.testing.assert_close(cropped, pixels.preprocess(image, 24), atol=1.01 / 255 / 0.26, rtol=0)


@pytest.mark.parametrize("shape", [(60000, 1), (1, 60000)])
def test_a_line_of_pixels_takes_little_memory_and_is_its_centre(shape: tuple[int, int]) -> None:
    image = plain(*shape)
    image.paste((0, 255, 0), (29000, 0, 31000, 1) if shape[1] == 1 else (0, 29000, 1, 31000))
    assert torch.equal(pixels.preprocess(image, 16), pixels.preprocess(plain(16, 16, (0, 255, 0)), 16))
