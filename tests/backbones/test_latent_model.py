"""The latent reward model against diffusers' own blocks run layer by layer; its folder; its real sizes."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext

import pytest
import real_sizes
import torch
from checkpoints import edit_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from latent_states import PROMPTS, noisy, states_by_hand

from spo import config
from spo.backbones.features import DownPath
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.types import Conditioning

RATE = config.Optimizer(learning_rate=1e-3)
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def latent_model(backbone, guidance: float = 7.5) -> LatentPreferenceModel:
    """With heads unlike those it starts with."""
    torch.manual_seed(0)
    model = LatentPreferenceModel(backbone.feature_model(), guidance)
    if model.text_projection is not None:
        torch.nn.init.normal_(model.text_projection.weight)
    torch.nn.init.constant_(model.logit_scale, 1.5)
    return model


def by_hand(folder, family: str, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [3,D] and pooled text, from the checkpoint's folder by diffusers' pipeline alone."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    x_t, timesteps = noisy()
    if family == "sd":
        text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, [""] * 3)
        tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
        pooled, of_text, of_empty = pipeline.text_encoder(tokens).pooler_output, None, None
    else:
        text, empty, pooled, of_empty = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=True
        )
        of_text = pooled
        assert float(empty.abs().max()) == 0  # as model_index.json says
    *down, middle = states_by_hand(pipeline.unet, x_t, timesteps, text, of_text)
    without = states_by_hand(pipeline.unet, x_t, timesteps, empty, of_empty)[-1]
    if guidance > 1:
        middle = middle + (guidance - 1) * (middle - without)  # as the paper writes it
    return torch.cat([*down, middle], dim=-1), pooled


@FAMILIES
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@torch.no_grad()
def test_features_and_score_are_those_of_the_blocks_run_by_hand(load, checkpoints, family, guidance) -> None:
    model = latent_model(load(family), guidance)
    x_t, timesteps = noisy()
    features, pooled = by_hand(checkpoints[family], family, guidance)
    text = model.encode_text(PROMPTS)
    assert features.shape == (3, 32 + 64 + 64)
    torch.testing.assert_close(model.image_features(x_t, text, timesteps), features, rtol=1e-4, atol=1e-5)
    if family == "sd":
        pooled = pooled @ model.text_projection.weight.T
    seen = features @ model.visual_projection.weight.T
    score = math.exp(1.5) * (seen * pooled).sum(-1) / (seen.norm(dim=-1) * pooled.norm(dim=-1))
    torch.testing.assert_close(model.score(x_t, text, timesteps), score, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_the_empty_prompt_is_encoded_once_while_its_encoders_are_frozen(load, family, monkeypatch) -> None:
    model, encoded = latent_model(load(family)), []
    original = DownPath.encode_prompts
    monkeypatch.setattr(
        DownPath, "encode_prompts", lambda self, p: encoded.append(list(p)) or original(self, p)
    )
    texts = [model.encode_text(PROMPTS) for _ in range(2)]
    assert encoded == [PROMPTS, [""], PROMPTS]
    assert all(torch.equal(texts[0].tensors[name], texts[1].tensors[name]) for name in texts[0].tensors)
    model.make_trainable(config.LatentPreference(trained="all", optimizer=RATE, steps=1, batch_size=1), 0)
    with torch.no_grad():
        for weight in model.encoder.text_encoders.parameters():
            weight.mul_(1.1)
    encoded.clear()
    trained = [model.encode_text(PROMPTS) for _ in range(2)]
    assert encoded == [PROMPTS, [""]] * 2 and trained[0].tensors["empty text"].requires_grad
    LatentRewardModel(model, "candidate")  # which freezes it, as it is now
    again = model.encode_text(PROMPTS)
    assert torch.equal(again.tensors["empty text"], trained[0].tensors["empty text"])


@FAMILIES
@torch.no_grad()
def test_the_score_depends_on_latents_prompt_and_timestep(load, family) -> None:
    model = latent_model(load(family))
    x_t, timesteps = noisy()
    text = model.encode_text(PROMPTS)
    score = model.score(x_t, text, timesteps)
    for other in (
        model.score(x_t.flip(0), text, timesteps),
        model.score(x_t, model.encode_text(PROMPTS[::-1]), timesteps),
        model.score(x_t, text, timesteps.flip(0)),
    ):
        assert float((score - other).abs()[[0, 2]].min()) > 1e-4
    one = model.score(x_t[1:2], model.encode_text(PROMPTS[1:2]), timesteps[1:2])
    torch.testing.assert_close(one, score[1:2], rtol=1e-4, atol=1e-5)  # each by itself


@pytest.mark.parametrize(("family", "down"), [("sd", (320, 640, 1280, 1280)), ("sdxl", (320, 640, 1280))])
def test_the_features_of_the_released_sizes(words, family, down, monkeypatch) -> None:
    """4,800 numbers to 768 for SD 1.5, and 3,520 to 1,280 for SDXL, from configs alone."""
    monkeypatch.setattr(DownPath, "_autocast", lambda *_: nullcontext())  # torch has none for `meta`
    with torch.device("meta"):
        pipeline = (real_sizes.sd15 if family == "sd" else real_sizes.sdxl)(words)
        base = real_sizes.backbone(pipeline, family, "meta", torch.float32)
        model = LatentPreferenceModel(base.feature_model(), 7.5)
        side, wide = pipeline.unet.config.sample_size, pipeline.unet.config.cross_attention_dim
        text = {"text": torch.zeros(1, 77, wide), "pooled": torch.zeros(1, model.encoder.text_width)}
        if family == "sdxl":
            text["time_ids"] = torch.zeros(1, 6)
        text |= {f"empty {name}": value for name, value in text.items()}
        features = model.image_features(
            torch.zeros(1, 4, side, side), Conditioning(text), torch.zeros(1, dtype=torch.int64)
        )
    total, out = {"sd": (4800, 768), "sdxl": (3520, 1280)}[family]
    assert [*model.encoder.facts.values()] == [[*down], 1280]
    assert features.shape == (1, total) and model.visual_projection.weight.shape == (out, total)
    assert (model.text_projection is None) == (family == "sdxl")


@FAMILIES
@pytest.mark.parametrize("trained", ["all", "lora"])
@torch.no_grad()
def test_a_saved_model_scores_as_before(load, tmp_path, family, trained) -> None:
    """After its weights have moved; an adapter is merged."""
    backbone = load(family)
    model = latent_model(backbone)
    lora = config.Lora(rank=2, alpha=4) if trained == "lora" else None
    settings = config.LatentPreference(
        trained=trained, lora=lora, optimizer={"learning_rate": 1e-3}, steps=1, batch_size=1
    )
    model.make_trainable(settings, 0)
    moved = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(2)
    for parameter in moved:
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    assert len(moved) > 20
    x_t, timesteps = noisy()
    before = model.score(x_t, model.encode_text(PROMPTS), timesteps)
    model.save_pretrained(tmp_path, backbone)
    again = LatentPreferenceModel.from_pretrained(tmp_path, load(family))
    after = again.score(x_t, again.encode_text(PROMPTS), timesteps)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert again.feature_guidance == 7.5 and not again.training
    untouched = latent_model(load(family))
    assert (
        float((untouched.score(x_t, untouched.encode_text(PROMPTS), timesteps) - before).abs().max()) > 0.01
    )


def refused(folder, backbone, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        LatentPreferenceModel.from_pretrained(folder, backbone)
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(folder)) and "spo preference latent" in line
    for word in words:
        assert word in line, line


def test_a_model_of_another_base_is_refused(load, checkpoints, tmp_path) -> None:
    backbone = load("sd")
    latent_model(backbone).save_pretrained(tmp_path / "model", backbone)
    refused(tmp_path / "model", load("sdxl"), "of another base: width of the pooled text: 32", "has 24")
    wider = tmp_path / "wider"
    shutil.copytree(checkpoints["sd"], wider)
    settings = {**UNet2DConditionModel.load_config(wider / "unet"), "block_out_channels": (32, 96)}
    UNet2DConditionModel.from_config(settings).save_pretrained(wider / "unet")
    other = load("sd", checkpoint=str(wider))
    refused(tmp_path / "model", other, "channels of the UNet's down blocks: [32, 64]", "has [32, 96]")


def test_a_model_of_another_vae_is_refused(load, checkpoints, tmp_path) -> None:
    backbone = load("sd")
    latent_model(backbone).save_pretrained(tmp_path / "model", backbone)
    torch.manual_seed(7)
    settings = AutoencoderKL.load_config(checkpoints["sd"] / "vae")
    AutoencoderKL.from_config(settings).save_pretrained(tmp_path / "vae")
    other = load("sd", vae=str(tmp_path / "vae"))
    refused(
        tmp_path / "model", other, "of another VAE", "or name the VAE it was trained with in backbone.vae"
    )


def test_no_model_or_one_with_missing_weights_is_refused(load, tmp_path) -> None:
    backbone = load("sd")
    refused(tmp_path, backbone, "no latent reward model there")
    latent_model(backbone).save_pretrained(tmp_path, backbone)
    edit_weights(tmp_path / "model.safetensors", lambda state: state.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match=r"visual_projection\.weight") as error:
        LatentPreferenceModel.from_pretrained(tmp_path, backbone)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"step_condition": true, "text_config": {}}'])
def test_another_config_is_refused(load, tmp_path, text: str) -> None:
    """Damaged, or that of a step-aware preference model."""
    backbone = load("sd")
    LatentPreferenceModel(backbone.feature_model(), 1.0).save_pretrained(tmp_path, backbone)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match="config.json: .*; give a folder written by `spo preference latent`"
    ) as error:
        LatentPreferenceModel.from_pretrained(tmp_path, backbone)
    assert "\n" not in str(error.value)


def test_the_text_projection_is_taken_over_where_it_fits(load) -> None:
    weight = torch.randn(32, 32)
    model = LatentPreferenceModel(load("sd").feature_model(), 7.5)
    assert torch.equal(model.text_projection.weight, torch.eye(32))
    model.start_text_projection(weight, "a CLIP")
    assert torch.equal(model.text_projection.weight, weight)
    with pytest.raises(ValueError, match=r"a CLIP has a projection of \[24, 32\].* needs \[32, 32\]"):
        model.start_text_projection(torch.zeros(24, 32), "a CLIP")
    with pytest.raises(ValueError, match="text of SDXL and SD 3 is projected already; set it to null"):
        LatentPreferenceModel(load("sdxl").feature_model(), 7.5).start_text_projection(weight, "a CLIP")


@pytest.mark.parametrize("judged_at", ["candidate", "step"])
def test_judged_at_is_the_timestep_of_the_score(load, judged_at) -> None:
    model = latent_model(load("sd"))
    x_t, own = noisy()

    class Candidates:
        latents, timesteps, step_timesteps = x_t, own, own + 40

        @property
        def images(self):
            raise AssertionError("decoded")

    reward_model = LatentRewardModel(model, judged_at)
    text = reward_model.encode_text(PROMPTS)
    score = reward_model.score(Candidates(), text)
    timesteps, other = (own, own + 40) if judged_at == "candidate" else (own + 40, own)
    assert torch.equal(score, model.score(x_t, text, timesteps)) and not score.requires_grad
    assert not torch.equal(score, model.score(x_t, text, other))
