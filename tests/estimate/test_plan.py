"""The dry run's plan, against numbers by hand; no time of work is asserted."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml

from spo import config
from spo import estimate as peaks
from spo.commands import dry_run
from spo.estimate import Peak
from spo.estimate import time as estimate
from spo.estimate.plan import plan
from spo.training import budget, probe
from spo.training.compute import Work
from spo.types import Budget

DDIM = {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture
def scenes() -> config.Params:
    return config.validate(yaml.safe_load(config.preset("scenes")))


def test_spo(scenes) -> None:
    """48 iterations of 8 prompts: 2 plain steps, then 4 candidates at each of 18, guidance 2. The last step's
    candidates are judged as they are: 3 + 4 * 17 forwards a prompt. Validated before, every 8, 24 * 2 images.
    """
    found = plan(scenes, "align", "spo", DDIM)
    validation = Work(unet=7 * 48 * 20 * 2, decoded=7 * 48)
    rollouts = Work(unet=384 * 2 * (3 + 4 * 17), decoded=384 * 72, judged=384 * 72)
    assert found.least == rollouts + validation
    assert found.most == found.least + Work(unet=384 * 18 * 2, unet_trained=384 * 18 * 2)


def test_lpo_without_feature_enhancement(scenes) -> None:
    """28 iterations of 8 prompts, 20 steps of 4 candidates: one forward a step and one down path each."""
    found = plan(scenes, "align", "lpo", DDIM)
    validation = Work(unet=8 * 48 * 20 * 2, decoded=8 * 48)
    assert found.least == Work(unet=224 * 20 * 2, down=224 * 80) + validation
    assert found.most == found.least + Work(unet=224 * 20 * 2, unet_trained=224 * 20 * 2)


def test_diffusion_dpo(scenes) -> None:
    """1200 updates of 16 pairs of images, by policy and reference; 5 validations."""
    found = plan(scenes, "align", "diffusion_dpo", DDIM)
    samples, validation = 1200 * 32, Work(unet=5 * 48 * 20 * 2, decoded=5 * 48)
    assert found.most == found.least == Work(unet=samples, unet_trained=samples) + validation


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


def test_work_in_unet_samples() -> None:
    """A backward pass counts as two forwards, the down path as .4 of a UNet."""
    assert Work(unet=10, unet_trained=5, decoded=9, judged=9).unet_samples == 10 + 3 * 5
    assert Work(down=10, down_trained=10).unet_samples == 4 + 12
    assert Work(unet=1, judged=2).times(3) == Work(unet=3, judged=6)


def test_hours() -> None:
    work = Work(unet=3600, unet_trained=1800)
    assert estimate.hours(work, {"unet": 0.5, "unet_trained": 2.0}) == pytest.approx(1.5)


@pytest.mark.parametrize(("threads", "least", "most"), [(1, 0.0, 0.02), (2, 0.05, 60.0)])
def test_waiting_counts_where_threads_wait_for_each_other(threads: int, least: float, most: float) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert least <= probe.seconds(lambda n: time.sleep(0.05 * n), 2, "cpu") <= most
    finally:
        torch.set_num_threads(before)


def test_a_stage_that_exceeds_its_device_says_what_would_fit(scenes, monkeypatch) -> None:
    """90 MB with the budget of the card, 30 MB with the least; a tenth of the memory is left free."""
    found = {False: Peak(20_000_000, {"update": 90_000_000}), True: Peak(10_000_000, {"update": 30_000_000})}
    monkeypatch.setattr(peaks, "peak", lambda params, stage, variant, cut: found[cut == budget.LEAST])
    cut = Budget(images=8, samples=16, pairs=4)
    for gib, end in ((0.05, "fits"), (0.02, "does not fit either")):
        params = scenes.model_copy(update={"device": config.Device(memory=gib)})
        lines = dry_run._memory(params, "align", "spo", cut)
        assert lines[0].startswith("memory: 0.09 GB at the peak") and "update 0.09" in lines[0]
        assert lines[1] == "device: images 8, samples 16, pairs 4, checkpointing false, offload false"
        assert "pairs 1, checkpointing true, offload true" in lines[2] and lines[2].endswith(end)
    assert len(dry_run._memory(scenes, "align", "spo", cut)) == 2  # a CPU's memory is not known to be ours
