"""What a checkpoint's files announce and this package cannot honour is refused in one line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit, edit_weights, refused
from safetensors.torch import load_file

from spo import config

pytestmark = pytest.mark.smoke

WEIGHTS = "diffusion_pytorch_model.safetensors"
ANY = pytest.mark.parametrize("family", ["sd", "sdxl"])


@pytest.fixture
def copy(checkpoints, tmp_path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(checkpoints[family], tmp_path / family))


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
def test_other_processes_than_a_discrete_ddpm_are_refused(
    copy, family: str, name: str, fields: dict, word: str
) -> None:
    folder = copy(family)
    path = folder / "scheduler/scheduler_config.json"
    edit(path, _class_name=name, **fields)
    index = folder / "model_index.json"
    edit(index, scheduler=["diffusers", name])
    refused(folder, family, word, family)


@ANY
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_unknown_and_infinite_tensors_are_refused(copy, family: str, part: str) -> None:
    folder = copy(family)
    file = folder / part / (WEIGHTS if part != "text_encoder" else "model.safetensors")
    content = file.read_bytes()
    name = sorted(load_file(file))[3]
    edit_weights(file, lambda state: state.pop(name))
    refused(folder, family, part, "lacks weights", name.removeprefix("text_model."))
    file.write_bytes(content)
    edit_weights(file, lambda state: state.update(foreign=torch.zeros(1)))
    refused(folder, family, part, "unknown weights", "foreign")
    file.write_bytes(content)
    edit_weights(file, lambda state: state[name].view(-1)[:1].fill_(float("nan")))
    refused(folder, family, part, "NaN or infinity")
    file.write_bytes(content)
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


def test_parts_given_as_a_checkpoint_say_where_they_belong(checkpoints, tmp_path) -> None:
    refused(checkpoints["sd"] / "unet", "sd", "model_index.json", "--unet")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    refused(tmp_path, "sd", "model_index.json", "--lora")
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(tmp_path / "model.ckpt", "sd", "not a .safetensors file")


def test_negative_guidance_is_refused() -> None:
    for section in (config.Variant, config.Spo, config.Preference):
        assert re.search("Ge", repr(section.model_fields["guidance"].metadata)), section
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        config.Variant(guidance=-1.0)


@ANY
@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("unet/config.json", {"sample_size": 0}, ("sample_size",)),
        ("unet/config.json", {"sample_size": True}, ("sample_size", "True")),
        ("vae/config.json", {"scaling_factor": None}, ("vae/config.json", "scaling_factor", "None")),
        ("vae/config.json", {"scaling_factor": 0}, ("vae/config.json", "scaling_factor")),
        ("vae/config.json", {"shift_factor": "0.3"}, ("vae/config.json", "shift_factor")),
        ("vae/config.json", {"latents_mean": 0.5, "latents_std": 1.0}, ("latents_mean", "4 numbers")),
        (
            "vae/config.json",
            {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4},
            ("latents_std", "above 0"),
        ),
        ("model_index.json", {"unet": "x"}, ("model_index.json: unet", "'x'")),
        ("scheduler/scheduler_config.json", {"_class_name": ["DDIMScheduler"]}, ("_class_name",)),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, ("tokenizer", "model_max_length")),
    ],
)
def test_invalid_values_are_refused(copy, family: str, file: str, changes: dict, said) -> None:
    folder = copy(family)
    edit(folder / file, **changes)
    refused(folder, family, *said)


@ANY
@pytest.mark.parametrize("file", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_config_file_that_is_not_an_object_is_refused(copy, family: str, file: str) -> None:
    folder = copy(family)
    for content in ("[]", "3", "null"):
        (folder / file).write_text(content)
        refused(folder, family, file, "must be a JSON object")


@ANY
def test_a_tokenizer_without_its_files_is_refused(copy, family: str) -> None:
    """transformers builds one with an empty vocabulary, for which every prompt is the same."""
    folder = copy(family)
    (folder / "tokenizer/tokenizer.json").unlink()
    refused(folder, family, "tokenizer has an empty vocabulary")
    shutil.rmtree(folder / "tokenizer")
    refused(folder, family, "tokenizer has an empty vocabulary")


def test_tokenizers_of_two_lengths_are_refused(copy) -> None:
    folder = copy("sdxl")
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=5)
    refused(folder, "sdxl", "tokenizer_2", "model_max_length")


def test_an_offset_that_is_not_a_number_is_refused(copy) -> None:
    folder = copy("sdxl")  # diffusers' Stable Diffusion pipeline sets it itself
    for value in ("1", None, -1):
        edit(folder / "scheduler/scheduler_config.json", steps_offset=value)
        refused(folder, "sdxl", "steps_offset")
