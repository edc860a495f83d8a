"""The latent reward model in training, and LPO with it: losses by hand, resumed and in two processes."""

from __future__ import annotations

import math

import pytest
import torch
from group import check_alike, run_in

from spo import config
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.schedule import Schedule
from spo.methods.lpo import LpoMethod
from spo.preference import trainer
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.latent_training import LatentTask
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Budget

pytestmark = pytest.mark.smoke

PROMPTS = ["a circle", "a blue star on sand", "a large red square", "a small star"]
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def setup(backbone, **changes) -> LatentTask:
    settings = config.LatentPreference(
        **{"optimizer": {"learning_rate": 1e-3}, "steps": 4, "batch_size": 4, "checkpoint_every": 2} | changes
    )
    torch.manual_seed(0)
    model = LatentPreferenceModel(backbone.feature_model(), settings.feature_guidance)
    return LatentTask(model, backbone, Schedule.from_config(backbone.scheduler_config, 20), settings)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@FAMILIES
def test_the_loss_of_pairs_by_hand(load, pairs, family) -> None:
    """Cross entropy of two scores at one timestep, each image with a noise of its own; a tie's best is 0."""
    trained = setup(load(family))
    objective = trainer.LabelObjective(trained, pairs, seed=3)
    labels = {float(x) for x in pairs.label_0}
    seen = set()
    for iteration in range(3):
        (((batch,),), _) = objective.collect(iteration)
        assert set(batch.timesteps.tolist()) <= set(trained.schedule.timesteps.tolist())
        with torch.no_grad():
            losses, measured = objective.loss(batch, FiniteCheck())
        for p, index in enumerate(batch.indices.tolist()):
            t = batch.timesteps[p : p + 1]
            alpha = trained.schedule.alphas_cumprod[t]
            text = trained.model.encode_text([pairs.captions[index]])
            scores = []
            for side in (0, 1):
                noise = batch.noise[p : p + 1, side]
                x_t = alpha.sqrt() * pairs.latents[index : index + 1, side] + (1 - alpha).sqrt() * noise
                with torch.no_grad():
                    scores.append(float(trained.model.score(x_t, text, t)))
            chance = 1 / (1 + math.exp(scores[1] - scores[0]))  # that the first one wins
            label = float(pairs.label_0[index])
            expected = -label * math.log(chance) - (1 - label) * math.log(1 - chance)
            if label == 0.5:
                expected += math.log(0.5)
                assert expected > -1e-6
            assert float(losses[p]) == pytest.approx(expected, abs=1e-4)
            right = float((scores[0] > scores[1]) == (label > 0.5))
            assert float(measured["accuracy"].values[p]) == right
            assert float(measured["accuracy"].weights[p]) == float(label != 0.5)
            assert float(batch.weight[p]) == float(pairs.weight[index])
            seen.add(label)
    assert seen == labels == {0.0, 0.5, 1.0}


def test_timesteps_are_uniform_and_the_noises_independent(load) -> None:
    trained = setup(load("sd"))
    timesteps, noise = trained.draw([f"spm 0 {i}" for i in range(2000)], 0)
    assert noise.shape == (2000, 2, 4, 8, 8)
    counts = torch.stack([(timesteps == t).sum() for t in trained.schedule.timesteps])
    assert int(counts.sum()) == 2000 and 60 < int(counts.min()) and int(counts.max()) < 140  # 100 +- 4 std
    first, second = noise[:, 0].flatten(), noise[:, 1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02
    again = trained.draw(["spm 0 7", "spm 0 1"], 0)  # of the pair, not of its place
    assert torch.equal(again[0], timesteps[[7, 1]]) and torch.equal(again[1], noise[[7, 1]])


@FAMILIES
@pytest.mark.parametrize("trained", ["all", "lora", "heads"])
def test_what_is_trained_is_what_is_named(load, pairs, family, trained) -> None:
    backbone = load(family)
    lora = {"rank": 2, "alpha": 2} if trained == "lora" else None
    backbone.budget = Budget(pairs=2)
    training = setup(backbone, trained=trained, lora=lora, steps=2)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    own = [p.detach().clone() for p in backbone.unet.parameters()]
    trainer.train(training, pairs, seed=0)
    moved = {
        name
        for name, p in training.model.named_parameters()
        if name not in before or not torch.equal(p, before[name])
    }
    heads = {"visual_projection.weight", "logit_scale"}
    heads |= {"text_projection.weight"} if family == "sd" else set()
    assert heads <= moved
    in_unet = {name for name in moved if name.startswith("encoder.unet.")}
    in_text = {name for name in moved if name.startswith("encoder.text_encoders.")}
    if trained == "all":
        assert len(in_unet) > 50 and len(in_text) > 20
    else:
        assert not in_text and all("lora" in name or "base_layer" in name for name in in_unet)
        assert bool(in_unet) == (trained == "lora")
    for now, then in zip(backbone.unet.parameters(), own, strict=True):
        assert torch.equal(now, then)  # the policy's UNet is another


def test_gradients_computed_again_are_the_same(load, pairs) -> None:
    found = []
    for again in (False, True):
        training = setup(load("sd"), steps=1)
        training.backbone.budget = Budget(checkpointing=again)
        trainer.train(training, pairs, seed=0)
        found.append(torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None]))
    assert len(found[0]) == len(found[1]) and float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_the_latent_model_resumed_is_uninterrupted_bit_for_bit(load, pairs, tmp_path) -> None:
    backbone = load("sd")
    whole = setup(backbone, ema=0.9)
    trainer.train(whole, pairs, seed=0)

    def stop(metrics, step) -> None:
        if step == 3:
            raise KeyboardInterrupt

    store = CheckpointStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(setup(backbone, ema=0.9), pairs, seed=0, checkpoint=store, on_metrics=stop)
    assert store.latest()[0] == 2
    parts = setup(backbone, ema=0.9)
    start = weights(parts.model)
    trainer.train(parts, pairs, seed=0, checkpoint=store)
    assert torch.equal(weights(parts.model), weights(whole.model))
    assert not torch.equal(weights(parts.model), start)


