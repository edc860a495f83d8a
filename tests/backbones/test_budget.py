"""The budget of a device cuts the work and changes no result: calls of one sample and calls of all."""

import itertools
from pathlib import Path

import pytest
import torch

from spo import config
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.preference import trainer
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.latent_training import LatentTask
from spo.preference.model import ClipRewardModel
from spo.preference.step_aware import StepAwareTask
from spo.stages import align, generate, preference
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Budget

pytestmark = pytest.mark.smoke

ONE, ALL = Budget(1, 1, 1), Budget(4096, 4096, 4096)
LORA = config.Lora(rank=2, alpha=2)
OPTIMIZER = config.Optimizer(learning_rate=1e-4)
PROMPTS = ["a circle", "a blue star on sand", "a large red square"]


def method(name: str, backbone, model, words, pairs):
    common = {"lora": LORA, "optimizer": OPTIMIZER, "iterations": 2, "batch_size": 4}
    schedule = Schedule.from_config(backbone.scheduler_config, 4)
    if name == "diffusion_dpo":
        return DiffusionDpoMethod(config.DiffusionDpo(**common, beta=1.0), schedule, pairs, 0)
    common |= {"num_inference_steps": 4, "divert_start_step": 1, "candidates": 2, "guidance": 2.0}
    common |= {"prompts_per_iteration": 3, "threshold": 0.0, "beta": 2.0}
    if name == "lpo":
        latent = LatentPreferenceModel(backbone.feature_model(), 2.0)
        reward_model = LatentRewardModel(latent, "candidate")
        return LpoMethod(config.Lpo(**common), schedule, reward_model, PROMPTS, 0)
    inner = {"inner_steps": 2} if name == "spo, inner steps" else {}
    reward_model = ClipRewardModel(model, words)
    return SpoMethod(config.Spo(**common, **inner), schedule, reward_model, PROMPTS, 0)


def losses_and_gradients(backbone, objective, budget: Budget) -> tuple[list[float], torch.Tensor]:
    """Of all batches of two iterations, before any update."""
    backbone.budget, losses = budget, []
    for iteration in range(2):
        updates, _ = objective.collect(iteration)
        for parts in updates:
            total = sum(float(p.weight.sum()) for p in parts)
            found = [(objective.loss(part, FiniteCheck())[0] * part.weight).sum() / total for part in parts]
            sum(found).backward()
            losses.append(float(sum(found).detach()))
    gradients = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    for parameter in objective.parameters():
        parameter.grad = None
    return losses, gradients


def assert_same(one, other) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert float(other[1].norm()) > 0
    assert float((one[1] - other[1]).norm()) <= 1e-4 * float(other[1].norm())


@pytest.mark.parametrize(
    ("name", "family"),
    [("spo", "sd"), ("spo, inner steps", "sdxl"), ("lpo", "sdxl"), ("diffusion_dpo", "sd")],
)
def test_alignment(name, family, load, model, words, pairs) -> None:
    backbone = load(family)
    built = method(name, backbone, model, words, pairs)
    backbone.add_lora(LORA, 0)
    torch.manual_seed(1)
    for parameter in backbone.trainable_parameters():
        parameter.data.normal_(std=0.05)
    objective = Alignment("align.x", backbone, built)
    assert_same(*(losses_and_gradients(backbone, objective, b) for b in (ONE, ALL)))


@pytest.mark.parametrize("latent", [False, True])
def test_preference_models(latent, load, model, words, pairs) -> None:
    backbone = load("sd")
    schedule = Schedule.from_config(backbone.scheduler_config, 20)
    if latent:
        settings = config.LatentPreference(optimizer=OPTIMIZER, steps=2, batch_size=4)
        torch.manual_seed(0)
        reward_model = LatentPreferenceModel(backbone.feature_model(), settings.feature_guidance)
        trained = LatentTask(reward_model, backbone, schedule, settings)
    else:
        settings = config.Preference(init="", optimizer=OPTIMIZER, steps=2, batch_size=4, guidance=2.0)
        trained = StepAwareTask(model, words, backbone, schedule, settings)
    trained.prepare()
    trained.model.train()
    objective = trainer.LabelObjective(trained, pairs, 0)
    assert_same(*(losses_and_gradients(backbone, objective, b) for b in (ONE, ALL)))
    accuracies = []
    for backbone.budget in (ONE, ALL):
        accuracies.append(trainer.evaluate(trained, pairs, [0, 501], seed=0))
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_images(family, load) -> None:
    backbone, found = load(family), []
    schedule = Schedule.from_config(backbone.scheduler_config, 3)
    for backbone.budget in (ONE, ALL):
        noise = SampleNoise(0, [1, 2, 3], backbone.latent_shape)
        found.append(backbone.decode(sample_latents(backbone, schedule, PROMPTS, noise, 2.0, 1.0)))
    assert float((found[0] - found[1]).abs().max()) < 2 / 255  # of images in [-1,1]
    torch.manual_seed(0)
    images, noise = found[0].clamp(-1, 1), torch.randn(3, *backbone.latent_shape)
    for drawn in (None, noise):
        latents = []
        for backbone.budget in (ONE, ALL):
            latents.append(backbone.encode(images, drawn))
        torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-5)


