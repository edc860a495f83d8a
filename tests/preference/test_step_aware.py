import torch

from spo.diffusion.finite import FiniteCheck
from spo.diffusion.noise import SampleNoise
from spo.preference.step_aware import images_of
from spo.preference.trainer import NoisedPairs


def test_both_images_get_the_same_noise_at_the_same_step(backbone, schedule) -> None:
    """With a UNet that tells the truth about zero-mean noise, the image's mean is what comes back."""

    class Recording(type(backbone)):
        def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
            self.seen = x_t
            return torch.zeros_like(x_t)

    backbone = Recording()
    timesteps, noise = torch.tensor([250, 700]), SampleNoise(0, ["p", "q"], (3, 16, 16)).draw()
    sides = (torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), -0.5))
    pairs = NoisedPairs(sides, ["a", "b"], timesteps, noise)
    first, second = images_of(backbone, schedule, pairs, 1.0, FiniteCheck())
    alpha = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(backbone.seen[:2] - backbone.seen[2:], alpha.sqrt().expand(2, 3, 16, 16))
    torch.testing.assert_close(backbone.seen[:2], alpha.sqrt() * 0.5 + (1 - alpha).sqrt() * noise)
    expected = (backbone.seen[:2] / alpha.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(first, expected)
    assert second.shape == first.shape


def test_guidance_is_between_the_caption_and_the_empty_one(backbone, schedule) -> None:
    class Lengths(type(backbone)):
        def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
            return conditioning.tensors["length"].view(-1, 1, 1, 1).expand_as(x_t) * 0.01

    backbone, t = Lengths(), torch.tensor([300])
    sides, noise = (torch.zeros(1, 3, 16, 16),) * 2, torch.zeros(1, 3, 16, 16)
    image, _ = images_of(backbone, schedule, NoisedPairs(sides, ["four"], t, noise), 3.0, FiniteCheck())
    alpha = schedule.alphas_cumprod[300]
    expected = -(1 - alpha).sqrt() * (3 * 4 * 0.01) / alpha.sqrt()
    torch.testing.assert_close(image, torch.full_like(image, expected.item()))


def test_the_images_of_a_flow_are_predicted_from_its_velocity(backbone, flow) -> None:
    """With a velocity of 0 the x_0 is x_t = (1 - sigma) x_0 + sigma eps itself."""

    class Still(type(backbone)):
        def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
            return torch.zeros_like(x_t)

    sides, noise = (
        (torch.full((1, 3, 16, 16), 0.8), torch.zeros(1, 3, 16, 16)),
        torch.full((1, 3, 16, 16), -0.4),
    )
    pairs = NoisedPairs(sides, ["a"], torch.tensor([312.5]), noise)
    first, second = images_of(Still(), flow, pairs, 1.0, FiniteCheck())
    torch.testing.assert_close(first, torch.full_like(first, 0.6875 * 0.8 - 0.3125 * 0.4))
    torch.testing.assert_close(second, torch.full_like(second, -0.3125 * 0.4))
