import pytest
import torch

from spo.diffusion.denoiser import GuidedDenoiser


def test_guided_output_in_one_call(backbone) -> None:
    """The fake is linear in the prompt's length n: c - u = .1 n, so u + g (c - u) = u + .1 g n."""
    x_t, timesteps = torch.randn(3, 2, 3, 3), torch.tensor([1, 500, 900])
    conditioning = backbone.encode_prompts(["a", "bb", "ccccc"])
    empty = backbone.encode_prompts([""] * 3)
    actual = GuidedDenoiser(backbone, conditioning, empty, 2.5)(x_t, timesteps)
    lengths = torch.tensor([1.0, 2.0, 5.0]).view(-1, 1, 1, 1)
    expected = 0.5 * x_t + timesteps.view(-1, 1, 1, 1) / 1000 + 0.1 * 2.5 * lengths
    assert torch.allclose(actual, expected, atol=1e-6)
    assert backbone.calls == [(6, False)]


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_of_one_and_below_is_conditional_alone(backbone, guidance: float) -> None:
    x_t, timesteps = torch.randn(2, 2, 3, 3), torch.tensor([1, 500])
    conditioning = backbone.encode_prompts(["a", "bb"])
    actual = GuidedDenoiser.of(backbone, conditioning, guidance)(x_t, timesteps)
    assert backbone.calls == [(2, False)]
    assert torch.equal(actual, backbone.predict(x_t, timesteps, conditioning))


def test_reference_weights_are_asked_for(backbone) -> None:
    x_t, timesteps = torch.randn(1, 2, 3, 3), torch.tensor([1])
    for guidance in (1.0, 3.0):
        GuidedDenoiser.encode(backbone, ["a"], guidance)(x_t, timesteps, reference=True)
    assert backbone.calls == [(1, True), (2, True)]