def test_a_posterior_is_its_mean_and_its_deviation_times_the_noise(load) -> None:
    backbone = load("sd")
    images, noise = torch.rand(2, 3, *backbone.image_size) * 2 - 1, torch.randn(2, *backbone.latent_shape)
    posterior = backbone.vae.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * noise) * backbone.vae.config.scaling_factor
    torch.testing.assert_close(backbone.encode(images, noise), expected, rtol=1e-4, atol=1e-5)


def test_no_call_is_larger_than_the_budget(load, model, words, pairs, monkeypatch) -> None:
    """Images of the VAE; samples of the UNet without gradients and with, which guidance doubles."""
    backbone = load("sd")
    backbone.budget = Budget(images=2, samples=3, pairs=2)
    seen: dict[str, set[int]] = {"vae": set(), "unet": set(), "trained": set()}
    built = method("spo", backbone, model, words, pairs)
    backbone.add_lora(LORA, 0)

    def noted(name: str, run):
        def call(x, *args, **options):
            kind = "trained" if name == "unet" and torch.is_grad_enabled() else name
            seen[kind].add(len(x))
            return run(x, *args, **options)

        return call

    monkeypatch.setattr(backbone.vae, "decode", noted("vae", backbone.vae.decode))
    monkeypatch.setattr(backbone.vae, "encode", noted("vae", backbone.vae.encode))
    monkeypatch.setattr(backbone.unet, "forward", noted("unet", backbone.unet.forward))
    objective = Alignment("align.spo", backbone, built)
    loop.fit(objective, OPTIMIZER, checkpoints=None, checkpoint_every=9, on_metrics=lambda m, s: None)
    backbone.encode(torch.zeros(5, 3, *backbone.image_size))
    assert max(seen["vae"]) == 2 and max(seen["unet"]) == 6 and max(seen["trained"]) == 4


def test_what_rests_comes_back(load, model, words, pairs) -> None:
    """With `offload` results are the same, and text encoders, VAE and UNet leave the device and return."""
    results, moved = [], []
    for offload in (False, True):
        backbone = load("sd")
        backbone.budget = Budget(offload=offload)
        settings = config.Preference(init="", optimizer=OPTIMIZER, steps=1, batch_size=4, guidance=2.0)
        schedule = Schedule.from_config(backbone.scheduler_config, 20)
        trained = StepAwareTask(model, words, backbone, schedule, settings)
        trained.prepare()
        trained.model.train()
        objective = trainer.LabelObjective(trained, pairs, 0)
        results.append(losses_and_gradients(backbone, objective, backbone.budget))
        moved.append(backbone._resting is not None)
        assert backbone.device.type == "cpu"
    assert moved == [False, True]
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_a_budget_may_change_in_mid_training(load, model, words, pairs, tmp_path) -> None:
    """The state has no word of it, and no name of a resume folder nor a stage of dvc.yaml has."""
    weights = []
    for budgets in ((ALL, ALL), (ALL, ONE)):
        backbone, store = load("sd"), CheckpointStore(tmp_path / str(len(weights)))
        built = method("spo", backbone, model, words, pairs)
        backbone.add_lora(LORA, 0)
        objective = Alignment("align.spo", backbone, built)
        options = {"checkpoints": store, "checkpoint_every": 1, "on_metrics": lambda m, s: None}
        for objective.iterations, backbone.budget in zip((1, 2), budgets, strict=True):
            summary = loop.fit(objective, OPTIMIZER, **options)
        assert summary["iterations"] == 2
        weights.append(torch.cat([p.detach().flatten() for p in backbone.trainable_parameters()]))
    assert float((weights[0] - weights[1]).norm()) <= 1e-3 * float(weights[0].norm())


def test_no_stage_depends_on_the_budget() -> None:
    params = config.load()
    other = params.model_copy(update={"device": config.Device(images=1, samples=1, pairs=1, offload=True)})
    file = Path("outputs/prompts/test.txt")
    for one, two in (
        [align._scratch(p, "spo") for p in (params, other)],
        [preference._scratch(p, p.preference, "preference") for p in (params, other)],
        [generate._scratch(p, "base", p.generate.base, file) for p in (params, other)],
    ):
        assert one == two
    stages = config.yaml_text.parse(Path("dvc.yaml").read_text(encoding="utf-8"), "dvc.yaml")["stages"]
    named = {str(name) for s in stages.values() for name in s.get("do", s).get("params", [])}
    assert "align.${key}" in named and not {name for name in named if name.split(".")[0] == "device"}


def test_an_empty_prompt_is_encoded_once(load) -> None:
    backbone, calls = load("sd"), itertools.count()
    encode, backbone._text = backbone._text, None
    backbone._text = lambda prompts: (next(calls), encode(prompts))[1]
    backbone._text.encoders = encode.encoders
    backbone._text.encodes_once = False
    first, again = backbone.empty_prompt(), backbone.empty_prompt()
    assert next(calls) == 1 and first is again
    assert torch.equal(first.tensors["text"], encode([""]).tensors["text"])
