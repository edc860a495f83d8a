import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from spo.diffusion import ddim
from spo.diffusion.announced import schedule_of
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_model_of_one_image_samples_it(backbone, eta: float) -> None:
    """If the data are a single x_0, eps is known in closed form, and every path ends there."""
    schedule = Schedule.from_config(SD, 10)
    image = torch.randn(2, 3, 3)

    def predict(x_t, timesteps, conditioning, *, reference=False, copies=1):
        alpha = schedule.alpha(timesteps)
        return (x_t - alpha.sqrt() * image) / (1 - alpha).sqrt()

    backbone.predict = predict
    latents = sample_latents(backbone, schedule, ["a", "b"], SampleNoise(0, [1, 2], (2, 3, 3)), 3.0, eta)
    assert torch.allclose(latents, image.expand(2, -1, -1, -1), atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_eta_a_flow_is_sampled_as_by_the_scheduler_of_diffusers(backbone, guidance) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    latents = sample_latents(
        backbone, schedule_of(config, 6), ["a", "bb"], SampleNoise(0, [1, 2], (2, 3, 3)), guidance, 0.0
    )
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(6)
    x, length = SampleNoise(0, [1, 2], (2, 3, 3)).draw(), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    for t in theirs.timesteps:
        x = theirs.step(0.5 * x + guidance * 0.1 * length + t / 1000, t, x)[0]
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_batch_composition_never_changes_a_sample(backbone, eta: float) -> None:
    schedule = Schedule.from_config(SD, 5)

    def draw(prompts: list[str]) -> torch.Tensor:
        return sample_latents(backbone, schedule, prompts, SampleNoise(0, prompts, (2, 3, 3)), 2.0, eta)

    together = draw(["a", "bb", "ccc"])
    assert torch.allclose(draw(["ccc"]), together[2:], atol=1e-5)
    assert torch.allclose(draw(["ccc", "a"]), together[[2, 0]], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def recorded(backbone) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """x_t, timesteps and output of each call that follows, all in inference mode."""
    calls, plain = [], backbone.predict

    def predict(x_t, timesteps, conditioning, **options):
        assert backbone.in_inference
        calls.append((x_t, timesteps, plain(x_t, timesteps, conditioning, **options)))
        return calls[-1][2]

    backbone.predict = predict
    return calls


def test_one_doubled_call_a_step_inside_inference(backbone) -> None:
    schedule, calls = Schedule.from_config(SD, 5), recorded(backbone)
    latents = sample_latents(backbone, schedule, ["a", "b"], SampleNoise(0, [1, 2], (2, 3, 3)), 2.0, 1.0)
    assert backbone.calls == [(4, False)] * 5
    assert [t.unique().tolist() for _, t, _ in calls] == [[t] for t in schedule.timesteps.tolist()]
    assert latents.shape == (2, 2, 3, 3)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_without_eta_every_step_is_its_mean(backbone, eta: float) -> None:
    schedule = Schedule.from_config({**SD, "set_alpha_to_one": False, "steps_offset": 1}, 4)
    calls = recorded(backbone)
    latents = sample_latents(backbone, schedule, ["a"], SampleNoise(0, [1], (2, 3, 3)), 1.0, eta)
    after = [*(x_t for x_t, _, _ in calls[1:]), latents]
    means = [ddim.transition(schedule, output, t, x_t, eta).mean for x_t, t, output in calls]
    assert [torch.equal(*both) for both in zip(after, means, strict=True)] == [eta == 0] * 4


def test_first_draw_is_the_start(backbone) -> None:
    starts = []
    plain = backbone.predict

    def predict(x_t, *rest, **options):
        starts.append(x_t)
        return plain(x_t, *rest, **options)

    backbone.predict = predict
    noise = SampleNoise(5, ["p"], (2, 3, 3))
    sample_latents(backbone, Schedule.from_config(SD, 3), ["p"], noise, 1.0, 0.0)
    assert torch.equal(starts[0], SampleNoise(5, ["p"], (2, 3, 3)).draw())
