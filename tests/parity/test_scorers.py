"""Scorers against golden figures: preprocessing of the original implementations, and the released head."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spo.rewards import aesthetic, hps, pickscore

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden"
IMAGES = ["small", "square", "tall", "wide"]
# Pixels are sums over 12 taps along and 12 across, divided by a deviation of 1/4: their rounding in fp32, in
# the processor's order of sums, takes that share of them over the border between two numbers of fp16.
OVER_THE_BORDER = 2 * 4 * 24**0.5 * torch.finfo(torch.float32).eps / torch.finfo(torch.float16).eps


def check_pixels(actual: torch.Tensor, file: Path) -> None:
    """The stored figures are rounded to fp16: beyond half a unit of that, 1e-4 of the largest."""
    stored = np.load(file)["pixels"]
    golden = torch.from_numpy(stored.astype(np.float32))
    half_unit = torch.from_numpy(np.spacing(np.abs(stored)).astype(np.float32) / 2)
    assert actual.dtype == torch.float32 and actual.shape == golden.shape
    beyond = ((actual - golden).abs() - half_unit).clamp(min=0)
    assert float(beyond.max() / golden.abs().max()) < 1e-4
    assert float((actual.half() == torch.from_numpy(stored)).float().mean()) > 1 - OVER_THE_BORDER


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("module", [pickscore, aesthetic])
def test_clip_pixels_match_golden(module, name: str) -> None:
    check_pixels(
        module.preprocess(Image.open(GOLDEN / f"image_{name}.png")), GOLDEN / f"clip_pixels_{name}.npz"
    )


@pytest.mark.parametrize("name", IMAGES)
def test_hps_pixels_match_golden(name: str) -> None:
    check_pixels(hps.preprocess(Image.open(GOLDEN / f"image_{name}.png")), GOLDEN / f"hps_pixels_{name}.npz")


@pytest.mark.skipif(
    "SPO_AESTHETIC_HEAD" not in os.environ,
    reason="SPO_AESTHETIC_HEAD does not name the released sac+logos+ava1-l14-linearMSE.pth (not shipped)",
)
def test_released_aesthetic_head_matches_golden() -> None:
    head = aesthetic.AestheticHead.load(os.environ["SPO_AESTHETIC_HEAD"])
    with np.load(GOLDEN / "aesthetic_head.npz") as file:
        embeddings, golden = (torch.from_numpy(file[k]) for k in ("embeddings", "scores"))
    actual = head(embeddings)
    assert actual.shape == golden.shape
    assert float((actual - golden).abs().max() / golden.abs().max()) < 1e-4
