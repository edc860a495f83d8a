from contextlib import contextmanager

import pytest
import torch
from fake_backbone import Whole

from spo.types import Conditioning


class FakeBackbone(Whole):
    """Linear in x_t and in a number that stands for the prompt: its length, 0 for the empty one."""

    scheduler_config = {}
    latent_shape = (2, 3, 3)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []  # samples and `reference` of each UNet call
        self.in_inference = False

    def encode_prompts(self, prompts):
        return Conditioning({"length": torch.tensor([float(len(p)) for p in prompts])})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        self.calls.append((len(x_t), reference))
        length = conditioning.tensors["length"].view(-1, 1, 1, 1)
        return 0.5 * x_t + 0.1 * length + timesteps.view(-1, 1, 1, 1) / 1000

    @contextmanager
    def inference(self):
        self.in_inference = True
        with torch.no_grad():
            yield
        self.in_inference = False


@pytest.fixture
def backbone():
    return FakeBackbone()