def test_two_processes_train_the_latent_model_as_one(load, pairs) -> None:
    backbone = load("sd")
    backbone.budget = Budget(pairs=2)

    def body() -> dict:
        training, seen = setup(backbone, steps=3), []
        trainer.train(training, pairs, seed=0, on_metrics=lambda m, s: seen.append(m))
        accuracy = trainer.evaluate(training, pairs, [1, 501], seed=0)
        gradients = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
        return {
            "metrics": seen,
            "gradients": torch.cat(gradients),
            "weights": weights(training.model),
            "counts": {t: m["accuracy"] for t, m in accuracy.items()},
        }

    (one,), several = run_in(1, body), run_in(2, body)
    check_alike(one, several)


def lpo(backbone, reward_model: LatentPreferenceModel) -> LpoMethod:
    settings = config.Lpo(
        lora={"rank": 2, "alpha": 2},
        optimizer={"learning_rate": 1e-3},
        iterations=3,
        prompts_per_iteration=3,
        batch_size=8,
        candidates=2,
        num_inference_steps=4,
        guidance=2.0,
        divert_start_step=0,
        threshold=0.0,
        threshold_by="sigma",
    )
    schedule = Schedule.from_config(backbone.scheduler_config, 4)
    return LpoMethod(settings, schedule, LatentRewardModel(reward_model, "candidate"), PROMPTS, seed=0)


@FAMILIES
def test_lpo_resumed_is_uninterrupted_bit_for_bit(load, tmp_path, family) -> None:
    reward_model = setup(load(family)).model

    def fit(folder, stop_at: int = 0) -> torch.Tensor:
        backbone = load(family)
        method = lpo(backbone, reward_model)
        backbone.add_lora(method.config.lora, 0)
        seen: list[int] = []

        def note(metrics, step) -> None:
            seen.append(step)
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        options = {"checkpoints": CheckpointStore(folder), "checkpoint_every": 1, "on_metrics": note}
        loop.fit(Alignment("align.lpo", backbone, method), method.config.optimizer, **options)
        return torch.cat([p.detach().flatten() for p in backbone.trainable_parameters()])

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop_at=2)
    assert CheckpointStore(tmp_path / "parts").latest()[0] == 1
    assert torch.equal(fit(tmp_path / "parts"), whole)


def test_two_processes_roll_out_lpo_as_one(load) -> None:
    """Three prompts, four steps: twelve pairs in updates of eight and four, half of each to a process."""
    backbone = load("sd")
    method = lpo(backbone, setup(backbone).model)

    def body() -> list[torch.Tensor]:
        updates, metrics = method.collect(backbone, 0)
        batches = [batch for parts in updates for batch in parts]
        rows = torch.cat([torch.cat([b.x_t, b.x_win, b.x_lose], dim=1) for b in batches])
        return [rows, torch.cat([b.weight for b in batches]), torch.tensor(list(metrics.values()))]

    ((rows, _, metrics),), both = run_in(1, body), run_in(2, body)
    assert len(rows) == 12 and [int(part[1].sum()) for part in both] == [6, 6]
    for part in both:
        torch.testing.assert_close(part[2], metrics, rtol=1e-4, atol=1e-5)
    together = torch.cat([part[0] for part in both])
    order = [int((rows - row).abs().flatten(1).sum(1).argmin()) for row in together]
    assert sorted(order) == list(range(12))  # the same twelve pairs
    torch.testing.assert_close(together, rows[order], rtol=1e-3, atol=1e-4)
