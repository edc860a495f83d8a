"""What a single .safetensors file announces is honoured, or refused in one line."""

from pathlib import Path

import pytest
import single_file
import torch
from checkpoints import assert_equal, ours, theirs
from safetensors.torch import load_file, save_file

from spo import backbones, config


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


def test_params_override_the_marks_of_a_single_file(single) -> None:
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
    refused_file(single(without(text)), "text_encoder", "lacks weights")
    Path(single().checkpoint).write_bytes(b"truncated")
    settings = single()
    Path(settings.checkpoint).write_bytes(b"truncated")
    refused_file(settings, "model.safetensors: cannot be read as weights")
