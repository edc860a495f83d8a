import pytest
import torch
from fake_backbone import Whole

from spo.diffusion.flow import FlowSchedule
from spo.diffusion.schedule import Schedule
from spo.types import Conditioning

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


class FakeBackbone(Whole):
    """Linear in x_t, in the sine of the prompt's length and in one trainable number (0 in the reference)."""

    scheduler_config = SD
    latent_shape = (3, 2, 2)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.encoded: list[list[str]] = []
        self.predicted: list[int] = []  # samples of each UNet call

    def encode_prompts(self, prompts):
        self.encoded.append(list(prompts))
        return Conditioning({"length": torch.tensor([float(len(p)) for p in prompts])})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        self.predicted.append(len(x_t))
        assert timesteps.shape == (len(x_t),) and len(conditioning) == len(x_t)
        length = conditioning.tensors["length"].view(-1, 1, 1, 1)
        shift = self.shift.detach() * 0 if reference else self.shift
        return 0.5 * x_t + 0.5 * length.sin() + timesteps.view(-1, 1, 1, 1) / 1000 + shift * x_t.sin()

    def decode(self, latents):
        return latents

    def inference(self):
        """The strictest kind: nothing made in it may be used in a backward pass."""
        return torch.inference_mode()


class FakeRewardModel:
    """Prefers bright images; remembers what it was asked."""

    model = torch.nn.Identity()
    needs_images = True

    def __init__(self, scale: float = 10.0) -> None:
        self.scale = scale
        self.texts: list[list[str]] = []
        self.timesteps: list[torch.Tensor] = []
        self.images: list[torch.Tensor] = []
        self.lengths: list[torch.Tensor] = []

    def encode_text(self, prompts):
        self.texts.append(list(prompts))
        return Conditioning({"length": torch.tensor([float(len(p)) for p in prompts])})

    def score(self, candidates, text):
        images, length = candidates.images, text.tensors["length"]
        assert len(images) == len(length) == len(candidates.timesteps)
        self.timesteps.append(candidates.timesteps.clone())
        self.images.append(images.clone())
        self.lengths.append(length.clone())
        return self.scale * images.mean((1, 2, 3)) + 0.01 * length


class LatentRewardModel(FakeRewardModel):
    """The same of the latents: nothing is predicted or decoded for it."""

    needs_images = False

    def score(self, candidates, text):
        self.timesteps.append(torch.stack([candidates.timesteps, candidates.step_timesteps]))
        self.images.append(candidates.latents.clone())
        self.lengths.append(text.tensors["length"].clone())
        return self.scale * candidates.latents.mean((1, 2, 3))


@pytest.fixture
def backbone():
    return FakeBackbone()


@pytest.fixture
def reward_model():
    return FakeRewardModel()


@pytest.fixture
def latent_reward_model():
    return LatentRewardModel()


@pytest.fixture
def schedule():
    """Five steps: timesteps 801, 601, 401, 201, 1."""
    return Schedule.from_config(SD, 5)


@pytest.fixture
def flow():
    """A backbone whose model is a flow; five steps at 1000, 923.1, 818.2, 666.7 and 428.6."""

    class FlowBackbone(FakeBackbone):
        def schedule(self, num_inference_steps):
            return FlowSchedule.from_config(FLOW, num_inference_steps, last_sigma=1 / num_inference_steps)

    return FlowBackbone()
