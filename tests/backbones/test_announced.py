"""What a checkpoint's files announce is honoured, as in diffusers' own pipeline, or refused in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import single_file
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from spo import backbones, config
from spo.backbones import sizes
from spo.backbones.parts import choose_variants, variants_of
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
ANY = pytest.mark.parametrize("family", ["sd", "sdxl"])
PROMPTS = ["a red circle", "a large blue square"]


@pytest.fixture
def copy(checkpoints, tmp_path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(checkpoints[family], tmp_path / family))


def edit(path: Path, drop: tuple[str, ...] = (), **changes) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**content, **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def load(folder: Path, family: str, **changes) -> backbones.StableDiffusion:
    return backbones.load(config.Backbone(family=family, checkpoint=str(folder), **changes), "cpu")


def refused(folder: Path, family: str, *words: str, **changes) -> None:
    with pytest.raises(ValueError) as error:
        load(folder, family, **changes)
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    for word in words:
        assert word in line, line


def ours(backbone, guidance: float, prompts: list[str] = PROMPTS) -> torch.Tensor:
    """Images in [0,1] of two prompts by five deterministic steps."""
    schedule = Schedule.from_config(backbone.scheduler_config, 5)
    noise = SampleNoise(0, [1, 2], backbone.latent_shape)
    images = backbone.decode(sample_latents(backbone, schedule, prompts, noise, guidance, eta=0.0))
    return (images / 2 + 0.5).clamp(0, 1)


def theirs(folder: Path, guidance: float, **scheduler) -> torch.Tensor:
    """The same by diffusers' pipeline with its DDIM."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **scheduler)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size
    side = size if isinstance(size, int) else size[0]
    latents = SampleNoise(0, [1, 2], (pipe.unet.config.in_channels, side, side)).draw()
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "eta": 0.0, "output_type": "pt"}
    return pipe(PROMPTS, latents=latents, **options).images


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.std() > 0.05  # images that say something
    assert torch.allclose(one, other, atol=1e-4), float((one - other).abs().max())


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


def test_betas_that_a_file_leaves_out_are_those_of_its_class(copy) -> None:
    folder = copy("sd")
    path = folder / "scheduler/scheduler_config.json"
    edit(path, drop=("beta_start", "beta_end", "beta_schedule"), _class_name="HeunDiscreteScheduler")
    used = load(folder, "sd").scheduler_config
    assert (used["beta_start"], used["beta_end"], used["beta_schedule"]) == (0.00085, 0.012, "linear")


