"""What a checkpoint's files announce is honoured, as in diffusers' own pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import PROMPTS, assert_equal, edit, load, ours, refused, theirs
from rounding import assert_same

from spo.backbones.weight_files import choose_variants, variants_of

pytestmark = pytest.mark.smoke

WEIGHTS = "diffusion_pytorch_model.safetensors"
ANY = pytest.mark.parametrize("family", ["sd", "sdxl"])


@pytest.fixture
def copy(checkpoints, tmp_path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(checkpoints[family], tmp_path / family))


@ANY
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_that_of_diffusers(copy, family: str, guidance: float) -> None:
    folder = copy(family)
    assert_equal(ours(load(folder, family), guidance), theirs(folder, guidance))


@ANY
def test_latents_are_not_clipped_where_the_file_does_not_say_so(copy, family: str) -> None:
    """Files of Euler, DPM++ and UniPC have no such key, and DDIM's class would clip without it."""
    folder = copy(family)
    path = folder / "scheduler/scheduler_config.json"
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"):
        edit(path, drop=("clip_sample", "set_alpha_to_one"), _class_name=name)
        assert_equal(ours(load(folder, family), 3.0), theirs(folder, 3.0, clip_sample=False))


@ANY
def test_a_file_without_an_offset_is_read_as_the_pipeline_reads_it(copy, family: str) -> None:
    folder = copy(family)
    drop = ("clip_sample", "steps_offset", "set_alpha_to_one")
    edit(folder / "scheduler/scheduler_config.json", drop=drop, _class_name="DDIMScheduler")
    offset = {"sd": 1, "sdxl": 0}[family]  # diffusers' Stable Diffusion pipeline sets it to 1
    used = load(folder, family)
    assert used.scheduler_config.get("steps_offset", 0) == offset
    assert_equal(ours(used, 3.0), theirs(folder, 3.0, clip_sample=False, steps_offset=offset))


def test_betas_that_a_file_omits_are_those_of_its_class(copy) -> None:
    folder = copy("sd")
    path = folder / "scheduler/scheduler_config.json"
    edit(path, drop=("beta_start", "beta_end", "beta_schedule"), _class_name="HeunDiscreteScheduler")
    used = load(folder, "sd").scheduler_config
    assert (used["beta_start"], used["beta_end"], used["beta_schedule"]) == (0.00085, 0.012, "linear")


@ANY
def test_a_saved_pipeline_announces_no_more_of_its_schedule_than_the_base(
    copy, tmp_path, family: str
) -> None:
    """diffusers writes its class's defaults, which differ from what a missing key means."""
    folder = copy(family)
    edit(folder / "scheduler/scheduler_config.json", drop=("timestep_spacing",))
    backbone = load(folder, family)
    backbone.save_pipeline(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    assert "timestep_spacing" not in saved and "beta_start" in saved
    assert_equal(ours(load(tmp_path / "saved", family), 3.0), ours(backbone, 3.0))


@ANY
def test_params_override_the_file_and_are_saved_with_a_full_fine_tune(copy, family: str, tmp_path) -> None:
    folder = copy(family)
    override = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    backbone = load(folder, family, scheduler=override)
    assert_equal(ours(backbone, 3.0), theirs(folder, 3.0, **override))
    assert override.items() <= backbone.scheduler_config.items()
    backbone.save_pipeline(tmp_path / "saved")
    again = load(tmp_path / "saved", family)
    assert override.items() <= again.scheduler_config.items()
    assert_equal(ours(again, 3.0), ours(backbone, 3.0))


@ANY
def test_square_sample_sizes_as_a_list_work(copy, family: str) -> None:
    folder = copy(family)
    plain = ours(load(folder, family), 3.0)
    edit(folder / "unet/config.json", sample_size=[8, 8])
    square = load(folder, family)
    assert square.latent_shape == (4, 8, 8) and torch.equal(ours(square, 3.0), plain)


def test_an_empty_prompt_that_is_not_zeroed_is_encoded(copy) -> None:
    folder = copy("sdxl")
    zeroed = ours(load(folder, "sdxl"), 3.0)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    encoded = ours(load(folder, "sdxl"), 3.0)
    assert (encoded - zeroed).abs().max() > 1e-3
    assert_equal(encoded, theirs(folder, 3.0))


@ANY
def test_statistics_of_latents_are_honoured(copy, family: str) -> None:
    folder = copy(family)
    mean, std = [0.5, -1.0, 2.0, 0.0], [1.5, 0.5, 1.0, 2.0]
    plain = load(folder, family)
    edit(folder / "vae/config.json", latents_mean=mean, latents_std=std)
    backbone = load(folder, family)
    if family == "sdxl":  # diffusers' Stable Diffusion pipeline does not read them
        assert_equal(ours(backbone, 3.0), theirs(folder, 3.0))
    latents = torch.randn(2, *backbone.latent_shape)
    scale = backbone.vae.config.scaling_factor
    shifted = latents * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1) * scale
    assert_same(backbone.decode(latents), plain.decode(shifted), plain.vae)
    images = torch.rand(2, 3, *backbone.image_size) * 2 - 1
    expected = plain.encode(images) - torch.tensor(mean).view(1, 4, 1, 1) * scale
    assert_same(backbone.encode(images), expected / torch.tensor(std).view(1, 4, 1, 1), plain.vae)


