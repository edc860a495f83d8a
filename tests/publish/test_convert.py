"""What `spo convert` writes: kohya's keys computed by hand, and images of diffusers from every file."""

from __future__ import annotations

import re
from pathlib import Path

import adapters
import pytest
import single_file
import torch
import yaml
from checkpoints import PROMPTS, assert_equal, ours
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from spo import cli, config
from spo.adapters import load as load_adapted
from spo.diffusion.noise import SampleNoise
from spo.publish import original

DOWN = "down_blocks.1.attentions.0"
BLOCK = f"{DOWN}.transformer_blocks.0"
# a layer of each kind: its key in kohya's files of SD 1.5, and in those of SDXL, whose UNet has the original
# names (of the tests' UNet with one layer a block)
UNET = {
    f"{BLOCK}.attn1.to_q": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    ),
    f"{BLOCK}.attn2.to_out.0": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    ),
    f"{BLOCK}.ff.net.0.proj": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
    ),
    f"{BLOCK}.ff.net.2": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_ff_net_2",
    ),
    f"{DOWN}.proj_in": ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_3_1_proj_in"),
    "mid_block.attentions.0.proj_out": (
        "lora_unet_mid_block_attentions_0_proj_out",
        "lora_unet_middle_block_1_proj_out",
    ),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k",
    ),
    "down_blocks.0.resnets.0.conv1": (
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_input_blocks_1_0_in_layers_2",
    ),
    "mid_block.resnets.1.conv2": (
        "lora_unet_mid_block_resnets_1_conv2",
        "lora_unet_middle_block_2_out_layers_3",
    ),
    "up_blocks.1.resnets.0.time_emb_proj": (
        "lora_unet_up_blocks_1_resnets_0_time_emb_proj",
        "lora_unet_output_blocks_2_0_emb_layers_1",
    ),
    "up_blocks.1.resnets.1.conv_shortcut": (
        "lora_unet_up_blocks_1_resnets_1_conv_shortcut",
        "lora_unet_output_blocks_3_0_skip_connection",
    ),
    "down_blocks.0.downsamplers.0.conv": (
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_input_blocks_2_0_op",
    ),
    "up_blocks.0.upsamplers.0.conv": (
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_unet_output_blocks_1_2_conv",
    ),
    "conv_in": ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
    "conv_out": ("lora_unet_conv_out", "lora_unet_out_2"),
    "time_embedding.linear_1": ("lora_unet_time_embedding_linear_1", "lora_unet_time_embed_0"),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": "text_model_encoder_layers_0_self_attn_q_proj",
    "encoder.layers.1.self_attn.out_proj": "text_model_encoder_layers_1_self_attn_out_proj",
    "encoder.layers.0.mlp.fc1": "text_model_encoder_layers_0_mlp_fc1",
}
PREFIXES = {
    "sd": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}

pytestmark = pytest.mark.parametrize("family", ["sd", "sdxl"])


def table(backbone, family: str) -> dict[str, dict[str, str]]:
    """component: module: its key in kohya's file."""
    found = {"unet": {name: keys[family == "sdxl"] for name, keys in UNET.items()}}
    if family == "sdxl":
        found["unet"]["add_embedding.linear_2"] = "lora_unet_label_emb_0_2"
    for component, prefix in PREFIXES[family].items():
        modules = dict(getattr(backbone.pipeline, component).named_modules())
        start = "text_model." if "text_model.encoder" in modules else ""
        found[component] = {f"{start}{name}": prefix + key for name, key in TEXT.items()}
    return found


def made(backbone, family: str, folder: Path, uniform: bool = False) -> tuple[Path, dict]:
    """An adapter of diffusers' format with alphas, and its changes by component."""
    state, parts = {}, {}
    for component, names in table(backbone, family).items():
        parts[component] = adapters.changes(backbone.pipeline.components[component], list(names))
        for name, change in parts[component].items():
            if uniform:
                change.down, change.up, change.alpha = change.down[:1], change.up[:, :1], 3.0
            key = f"{component}.{name if component == 'unet' else original.text_name(name)}"
            state |= {f"{key}.lora.down.weight": change.down, f"{key}.lora.up.weight": change.up}
            state[f"{key}.alpha"] = torch.tensor(change.alpha)
    return adapters.write(folder / "made.safetensors", state), parts


def params(folder: Path, family: str, checkpoint: Path, **more: object) -> config.Backbone:
    """Write params.yaml; its backbone."""
    raw = yaml.safe_load(config.preset("smoke"))
    raw["backbone"] = {"family": family, "checkpoint": str(checkpoint), **more}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return config.load(folder / "params.yaml").backbone


def convert(folder: Path, source: Path, target: Path, *arguments: str) -> int:
    words = ["convert", str(source), "--to", str(target), "--params", str(folder / "params.yaml")]
    return cli.main([*words, *arguments])


def drawn(pipe) -> torch.Tensor:
    """Images by diffusers' pipeline, as `ours` draws them."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    latents = SampleNoise(0, [1, 2], (4, side, side)).draw()
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 0.0, "output_type": "pt"}
    return pipe(PROMPTS, latents=latents, **options).images


def add(layer: torch.nn.Module, raw: dict[str, torch.Tensor], key: str) -> float:
    """Add alpha / rank * up @ down of a raw file to a layer's weight; returns alpha / rank."""
    down, up = raw[f"{key}.lora_down.weight"], raw[f"{key}.lora_up.weight"]
    strength = float(raw[f"{key}.alpha"]) / down.shape[0]
    assert down.ndim == up.ndim == layer.weight.ndim
    with torch.no_grad():
        layer.weight += strength * torch.einsum("or...,ri...->oi...", up, down)
    return strength


def norms(weight: torch.Tensor) -> torch.Tensor:
    """The norm of each output, [out,1] or [out,1,1,1]."""
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


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
    names = original_names(pipeline.unet)
    assert all(names[new] == old for old, new in original.unet_names(pipeline.unet).items())
    known = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
    vae = original._vae(pipeline.vae)
    assert all(known.match(name) and "blocks" not in name for name in vae)
    assert {"decoder.up.3.block.0.conv1.weight", "decoder.up.3.upsample.conv.weight"} <= set(vae)
    assert {"decoder.up.1.block.0.nin_shortcut.weight", "encoder.mid.attn_1.proj_out.bias"} <= set(vae)