@ANY
@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("EDMEulerScheduler", {}, "EDMEulerScheduler"),
        ("EDMDPMSolverMultistepScheduler", {}, "EDMDPMSolver"),
        ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatch"),
        ("LCMScheduler", {}, "LCMScheduler"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_what_is_no_discrete_ddpm_is_refused(copy, family: str, name: str, fields: dict, word: str) -> None:
    folder = copy(family)
    path = folder / "scheduler/scheduler_config.json"
    edit(path, _class_name=name, **fields)
    index = folder / "model_index.json"
    edit(index, scheduler=["diffusers", name])
    refused(folder, family, word, family)


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
    measured = sizes.measure(config.Backbone(family=family, checkpoint=str(folder), scheduler=override))
    assert override.items() <= measured.scheduler_config.items()
    backbone.save_pipeline(tmp_path / "saved")
    again = load(tmp_path / "saved", family)
    assert override.items() <= again.scheduler_config.items()
    assert_equal(ours(again, 3.0), ours(backbone, 3.0))


@pytest.fixture(params=["sd", "sdxl"])
def single(request, checkpoints, tmp_path):
    """single(change, metadata): (a single file of the family, its settings)."""

    def make(change=lambda state: None, metadata=None, **settings) -> config.Backbone:
        file = tmp_path / "model.safetensors"
        single_file.write(checkpoints[request.param], file, layers=1, vae_blocks=2)
        state = load_file(file)
        change(state)
        save_file(state, file, metadata=metadata)
        described = {"config": str(checkpoints[request.param]), **settings}
        return config.Backbone(family=request.param, checkpoint=str(file), **described)

    return make


def refused_file(settings: config.Backbone, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        backbones.load(settings, "cpu")
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    for word in words:
        assert word in line, line


def mark(*names: str):
    return lambda state: state.update({name: torch.zeros(0) for name in names})


def test_marks_of_a_single_file_are_honoured(single) -> None:
    used = backbones.load(single(mark("v_pred", "ztsnr")), "cpu")
    assert used.scheduler_config["prediction_type"] == "v_prediction"
    assert used.scheduler_config["rescale_betas_zero_snr"] is True
    marks = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = Path(used_config := single().config)
    assert used_config is not None
    assert_equal(ours(used, 3.0), theirs(folder, 3.0, **marks))


def test_metadata_of_a_single_file_is_honoured(single) -> None:
    for said, meant in (("v", "v_prediction"), ("epsilon", "epsilon")):
        used = backbones.load(single(metadata={"modelspec.prediction_type": said}), "cpu")
        assert used.scheduler_config["prediction_type"] == meant


def test_params_go_before_the_marks_of_a_single_file(single) -> None:
    used = backbones.load(single(mark("v_pred"), scheduler={"prediction_type": "epsilon"}), "cpu")
    assert used.scheduler_config["prediction_type"] == "epsilon"


def test_other_marks_of_a_single_file_are_refused(single) -> None:
    refused_file(single(mark("edm_mean", "edm_std")), "edm_mean", "EDM")
    refused_file(single(mark("v_pred", "edm_vpred.sigma_max", "edm_vpred.sigma_min")), "CosXL")
    refused_file(single(metadata={"modelspec.prediction_type": "flow"}), "modelspec.prediction_type", "flow")
    contradiction = single(mark("v_pred"), {"modelspec.prediction_type": "epsilon"})
    refused_file(contradiction, "contradict", "backbone.scheduler.prediction_type")
    refused_file(single(mark("ztsnr")), "zero terminal SNR")  # with epsilon
    for name in ("flux-1-dev", "stable-diffusion-xl-v1-refiner", "stable-diffusion-v1/lora"):
        refused_file(single(metadata={"modelspec.architecture": name}), "modelspec.architecture", name)


def test_a_single_file_of_something_else_says_what_it_is(single) -> None:
    def only(*prefixes: str, rename: str = ""):
        def change(state):
            for name in list(state):
                value = state.pop(name)
                if name.startswith(prefixes):
                    state[rename + name.removeprefix(prefixes[0])] = value

        return change

    unet = "model.diffusion_model."
    refused_file(single(only(unet, rename="lora_unet_")), "adapter", "--lora")
    refused_file(single(only(unet)), "UNet alone")
    refused_file(single(only("first_stage_model.")), "VAE alone")
    refused_file(single(only(unet, "first_stage_model.", rename=unet)), "text encoder")
    refused_file(single(lambda s: [s.pop(n) for n in list(s) if n.startswith("first_stage")]), "no VAE")


def test_a_single_file_with_missing_or_unknown_tensors_is_refused(single) -> None:
    def without(prefix: str):
        return lambda state: state.pop(sorted(n for n in state if n.startswith(prefix))[4])

    for prefix in ("model.diffusion_model.", "first_stage_model."):
        refused_file(single(without(prefix)), "tensors", prefix)
        refused_file(single(lambda s, p=prefix: s.update({f"{p}more": torch.zeros(1)})), "tensors", prefix)
    text = "cond_stage_model." if single().family == "sd" else "conditioner.embedders.1."
    refused_file(single(without(text)), "text_encoder", "misses tensors")
    Path(single().checkpoint).write_bytes(b"torn")
    settings = single()
    Path(settings.checkpoint).write_bytes(b"torn")
    refused_file(settings, "no readable safetensors file")


@ANY
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_unknown_and_infinite_tensors_are_refused(copy, family: str, part: str) -> None:
    folder = copy(family)
    file = folder / part / (WEIGHTS if part != "text_encoder" else "model.safetensors")
    whole = file.read_bytes()
    name = sorted(load_file(file))[3]
    edit_weights(file, lambda state: state.pop(name))
    refused(folder, family, part, "misses tensors", name.removeprefix("text_model."))
    file.write_bytes(whole)
    edit_weights(file, lambda state: state.update(foreign=torch.zeros(1)))
    refused(folder, family, part, "unknown tensors", "foreign")
    file.write_bytes(whole)
    edit_weights(file, lambda state: state[name].view(-1)[:1].fill_(float("nan")))
    refused(folder, family, part, "NaN or infinite")
    file.write_bytes(whole)
    edit_weights(file, lambda state: state.update({name: state[name][..., None].repeat_interleave(2, -1)}))
    refused(folder, family, part)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 16}, ("time_cond_proj_dim", "LCM")),
        ("unet/config.json", {"num_class_embeds": 10}, ("num_class_embeds",)),
        ("unet/config.json", {"in_channels": 9}, ("unet",)),
        ("unet/config.json", {"sample_size": None}, ("sample_size", "None")),
        ("unet/config.json", {"sample_size": [8, 16]}, ("sample_size", "square")),
        ("unet/config.json", {"cross_attention_dim": 24}, ("unet",)),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, ("latents_mean", "latents_std")),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, ("vae", "AutoencoderTiny")),
        ("model_index.json", {"text_encoder": [None, None]}, ("text_encoder", "missing")),
        ("model_index.json", {"requires_aesthetics_score": True}, ("refiner",)),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, ("Inpaint", "family")),
    ],
)
def test_announcements_that_are_not_supported_are_refused(copy, file: str, changes: dict, said) -> None:
    for family in ("sd", "sdxl"):
        folder = copy(family)
        edit(folder / file, **changes)
        refused(folder, family, *said)


