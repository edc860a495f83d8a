"""What is NaN or infinite stops sampling, with the part, step and prompt that it came from."""

import pytest
import torch

from spo.diffusion.announced import schedule_of
from spo.diffusion.finite import DECODER, FiniteCheck, check_finite
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.types import Conditioning

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
BAD = [float("nan"), float("inf"), -float("inf")]


def sample(backbone, prompts, scheduler=SD, eta=1.0, guidance=2.0, steps=5) -> torch.Tensor:
    noise = SampleNoise(0, prompts, (2, 3, 3))
    schedule = schedule_of(scheduler, steps)
    return sample_latents(backbone, schedule, prompts, noise, guidance, eta)


def spoil(backbone, step: int, row: int, value: float) -> None:
    """One number of one sample's UNet output at one step."""
    plain, calls = backbone.predict, []

    def predict(x_t, timesteps, conditioning, **options):
        output = plain(x_t, timesteps, conditioning, **options)
        calls.append(None)
        if len(calls) == step:
            output[row, 1, 2, 0] = value
        return output

    backbone.predict = predict


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_bad_step_and_its_prompt_are_named(backbone, value, step, eta) -> None:
    """Five steps of 1000: timesteps 800, 600, 400, 200, 0."""
    spoil(backbone, step, 4, value)  # three empty prompts, then "a", "bb", "ccc"
    with pytest.raises(ValueError) as error:
        sample(backbone, ["a", "bb", "ccc"], eta=eta)
    message = str(error.value)
    assert f"UNet output at step {step} of 5 (t={1000 - 200 * step}), prompt 'bb': " in message
    assert "backbone.dtype is fp16, set bf16 or fp32" in message and "\n" not in message


@pytest.mark.parametrize("value", BAD)
def test_clamped_predictions_hide_nothing(backbone, value) -> None:
    """clip_sample clamps the predicted x_0, which turns infinity into a number."""
    spoil(backbone, 5, 0, value)
    with pytest.raises(ValueError, match=r"step 5 of 5 \(t=0\), prompt 'a'"):
        sample(backbone, ["a"], SD | {"clip_sample": True}, guidance=1.0)


def test_a_step_that_the_schedule_makes_infinite_is_the_samplers(backbone) -> None:
    """alpha-bar is 0 at t = 3: the x_0 that the first step predicts is a division by 0."""
    scheduler = {"trained_betas": [0.1, 0.1, 0.1, 1.0], "clip_sample": False, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match=r"latents at step 1 of 2 \(t=3\), prompt 'a': .*scheduler_config"):
        sample(backbone, ["a"], scheduler, steps=2)


@pytest.mark.parametrize(("bad", "named"), [("bb", "'bb'"), ("", "''")])
def test_text_that_is_not_finite_is_the_encoders(backbone, bad, named) -> None:
    def encode(prompts):
        return Conditioning({"length": torch.tensor([float("nan") if p == bad else 1.0 for p in prompts])})

    backbone.encode_prompts = encode
    with pytest.raises(ValueError, match=f"text encoder output, prompt {named}: "):
        sample(backbone, ["a", "bb"])


def test_long_prompts_are_cut() -> None:
    images = torch.zeros(2, 3, 4, 4)
    check_finite(DECODER, images, ["a", "b"])
    images[1, 2, 3, 3] = float("inf")
    with pytest.raises(ValueError, match=f"VAE decoder output, prompt '{'x' * 100}': .*backbone.vae"):
        check_finite(DECODER, images, ["a", "x" * 300])


def test_a_check_names_the_first_of_all_that_was_noted() -> None:
    check = FiniteCheck()
    check.check()
    check.note(DECODER, torch.zeros(2, 3), ["a", "b"])
    check.note(DECODER, torch.tensor([1.0, float("nan")]), ["c", "d"], torch.tensor([7, 8]))
    assert "at t=8, prompt 'd'" in str(check.failure())
    with pytest.raises(ValueError, match="at t=8, prompt 'd'"):
        check.check()


def test_a_step_of_a_flow_is_named_by_its_timestep(backbone) -> None:
    """The last sigma is 3 * .001 / 1.002 = .002994, so the second is (1 + .002994) / 2 before its shift."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    spoil(backbone, 2, 0, float("nan"))
    with pytest.raises(ValueError, match=r"UNet output at step 2 of 3 \(t=751.121\), prompt 'a'"):
        sample(backbone, ["a"], flow, guidance=1.0, steps=3)
