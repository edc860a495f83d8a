import pytest
import torch

from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_model_of_one_picture_samples_it(backbone, eta: float) -> None:
    """If the data are a single x_0, eps is known in closed form, and every path ends there."""
    schedule = Schedule.from_config(SD, 10)
    picture = torch.randn(2, 3, 3)

    def predict(x_t, timesteps, conditioning, *, reference=False, copies=1):
        alpha = schedule.alpha(timesteps)
        return (x_t - alpha.sqrt() * picture) / (1 - alpha).sqrt()

    backbone.predict = predict
    latents = sample_latents(backbone, schedule, ["a", "b"], SampleNoise(0, [1, 2], (2, 3, 3)), 3.0, eta)
    assert torch.allclose(latents, picture.expand(2, -1, -1, -1), atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_batch_composition_never_changes_a_sample(backbone, eta: float) -> None:
    schedule = Schedule.from_config(SD, 5)

    def draw(prompts: list[str]) -> torch.Tensor:
        return sample_latents(backbone, schedule, prompts, SampleNoise(0, prompts, (2, 3, 3)), 2.0, eta)

    together = draw(["a", "bb", "ccc"])
    assert torch.allclose(draw(["ccc"]), together[2:], atol=1e-5)
    assert torch.allclose(draw(["ccc", "a"]), together[[2, 0]], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_one_doubled_call_a_step_inside_inference(backbone) -> None:
    schedule = Schedule.from_config(SD, 5)
    seen = []

    def on_step(i, step, x_prev) -> None:
        assert backbone.in_inference
        seen.append((i, step, x_prev))

    latents = sample_latents(
        backbone, schedule, ["a", "b"], SampleNoise(0, [1, 2], (2, 3, 3)), 2.0, 1.0, on_step=on_step
    )
    assert backbone.calls == [(4, False)] * 5
    assert [i for i, _, _ in seen] == list(range(5))
    assert torch.equal(seen[-1][2], latents)
    assert all(step.x0.shape == latents.shape for _, step, _ in seen)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_without_eta_every_step_is_its_mean(backbone, eta: float) -> None:
    at_mean = []
    sample_latents(
        backbone,
        Schedule.from_config({**SD, "set_alpha_to_one": False, "steps_offset": 1}, 4),
        ["a"],
        SampleNoise(0, [1], (2, 3, 3)),
        2.0,
        eta,
        on_step=lambda i, step, x_prev: at_mean.append(torch.equal(x_prev, step.mean)),
    )
    assert at_mean == [eta == 0] * 4


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