@ANY
def test_a_tokenizer_without_a_length_pads_to_the_encoders(copy, family: str) -> None:
    folder = copy(family)
    plain = load(folder, family).encode_prompts(PROMPTS).tensors["text"]
    for tokenizer in folder.glob("tokenizer*"):
        edit(tokenizer / "tokenizer_config.json", drop=("model_max_length",))
    assert torch.equal(load(folder, family).encode_prompts(PROMPTS).tensors["text"], plain)


def test_a_text_encoder_that_announces_an_attention_mask_gets_it(copy) -> None:
    folder = copy("sd")
    edit(folder / "text_encoder/config.json", use_attention_mask=True)
    assert_equal(ours(load(folder, "sd"), 3.0), theirs(folder, 3.0))


@ANY
def test_files_of_one_variant_are_found_and_several_are_asked_for(copy, family: str) -> None:
    folder = copy(family)
    plain = ours(load(folder, family), 3.0)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert torch.equal(ours(load(folder, family), 3.0), plain)
    assert torch.equal(ours(load(folder, family, variant="fp16"), 3.0), plain)
    refused(folder, family, "backbone.variant", "bf16", "fp16", variant="bf16")
    for file in list(folder.rglob("*.fp16.safetensors")):
        shutil.copy(file, str(file).replace(".fp16.", ".non_ema."))
    refused(folder, family, "backbone.variant", "fp16", "non_ema")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    refused(folder, family, "has no weights")


def test_variants_by_file_name() -> None:
    assert variants_of(["config.json", "model.safetensors", "pytorch_model.fp16.bin"]) == {None}
    assert variants_of(["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]) == {
        "fp16"
    }
    assert variants_of(["diffusion_pytorch_model-00001-of-00002.safetensors"]) == {None}
    assert variants_of(["diffusion_pytorch_model.non_ema.bin"]) == {"non_ema"}
    assert variants_of(["openvino_model.xml"]) == set()
    files = {"unet": ["diffusion_pytorch_model.fp16.safetensors"], "vae": [WEIGHTS]}
    assert choose_variants(files, None, "x") == {"unet": "fp16", "vae": None}
    assert choose_variants(files, "fp16", "x") == {"unet": "fp16", "vae": None}


def test_another_autoencoder_as_vae_is_refused(checkpoints, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    refused(checkpoints["sd"], "sd", "backbone.vae", "AutoencoderTiny", vae=str(tmp_path))
    with_one = load(checkpoints["sd"], "sd", vae=str(checkpoints["sdxl"]))  # a pipeline's folder has one
    own = load(checkpoints["sdxl"], "sdxl")
    assert torch.equal(with_one.decode(torch.ones(1, 4, 8, 8)), own.decode(torch.ones(1, 4, 8, 8)))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_another_image_size_is_that_of_diffusers(checkpoints, family: str) -> None:
    """SDXL's time ids say it too."""
    backbone = load(checkpoints[family], family, image_size=24)
    assert backbone.image_size == (24, 24) and backbone.latent_shape == (4, 12, 12)
    assert_equal(ours(backbone, 3.0), theirs(checkpoints[family], 3.0, side=12))
    refused(checkpoints[family], family, "backbone.image_size: 25 is not a multiple of 2", image_size=25)
