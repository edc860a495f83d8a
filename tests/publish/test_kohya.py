"""A LoRA in kohya's key names: computed by hand from the raw file, and drawn by diffusers."""

from __future__ import annotations

import adapters
import pytest
import torch
from checkpoints import assert_equal, ours
from conversions import BLOCK, add, convert, drawn, made, norms, params, table
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from spo.adapters import load as load_adapted

pytestmark = pytest.mark.parametrize("family", ["sd", "sdxl"])


def test_kohyas_keys_by_hand_are_the_adapter(load, family, checkpoints, tmp_path) -> None:
    """W + alpha / rank * up @ down from the raw keys, ranks 1 to 3, alpha from 1/4 to 4 times the rank."""
    backbone = load(family)
    settings = params(tmp_path, family, checkpoints[family])
    source, _ = made(backbone, family, tmp_path)
    assert convert(tmp_path, source, tmp_path / "name_webui.safetensors") == 0

    raw, known, ratios = load_file(tmp_path / "name_webui.safetensors"), table(backbone, family), set()
    names = {key for modules in known.values() for key in modules.values()}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(raw) == {f"{name}.{part}" for name in names for part in parts}
    plain = ours(backbone, 3.0)
    for component, modules in known.items():
        for module, key in modules.items():
            ratios.add(add(backbone.pipeline.components[component].get_submodule(module), raw, key))
    backbone.forget_prompts()
    assert len(ratios) == 4
    expected = ours(load_adapted(settings, source, "cpu"), 3.0)
    assert_equal(ours(backbone, 3.0), expected)
    assert (expected - plain).abs().max() > 0.05
    assert_equal(ours(load_adapted(settings, tmp_path / "name_webui.safetensors", "cpu"), 3.0), expected)


def test_diffusers_draws_the_same_images_from_it(load, family, checkpoints, tmp_path) -> None:
    settings = params(tmp_path, family, checkpoints[family])
    source, _ = made(load(family), family, tmp_path, uniform=True)
    assert convert(tmp_path, source, tmp_path / "webui.safetensors") == 0
    pipe = DiffusionPipeline.from_pretrained(checkpoints[family])
    pipe.load_lora_weights(tmp_path / "webui.safetensors")
    assert_equal(drawn(pipe), ours(load_adapted(settings, source, "cpu"), 3.0))


def test_dora_by_hand(load, family, checkpoints, tmp_path) -> None:
    """W' = m * (W + alpha / rank * up @ down) / its norm over each output's inputs, of matrix and kernel."""
    settings = params(tmp_path, family, checkpoints[family])
    backbone = load(family)
    modules = [f"{BLOCK}.attn1.to_q", "down_blocks.0.resnets.0.conv1"]
    layers = {name: backbone.unet.get_submodule(name) for name in modules}
    state = adapters.kohya("lora_unet_", adapters.changes(backbone.unet, modules))
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        norm = norms(layer.weight.detach())
        norm = norm * (0.7 + 0.6 * torch.rand(norm.shape, generator=generator))
        state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = norm
    source = adapters.write(tmp_path / "dora.safetensors", state)
    assert convert(tmp_path, source, tmp_path / "webui.safetensors") == 0

    raw, names = load_file(tmp_path / "webui.safetensors"), table(backbone, family)["unet"]
    assert len(raw) == 8
    for name, layer in layers.items():
        add(layer, raw, names[name])
        with torch.no_grad():
            layer.weight *= raw[f"{names[name]}.dora_scale"] / norms(layer.weight)
    expected = ours(load_adapted(settings, source, "cpu"), 3.0)
    assert_equal(ours(backbone, 3.0), expected)
    merged = tmp_path / "merged"
    assert convert(tmp_path, source, merged, "--merge-into", str(checkpoints[family])) == 0
    again = params(tmp_path, family, merged)
    assert_equal(ours(load_adapted(again, None, "cpu"), 3.0), expected)


def test_tuckers_form_becomes_a_plain_convolution(load, family, checkpoints, tmp_path) -> None:
    settings = params(tmp_path, family, checkpoints[family])
    backbone = load(family)
    name, stem = "down_blocks.0.resnets.0.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"
    outputs, inputs = backbone.unet.get_submodule(name).weight.shape[:2]
    shapes = {"lora_up": (outputs, 3, 1, 1), "lora_mid": (3, 2, 3, 3), "lora_down": (2, inputs, 1, 1)}
    generator = torch.Generator().manual_seed(0)
    state = {f"{stem}.{p}.weight": 0.3 * torch.randn(s, generator=generator) for p, s in shapes.items()}
    state[f"{stem}.alpha"] = torch.tensor(1.5)
    source = adapters.write(tmp_path / "tucker.safetensors", state)
    assert convert(tmp_path, source, tmp_path / "webui.safetensors") == 0
    raw = load_file(tmp_path / "webui.safetensors")
    assert len(raw) == 3
    add(backbone.unet.get_submodule(name), raw, table(backbone, family)["unet"][name])
    assert_equal(ours(backbone, 3.0), ours(load_adapted(settings, source, "cpu"), 3.0))


def test_the_header_says_what_it_is_and_no_path(load, family, checkpoints, tmp_path) -> None:
    params(tmp_path, family, checkpoints[family])
    source, _ = made(load(family), family, tmp_path)
    same, _ = made(load(family), family, tmp_path / "same", uniform=True)
    said = {}
    for name, adapter in (("varied", source), ("same", same)):
        assert convert(tmp_path, adapter, tmp_path / f"{name}_webui.safetensors") == 0
        with safe_open(tmp_path / f"{name}_webui.safetensors", "pt") as opened:
            said[name] = opened.metadata()
    architecture = {"sd": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}[family]
    for name, (rank, alpha) in {"varied": ("Dynamic", "Dynamic"), "same": ("1", "3")}.items():
        assert said[name]["modelspec.architecture"] == architecture
        assert said[name]["modelspec.title"] == f"{name}_webui" and said[name]["ss_v2"] == "False"
        assert said[name]["ss_base_model_version"] == {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]
        assert (said[name]["ss_network_dim"], said[name]["ss_network_alpha"]) == (rank, alpha)
        assert "/tmp" not in str(said[name]) and str(tmp_path) not in str(said[name])
