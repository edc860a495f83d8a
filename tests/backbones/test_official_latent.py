"""Latent reward models in the format of LPO's official code, against its formula written by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit, edit_weights
from diffusers import DiffusionPipeline
from latent_states import PROMPTS, noisy, states_by_hand

from spo.preference.latent import LatentPreferenceModel
from spo.preference.released import latent_model

FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])
WIDTH = 32 + 64 + 64  # down blocks, mid block


def official(checkpoint: Path, family: str) -> tuple[DiffusionPipeline, dict]:
    """A base's modules trained further, and the heads, as state_dict.pt has them."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(3)
    parts = [pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    with torch.no_grad():
        for part in filter(None, parts):
            for weight in part.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    text = 32 if family == "sd" else 24
    heads: dict = {"visual_projection": {"weight": torch.randn(text, WIDTH, generator=generator)}}
    if family == "sd":
        heads["text_projection"] = {"weight": torch.randn(text, text, generator=generator)}
    return pipeline, {**heads, "logit_scale": torch.tensor(1.25)}


def write_folder(folder: Path, pipeline: DiffusionPipeline, heads: dict) -> Path:
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if (part := getattr(pipeline, name, None)) is not None:
            part.save_pretrained(folder / name)
    torch.save(heads, folder / "state_dict.pt")
    return folder


def write_file(file: Path, pipeline: DiffusionPipeline, heads: dict) -> Path:
    """The state dict of the whole module, with the names of transformers 4."""
    state = {
        "logit_scale": heads["logit_scale"],
        "visual_projection.weight": heads["visual_projection"]["weight"],
    }
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        for key, value in getattr(pipeline, name).state_dict().items():
            plain = key.removeprefix("text_model.")
            old = f"text_model.{plain}" if name.startswith("text") and "text_projection" not in key else key
            state[f"{name}.{old}"] = value.clone()
    state["text_encoder.text_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, file)
    return file


def score_by_hand(pipeline: DiffusionPipeline, heads: dict, family: str, guidance: float) -> torch.Tensor:
    """exp(logit_scale) cos(W [down blocks, mid], text); the empty prompt goes through the text encoders."""
    x_t, timesteps = noisy()

    def encode(prompts: list[str]) -> tuple:
        tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        first = pipeline.text_encoder(tokens, output_hidden_states=True)
        if family == "sd":
            return first.last_hidden_state, None, first.pooler_output @ heads["text_projection"]["weight"].T
        second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return states, second.text_embeds, second.text_embeds

    text, pooled, target = encode(PROMPTS)
    empty, of_empty, _ = encode([""] * 3)
    *down, middle = states_by_hand(pipeline.unet, x_t, timesteps, text, pooled)
    if guidance > 1:
        without = states_by_hand(pipeline.unet, x_t, timesteps, empty, of_empty)[-1]
        middle = without + guidance * (middle - without)
    seen = torch.cat([*down, middle], -1) @ heads["visual_projection"]["weight"].T
    return math.exp(1.25) * torch.nn.functional.cosine_similarity(seen, target)


@FAMILIES
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@torch.no_grad()
def test_an_official_folder_scores_as_its_formula_and_so_does_our_folder_of_it(
    load, checkpoints, family, guidance, tmp_path
) -> None:
    pipeline, heads = official(checkpoints[family], family)
    backbone = load(family)
    model = latent_model(write_folder(tmp_path / "official", pipeline, heads), backbone, guidance)
    x_t, timesteps = noisy()
    scores = model.score(x_t, model.encode_text(PROMPTS), timesteps)
    expected = score_by_hand(pipeline, heads, family, guidance)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "ours", backbone)
    again = LatentPreferenceModel.from_pretrained(tmp_path / "ours", load(family))
    assert torch.equal(again.score(x_t, again.encode_text(PROMPTS), timesteps), scores)


@torch.no_grad()
def test_one_file_of_the_whole_module_scores_as_the_folder(load, checkpoints, tmp_path) -> None:
    pipeline, heads = official(checkpoints["sdxl"], "sdxl")
    backbone = load("sdxl")
    vae = {name: value.clone() for name, value in backbone.vae.state_dict().items()}
    model = latent_model(write_file(tmp_path / "lrm.bin", pipeline, heads), backbone, 7.5)
    x_t, timesteps = noisy()
    scores = model.score(x_t, model.encode_text(PROMPTS), timesteps)
    torch.testing.assert_close(scores, score_by_hand(pipeline, heads, "sdxl", 7.5), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, vae[name]) for name, value in backbone.vae.state_dict().items())


def test_one_file_with_another_vae_is_refused(load, checkpoints, tmp_path) -> None:
    pipeline, heads = official(checkpoints["sdxl"], "sdxl")
    with torch.no_grad():
        pipeline.vae.quant_conv.bias.add_(3)
    file = write_file(tmp_path / "lrm.bin", pipeline, heads)
    with pytest.raises(ValueError, match="lrm.bin: vae: a latent reward model of another VAE") as error:
        latent_model(file, load("sdxl"), 7.5)
    assert "\n" not in str(error.value)


BROKEN = {
    "another head": (lambda f, h: h.update(visual_projection={"weight": torch.zeros(32, 3)}), "does not fit"),
    "no head": (lambda f, h: h.pop("text_projection"), "lacks weights: text_projection.weight"),
    "one more": (lambda f, h: h.update(bias=torch.zeros(1)), "unknown weights: bias"),
    "no up block": (
        lambda f, h: edit_weights(f / UNET, lambda s: s.pop("conv_out.weight")),
        "unet lacks weights: conv_out.weight",
    ),
    "another up block": (
        lambda f, h: edit_weights(f / UNET, lambda s: s.update({"conv_out.bias": torch.zeros(9)})),
        "unet.conv_out.bias is",
    ),
    "no down block": (
        lambda f, h: edit_weights(f / UNET, lambda s: s.pop("conv_in.weight")),
        "lacks weights: encoder.unet.conv_in.weight",
    ),
    "other heads of attention": (
        lambda f, h: edit(f / "unet/config.json", attention_head_dim=4),
        "unet/config.json: attention_head_dim is 4",
    ),
    "another text encoder": (
        lambda f, h: edit(f / "text_encoder/config.json", num_attention_heads=2),
        "text_encoder/config.json: num_attention_heads is 2",
    ),
    "no text encoder": (lambda f, h: shutil.rmtree(f / "text_encoder"), "text_encoder: no weights there"),
}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_the_base_is_one_line(load, checkpoints, tmp_path, case) -> None:
    pipeline, heads = official(checkpoints["sd"], "sd")
    folder = write_folder(tmp_path / "official", pipeline, heads)
    change, message = BROKEN[case]
    change(folder, heads)
    torch.save(heads, folder / "state_dict.pt")
    with pytest.raises(ValueError) as error:
        latent_model(folder, load("sd"), 7.5)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_the_other_family_is_one_line(load, checkpoints, tmp_path) -> None:
    pipeline, heads = official(checkpoints["sdxl"], "sdxl")
    folder = write_folder(tmp_path / "official", pipeline, heads)
    with pytest.raises(ValueError, match="unet/config.json: .* but the backbone's UNet has") as error:
        latent_model(folder, load("sd"), 7.5)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="neither a folder of .* nor an official latent reward model"):
        latent_model(tmp_path, load("sd"), 7.5)
