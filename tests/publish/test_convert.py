"""Adapters merged into whole models, as a folder and as a file with the original names."""

from __future__ import annotations

import re
from pathlib import Path

import adapters
import pytest
import single_file
import torch
from checkpoints import assert_equal, ours
from conversions import convert, drawn, made, params
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file

from spo.adapters import load as load_adapted
from spo.publish import original

pytestmark = pytest.mark.parametrize("family", ["sd", "sdxl"])


def test_merged_models_draw_the_same_images(load, family, checkpoints, tmp_path) -> None:
    """A folder, and a single file of the original names, by diffusers and as backbone.checkpoint."""
    settings = params(tmp_path, family, checkpoints[family])
    source, _ = made(load(family), family, tmp_path)
    expected = ours(load_adapted(settings, source, "cpu"), 3.0)
    folder, file = tmp_path / "merged", tmp_path / "merged.safetensors"
    for target in (folder, file):
        assert convert(tmp_path, source, target, "--merge-into", str(checkpoints[family])) == 0
    single_file.write(folder, tmp_path / "expected.safetensors", layers=1, vae_blocks=2)
    found, wanted = load_file(file), load_file(tmp_path / "expected.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)

    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    none = {} if family == "sdxl" else {"safety_checker": None}
    assert_equal(drawn(kind.from_pretrained(folder)), expected)
    assert_equal(drawn(kind.from_single_file(file, config=str(checkpoints[family]), **none)), expected)
    for path in (folder, file):
        again = params(tmp_path, family, path, config=str(checkpoints[family]))
        assert_equal(ours(load_adapted(again, None, "cpu"), 3.0), expected)


def test_a_v_prediction_model_stays_one_in_a_single_file(load, family, checkpoints, tmp_path) -> None:
    settings = params(
        tmp_path,
        family,
        checkpoints[family],
        scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    )
    source, _ = made(load(family), family, tmp_path)
    file = tmp_path / "v.safetensors"
    assert convert(tmp_path, source, file, "--merge-into", str(checkpoints[family])) == 0
    expected = load_adapted(settings, source, "cpu")
    again = load_adapted(params(tmp_path, family, file, config=str(checkpoints[family])), None, "cpu")
    assert again.scheduler_config["prediction_type"] == "v_prediction"
    assert again.scheduler_config["rescale_betas_zero_snr"] is True
    assert_equal(ours(again, 3.0), ours(expected, 3.0))


def test_unets_and_pipelines_become_single_files_too(load, family, checkpoints, tmp_path) -> None:
    settings = params(tmp_path, family, checkpoints[family])
    other = load(family)
    with torch.no_grad():
        other.unet.conv_in.weight *= 1.5
    other.unet.save_pretrained(tmp_path / "unet")
    expected = ours(load_adapted(settings, tmp_path / "unet", "cpu"), 3.0)
    merged, file = tmp_path / "merged", tmp_path / "whole.safetensors"
    assert convert(tmp_path, tmp_path / "unet", merged, "--merge-into", str(checkpoints[family])) == 0
    assert convert(tmp_path, merged, file) == 0
    again = params(tmp_path, family, file, config=str(checkpoints[family]))
    assert_equal(ours(load_adapted(again, None, "cpu"), 3.0), expected)


def test_mistakes_are_one_line_and_write_nothing(load, family, checkpoints, tmp_path, capsys) -> None:
    params(tmp_path, family, checkpoints[family])
    source, _ = made(load(family), family, tmp_path)
    loha = {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2), "lora_unet_conv_in.hada_w1_b": torch.ones(2, 2)}
    adapters.write(tmp_path / "loha.safetensors", loha)
    load(family).unet.save_pretrained(tmp_path / "unet")
    base, new = str(checkpoints[family]), tmp_path / "new.safetensors"

    def refused(message: str, *arguments: object) -> None:
        capsys.readouterr()
        assert convert(tmp_path, *arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spo: ")]
        assert len(lines) == 1 and message in lines[0], lines
        assert not new.exists() and not (tmp_path / "new").exists()

    refused("exists; remove it, or give another name by --to", source, source)
    refused("give NAME.safetensors by --to", source, tmp_path / "new")
    refused("give the model that it belongs to by --merge-into", tmp_path / "unet", new)
    refused("is a complete pipeline; leave out --merge-into", Path(base), new, "--merge-into", base)
    refused("is LoHa; only LoRA, LoCon and DoRA are supported", tmp_path / "loha.safetensors", new)
    refused("no such file or folder", tmp_path / "nowhere", new)
    refused("no such file, folder or hub id", source, new, "--merge-into", str(tmp_path / "nowhere"))
    other = checkpoints["sdxl" if family == "sd" else "sd"]
    refused("backbone.family", source, new, "--merge-into", str(other))


def test_the_original_names_at_the_real_sizes(family, words) -> None:
    """SD 1.5's first block up has no attention, so its upsampler is the second module there."""
    import real_sizes

    from spo.adapters.names import original_names

    with torch.device("meta"):
        pipeline = real_sizes.sd15(words) if family == "sd" else real_sizes.sdxl(words)
    found = original._unet(pipeline.unet)
    expected = {
        "sd": "output_blocks.2.1.conv.weight",
        "sdxl": "output_blocks.2.2.conv.weight",
    }[family]
    assert expected in found and len(found) == len(pipeline.unet.state_dict())
    first = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
    assert all(first.match(name) for name in found)
    again = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": v for k, v in found.items()}, dict(pipeline.unet.config)
    )
    assert shapes(again) == shapes(pipeline.unet.state_dict())
    names = original_names(pipeline.unet)
    assert all(names[new] == old for old, new in original.unet_names(pipeline.unet).items())
    vae = {f"first_stage_model.{key}": value for key, value in original._vae(pipeline.vae).items()}
    again = convert_ldm_vae_checkpoint(vae, dict(pipeline.vae.config))
    assert len(vae) == len(again) and shapes(again) == shapes(pipeline.vae.state_dict())
    if family == "sdxl":
        second = {
            f"conditioner.embedders.1.model.{k}": v
            for k, v in original._open_clip(pipeline.text_encoder_2.state_dict()).items()
        }
        again = convert_open_clip_checkpoint(
            pipeline.text_encoder_2, second, prefix="conditioner.embedders.1.model."
        )
        wanted = pipeline.text_encoder_2.state_dict()
        assert {original.text_name(k): v.shape for k, v in again.items()} == {
            original.text_name(k): v.shape for k, v in wanted.items()
        }


def shapes(state) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}
