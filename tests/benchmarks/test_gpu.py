"""The GPU's benchmark in tiny shapes on a CPU: both sides give the same, all figures are on its page."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_page, shapes


def test_real_shapes_have_the_parameters_of_the_released_models() -> None:
    words = shapes.tokenizer()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    with torch.device("meta"):
        pipelines = {name: shapes._pipeline(shapes.SHAPES[name], words) for name in gpu.KINDS}
    assert count(pipelines["sd15"].unet) == 859_520_964 and count(pipelines["sdxl"].unet) == 2_567_463_684
    assert count(pipelines["sd15"].vae) == count(pipelines["sdxl"].vae) == 83_653_863


@pytest.mark.nightly  # tests/parity/test_official.py has the equality
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_both_sides_compute_the_same(name: str) -> None:
    found = gpu.measure(name, True, "cpu", 1, torch.float32)
    names = [result.name.split(" of ")[0] for result in found.results]
    assert names == [
        "rollout, decoding and preference scores",
        "decoding",
        "preference scores",
        "training step",
        "iteration",
        "LPO: rollout and preference scores",
        "Diffusion-DPO: update",
        "generation",
    ]
    by_name = dict(zip(names, found.results, strict=True))
    for step in ("training step", "iteration", "Diffusion-DPO: update"):
        assert by_name[step].difference < 1e-3  # of losses
    assert set(found.seconds) == {"unet", "unet_trained", "down", "decoded", "scored"}
    assert found.flops["unet_trained"] > 1.5 * found.flops["unet"] > found.flops["down"] > 0
    page = gpu_page.render([found], True)
    assert "no figures of a GPU" in page and all(f"| {r.name} |" in page for r in found.results)
    assert all(f"| {method} |" in page for method in ("spo", "diffusion_dpo", "lpo"))


def test_hours_of_the_recipe() -> None:
    """SPO with SD 1.5 takes some 14e18 FLOPs at 1e15 a second, as benchmarks/cards.py counts them."""
    found = gpu.recipes("sd15", 1e15)
    assert found.keys() == {"spo", "lpo", "diffusion_dpo"} and 3 < found["spo"] < 5