def test_an_inpainting_unet_is_refused_by_its_channels(copy) -> None:
    folder = copy("sd")
    edit(folder / "unet/config.json", in_channels=9)

    def widen(state) -> None:
        state["conv_in.weight"] = torch.zeros(32, 9, 3, 3)

    edit_weights(folder / "unet" / WEIGHTS, widen)
    refused(folder, "sd", "in_channels 9", "inpainting")


@ANY
def test_square_sample_sizes_as_a_list_work(copy, family: str) -> None:
    folder = copy(family)
    plain = ours(load(folder, family), 3.0)
    edit(folder / "unet/config.json", sample_size=[8, 8])
    assert torch.equal(ours(load(folder, family), 3.0), plain)
    assert sizes.measure(config.Backbone(family=family, checkpoint=str(folder))).latent_shape == (4, 8, 8)


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
    assert torch.allclose(backbone.decode(latents), plain.decode(shifted), atol=1e-5)
    images = torch.rand(2, 3, *backbone.image_size) * 2 - 1
    expected = plain.encode(images) - torch.tensor(mean).view(1, 4, 1, 1) * scale
    assert torch.allclose(backbone.encode(images), expected / torch.tensor(std).view(1, 4, 1, 1), atol=1e-5)


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


def test_parts_given_as_a_checkpoint_say_where_they_belong(checkpoints, tmp_path) -> None:
    refused(checkpoints["sd"] / "unet", "sd", "model_index.json", "--checkpoint")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    refused(tmp_path, "sd", "model_index.json", "--lora")
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(tmp_path / "model.ckpt", "sd", "no .safetensors file")


def test_another_autoencoder_as_vae_is_refused(checkpoints, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    refused(checkpoints["sd"], "sd", "backbone.vae", "AutoencoderTiny", vae=str(tmp_path))
    with_one = load(checkpoints["sd"], "sd", vae=str(checkpoints["sdxl"]))  # a pipeline's folder has one
    own = load(checkpoints["sdxl"], "sdxl")
    assert torch.equal(with_one.decode(torch.ones(1, 4, 8, 8)), own.decode(torch.ones(1, 4, 8, 8)))


def test_negative_guidance_is_refused() -> None:
    for section in (config.Variant, config.Spo, config.Preference):
        assert re.search("Ge", repr(section.model_fields["guidance"].metadata)), section
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        config.Variant(guidance=-1.0)
