"""What a stage computes, counted by its own code, against numbers by hand; what the dry run says of it."""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml

from spo import config, estimate
from spo.commands import dry_run
from spo.diffusion.schedule import Schedule
from spo.estimate import meta, models
from spo.estimate.count import Count, Phase
from spo.methods import method_spec
from spo.preference.compute import unet_samples
from spo.training import budget
from spo.types import Budget

pytestmark = pytest.mark.smoke

CONFIG = {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
DDIM = partial(Schedule.from_config, CONFIG)
ROOT = Path(__file__).parents[2]


@cache
def scenes() -> config.Params:
    return config.validate(yaml.safe_load(config.preset("scenes")))


@cache
def flops() -> dict[str, int]:
    """Of one sample of each model of the default experiment."""
    params, found = scenes(), {}
    with meta.stand_in() as counter:
        base = models.backbone(params.backbone, Budget())
        one, at = torch.zeros(1, *base.latent_shape, device="meta"), torch.ones(1, device="meta")
        text, down = base.encode_prompts(["a"]), base.feature_model()
        clip = models.preference_model(params.preference)
        pixels, features = (
            one.new_zeros(1, 3, *base.image_size),
            one.new_zeros(1, clip.model.text_projection.out_features),
        )
        runs = {
            "unet": lambda: base.predict(one, at, text),
            "down": lambda: down.features(one, at, text),
            "decoded": lambda: base.decode(one),
            "scored": lambda: clip.score_features(pixels, features, at),
        }
        for name, run in runs.items():
            with torch.no_grad():
                counter.restart()
                run()
            found[name] = counter.flops
        base.add_lora(params.align.spo.lora, 0)
        down.requires_grad_(True)
        trained = {
            "unet": lambda: base.predict(one, at, text),
            "down": lambda: down.features(one, at, text)[1],
        }
        for name, run in trained.items():
            counter.restart()
            run().sum().backward()
            found[f"{name}_trained"] = counter.flops
    return found


def work(**samples: float) -> float:
    return sum(count * flops()[name] for name, count in samples.items())


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch) -> None:
    if not (ROOT / "data/base").exists():
        pytest.skip("needs data/")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("spo.estimate.stages.PAIRS", Path("nowhere"))


def test_spo() -> None:
    """16 iterations of 8 prompts: 2 plain steps, then 4 candidates at each of 12 (to t = 301), guidance 2:
    2 + 1 + 4 * 12 forwards a prompt. Validated before, every 2, 24 * 2 images.
    """
    found = estimate.count(scenes(), "align", "spo", Budget())
    validation = work(unet=9 * 48 * 20 * 2, decoded=9 * 48)
    rollouts = work(unet=128 * 2 * (3 + 4 * 12), decoded=128 * 48, scored=128 * 48)
    trained = work(unet=128 * 12 * 2, unet_trained=128 * 12 * 2)  # the reference, and the policy
    assert found.flops(valid=False) == pytest.approx(validation + rollouts, rel=0.06)
    assert found.flops() == pytest.approx(validation + rollouts + trained, rel=0.06)
    cost = method_spec("spo").cost(scenes(), DDIM)
    assert (cost.rollouts, cost.updates) == (128 * 2 * (3 + 4 * 12), 128 * 12 * 2 * 4)
    assert cost.unet_samples == cost.rollouts + cost.updates


@pytest.mark.nightly
def test_lpo_without_feature_enhancement() -> None:
    """20 iterations of 8 prompts, 20 steps of 4 candidates: one forward a step and one down path each."""
    found = estimate.count(scenes(), "align", "lpo", Budget())
    validation = work(unet=11 * 48 * 20 * 2, decoded=11 * 48)
    assert found.flops(valid=False) == pytest.approx(
        work(unet=160 * 20 * 2, down=160 * 80) + validation, rel=0.06
    )
    trained = found.flops() - found.flops(valid=False)
    assert trained == pytest.approx(work(unet=160 * 20 * 2, unet_trained=160 * 20 * 2), rel=0.06)


def test_diffusion_dpo() -> None:
    """800 updates of 16 pairs of images, by policy and reference; 11 validations."""
    found = estimate.count(scenes(), "align", "diffusion_dpo", Budget())
    validation = work(unet=11 * 48 * 20 * 2, decoded=11 * 48)
    assert found.flops() == pytest.approx(work(unet=25600, unet_trained=25600) + validation, rel=0.06)
    assert found.flops(valid=False) == found.flops()
    assert method_spec("diffusion_dpo").cost(scenes(), DDIM).unet_samples == 800 * 32 * 4


