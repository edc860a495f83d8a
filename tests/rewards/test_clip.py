import math

import numpy as np
import pytest
import torch
from PIL import Image

from spo.rewards import clip, hps


def plain(width: int, height: int, colour: tuple[int, int, int] = (255, 0, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_preprocess_normalises_each_channel() -> None:
    pixels = clip.preprocess(plain(30, 40, (255, 0, 51)), 24)
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert torch.allclose(pixels, torch.tensor(expected).view(3, 1, 1).expand(3, 24, 24), atol=1e-6)


@pytest.mark.parametrize("tall", [False, True])
def test_preprocess_crops_the_centre_of_the_long_side(tall: bool) -> None:
    """Thirds of red, green and red: only the green one is left."""
    image = plain(16, 48) if tall else plain(48, 16)
    image.paste((0, 255, 0), (0, 16, 16, 32) if tall else (16, 0, 32, 16))
    assert torch.equal(clip.preprocess(image, 16), clip.preprocess(plain(16, 16, (0, 255, 0)), 16))


def test_preprocess_takes_any_mode_of_picture() -> None:
    grey = clip.preprocess(plain(8, 8, (90, 90, 90)).convert("L"), 8)
    assert torch.equal(grey, clip.preprocess(plain(8, 8, (90, 90, 90)), 8))


def test_preprocess_refuses_floating_point_pixels() -> None:
    """Pillow makes black of NaN, and of [0, 1] too."""
    pixels = np.full((8, 8), np.nan, np.float32)
    for prepare in (clip.preprocess, hps.preprocess):
        with pytest.raises(ValueError, match="floating-point pixels; give 8-bit RGB"):
            prepare(Image.fromarray(pixels), 8)


@pytest.mark.parametrize("shape", [(900, 40), (40, 900)])
def test_a_very_long_image_is_cropped_as_any_other(monkeypatch, shape: tuple[int, int]) -> None:
    """Within a grey level of resizing the whole image, as shorter ones are."""
    levels = torch.randint(256, (shape[1], shape[0], 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(levels.to(torch.uint8).numpy())
    cropped = clip.preprocess(image, 24)
    monkeypatch.setattr(clip, "LONG", 1000)
    torch.testing.assert_close(cropped, clip.preprocess(image, 24), atol=1.01 / 255 / 0.26, rtol=0)


@pytest.mark.parametrize("shape", [(60000, 1), (1, 60000)])
def test_a_line_of_pixels_takes_little_memory_and_is_its_centre(shape: tuple[int, int]) -> None:
    image = plain(*shape)
    image.paste((0, 255, 0), (29000, 0, 31000, 1) if shape[1] == 1 else (0, 29000, 1, 31000))
    assert torch.equal(clip.preprocess(image, 16), clip.preprocess(plain(16, 16, (0, 255, 0)), 16))


def in_batches(score, n_images: int, prompts: list[str], batch_size: int = 2) -> list[float]:
    images = [plain(i + 1, 1) for i in range(n_images)]
    return clip.in_batches(score, images, prompts, name="some_scorer", batch_size=batch_size)


def width_and_length(images, prompts) -> torch.Tensor:
    return torch.tensor([100.0 * i.width + len(p) for i, p in zip(images, prompts, strict=True)])


def test_each_image_meets_its_own_prompt_and_order_is_kept() -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert in_batches(width_and_length, 5, prompts) == [101, 202, 303, 404, 505]
    assert in_batches(width_and_length, 0, []) == []


@pytest.mark.parametrize("n_prompts", [0, 1, 4])
def test_lengths_must_agree(n_prompts: int) -> None:
    with pytest.raises(ValueError, match=f"^some_scorer: 3 images, but {n_prompts} prompts") as error:
        in_batches(width_and_length, 3, ["p"] * n_prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["a <|endoftext|> b", "a <end_of_text> b", "a [SEP] b", "a\0b"])
def test_a_prompt_that_cannot_be_encoded_gets_no_score(prompt: str) -> None:
    with pytest.raises(ValueError, match="some_scorer: the prompt 'a.*b' has .*; it cannot be encoded"):
        in_batches(width_and_length, 2, ["fine", prompt])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_its_prompt(bad: float) -> None:
    def score(images, prompts):
        return torch.tensor([bad if p == "the bad one" else 1.0 for p in prompts])

    with pytest.raises(ValueError, match="some_scorer: .*'the bad one'"):
        in_batches(score, 3, ["fine", "fine too", "the bad one"])


def test_no_gradients_are_kept() -> None:
    seen = []

    def score(images, prompts):
        seen.append(torch.is_grad_enabled())
        return torch.zeros(len(images))

    in_batches(score, 1, ["p"])
    assert seen == [False]


def test_a_torch_file_without_weights_is_refused(tmp_path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    for name in ("list.pt", "text.pt", "missing.pt"):
        with pytest.raises(
            ValueError, match=f"{name}( is not a state dict| cannot be read|: no such file)"
        ) as error:
            clip.load_state(tmp_path / name, name)
        assert "\n" not in str(error.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        clip.load_state(tmp_path / "evil.pt", "evil.pt")
    assert not (tmp_path / "made").exists()
