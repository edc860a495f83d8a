"""Tiny random checkpoints with the classes and config fields of Stable Diffusion 1.5 and XL."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_experiment
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spo import backbones, config
from spo.preference.model import StepAwarePreferenceModel
from spo.scenes import world
from tools.scenes import clips, tokenizer

WIDTH, SECOND_WIDTH = 32, 48  # of the text encoders
SIDE = 16  # of an image, in pixels
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    return tokenizer.save(world.vocabulary(), tmp_path_factory.mktemp("tokenizer"))


def text_encoder(words, kind: type, projection: int, width: int = WIDTH) -> torch.nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=projection,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=scaling_factor,
    )


def unet(cross_attention_dim: int, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        **more,
    )


def sd(words) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=text_encoder(words, CLIPTextModel, WIDTH),
        tokenizer=words,
        unet=unet(WIDTH, attention_head_dim=8),
        scheduler=PNDMScheduler.from_config({**BETAS, "skip_prk_steps": True, "clip_sample": False}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(words) -> StableDiffusionXLPipeline:
    """The pooled text (24 numbers) and six time ids of 8 numbers each go to the time embedding."""
    added = {
        "attention_head_dim": (4, 8),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    return StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=text_encoder(words, CLIPTextModel, WIDTH),
        text_encoder_2=text_encoder(words, CLIPTextModelWithProjection, 24, SECOND_WIDTH),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(WIDTH + SECOND_WIDTH, **added),
        scheduler=EulerDiscreteScheduler.from_config({**BETAS, "clip_sample": False}),
    )


@pytest.fixture(scope="session")
def checkpoints(words, tmp_path_factory):
    """The folder of each family."""
    folders = {}
    for family, make in (("sd", sd), ("sdxl", sdxl)):
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        pipeline = make(words)
        livelier(pipeline)
        pipeline.save_pretrained(folders[family])
    # left to the defaults, of which Euler has others than DDIM
    scheduler = folders["sdxl"] / "scheduler" / "scheduler_config.json"
    said = json.loads(scheduler.read_text())
    assert said.pop("timestep_spacing") == "linspace"
    scheduler.write_text(json.dumps(said))
    return folders


def livelier(pipeline) -> None:
    """Scale up random layers, so that prompt and latents have a measurable effect."""
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "attn2" in name or "conv_out" in name or "add_embedding" in name:
                parameter.mul_(3)
        pipeline.vae.decoder.conv_out.weight.mul_(3)


@pytest.fixture(scope="session")
def loaded(checkpoints):
    """Each family's backbone, to be copied: that takes half of the time of loading it."""
    return {family: backbones.load(settings(family, folder), "cpu") for family, folder in checkpoints.items()}


@pytest.fixture
def load(checkpoints, loaded):
    """load(family, **changed settings): a fresh backbone."""

    def load(family: str, **changes) -> backbones.StableDiffusion:
        if not changes:
            return copy.deepcopy(loaded[family])
        return backbones.load(settings(family, checkpoints[family], **changes), "cpu")

    return load


@pytest.fixture(autouse=True)
def known_rate(monkeypatch) -> None:
    """A dry run measures this machine's speed for seconds: tests/estimate and the DAG's dry run do that."""
    monkeypatch.setattr("spo.estimate.rate", lambda *_: 1e11)


def settings(family: str, folder: Path, **changes) -> config.Backbone:
    return config.Backbone(**{"family": family, "checkpoint": str(folder), **changes})


CAPTIONS = ["a circle", "a blue star on sand", "a large red square", "a small star"]


@dataclass
class Pairs:
    """Ten pairs of random latents; one is a tie, and the weights differ."""

    captions: list[str]
    label_0: torch.Tensor
    weight: torch.Tensor
    latents: torch.Tensor  # [N,2,C,h,w]

    def read(self, indices):
        return self.latents[indices, 0], self.latents[indices, 1]


@pytest.fixture
def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1.0, 0, 1, 1, 0, 0.5, 1, 0, 0, 1])
    weight = 1 / (1 + torch.arange(10.0) % 3)
    return Pairs((CAPTIONS * 3)[:10], labels, weight, torch.randn(10, 2, 4, 8, 8, generator=generator))


@pytest.fixture
def model(words) -> StepAwarePreferenceModel:
    torch.manual_seed(0)
    return StepAwarePreferenceModel(clips.fresh_clip(words, seed=0))


@pytest.fixture(params=["sd", "sdxl"])
def experiment(request, checkpoints, words, fresh_store, tmp_path, monkeypatch):
    """A folder with params.yaml and data, as a user has it; the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    small_experiment.inputs(tmp_path / "data", words)
    params = yaml.safe_load(config.preset("smoke"))
    params["backbone"] = {"family": request.param, "checkpoint": str(checkpoints[request.param])}
    params["prompts"] |= {"n_train": 4, "n_validation": 2, "n_test": 2, "vocabulary": None}
    params["prompts"]["max_tokens"] = 40
    params["pairs"]["validation_fraction"] = 0.3
    params["align"]["spo"] |= {"inner_steps": 2}
    params["device"] = {"pairs": 2, "checkpointing": True}
    params["align"]["spo"]["divert_start_step"] = 0
    params["score"]["oracle"] = None
    for model in ("preference", "latent_preference"):
        params[model]["local_prompts"] = 0
    small_experiment.write(params)
    return params
