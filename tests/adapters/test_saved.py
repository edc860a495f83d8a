"""Adapters that spo saved load here and in diffusers; those that do not fit the base are refused."""

import adapters
import pytest
import torch
from checkpoints import inputs, predict, pretend_training
from diffusers import DiffusionPipeline
from rounding import assert_same
from safetensors.torch import load_file, save_file

from spo import config
from spo.backbones import lora

LORA = config.Lora(rank=2, alpha=6)  # alpha is not the rank, so a lost scale shows

pytestmark = pytest.mark.parametrize("family", ["sd", "sdxl"])


def refused(message: str, attempt) -> None:
    with pytest.raises(ValueError, match=message) as error:
        attempt()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_saved_adapter_loads_here_and_in_diffusers(load, family, checkpoints, tmp_path) -> None:
    backbone = load(family)
    backbone.add_lora(LORA, seed=0)
    pretend_training(backbone)
    backbone.save_lora(tmp_path)
    expected = predict(backbone)

    for path in (tmp_path, tmp_path / lora.FILE):
        again = load(family)
        adapters.load_lora(again, path)
        assert_same(predict(again), expected, backbone.unet)
        assert again.trainable_parameters() == []

    pipe = DiffusionPipeline.from_pretrained(checkpoints[family])
    pipe.load_lora_weights(tmp_path)
    x_t, timesteps, conditioning = inputs(backbone)
    arguments = backbone._text.unet_arguments(conditioning)
    with torch.no_grad():
        output = pipe.unet(x_t, timesteps, **arguments).sample
    assert_same(output, expected, pipe.unet)


def test_an_adapter_that_does_not_fit_is_refused(load, family, tmp_path) -> None:
    backbone = load(family)
    backbone.add_lora(LORA, seed=0)
    backbone.save_lora(tmp_path)
    good = load_file(tmp_path / lora.FILE)
    first = next(k for k in good if k.endswith("lora.down.weight"))
    unknown = first.replace("down_blocks.1", "down_blocks.7")
    bad = {
        "wide": {k: torch.cat([v, v], dim=1) if k == first else v for k, v in good.items()},
        "more": {**good, unknown: good[first].clone()},
        "text": {**good, "text_encoder.layers.0.lora_A.weight": good[first].clone()},
    }
    for name, state in bad.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "truncated.safetensors").write_bytes(b"truncated")

    refused(
        "wide.safetensors: does not fit the unet: ",
        lambda: adapters.load_lora(load(family), tmp_path / "wide.safetensors"),
    )
    refused(
        "more.safetensors: does not fit the unet, which has no layer for unet.down_blocks.7",
        lambda: adapters.load_lora(load(family), tmp_path / "more.safetensors"),
    )
    messages = {
        "text.safetensors": "does not fit the text_encoder, which has no layer for text_encoder.layers.0",
        "truncated.safetensors": "cannot be read as weights",
        "nowhere": "no such file or folder; give a LoRA",
    }
    for name, message in messages.items():
        refused(f"{name}: {message}", lambda name=name: adapters.load_lora(load(family), tmp_path / name))


def test_the_adapter_of_the_other_family_is_refused(load, family, tmp_path) -> None:
    other = load({"sd": "sdxl", "sdxl": "sd"}[family])
    other.add_lora(LORA, seed=0)
    other.save_lora(tmp_path)
    refused("does not fit the unet", lambda: adapters.load_lora(load(family), tmp_path))