def test_preference_models(tmp_path, monkeypatch) -> None:
    """Updates of 32 pairs; rollouts of 32 prompts, 20 steps of 4 candidates; 100 pairs at one timestep."""
    counted = {"labels": {"validation": {"decided": 100, "ties": 7}}}
    (tmp_path / "summary.json").write_text(json.dumps(counted))
    monkeypatch.setattr("spo.estimate.stages.PAIRS", tmp_path / "summary.json")
    found, samples, local = estimate.count(scenes(), "preference", None, Budget()), 2 * 60 * 32, 32 * 80
    updates = work(unet=2 * samples, decoded=samples, scored=samples)  # the heads alone are trained
    rollouts = work(unet=32 * 2 * (1 + 4 * 19), decoded=local, scored=local)
    evaluation = work(unet=400, decoded=200, scored=200)
    assert found.flops() == pytest.approx(updates + rollouts + evaluation, rel=0.1)
    phase = found.phases["evaluation"]
    assert phase.flops * phase.times == pytest.approx(evaluation, rel=0.06)
    assert "100 validation pairs at 1 timestep" in found.text
    assert unet_samples(scenes().preference) == 2 * samples


@pytest.mark.nightly
def test_the_latent_reward_model() -> None:
    """450 updates of 32 pairs, all weights trained; the rollouts are those of the step-aware model."""
    found, samples = estimate.count(scenes(), "preference", "latent", Budget()), 2 * 450 * 32
    rollouts = work(unet=32 * 2 * (1 + 4 * 19), decoded=32 * 80, down=32 * 80)
    assert found.flops() == pytest.approx(work(down_trained=samples) + rollouts, rel=0.1)


def test_generation() -> None:
    """The first layers of a guided sample run once (backbones/shared_start.py)."""
    assert unet_samples(scenes().latent_preference) == round(0.4 * 3 * 2 * 450 * 32)
    found = estimate.count(scenes(), "generate", "base", Budget())
    assert found.flops() == pytest.approx(work(unet=256 * 20 * 2, decoded=256), rel=0.06)
    assert found.base.latent_shape == (8, 12, 12) and found.base.unet_flops == flops()["unet"]
    assert found.text == "256 images of 20 steps, guidance 2"


def test_the_rate_is_that_of_a_part_of_a_product() -> None:
    assert 1e8 < estimate.rate(scenes().backbone, "cpu") < 1e14


def test_a_stage_that_exceeds_its_device_says_what_would_fit(monkeypatch) -> None:
    """90 MB with the budget of the card, 30 MB with the least; a tenth of the memory is left free."""

    def count(peak: int) -> Count:
        found = Count(None, None)
        found.phases["update"] = Phase(peak, 0, 0.0, False)
        return found

    monkeypatch.setattr(estimate, "count", lambda *given: count(30_000_000))
    cut = Budget(images=8, samples=16, pairs=4)
    for gib, end in ((0.05, "fits"), (0.02, "does not fit either")):
        params = scenes().model_copy(update={"device": config.Device(memory=gib)})
        lines = dry_run._memory(params, "align", "spo", cut, count(90_000_000))
        assert lines[0].startswith("memory: 0.09 GB at the peak") and "update 0.09" in lines[0]
        assert lines[1] == "device: images 8, samples 16, pairs 4, checkpointing false, offload false"
        assert f"device: {dry_run._budget(budget.LEAST)}" in lines[2] and lines[2].endswith(end)
    # a CPU's memory is not known to be ours
    assert len(dry_run._memory(scenes(), "align", "spo", cut, count(90_000_000))) == 2


def test_hours_are_flops_over_the_rate() -> None:
    """A rollout of 1.8e12 FLOPs and, if every pair is valid, updates of as many, at 1 GFLOP/s."""
    found = Count(None, None)
    found.phases = {"collecting": Phase(0, 18, 1e11, False), "update": Phase(0, 9, 2e11, True)}
    assert "about 1 h if every pair is valid, 0.5 h if none is on this cpu" in dry_run._time(
        found, 1e9, "cpu"
    )
