"""The dry run's plan and memory, against numbers by hand; no time of work is asserted."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml

from spo import config
from spo.backbones import probe as base_probe
from spo.backbones import sizes
from spo.commands import estimate
from spo.commands.plan import plan
from spo.training import probe
from spo.training.compute import Work

DDIM = {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture
def scenes() -> config.Params:
    return config.validate(yaml.safe_load(config.preset("scenes")))


def test_spo(scenes) -> None:
    """48 iterations of 8 prompts: 2 plain steps, then 4 candidates at each of 18, guidance 2. The last step's
    candidates are judged as they are: 3 + 4 * 17 forwards a prompt. Validated before, every 8, 24 * 2 images.
    """
    found = plan(scenes, "align", "spo", DDIM)
    looks = Work(unet=7 * 48 * 20 * 2, decoded=7 * 48)
    rollouts = Work(unet=384 * 2 * (3 + 4 * 17), decoded=384 * 72, judged=384 * 72)
    assert found.least == rollouts + looks
    assert found.most == found.least + Work(unet=384 * 18 * 2, unet_trained=384 * 18 * 2)
    # 32 candidates, guided; updates of 16 pairs, guided; validation images in one batch of 48, guided
    assert found.calls == {"unet": 96, "unet_trained": 32, "decoded": 48, "judged": 32, "down": 32}


def test_lpo_without_feature_enhancement(scenes) -> None:
    """28 iterations of 8 prompts, 20 steps of 4 candidates: one forward a step and one down path each."""
    found = plan(scenes, "align", "lpo", DDIM)
    looks = Work(unet=8 * 48 * 20 * 2, decoded=8 * 48)
    assert found.least == Work(unet=224 * 20 * 2, down=224 * 80) + looks
    assert found.most == found.least + Work(unet=224 * 20 * 2, unet_trained=224 * 20 * 2)


def test_diffusion_dpo(scenes) -> None:
    """1200 updates of 16 pairs of images, by policy and reference; 5 validations."""
    found = plan(scenes, "align", "diffusion_dpo", DDIM)
    samples, looks = 1200 * 32, Work(unet=5 * 48 * 20 * 2, decoded=5 * 48)
    assert found.most == found.least == Work(unet=samples, unet_trained=samples) + looks
    assert found.calls == {"unet": 96, "unet_trained": 32, "decoded": 48}


def test_preference_models(scenes, tmp_path, monkeypatch) -> None:
    """Updates of 32 pairs; rollouts of 32 prompts, 20 steps of 4 candidates; 100 pairs at three timesteps."""
    monkeypatch.chdir(tmp_path)
    updates, local = 2 * 60 * 32, 32 * 80
    sampled = 32 * 2 * (1 + 4 * 19)
    found = plan(scenes, "preference", None, DDIM)
    trained = Work(unet=2 * updates, decoded=updates, judged_trained=updates)
    assert found.most == trained + Work(unet=sampled, decoded=local, judged=local)
    (tmp_path / "outputs/pairs").mkdir(parents=True)
    counted = {"labels": {"validation": {"decided": 100, "ties": 7}}}
    (tmp_path / "outputs/pairs/summary.json").write_text(json.dumps(counted))
    evaluated = plan(scenes, "preference", None, DDIM)
    assert evaluated.most == found.most + Work(unet=1200, decoded=600, judged=600)
    assert "100 validation pairs at 3 timesteps" in evaluated.text
    latent = plan(scenes, "preference", "latent", DDIM)
    down = Work(down=local + 600, down_trained=2 * 450 * 32)
    assert latent.most == down + Work(unet=sampled, decoded=local)


def test_generation(scenes) -> None:
    found = plan(scenes, "generate", "base", DDIM)
    assert found.most == Work(unet=256 * 20 * 2, decoded=256)
    assert found.calls == {"unet": 128, "decoded": 64}


def test_work_in_unet_samples() -> None:
    """A backward pass counts as two forwards, the down path as .4 of a UNet."""
    assert Work(unet=10, unet_trained=5, decoded=9, judged=9).unet_samples == 10 + 3 * 5
    assert Work(down=10, down_trained=10).unet_samples == 4 + 12
    assert Work(unet=1, judged=2).times(3) == Work(unet=3, judged=6)


def test_hours() -> None:
    work = Work(unet=3600, unet_trained=1800)
    assert estimate.hours(work, {"unet": 0.5, "unet_trained": 2.0}) == pytest.approx(1.5)


def test_live_bytes_are_those_at_the_peak() -> None:
    """Two vectors of 4 n bytes at once, of three; and the inputs of a product that its gradient needs."""

    def chain(n: int) -> None:
        x = torch.zeros(n, device="meta")
        x = x + 1
        x = x + 1

    assert probe.live_bytes(chain, 1000) == 2 * 4000

    def product(n: int) -> None:
        a = torch.ones(n, device="meta", requires_grad=True)
        a.exp().sum().backward()

    # a; its exponential, which the gradient needs; the gradients of both; the sum and its gradient of 4 bytes
    assert probe.live_bytes(product, 1000) in (3 * 4000 + 8, 4 * 4000 + 8)
    weight = torch.ones(1000, device="meta")
    assert probe.live_bytes(lambda n: weight.add_(1), 1) == 0  # was there before


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_terms_of_memory(family: str, checkpoints, scenes, monkeypatch) -> None:
    backbone = config.Backbone(family=family, checkpoint=str(checkpoints[family]), dtype="bf16")
    lora = config.Lora(rank=2, alpha=2, target_modules=("to_q",))
    spo = scenes.align.spo.model_copy(update={"lora": lora, "validation": None})
    align = scenes.align.model_copy(update={"spo": spo})
    params = scenes.model_copy(update={"backbone": backbone, "align": align})
    size = sizes.measure(backbone)
    found = plan(params, "align", "diffusion_dpo", DDIM)
    found = estimate.Estimate(params, "align", "diffusion_dpo", found, size, "cpu").bytes()
    text = base_probe.parameters_of_text(backbone)
    assert found["base"] == 2 * (size.unet_parameters + size.vae_parameters + text)
    trained = sizes.lora_parameters(backbone, params.align.diffusion_dpo.lora)
    assert found["training"] == (4 + 8) * trained  # fp32, and two moments; no preference model
    assert found["preference model"] == 0 and found["libraries"] > estimate.OTHER_LIBRARIES
    assert found["largest call"] > 0


@pytest.mark.parametrize(("threads", "least", "most"), [(1, 0.0, 0.02), (2, 0.05, 60.0)])
def test_waiting_counts_where_threads_wait_for_each_other(threads: int, least: float, most: float) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert least <= probe.seconds(lambda n: time.sleep(0.05 * n), 2, "cpu") <= most
    finally:
        torch.set_num_threads(before)
