import pytest
import torch
from fake_backbone import Whole
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from spo.diffusion.flow import FlowSchedule
from spo.diffusion.schedule import Schedule
from spo.types import Conditioning

VOCABULARY = ["<s>", "</s>", "a", "dark", "bright", "square"]


class WordTokenizer:
    """Six words, eight places."""

    def __call__(self, prompts, *, padding, truncation, max_length, return_tensors):
        rows = []
        for prompt in prompts:
            words = [0, *(VOCABULARY.index(w) for w in prompt.split()), 1]
            rows.append((words + [1] * max_length)[:max_length])
        return type("Encoding", (), {"input_ids": torch.tensor(rows)})


class GreyBackbone(Whole):
    """Latents are grey images of 16 pixels a side; its UNet predicts the noise it can see."""

    latent_shape = (3, 16, 16)
    image_size = (16, 16)
    device = torch.device("cpu")

    def encode_prompts(self, prompts):
        return Conditioning({"length": torch.tensor([float(len(p)) for p in prompts])})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        return x_t - x_t.mean((1, 2, 3), keepdim=True)

    def decode(self, latents):
        return latents

    def inference(self):
        return torch.no_grad()


@pytest.fixture
def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=16,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture
def backbone():
    return GreyBackbone()


@pytest.fixture
def schedule():
    return Schedule.from_config({"clip_sample": False}, 5)


@pytest.fixture
def flow():
    """The schedule of a flow."""
    return FlowSchedule.from_config({"shift": 3.0}, 5)
